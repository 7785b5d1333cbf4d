"""``distill_loss``: the loss and the gradients of the models' own logits, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from teacher_http import model_logprobs, serving
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", reason="it runs models of transformers")

from causal_models import (
    ATTENTION,
    DOUBLE,
    FAMILIES,
    IMAGE,
    LARGEST_LOGIT,
    MASK,
    SINGLE,
    TOKENS,
    B,
    K,
    T,
    V,
    assert_same,
    gradients,
    model_of,
    sees_images,
    with_images,
)

from opd_kernels import distill, distill_loss, predicting, select_topk, topk_divergence, topk_rkl

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(
    student: Any, teacher: Any, mask: Tensor, attention: Tensor = ATTENTION, **options: Any
) -> Tensor:
    """From whole logits, one sequence at a time and without its padding."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(B):
        real = attention[row].bool()
        tokens, counted = TOKENS[row : row + 1, real], mask[row : row + 1, real]
        with torch.no_grad():
            given = teacher(tokens).logits
        counted, logits = predicting(counted), student(tokens).logits
        assert max(logits.abs().max(), given.abs().max()) < LARGEST_LOGIT
        chosen = {"outside": "bucket", "reduction": "sum", **options}
        total = total + topk_divergence(logits, given, K, mask=counted, **chosen)
        count += int(counted.sum())
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family: str) -> None:
    student, teacher = model_of(family), model_of(family, seed=5, vocab_size=V + 8)
    # Gemma 2's own logits are NaN at padding on the left, and so are gradients through them.
    attention = torch.ones_like(ATTENTION) if family == "Gemma2" else ATTENTION
    expected = by_hand(student.eval(), teacher, MASK, attention)
    student.train()
    for part in student.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    loss = distill_loss(student, TOKENS, teacher, mask=MASK, attention_mask=attention, k=K)
    assert student.training
    assert not teacher.training
    assert_same(loss, expected)
    # These models round gradients to float32 on their way.
    unit = SINGLE if family in ("Gemma2", "Cohere") else DOUBLE
    assert_same(gradients(loss, student), gradients(expected, student), unit)


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "forward_kl", "temperature": 1.5},
        {"weight": torch.rand(B, T, dtype=torch.float64), "divergence": "jsd"},
        {"reduction": "none", "banned_ids": [3, 7], "vocab_size": V - 4},
        {"include_token": True},
        {"outside": "renormalize"},
        {"outside": "sample", "temperature": 0.7},
        {"outside": "generalize", "support": "student"},
    ],
)
def test_what_has_an_element_a_token_is_aligned_with_the_tokens(options: dict) -> None:
    student, teacher = model_of(), model_of(seed=5)
    loss = distill_loss(student, TOKENS, teacher, mask=MASK, k=K, **options)
    rows = {"outside": "bucket", **options}
    if "weight" in rows:
        rows["weight"] = rows["weight"][:, 1:]
    with torch.no_grad():
        given = teacher(TOKENS).logits[:, :-1]
    expected = topk_divergence(
        student(TOKENS).logits[:, :-1], given, K, mask=MASK[:, 1:], token_ids=TOKENS[:, 1:], **rows
    )
    assert_same(loss[:, 1:] if loss.ndim else loss, expected)
    if loss.ndim:
        assert torch.equal(loss[:, 0], torch.zeros(B))


def test_log_probs_of_the_tokens_come_with_the_loss_and_share_its_backward() -> None:
    student, teacher = model_of(), model_of(seed=5)
    options: dict[str, Any] = {"outside": "bucket", "temperature": 0.7}
    upstream = torch.rand(B, T, dtype=torch.float64)
    loss, logprobs, stats = distill_loss(
        student, TOKENS, teacher, mask=MASK, k=K, return_token_logprobs=True,
        return_stats=["student_mass"], **options,
    )  # fmt: skip
    assert stats.student_mass.shape == logprobs.shape
    kept = MASK[:, 1:] != 0
    logits = student(TOKENS).logits[:, :-1]
    own = (logits / 0.7).log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
    own = torch.where(kept, own, 0.0)
    with torch.no_grad():
        given = teacher(TOKENS).logits[:, :-1]
    expected = topk_divergence(logits, given, K, mask=kept, **options)
    assert_same(loss, expected)
    assert_same(logprobs[:, 1:], own)
    assert torch.equal(logprobs[:, 0], torch.zeros(B))
    both = (expected + (upstream[:, 1:] * own).sum(), loss + (upstream * logprobs).sum())
    assert_same(gradients(both[1], student), gradients(both[0], student))


