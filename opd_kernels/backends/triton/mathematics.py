"""exp and log to the last bits: the hardware's are approximations that differ between vendors.

Both are Cephes' single-precision algorithms (S. Moshier). They need only IEEE additions and
multiplications. A row calls them for K entries, so their cost does not show.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def scalar(number):
    """A kernel's argument as float32: Triton's interpreter passes Python's numbers as they are."""
    return tl.full((), number, tl.float32)


@triton.jit
def finite(x):
    """Infinities become the largest floats."""
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def exp(x):
    """e to the x for x <= 89, within one unit in the last place; 0 for -inf, inf beyond float32."""
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
def expm1(x):
    """e to the x minus 1, within 2 units in the last place; inf beyond float32."""
    return tl.where(tl.abs(x) <= 0.5, expm1_near_zero(x), exp(tl.minimum(x, 89.0)) - 1.0)


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
    """Natural logarithm of 1 + x in [sqrt(1/2), sqrt(2)), within one unit in the last place."""
    return _log(x, 0.0)


@triton.jit
def log1p(x):
    """Natural logarithm of 1 + x for a normal 1 + x, within 2 units in the last place."""
    whole = 1.0 + x
    rounding = x - (whole - 1.0)
    near = (x > -0.29) & (x < 0.41)
    return tl.where(near, log1p_near_zero(x), log(whole) + tl.div_rn(rounding, whole))


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


@triton.jit
def log_double(x):
    """Natural logarithm of a normal float64 x > 0, within a few units in the last place.

    With x = m 2^e it is e log 2 + 2 artanh((m - 1) / (m + 1)), whose series has 11 terms here.
    """
    bits = x.to(tl.int64, bitcast=True)
    e = (bits - 0x3FE6A09E667F3BCD) >> 52  # m in [sqrt(1/2), sqrt(2))
    m = (bits - (e << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    y = square * (1.0 / 21.0) + 1.0 / 19.0
    for n in tl.static_range(17, 1, -2):
        y = y * square + 1.0 / n
    return e.to(tl.float64) * 0.6931471805599453 + (2.0 * s + 2.0 * s * square * y)
