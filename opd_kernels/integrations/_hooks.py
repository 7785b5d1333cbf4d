"""What adapters to trainers share: one log line, checks of what they replace, losses, shards."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from opd_kernels.distributed import VocabShard
from opd_kernels.divergences import Divergence, forward_kl, jsd, reverse_kl

LOG = logging.getLogger("opd_kernels")


@cache
def announce(trainer: str, loss: str) -> None:
    """Logs once in a process which loss runs in place of the trainer's.

    A warning, because trainers hide what is below it.
    """
    LOG.warning("%s: the loss is opd_kernels' %s", trainer, loss)


def check_parameters(function: Callable[..., Any], expected: Sequence[str], known: str) -> None:
    """Raises ``ImportError`` where a function of a trainer takes other parameters than expected.

    ``known`` is the trainer with the version that the adapter was tested with.
    """
    found = list(inspect.signature(function).parameters)
    if found != list(expected):
        raise ImportError(
            f"{function.__module__}.{function.__qualname__} takes {found}, expected "
            f"{list(expected)}: this adapter was tested with {known}; install that version"
        )


def generalized_jsd(beta: float) -> Divergence:
    """The divergence that TRL, ms-swift and Axolotl call beta.

    0 is the forward KL, 1 the reverse KL, all between is the JSD whose mixture has beta of the
    teacher.
    """
    return {0.0: forward_kl(), 1.0: reverse_kl()}.get(float(beta)) or jsd(beta)


def megatron_shard(width: int, vocab_size: int | None = None) -> VocabShard | None:
    """The columns of this rank of Megatron's tensor-parallel group; None where it holds all.

    ``width`` is how many it holds; ``vocab_size`` the number of real ids, None: all columns.
    """
    state: Any = import_module("megatron.core.parallel_state")
    ranks = state.get_tensor_model_parallel_world_size()
    if ranks == 1:
        return None
    start = state.get_tensor_model_parallel_rank() * width
    group = state.get_tensor_model_parallel_group()
    return VocabShard(start, vocab_size or ranks * width, group)