def test_the_mean_of_sampled_backgrounds_is_the_gradient_of_whole_logits() -> None:
    student, teacher = model_of(), model_of(seed=5)
    options: dict[str, Any] = {"outside": "bucket", "temperature": 0.7}
    logits = student(TOKENS).logits
    with torch.no_grad():
        given = teacher(TOKENS).logits
        probabilities = (logits / 0.7).softmax(-1)
        at_tokens = torch.cat([torch.zeros(B, 1, V), probabilities[:, :-1]], 1)
    expected = topk_divergence(logits[:, :-1], given[:, :-1], K, mask=MASK[:, 1:], **options)
    # Every token in turn, weighted by the probability that the student would have sampled it.
    losses = [
        distill_loss(
            student, TOKENS, teacher, mask=MASK, k=K, background="sampled",
            token_ids=torch.full_like(TOKENS, token), weight=at_tokens[..., token], **options,
        )
        for token in range(V)
    ]  # fmt: skip
    total = torch.stack(losses).sum()
    assert_same(total, expected)
    # Norms round each pass's gradients to float32.
    assert_same(gradients(total, student), gradients(expected, student), SINGLE)


def test_statistics_are_of_the_tokens_that_count() -> None:
    student, teacher = model_of(), model_of(seed=5)
    names = ("student_mass", "overlap")
    _, stats = distill_loss(student, TOKENS, teacher, mask=MASK, k=K, return_stats=names)
    assert torch.equal(stats.student_mass.isnan(), (MASK == 0) | (torch.arange(T) == 0))


@pytest.mark.parametrize("outside", ["bucket", "renormalize"])
def test_a_support_is_by_position_as_logits_are(outside: str) -> None:
    student, teacher = model_of(), model_of(seed=5)
    full = outside == "bucket"
    with torch.no_grad():
        support = select_topk(teacher(TOKENS).logits, K, with_logsumexp=full)
    ours = distill_loss(student, TOKENS, support, mask=MASK, outside=outside)
    assert_same(ours, distill_loss(student, TOKENS, teacher, mask=MASK, k=K, outside=outside))


def test_the_papers_loss_is_one_word_away() -> None:
    student, teacher = model_of(), model_of(seed=5)
    ours = distill_loss(student, TOKENS, teacher, mask=MASK, k=K, outside="renormalize")
    with torch.no_grad():
        given = teacher(TOKENS).logits
    expected = topk_rkl(student(TOKENS).logits, given, K, mask=predicting(MASK))
    assert_same(ours, expected)
    with pytest.raises(ValueError, match="outside='renormalize' needs none"):
        distill_loss(student, TOKENS, select_topk(given, K), mask=MASK)


# The server's log-probs: logits in float32, less the log of a sum of V exponentials.
SERVED = V + 4


