"""Elementary functions for the twins: float32 by polynomials that compile to vector code, float64
by the C library.

pip's Numba has no vector mathematics library: math.exp in a loop is a scalar call. The polynomials
were fitted for this file by weighted least squares on Chebyshev nodes; errors are tested in
tests/test_kernels.py. Numba's cache does not see a change of this file in the kernels that call it:
delete __pycache__ after editing.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload


@intrinsic
def _float_of_bits(_, bits):
    """The float32 with these 32 bits"""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


def exp(x):
    """e^x; float32 within 2e-7 relative where the result is a normal number"""
    return math.inf if x > 709 else math.exp(x)


@overload(exp, inline="always")
def _exp(x):
    if x != types.float32:
        return lambda x: math.exp(x)

    def exp32(x):
        x = np.float32(-110.0) if x < np.float32(-110.0) else x  # comparisons that let NaN through
        x = np.float32(90.0) if x > np.float32(90.0) else x
        y = x * np.float32(1.44269504)
        n = np.floor(y + np.float32(0.5))
        # r = x log2(e) - n in units of ln 2, ln 2 in two parts so that its rounding is not taken n
        # times
        r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
        r = r * np.float32(1.44269504)
        p = np.float32(1.5345807e-4)
        p = p * r + np.float32(1.3399931e-3)
        p = p * r + np.float32(9.6184890e-3)
        p = p * r + np.float32(5.5503288e-2)
        p = p * r + np.float32(2.4022647e-1)
        p = p * r + np.float32(6.9314721e-1)
        p = p * r + np.float32(1.0)
        # 2^n in two factors, so that it overflows and underflows where the result does
        m = np.int32(n)
        half, bias, shift = m >> np.int32(1), np.int32(127), np.int32(23)
        p *= _float_of_bits((half + bias) << shift)
        return p * _float_of_bits((m - half + bias) << shift)

    return exp32


def normal_cdf(x, e):
    """The normal distribution function Φ(x), given e = exp(-x²/2); float32: 6e-7 for |x| < 4"""
    return 0.5 * math.erfc(-x * math.sqrt(0.5))


@overload(normal_cdf, inline="always")
def _normal_cdf(x, e):
    if x != types.float32:
        return lambda x, e: 0.5 * math.erfc(-x * math.sqrt(0.5))

    def normal_cdf32(x, e):
        # the tail is e t P(t), t = 1/(1 + 0.35 |x|): no cancellation on the negative side
        t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.35) * abs(x))
        p = np.float32(-0.0291461394)
        p = p * t + np.float32(0.143972707)
        p = p * t + np.float32(-0.255716319)
        p = p * t + np.float32(0.159176492)
        p = p * t + np.float32(-0.0231114176)
        p = p * t + np.float32(0.105508663)
        p = p * t + np.float32(0.119832704)
        p = p * t + np.float32(0.139861892)
        p = p * t + np.float32(0.139621403)
        tail = p * t * e
        return tail if x < np.float32(0.0) else np.float32(1.0) - tail

    return normal_cdf32
