"""exp and log to the last bits: the hardware's are approximations that differ between vendors.

Both are Cephes' single-precision algorithms (S. Moshier). They need only IEEE additions and
multiplications. A row calls them for K entries, so their cost does not show.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e to the x for x <= 0, within one unit in the last place; 0 for -inf."""
    x = tl.maximum(x, -110.0)  # exp is 0 there already
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    y = 1.9875691500e-4 * r + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = (y * r) * r + r + 1.0
    # 2^n in two factors, each a normal number.
    half = (n * 0.5).to(tl.int32)
    return y * _power_of_2(half) * _power_of_2(n.to(tl.int32) - half)


@triton.jit
def _power_of_2(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def expm1_near_zero(x):
    """e to the x minus 1 for |x| <= 1/2, within 2 units in the last place."""
    y = 1.9991810e-4 * x + 1.39974931e-3
    y = y * x + 8.33307672e-3
    y = y * x + 4.16653156e-2
    y = y * x + 1.66666687e-1
    y = y * x + 5.00000060e-1
    return x + x * x * y


@triton.jit
def log(x):
    """Natural logarithm of a normal x > 0, within one unit in the last place."""
    bits = x.to(tl.int32, bitcast=True)
    # x = m 2^e with m in [sqrt(1/2), sqrt(2)).
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    return _log(m - 1.0, e.to(tl.float32))


@triton.jit
def log1p_near_zero(x):
    """Natural logarithm of 1 + x for |x| <= 1/4, within one unit in the last place."""
    return _log(x, 0.0)


@triton.jit
def _log(m, e):
    """log((1 + m) 2^e) for 1 + m in [sqrt(1/2), sqrt(2))."""
    y = 7.0376836292e-2 * m - 1.1514610310e-1
    y = y * m + 1.1676998740e-1
    y = y * m - 1.2420140846e-1
    y = y * m + 1.4249322787e-1
    y = y * m - 1.6668057665e-1
    y = y * m + 2.0000714765e-1
    y = y * m - 2.4999993993e-1
    y = y * m + 3.3333331174e-1
    square = m * m
    y = y * m * square - e * 2.12194440e-4 - 0.5 * square
    return (m + y) + e * 0.693359375