def test_a_server_is_asked_for_the_tokens_that_count() -> None:
    pytest.importorskip("requests")
    from opd_kernels.integrations.server import TeacherServer, TeacherServerError

    student, teacher = model_of(), model_of(seed=5)
    exact: dict[str, Any] = {"mask": MASK, "outside": "renormalize"}
    with serving(model_logprobs(teacher)) as served, TeacherServer(served.url, k=K) as server:
        ours = distill_loss(student, TOKENS, server, attention_mask=ATTENTION, **exact)
        assert len(served.requests) == 2  # nothing of the third sequence counts
        expected = distill_loss(student, TOKENS, teacher, attention_mask=ATTENTION, k=K, **exact)
        assert_same(ours, expected, SINGLE, SERVED)
        ours = distill_loss(student, TOKENS, server, mask=MASK, attention_mask=ATTENTION)
        expected = distill_loss(student, TOKENS, teacher, mask=MASK, attention_mask=ATTENTION, k=K)
        # The tail is 1 - Q, and Q is below a half: its logarithm is off by less than an entry's.
        assert_same(ours, expected, SINGLE, SERVED)
        served.change = lambda answer: blank(answer, 7)
        with pytest.raises(TeacherServerError, match="no 6 entries for 2 of"):
            distill_loss(student, TOKENS, server, mask=MASK, attention_mask=None)
        server.on_failure = "mask"
        ours = distill_loss(student, TOKENS, server, **exact)
        kept = MASK.clone()
        kept[:, 7] = 0
        expected = distill_loss(student, TOKENS, teacher, k=K, **exact | {"mask": kept})
        assert_same(ours, expected, SINGLE, SERVED)
        with pytest.raises(ValueError, match="pixel_values, which a server is not shown"):
            distill_loss(student, TOKENS, server, mask=MASK, model_inputs={"pixel_values": 0})


def blank(answer: dict, position: int) -> dict:
    answer["choices"][0]["prompt_logprobs"][position] = None
    return answer


def test_adapters_take_part_and_a_head_with_one_is_refused() -> None:
    peft = pytest.importorskip("peft")
    teacher = model_of(seed=5)

    def adapted(targets: list[str]) -> Any:
        settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model_of(), settings).eval().double()

    student = adapted(["q_proj"])
    loss = distill_loss(student, TOKENS, teacher, mask=MASK, attention_mask=ATTENTION, k=K)
    expected = by_hand(student, teacher, MASK)
    assert_same(loss, expected)
    assert_same(gradients(loss, student), gradients(expected, student))
    with pytest.raises(ValueError, match=r"model: the output head .* has an adapter"):
        distill_loss(adapted(["lm_head"]), TOKENS, teacher, mask=MASK)
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="prompt and prefix tuning"):
        distill_loss(peft.get_peft_model(model_of(), prompts), TOKENS, teacher, mask=MASK)


def test_what_follows_a_token_that_the_teacher_lacks_does_not_count() -> None:
    student, teacher = model_of(), model_of(seed=5, vocab_size=40)
    tokens = TOKENS.clamp(max=39)
    tokens[0, 4] = 50
    with pytest.warns(UserWarning, match="token 50, and the teacher has 40 ids"):
        loss = distill_loss(student, tokens, teacher, mask=MASK, k=K)
    kept = MASK.clone()
    kept[0, 5:] = 0
    known = tokens.clamp(max=39)
    support = select_topk(teacher(known).logits, K, with_logsumexp=True)
    assert_same(loss, distill_loss(student, tokens, support, mask=kept))


def test_no_padding_predicts_a_token() -> None:
    student, teacher = model_of(), model_of(seed=5)
    rows = distill_loss(
        student, TOKENS, teacher, mask=torch.ones_like(MASK), attention_mask=ATTENTION, k=K,
        reduction="none",
    )  # fmt: skip
    first = ATTENTION.argmax(-1, keepdim=True)  # of each sequence
    assert torch.equal(rows != 0, ATTENTION.bool().scatter(-1, first, False))


def test_padding_that_the_teacher_lacks_is_no_token() -> None:
    student, teacher = model_of(), model_of(seed=5, vocab_size=40)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for padding in (3, 50):
            tokens = TOKENS.clamp(max=39).masked_fill(ATTENTION == 0, padding)
            losses.append(
                distill_loss(student, tokens, teacher, mask=MASK, attention_mask=ATTENTION, k=K)
            )
    assert losses[0] > 0
    assert_same(losses[1], losses[0])


