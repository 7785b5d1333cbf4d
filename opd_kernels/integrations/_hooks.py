"""What adapters to trainers share: one log line, checks of what they replace, names of losses."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

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
