"""A batch as verl's trainer sends it, through verl's own engines and loss, on the CPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

# The test registers by itself; whether this package's entry point is installed does not matter.
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation import distillation_ppo_loss
from verl.utils.metric.utils import Metric
from verl.utils.tensordict_utils import get_tensordict
from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of engines that are not installed
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

K = 8
LENGTHS, RESPONSES = (11, 8, 5), (7, 4, 3)
DP_SIZE, TOKENS = 2, 19  # data-parallel ranks, and tokens of the whole batch on all of them
TEMPERATURES = (0.7, 1.0, 1.3)


class Inputs(NamedTuple):
    """Logits (1, n, V) as a model gives them; the teacher's K best (n, K), ids int32."""

    student: Tensor
    logprobs: Tensor
    ids: Tensor


def inputs(vocab: int = 128, seed: int = 0, sharp: bool = False) -> Inputs:
    """The student is broader than the teacher, so its losses are positive.

    Every other row is as ``sharp`` in the other direction, if asked: it has negative losses.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = sum(LENGTHS)
    teacher = 2 * torch.randn(rows, vocab, generator=generator)
    student = teacher / 4 + torch.randn(rows, vocab, generator=generator)
    if sharp:
        student[::2] = 2 * teacher[::2]
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    logprobs[ends], ids[ends] = 0.0, 0  # verl's filler at each last token
    return Inputs(student[None], logprobs, ids.int())


def nested(values: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.nested.as_nested_tensor(list(values.split(list(lengths))), layout=torch.jagged)


def micro_batch(given: Inputs, distillation_only: bool = True) -> TensorDict:
    tokens = torch.arange(sum(LENGTHS))
    prompts = tuple(n - r for n, r in zip(LENGTHS, RESPONSES, strict=True))
    mask = torch.ones(sum(RESPONSES), dtype=torch.int64)
    mask[2::5] = 0  # a tool's tokens, say
    return get_tensordict(
        {
            "input_ids": nested(tokens),
            "prompts": nested(tokens[: sum(prompts)], prompts),
            "responses": nested(tokens[: sum(RESPONSES)], RESPONSES),
            "response_mask": nested(mask, RESPONSES),
            "old_log_probs": nested(torch.full((sum(RESPONSES),), -5.0), RESPONSES),
            "advantages": nested(torch.ones(sum(RESPONSES)), RESPONSES).to_padded_tensor(0.0),
            "teacher_logprobs": nested(given.logprobs),
            "teacher_ids": nested(given.ids),
        },
        {
            "temperature": 1.0,
            "distillation_use_topk": True,
            "distillation_only": distillation_only,
            "dp_size": DP_SIZE,
            "batch_num_tokens": TOKENS,
            "global_batch_size": 2 * len(LENGTHS),
        },
    )


def configured(mode: str, strategy: str = "fsdp2", **options: Any) -> dict[str, Any]:
    """The arguments that verl's worker binds to its loss."""
    plain = dict.fromkeys(("log_prob_min_clamp", "loss_max_clamp"))
    defaults = {"use_policy_gradient": False, "use_task_rewards": False, **plain}
    aggregation = options.pop("loss_agg_mode", "token-mean")
    actor: Any = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        loss_agg_mode=aggregation,
    )
    if strategy == "megatron":
        actor = SimpleNamespace(strategy=strategy)
    loss = DistillationLossConfig(loss_mode=mode, topk=K, **{**defaults, **options})
    return {"config": actor, "distillation_config": DistillationConfig(distillation_loss=loss)}


def row_temperatures() -> Tensor:
    return torch.tensor(TEMPERATURES).repeat_interleave(torch.tensor(LENGTHS))


def predicting() -> Tensor:
    """The rows whose next token is of a response."""
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    parts = [torch.arange(end - r - 1, end - 1) for end, r in zip(ends, RESPONSES, strict=True)]
    return torch.cat(parts)


def restated_rows(given: Inputs, logits: Tensor, floor: float | None) -> dict[str, Tensor]:
    """verl's outputs (n,) in float64, of logits (1, n, V); without its clamp at 0."""
    logp = (logits[0] / row_temperatures().to(logits)[:, None]).log_softmax(-1)
    ids, a, b = given.ids.long(), logp.gather(-1, given.ids.long()), given.logprobs.to(logits)
    masses = {"student_mass": a.exp().sum(-1), "teacher_mass": b.exp().sum(-1)}
    if floor is not None:
        a, b = a.clamp(min=floor), b.clamp(min=floor)
    best = logp.topk(K).indices
    shared = (ids[..., None] == best[..., None, :]).any(-1)
    count = shared.sum(-1)
    gain = (b.exp() * (a - b) * shared).sum(-1) / count.clamp(min=1)
    return {
        **masses,
        "distillation_losses": (b.exp() * (b - a)).sum(-1),
        "overlap_count": count,
        "overlap_token_advantage": gain,
    }


def under_fsdp(
    given: Inputs, mode: str, *, logits: Tensor | None = None, **options: Any
) -> tuple[Tensor, dict[str, Any]]:
    """(loss, metrics) of a micro-batch: the engine's outputs, then the final loss."""
    bound = partial(distillation_ppo_loss, **configured(mode, **options))
    batch = micro_batch(given, not options.get("use_task_rewards", False))
    output_args = {
        "temperature_is_one": False,
        "temperature_rmpad": row_temperatures(),
        "input_ids_rmpad_rolled": batch["input_ids"].values().roll(-1),
        "pad_size": 0,
    }
    engine = SimpleNamespace(
        use_ulysses_sp=False,
        engine_config=SimpleNamespace(),
        _gather_and_unpad_packed=lambda values, pad_size: values,
    )
    model_output = FSDPEngineWithLMHead.prepare_model_outputs(
        engine,
        output=SimpleNamespace(logits=given.student if logits is None else logits),
        output_args=output_args,
        micro_batch=batch,
        logits_processor_func=bound,
    )
    loss, metrics = bound(model_output=model_output, data=batch, dp_group=None)
    return loss, {
        name: value.aggregate() if isinstance(value, Metric) else value
        for name, value in metrics.items()
    }


def under_megatron(
    given: Inputs,
    mode: str,
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor,
    *,
    distillation_only: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """What the engine's logits processor gives for this rank's columns (1, rows, V/tp)."""
    bound: Callable[..., Any] = partial(
        distillation_ppo_loss, **configured(mode, "megatron", **options)
    )
    batch = micro_batch(given, distillation_only)
    found: dict[str, Tensor] = MegatronEngineWithLMHead._lm_head_logits_processor(
        SimpleNamespace(engine_config=SimpleNamespace()),
        logits,
        labels,
        temperatures,
        calculate_sum_pi_squared=False,
        calculate_entropy=False,
        distillation_use_topk=True,
        distillation_only=distillation_only,
        logits_processor_func=bound,
        batch=batch,
        data_format="thd",
    )
    return found
