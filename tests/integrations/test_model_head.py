"""``head_of``: logits are the model's own; a head that is not one whole weight is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations

pytest.importorskip("transformers", reason="it reads models of transformers")

import transformers

from opd_kernels import LinearLogits, head_of, linear_topk_rkl, select_topk, topk_rkl

pytestmark = pytest.mark.usefixtures("one_thread")

V, H = 64, 32
SMALL = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
# name: what its logits depend on besides the weight
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "Granite": {"logits_scaling": 0.25},
    "HyperCLOVAX": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 4.0},
    "Mpt": {"logit_scale": 4.0, "d_model": H, "n_heads": 4, "n_layers": 1, "max_seq_len": 32},
    "MiniCPM3": {
        "dim_model_base": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    },
    "Phi": {},
}  # fmt: skip


def model_of(family: str = "Llama", **options: Any) -> Any:
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**SMALL | FAMILIES[family] | options)
    model = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    for parameter in model.parameters():  # of one scale, whatever a family starts from
        nn.init.normal_(parameter, std=0.3)
    return model


def outputs(model: Any) -> tuple[Tensor, Tensor]:
    """(hidden states, logits)."""
    tokens = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))
    found = model(tokens, output_hidden_states=True, use_cache=False)
    return found.hidden_states[-1], found.logits


def all_logits(head: LinearLogits) -> Tensor:
    support = select_topk(head, head.vocab)
    return torch.empty_like(support.logits).scatter(-1, support.ids.long(), support.logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_the_models_own(family: str) -> None:
    model = model_of(family)
    hidden, own = outputs(model)
    head = head_of(model)
    ours = all_logits(head(hidden))
    # Two orders of a sum of H products, each off by at most H roundings of the terms' magnitudes;
    # scale, division and tanh round a few times more. A cap never makes a difference larger.
    unit = torch.finfo(torch.float32).eps / 2
    terms = hidden.abs() @ head.weight.abs().T + (0 if head.bias is None else head.bias.abs())
    bound = unit * (2 * (H + 1) * head.scale * terms + 8 * own.abs() + 8 * (head.softcap or 0))
    assert ((ours - own).abs() <= bound).all()
    head.check(hidden, own)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_students_loss_and_gradient_are_those_of_its_logits(family: str) -> None:
    model = model_of(family).double()
    teacher = torch.randn(2, 7, V, dtype=torch.float64)
    hidden, logits = outputs(model)
    head = head_of(model)
    losses = (
        topk_rkl(logits, teacher, 8),
        linear_topk_rkl(hidden, teacher=teacher, k=8, **head.as_student),
    )
    wanted = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    expected, found = (torch.autograd.grad(loss, wanted, retain_graph=True) for loss in losses)
    # float64 against float64: some 1e2 roundings of 1e-16, of numbers up to 1e3.
    for ours, theirs in zip((losses[1], *found), (losses[0], *expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_tied_weights_are_the_models_parameter() -> None:
    model = model_of(tie_word_embeddings=True)
    assert head_of(model).weight is model.model.embed_tokens.weight


def test_what_a_padded_head_has_beyond_the_vocabulary_is_left_out() -> None:
    model = model_of()
    model.config.unpadded_vocab_size = 50
    assert torch.equal(head_of(model).weight, model.lm_head.weight[:50])


def test_a_softcap_of_a_model_that_does_not_apply_it_is_left_out() -> None:
    model = model_of(final_logit_softcapping=2.0)
    assert head_of(model).softcap == 2.0
    model.config.model_type = "gemma3"  # with images; its language model alone applies it
    assert head_of(model).softcap is None


# Adapters


def adapted(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | options)
    settings.init_lora_weights = False  # B is not 0, so that an adapter counts
    return peft.get_peft_model(model_of(), settings).eval()


@torch.no_grad()
def test_adapters_elsewhere_are_in_the_hidden_states() -> None:
    model = adapted()
    hidden, own = outputs(model)
    head_of(model).check(hidden, own)
    with model.disable_adapter():
        assert (outputs(model)[1] - own).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@torch.no_grad()
def test_virtual_tokens_are_in_the_hidden_states_of_the_whole_model_alone(kind: str) -> None:
    peft = pytest.importorskip("peft")
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(model_of(), settings).eval()
    for parameter in model.prompt_encoder.parameters():
        nn.init.normal_(parameter)
    hidden, own = outputs(model)
    head_of(model).check(hidden, own)
    base, _ = outputs(model.get_base_model())
    with pytest.raises(ValueError, match="are not those of its last hidden state"):
        head_of(model).check(base, own[:, -base.shape[1] :])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"trainable_token_indices": {"lm_head": [1, 2]}},
    ],
    ids=["lora", "dora", "tokens"],
)
def test_an_adapter_on_the_head_is_refused_until_it_is_merged(options: dict) -> None:
    model = adapted(**options)
    with pytest.raises(ValueError, match=r"has an adapter.*merge_and_unload.*target_modules"):
        head_of(model)
    merged = model.merge_and_unload()
    with torch.no_grad():
        head_of(merged).check(*outputs(merged))


def test_of_a_head_that_is_trained_whole_the_copy_in_use_is_served() -> None:
    model = adapted(modules_to_save=["lm_head"])
    wrapper = model.base_model.model.lm_head
    nn.init.normal_(wrapper.modules_to_save["default"].weight)
    hidden, own = outputs(model)
    head = head_of(model)
    head.check(hidden, own)
    loss = linear_topk_rkl(hidden.detach(), teacher=torch.randn(2, 7, V), **head.as_student)
    loss.backward()
    assert wrapper.modules_to_save["default"].weight.grad.abs().sum() > 0
    with model.disable_adapter():
        head_of(model).check(*outputs(model))
        assert head_of(model).weight is wrapper.original_module.weight


# Heads that are not one whole weight


class Scaled(torch.Tensor):
    """A quantised tensor as torchao and quanto make them: floating to who asks for its dtype."""

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype)

    def __init__(self, packed: Tensor, scale: Tensor) -> None:
        self.packed, self.scale = packed, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        return args[0] if function is torch.ops.aten.detach.default else NotImplemented


class Packed(nn.Linear):
    """bitsandbytes' Linear4bit: a flat weight of bytes."""

    def __init__(self) -> None:
        super().__init__(H, V, bias=False)
        self.weight = nn.Parameter(torch.zeros(V * H // 2, 1, dtype=torch.uint8), False)

    def forward(self, x: Tensor) -> Tensor:
        return x


class NoWeight(nn.Module):
    """GPTQ, HQQ, compressed-tensors: tensors under other names."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        if name is not None:
            self.register_buffer(name, torch.zeros(V, H // 4, dtype=torch.int32))


def with_weight(weight: Tensor, **beside: Tensor) -> Callable[[nn.Linear], None]:
    def change(head: nn.Linear) -> None:
        head.weight = nn.Parameter(weight, requires_grad=False)
        for name, tensor in beside.items():
            head.register_buffer(name, tensor)

    return change


def replaced(module: nn.Module) -> Callable[[nn.Linear], nn.Module]:
    return lambda head: module


def own_forward(head: nn.Linear) -> None:
    head.forward = lambda x: 2 * nn.Linear.forward(head, x)


def offloaded(head: nn.Linear) -> None:
    hooks = pytest.importorskip("accelerate").hooks
    hooks.add_hook_to_module(head, hooks.AlignDevicesHook("cpu", offload=True, weights_map={}))


class Doubles(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


FP8, INT8 = torch.zeros(V, H).to(torch.float8_e4m3fn), torch.zeros(V, H, dtype=torch.int8)
REFUSED: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "int8": (with_weight(INT8), r"torch\.int8.*dequantise it with its scales"),
    "int8 and scales": (with_weight(INT8, weight_scale=torch.ones(V, 1)), r"\(weight_scale\); deq"),
    "fp8": (with_weight(FP8), r"float8_e4m3fn.*dequantise it with its scales"),
    "fp8 and scales": (with_weight(FP8, weight_scale_inv=torch.ones(1)), "weight_scale_inv"),
    "4 bits": (replaced(Packed()), r"Packed\.weight\) is a Parameter of torch\.uint8.*dequantise"),
    "subclass": (with_weight(Scaled(INT8, torch.ones(V, 1))), "is a Scaled of torch.float32.*deq"),
    "GPTQ": (replaced(NoWeight("qweight")), r"is quantised \(qweight\); dequantise"),
    "HQQ": (replaced(NoWeight("W_q")), r"is quantised \(W_q\); dequantise"),
    "no weight": (replaced(NoWeight()), "has no weight; make LinearLogits"),
    "ZeRO-3": (with_weight(torch.empty(0)), "is empty.*GatheredParameters"),
    "flat": (with_weight(torch.zeros(V * H)), r"has shape \(2048,\), expected \(V, H\)"),
    "part": (with_weight(torch.zeros(V // 2, H)), r"32 rows, but the config says 64 ids.*gather"),
    "parametrised": (parametrizations.weight_norm, "is parametrised.*remove_parametrizations"),
    "hook": (
        lambda head: head.register_forward_hook(lambda _, args, out: 2 * out) and None,
        r"has hooks \(_forward_hooks\)",
    ),
    "pre-hook": (
        lambda head: head.register_forward_pre_hook(lambda *_: None) and None,
        r"has hooks \(_forward_pre_hooks\)",
    ),
    "backward hook": (
        lambda head: head.register_full_backward_hook(lambda *_: None) and None,
        r"has hooks \(_backward_hooks\)",
    ),
    "forward": (own_forward, "has a forward of its own"),
    "class": (replaced(Doubles(H, V)), r"\(Doubles\) has a forward of its own"),
    "layers": (replaced(nn.Sequential(nn.Linear(H, H), nn.Linear(H, V))), "has no weight"),
    "offloaded": (offloaded, "is offloaded.*device_map"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_head_that_is_not_one_whole_weight_is_refused(kind: str) -> None:
    change, message = REFUSED[kind]
    model = model_of()
    new = change(model.lm_head)
    model.lm_head = model.lm_head if new is None else new
    with pytest.raises(ValueError, match=message):
        head_of(model)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_sharded_head_is_refused(one_process: None, part: str) -> None:
    model = model_of("Phi")
    mesh = init_device_mesh("cpu", (1,))
    whole = getattr(model.lm_head, part)
    sharded = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    setattr(model.lm_head, part, sharded)
    with pytest.raises(ValueError, match=rf"\(Linear\.{part}\) is a DTensor.*fully_shard"):
        head_of(model)


def test_a_head_that_is_sharded_by_itself_is_served_while_its_weight_is_whole(
    one_process: None,
) -> None:
    model = model_of()
    whole = model.lm_head.weight.detach().clone()
    fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"\(FSDPLinear\.weight\) is a DTensor"):
        head_of(model)
    model.lm_head.unshard()
    assert torch.equal(head_of(model).weight, whole)


def test_hooks_that_gather_a_weight_are_no_obstacle() -> None:
    def fetch(*_: Any) -> None:
        pass

    fetch.__module__ = "deepspeed.runtime.zero.parameter_offload"
    model = model_of()
    model.lm_head.register_forward_pre_hook(fetch)
    assert head_of(model).weight is model.lm_head.weight


def test_heads_that_only_run_elsewhere_or_compiled_are_served() -> None:
    hooks = pytest.importorskip("accelerate").hooks
    model = model_of()
    weight = model.lm_head.weight
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook("cpu"))
    assert head_of(model).weight is weight
    model = model_of()
    weight, model.lm_head = model.lm_head.weight, torch.compile(model.lm_head)
    assert head_of(torch.compile(model)).weight is weight


# Models


def test_what_has_no_head_that_hidden_states_go_straight_into_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaModel has no output head.*AutoModelForCausalLM"):
        head_of(model_of().model)
    seq2seq = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=V, d_model=H, d_kv=8, d_ff=H, num_layers=1, num_heads=4)
    )
    with pytest.raises(ValueError, match="is an encoder-decoder model"):
        head_of(seq2seq)
    settings = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    bert = transformers.BertLMHeadModel(transformers.BertConfig(is_decoder=True, **settings))
    with pytest.raises(ValueError, match="lies in a BertLMPredictionHead, whose other layers"):
        head_of(bert)
    electra = transformers.ElectraForCausalLM(
        transformers.ElectraConfig(is_decoder=True, embedding_size=H, **settings)
    )
    with pytest.raises(ValueError, match="whose other layers change the hidden states"):
        head_of(electra)


@pytest.mark.parametrize("thing", [None, "Qwen/Qwen3-8B", nn.Linear(H, V), torch.ones(V, H)])
def test_what_is_no_model_is_refused(thing: object) -> None:
    with pytest.raises(TypeError, match=r"has no get_output_embeddings\(\).*make LinearLogits"):
        head_of(thing)


def test_a_wrapped_model_is_refused_with_what_to_pass() -> None:
    with pytest.raises(TypeError, match=r"DataParallel has no .*\(\.module\)"):
        head_of(nn.DataParallel(model_of()))


@torch.no_grad()
def test_check_finds_what_the_configuration_does_not_say() -> None:
    model = model_of("Gemma2")
    hidden, own = outputs(model)
    model.config.final_logit_softcapping = None
    with pytest.raises(ValueError, match=r"are not those of .* scale 1\.0 and softcap None"):
        head_of(model).check(hidden, own)
    for logits in (own[..., :-1], torch.full_like(own, math.nan)):
        with pytest.raises(ValueError, match="are not those of"):
            head_of(model_of("Gemma2")).check(hidden, logits)


def test_a_factor_that_is_none_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"config\.logit_scale is 0\.0, allowed"):
        head_of(model_of("Cohere", logit_scale=0.0))
