"""What travels whole from the public functions to the kernels: one value for what belongs together.

The compiled modules have a struct of the same name for each (csrc/common/arguments.h). A new option
is a field here and there.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from opd_kernels.divergences import Divergence, reverse_kl


class Allowed(NamedTuple):
    """What may enter a support.

    Ids in [0, ``limit``) that the bitmap ``banned`` does not name: uint8, bit b of byte i standing
    for id 8 i + b, in whole 64-bit words. Rows (...) whose ``mask``, bool, is True.
    """

    limit: int
    banned: Tensor | None = None
    mask: Tensor | None = None


class Temperature(NamedTuple):
    """What divides one side's logits: ``rows`` (...) if there are any, else ``value``."""

    value: float = 1.0
    rows: Tensor | None = None


class Objective(NamedTuple):
    """What is computed on the entries of a support."""

    temperature: Temperature = Temperature()
    teacher_temperature: Temperature = Temperature()
    divergence: Divergence = reverse_kl()
