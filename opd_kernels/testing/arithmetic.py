"""What the bounds of the oracle are made of."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# The unit roundoff of float64, which is what the oracle computes in.
WIDE_UNIT = float(np.finfo(np.float64).eps) / 2


class Arithmetic(NamedTuple):
    """Unit roundoff, smallest normal and largest number."""

    unit: float
    tiny: float
    largest: float


def sum_depth(terms: int) -> int:
    """By how many roundings of its size a sum of so many terms is off, pairwise or better."""
    return math.ceil(math.log2(max(terms, 2))) + 1