def test_a_model_that_does_more_to_its_logits_is_refused_and_checked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = model_of(), model_of(seed=5)
    whole, calls = type(student).forward, []

    def doubled(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(self)
        output = whole(self, *args, **options)
        output.logits = output.logits * 2
        return output

    distill_loss(teacher, TOKENS, teacher, mask=MASK, k=K)
    monkeypatch.setattr(type(student), "forward", doubled)
    distill_loss(teacher, TOKENS, teacher, mask=MASK, k=K)
    assert not calls
    with pytest.raises(ValueError, match=r"model: .* not those of its last .*take its logits"):
        distill_loss(student, TOKENS, teacher, mask=MASK, k=K)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_sampled_token_that_the_teacher_lacks_adds_nothing(
    monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    student, teacher = model_of(), model_of(seed=5, vocab_size=40)
    tokens = TOKENS.clamp(max=39)
    tokens[0, 4] = 50
    options: dict[str, Any] = {"outside": "sample", "mask": MASK, "k": K}
    with torch.no_grad():
        given = teacher(tokens.clamp(max=39)).logits[:, :-1]
    kept = MASK[:, 1:].clone()
    kept[0, 4:] = 0
    expected = topk_divergence(
        student(tokens).logits[:, :-1], given, token_ids=tokens[:, 1:], **options | {"mask": kept}
    )
    if sharded:
        monkeypatch.setattr(distill, "is_wrapped", lambda model: model is teacher)
    with pytest.warns(UserWarning, match="token 50"):
        loss = distill_loss(student, tokens, teacher, **options)
    assert_same(loss, expected)
    assert_same(gradients(loss, student), gradients(expected, student))


@pytest.mark.parametrize(
    "options",
    [
        {"outside": "renormalize"},
        {"outside": "bucket", "banned_ids": [3, 70]},
        {"outside": "bucket", "vocab_size": V + 4},
        {"outside": "truncate", "vocab_size": V - 4, "banned_ids": torch.tensor([3])},
    ],
)
def test_ids_that_the_student_lacks_take_no_place_in_a_sharded_teachers_support(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    student, teacher = model_of(), model_of(seed=5, vocab_size=2 * V)
    expected = distill_loss(student, TOKENS, teacher, mask=MASK, k=K, **options)
    monkeypatch.setattr(distill, "is_wrapped", lambda model: model is teacher)
    loss, stats = distill_loss(
        student, TOKENS, teacher, mask=MASK, k=K, return_stats=["valid_k"], **options
    )
    assert (stats.valid_k[stats.mask] == K).all()
    assert_same(loss, expected)


def test_a_sharded_teachers_log_sum_exp_is_of_one_temperature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = model_of(), model_of(seed=5)
    options: dict[str, Any] = {
        "mask": MASK,
        "k": K,
        "temperature": torch.full((B, T), 0.7).double(),
    }
    expected = distill_loss(student, TOKENS, teacher, **options, outside="renormalize")
    monkeypatch.setattr(distill, "is_wrapped", lambda model: model is teacher)
    with pytest.raises(ValueError, match=r"is a tensor, and outside='bucket'.*='renormalize'"):
        distill_loss(student, TOKENS, teacher, **options)
    assert_same(distill_loss(student, TOKENS, teacher, **options, outside="renormalize"), expected)


def test_modules_of_bitsandbytes_never_run_in_evaluation_mode() -> None:
    class Packs(torch.nn.Linear):
        """Loses its gradient for good, as Linear4bit does on CPUs."""

        packed = False

        def forward(self, x: Tensor) -> Tensor:
            self.packed |= not self.training
            result = super().forward(x)
            return result.detach() if self.packed else result

    Packs.__module__ = "bitsandbytes.nn.modules"
    student = model_of().train()
    layer = student.model.layers[0].mlp
    packs = Packs(layer.up_proj.in_features, layer.up_proj.out_features, bias=False).double()
    layer.up_proj = packs
    distill_loss(student, TOKENS, model_of(seed=5), mask=MASK, k=K).backward()
    assert not packs.packed
    assert packs.weight.grad.any()


@pytest.mark.parametrize("shown", ["text", "images"])
@pytest.mark.parametrize("family", ["Llava", "Qwen2VL"])
def test_models_that_see_images_have_the_loss_of_their_own_logits(family: str, shown: str) -> None:
    student, teacher = sees_images(family), sees_images(family, seed=5)
    tokens, besides = with_images(family)
    if shown == "text":
        tokens, besides = TOKENS.clamp(max=IMAGE - 1), {}
    attention = ATTENTION.clone()
    attention[1, :] = 1 - (torch.arange(T) < 2).long()
    loss = distill_loss(
        student, tokens, teacher, mask=MASK, attention_mask=attention, k=K, model_inputs=besides
    )
    counted = MASK[:, 1:] * attention[:, 1:] * attention[:, :-1]
    inputs = {"input_ids": tokens, "attention_mask": attention, **besides}
    with torch.no_grad():
        given = teacher(**inputs).logits[:, :-1]
    logits = student(**inputs).logits[:, :-1]
    expected = topk_divergence(logits, given, K, mask=counted, outside="bucket")
    assert_same(loss, expected)
    ours = gradients(loss, student)
    assert_same(ours, gradients(expected, student))
    names = [name for name, _ in student.named_parameters()]
    vision = [g for name, g in zip(names, ours, strict=True) if "vis" in name]
    assert any(g.any() for g in vision) == (shown == "images")


@pytest.mark.parametrize("blind", ["model", "teacher"])
def test_a_model_that_sees_no_images_is_not_given_any(blind: str) -> None:
    models = {"model": sees_images("Llava"), "teacher": sees_images("Llava", seed=5)}
    models[blind] = model_of()
    tokens, besides = with_images("Llava")
    with pytest.raises(ValueError, match=f"{blind}: LlamaForCausalLM takes no pixel_values"):
        distill_loss(
            models["model"], tokens, models["teacher"], mask=MASK, k=K, model_inputs=besides
        )


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("outside", ["renormalize", "bucket"])
def test_under_autocast_it_is_as_exact_as_the_models_own_logits(family: str, outside: str) -> None:
    exact, teacher = model_of(family), model_of(family, seed=5)
    student, single = copy.deepcopy(exact).float(), copy.deepcopy(teacher).float()
    everything, options = torch.ones(B, T, dtype=torch.bool), {"outside": outside}

    def own(student: Any, teacher: Any) -> Tensor:
        with torch.no_grad():
            given = teacher(TOKENS).logits[:, :-1]
        logits = student(TOKENS).logits[:, :-1]
        return topk_divergence(logits, given, K, reduction="none", **options)

    expected = own(exact, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        losses = distill_loss(
            student, TOKENS, single, mask=everything, k=K, reduction="none", **options
        )
        rounded = own(student, single)
    assert losses.dtype == torch.float32
    ours, theirs, right = (
        (each, *gradients(each.sum(), model))
        for each, model in ((losses[:, 1:], student), (rounded, student), (expected, exact))
    )
    for part in (slice(1), slice(1, None)):  # losses, gradients
        error, allowed = (off(each[part], right[part]) for each in (ours, theirs))
        # Both round the same body's numbers; rounding fewer logits may change an error either way.
        assert error < min(1.25 * allowed, 0.05)


def off(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """The norm of all differences, in units of that of all numbers."""
    apart = sum((a - b).detach().double().square().sum() for a, b in zip(ours, theirs, strict=True))
    return float(apart / sum(b.detach().square().sum() for b in theirs)) ** 0.5


# GPT2 has absolute positions, which count from each sequence's first token.
@pytest.mark.parametrize("what", ["body", "body in place", "model", "step"])
def test_a_compiled_model_has_the_loss_of_the_same_model(what: str) -> None:
    torch._dynamo.reset()
    student, teacher = model_of("GPT2"), model_of("GPT2", seed=5)
    options: dict[str, Any] = {"mask": MASK, "attention_mask": ATTENTION, "k": K}
    expected = distill_loss(student, TOKENS, teacher, **options)
    expected_gradients = gradients(expected, student)
    call, backend, model = distill_loss, CompileCounter(), student
    body = student.base_model_prefix
    if what == "body":
        setattr(student, body, torch.compile(student.base_model, backend=backend))
    elif what == "body in place":
        student.base_model.compile(backend=backend)
    elif what == "model":
        model = torch.compile(student, backend=backend)
    else:
        call = torch.compile(distill_loss, backend=backend, fullgraph=True)
    for _ in range(2):
        loss = call(model, TOKENS, teacher, **options)
        assert_same(loss, expected)
        assert_same(gradients(loss, student), expected_gradients)
    # The loss calls the body, so to compile the whole model compiles nothing.
    assert backend.frame_count == (0 if what == "model" else 1)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_loss_runs_inside_of_a_wrappers_forward(kind: str, one_process: Any) -> None:
    student, teacher = model_of(tie_word_embeddings=True), model_of(seed=5)
    expected = distill_loss(student, TOKENS, teacher, mask=MASK, k=K)
    expected_gradients = gradients(expected, student)
    ours = copy.deepcopy(student)
    if kind == "ddp":
        wrapped = DistributedDataParallel(ours)
    else:
        wrapped = ours
        for each in (ours, teacher):
            fully_shard(each.model.layers[0], mesh=one_process)
            fully_shard(each, mesh=one_process)
    for _ in range(2):
        ours.zero_grad()
        loss = distill_loss(wrapped, TOKENS, teacher, mask=MASK, k=K)
        assert_same(loss, expected)
        loss.backward()
        found = [p.grad.full_tensor() if kind == "fsdp2" else p.grad for p in ours.parameters()]
        assert_same(tuple(found), expected_gradients)
    assert "forward" not in vars(ours)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no mask": ({"mask": None}, TypeError, "needs mask, which tokens"),
    "float mask": ({"mask": torch.ones(B, T)}, TypeError, "mask has dtype torch.float32"),
    "shifted mask": ({"mask": MASK[:, 1:]}, ValueError, r"mask has shape \(3, 8\), input_ids"),
    "one sequence": ({"input_ids": TOKENS[0], "mask": MASK[0]}, ValueError, r"add \[None\]"),
    "list": ({"input_ids": TOKENS.tolist()}, TypeError, "input_ids is a list"),
    "name": ({"teacher": "Qwen/Qwen3-8B"}, TypeError, "teacher is a str, expected a model"),
    "logits": ({"teacher": torch.randn(B, T, V)}, TypeError, "make a TopK of logits"),
    "attention": ({"attention_mask": ATTENTION[:, :4]}, ValueError, "attention_mask has shape"),
    "unknown": ({"labels": TOKENS}, TypeError, "unexpected keyword argument 'labels'"),
    "inputs": ({"model_inputs": [1]}, TypeError, "model_inputs is a list"),
    "mask among inputs": (
        {"model_inputs": {"attention_mask": MASK}},
        ValueError,
        "has attention_mask.* pass it as",
    ),
    "ids among inputs": ({"model_inputs": {"input_ids": TOKENS}}, ValueError, "has input_ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_told(name: str) -> None:
    changes, error, message = REFUSED[name]
    student = model_of()
    given = {"input_ids": TOKENS, "teacher": student, "mask": MASK, "k": K} | changes
    with pytest.raises(error, match=message):
        distill_loss(student, **given)


def test_what_is_no_causal_model_is_refused() -> None:
    teacher = model_of()
    with pytest.raises(TypeError, match="model: Linear has no get_output_embeddings"):
        distill_loss(torch.nn.Linear(2, 2), TOKENS, teacher, mask=MASK)
    with pytest.raises(ValueError, match="teacher: LlamaModel has no output head"):
        distill_loss(teacher, TOKENS, teacher.model, mask=MASK)
