"""Vectors for Numba kernels: 16 lanes of float32 or 8 of float64, with the operators + - * /.

    x = load(a, i)            64 bytes of the 1-D array a, from element i on
    store(a, i, 2 * x + y)    a number next to a vector stands for that number in every lane
    fma(x, y, z)              x y + z, rounded once
    exp(x)                    of every lane
    total(x)                  the sum of the lanes

A vector is one LLVM value <16 x float> or <8 x double>: one register of AVX-512, two of AVX2. LLVM
may contract x * y + z to one operation as it sees fit, and reorders nothing; without compilation
(NUMBA_DISABLE_JIT=1) there are no vectors. At the end: what the scans share, which put neighbouring
channels side by side in the lanes. Numba's cache does not see a change of this file in the kernels
that call it: delete __pycache__ after editing.
"""

import math
import operator

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

BYTES = 64
_int32 = ir.IntType(32)


class VectorType(types.Type):
    """A vector of Numba's scalar type `dtype`, 64 bytes wide unless told otherwise"""

    def __init__(self, dtype, lanes=None):
        self.dtype, self.lanes = dtype, lanes or BYTES * 8 // dtype.bitwidth
        self.ir_element = ir.FloatType() if dtype == types.float32 else ir.DoubleType()
        self.ir = ir.VectorType(self.ir_element, self.lanes)
        self.ir_int = ir.VectorType(ir.IntType(dtype.bitwidth), self.lanes)
        super().__init__(name=f"vector({dtype} x {self.lanes})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.ir)


def _is_array(a):
    return isinstance(a, types.Array) and a.ndim == 1 and a.layout == "C"


# Memory


def _pointer(context, builder, vector, a, array, i):
    data = context.make_array(a)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [i], inbounds=True), vector.ir.as_pointer())


def _load(a, share):
    if not _is_array(a):
        return None
    vector = VectorType(a.dtype, BYTES * 8 // a.dtype.bitwidth // share)

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, vector, a, args[0], args[1])
        return builder.load(pointer, align=a.dtype.bitwidth // 8, typ=vector.ir)

    return vector(a, types.intp), generate


@intrinsic
def load(_, a, i):
    """The vector a[i], a[i+1], ... of a contiguous 1-D array; nothing is checked"""
    return _load(a, 1)


@intrinsic
def load_half(_, a, i):
    """The same with half as many lanes"""
    return _load(a, 2)


@intrinsic
def store(_, a, i, x):
    """a[i], a[i+1], ... = x; nothing is checked"""
    if not (_is_array(a) and isinstance(x, VectorType) and x.dtype == a.dtype):
        return None

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, x, a, args[0], args[1])
        builder.store(args[2], pointer, align=a.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(a, types.intp, x), generate


@intrinsic
def prefetch(_, a, i):
    """Begin to bring the line of a[i] to the second cache; i may lie outside the array"""
    if not _is_array(a):
        return None

    def generate(context, builder, signature, args):
        data = context.make_array(a)(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _int32, _int32, _int32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, second_level, data_cache = _int32(0), _int32(2), _int32(1)
        builder.call(function, [pointer, read, second_level, data_cache])
        return context.get_dummy_value()

    return types.void(a, types.intp), generate


@intrinsic
def lane_count(_, a):
    """Lanes of the vectors of an array's type, a constant for the compiler"""
    count = BYTES * 8 // a.dtype.bitwidth

    def generate(context, builder, signature, args):
        return context.get_constant(types.intp, count)

    return types.intp(a), generate


def _splat(builder, vector, scalar):
    nothing = ir.Constant(vector.ir, ir.Undefined)
    one = builder.insert_element(nothing, scalar, _int32(0))
    lanes = ir.Constant(ir.VectorType(_int32, vector.lanes), [0] * vector.lanes)
    return builder.shuffle_vector(one, nothing, lanes)


@intrinsic
def splat(_, x):
    """The vector with the float x in every lane"""
    if not isinstance(x, types.Float):
        return None
    vector = VectorType(x)

    def generate(context, builder, signature, args):
        return _splat(builder, vector, args[0])

    return vector(x), generate


# Arithmetic


def _common(*operands):
    """The vector type among the operands, the others being vectors like it or numbers"""
    vectors = {x for x in operands if isinstance(x, VectorType)}
    others = all(isinstance(x, types.Number) for x in operands if not isinstance(x, VectorType))
    return vectors.pop() if len(vectors) == 1 and others else None


def _as_vectors(context, builder, vector, kinds, args):
    for kind, x in zip(kinds, args, strict=True):
        if isinstance(kind, VectorType):
            yield x
        else:
            yield _splat(builder, vector, context.cast(builder, x, kind, vector.dtype))


def _elementwise(arity, build):
    """An intrinsic on vectors and numbers; build(builder, vector, *operands) writes LLVM code"""

    def typed(*operands):
        vector = _common(*operands)
        if vector is None:
            return None

        def generate(context, builder, signature, args):
            return build(builder, vector, *_as_vectors(context, builder, vector, operands, args))

        return vector(*operands), generate

    if arity == 1:
        return intrinsic(lambda _, x: typed(x))
    if arity == 2:
        return intrinsic(lambda _, x, y: typed(x, y))
    return intrinsic(lambda _, x, y, z: typed(x, y, z))


def _call(name):
    """The LLVM function of that name on vectors"""

    def build(builder, vector, *operands):
        suffix = f"v{vector.lanes}f{vector.dtype.bitwidth}"
        kind = ir.FunctionType(vector.ir, [vector.ir] * len(operands))
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}")
        return builder.call(function, operands)

    return build


_FLAGS = ("contract",)
_add = _elementwise(2, lambda builder, _, x, y: builder.fadd(x, y, flags=_FLAGS))
_sub = _elementwise(2, lambda builder, _, x, y: builder.fsub(x, y, flags=_FLAGS))
_mul = _elementwise(2, lambda builder, _, x, y: builder.fmul(x, y, flags=_FLAGS))
_div = _elementwise(2, lambda builder, _, x, y: builder.fdiv(x, y, flags=_FLAGS))
_neg = _elementwise(1, lambda builder, _, x: builder.fneg(x))
_abs = _elementwise(1, _call("fabs"))
fma = _elementwise(3, _call("fmuladd"))  # x y + z; on a machine without FMA in two operations


def _choose(comparison):
    """x where it compares so with y or is NaN, else y"""

    def build(builder, _, x, y):
        return builder.select(builder.fcmp_unordered(comparison, x, y), x, y)

    return _elementwise(2, build)


minimum, maximum = _choose("<"), _choose(">")  # NaN of the first operand goes through


def _define(python_operator, implementation):
    if implementation in (_neg, _abs):

        @overload(python_operator)
        def _unary(x):
            return (lambda x: implementation(x)) if isinstance(x, VectorType) else None
    else:

        @overload(python_operator)
        def _binary(x, y):
            return (lambda x, y: implementation(x, y)) if _common(x, y) else None


_define(operator.add, _add)
_define(operator.sub, _sub)
_define(operator.mul, _mul)
_define(operator.truediv, _div)
_define(operator.neg, _neg)
_define(abs, _abs)


def _sum_of_halves(builder, x, lanes):
    low = ir.Constant(ir.VectorType(_int32, lanes // 2), list(range(lanes // 2)))
    high = ir.Constant(ir.VectorType(_int32, lanes // 2), list(range(lanes // 2, lanes)))
    halves = builder.shuffle_vector(x, x, low), builder.shuffle_vector(x, x, high)
    return builder.fadd(*halves, flags=_FLAGS)


@intrinsic
def fold(_, x):
    """The sum of both halves: a vector with half as many lanes"""
    if not isinstance(x, VectorType):
        return None

    def generate(context, builder, signature, args):
        return _sum_of_halves(builder, args[0], x.lanes)

    return VectorType(x.dtype, x.lanes // 2)(x), generate


@intrinsic
def total(_, x):
    """The sum of the lanes, by halves: a number"""
    if not isinstance(x, VectorType):
        return None

    def generate(context, builder, signature, args):
        v, lanes = args[0], x.lanes
        while lanes > 1:
            v, lanes = _sum_of_halves(builder, v, lanes), lanes // 2
        return builder.extract_element(v, _int32(0))

    return x.dtype(x), generate


@intrinsic
def any_greater(_, x, y):
    """Whether x > y, or either is NaN, in at least one lane"""
    if not (isinstance(x, VectorType) and x == y):
        return None

    def generate(context, builder, signature, args):
        lanes = builder.fcmp_unordered(">", *args)
        bits = builder.bitcast(lanes, ir.IntType(x.lanes))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(x, x), generate


# exp: 2^y = 2^n 2^r, n the integer next to y. Adding 1.5 * 2^(bits of the mantissa) rounds y to an
# integer, which then stands in the lowest bits of the sum.

_ROUND = {types.float32: 1.5 * 2.0**23, types.float64: 1.5 * 2.0**52}
_MANTISSA = {types.float32: 23, types.float64: 52}
_BIAS = {types.float32: 127, types.float64: 1023}
_LOG2E = {
    types.float32: (1.44269502162933349609375, 1.92596299113e-8),
    types.float64: (1.4426950408889634, 2.035527374093103205e-17),
}
# 2^r, |r| <= 1/2, fitted for this file: the relative errors oscillate with equal height, 2.5e-9 and
# 1.8e-17. The constant term is 1.
_POWERS = {
    types.float32: (
        1.54614447e-4,
        1.34004282e-3,
        9.61805668e-3,
        5.55032723e-2,
        2.40226509e-1,
        6.93147207e-1,
    ),
    types.float64: (
        4.07807178609287042e-10,
        7.07257039454079943e-9,
        1.01806476605730693e-7,
        1.32154426754528552e-6,
        1.52527273851897748e-5,
        1.54035304415718501e-4,
        1.33335581534399697e-3,
        9.61812910760700262e-3,
        5.55041086647903945e-2,
        2.40226506959100980e-1,
        6.93147180559945697e-1,
    ),
}


def _constant(table):
    """The entry of a table for the type of a vector, as a function in kernels"""

    @intrinsic
    def constant(_, x):
        value = table[x.dtype]

        def generate(context, builder, signature, args):
            return ir.Constant(x.ir_element, value)

        return x.dtype(x), generate

    return constant


_rounder = _constant(_ROUND)
_log2e = _constant({kind: high for kind, (high, _) in _LOG2E.items()})
_log2e_low = _constant({kind: low for kind, (_, low) in _LOG2E.items()})
_lowest = _constant({types.float32: -110.0, types.float64: -760.0})  # exp is 0 below
_highest = _constant({types.float32: 90.0, types.float64: 711.0})  # and infinite above


@intrinsic
def _power_of_two(_, r):
    """2^r for |r| <= 1/2"""
    if not isinstance(r, VectorType):
        return None

    def generate(context, builder, signature, args):
        muladd = _call("fmuladd")
        p, *rest = [ir.Constant(r.ir, [c] * r.lanes) for c in (*_POWERS[r.dtype], 1.0)]
        for c in rest:
            p = muladd(builder, r, p, args[0], c)
        return p

    return r(r), generate


def _int_constant(vector, value):
    return ir.Constant(vector.ir_int, [value] * vector.lanes)


@intrinsic
def _scale(_, p, rounded):
    """p 2^n, n from the sum that rounded it; p near 1 and p 2^n normal"""

    def generate(context, builder, signature, args):
        shift = _int_constant(p, _MANTISSA[p.dtype])
        n = builder.shl(builder.bitcast(args[1], p.ir_int), shift)
        return builder.bitcast(builder.add(builder.bitcast(args[0], p.ir_int), n), p.ir)

    return p(p, p), generate


@intrinsic
def _scale_twice(_, p, rounded):
    """p 2^n in two products, which overflow and underflow where p 2^n does"""

    def generate(context, builder, signature, args):
        shift = _int_constant(p, _MANTISSA[p.dtype])
        bias = _int_constant(p, _BIAS[p.dtype])
        zero = builder.bitcast(ir.Constant(p.ir, [_ROUND[p.dtype]] * p.lanes), p.ir_int)
        n = builder.sub(builder.bitcast(args[1], p.ir_int), zero)
        half = builder.ashr(n, _int_constant(p, 1))
        result = args[0]
        for m in (half, builder.sub(n, half)):
            power = builder.bitcast(builder.shl(builder.add(m, bias), shift), p.ir)
            result = builder.fmul(result, power)
        return result

    return p(p, p), generate


@njit(cache=True)
def exp(x):
    """e^x in every lane: 0 and infinity where the result is, NaN through"""
    x = minimum(maximum(x, _lowest(x)), _highest(x))
    rounded = fma(x, _log2e(x), _rounder(x))
    n = rounded - _rounder(x)
    r = fma(x, _log2e_low(x), fma(x, _log2e(x), -n))
    return _scale_twice(_power_of_two(r), rounded)


@njit(cache=True)
def exp2_product(x, y):
    """2^(x y) in every lane, one rounding; only for -126 <= x y < 128 (float64: -1022 and 1024)"""
    rounded = fma(x, y, _rounder(x))
    return _scale(_power_of_two(fma(x, y, _rounder(x) - rounded)), rounded)


@njit(cache=True)
def exp2_product_guarded(x, y):
    """The same bits, and 0 and infinity below and above that range"""
    return _guard(x * y, exp2_product(x, y))


@intrinsic
def _guard(_, z, power):
    """power; but 0 where z < -126, infinity where z >= 128, NaN where z is NaN"""

    def generate(context, builder, signature, args):
        bias = _BIAS[z.dtype]
        low, high, zero, infinity = (
            ir.Constant(z.ir, [x] * z.lanes) for x in (1.0 - bias, bias + 1.0, 0.0, math.inf)
        )
        y, result = args
        result = builder.select(builder.fcmp_ordered("<", y, low), zero, result)
        result = builder.select(builder.fcmp_ordered(">=", y, high), infinity, result)
        return builder.select(builder.fcmp_unordered("uno", y, y), y, result)

    return z(z, z), generate


def lanes(dtype):
    """Lanes of a vector of that NumPy type"""
    return BYTES // dtype.itemsize
