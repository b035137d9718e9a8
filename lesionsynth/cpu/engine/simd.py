"""Vectors of sixteen float32 or 32-bit words, or eight float64, as values inside Numba kernels.

LLVM vectorises innermost loops only, so a filter written with arrays reloads and rewrites its accumulators
for every tap. With vectors as values, a kernel keeps a block of outputs in registers and says itself in which
order it adds. LLVM splits a vector where the processor's registers are narrower, so the code is portable
and the result is the same.

Arrays are one-dimensional and C-contiguous; an index counts elements, and nothing checks it.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

FLOAT, DOUBLE, BYTE, WORD, LONG = (
    ir.FloatType(), ir.DoubleType(), ir.IntType(8), ir.IntType(32), ir.IntType(64),
)  # fmt: skip


class Vector(types.Type):  # type: ignore[misc]  # Numba is untyped
    """Numba type of a vector of `lanes` elements."""

    def __init__(self, element: Any, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"{element}x{lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        element = manager.lookup(kind.element).get_value_type()
        super().__init__(manager, kind, ir.VectorType(element, kind.lanes))


F32 = Vector(types.float32, 16)
F64 = Vector(types.float64, 8)
WORDS = Vector(types.uint64, 16)
"""Words of 32 bits in the lower halves of 64; the upper halves mean nothing, which saves clearing them."""
OF_ELEMENT = {kind.element: kind for kind in (F32, F64, WORDS)}
LANES = F32.lanes
STREAMED = 2**23
"""Bytes from which an output is written past the caches: they hold no such volume until it is used."""


def _llvm(context: Any, kind: Vector) -> Any:
    return context.get_value_type(kind)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, target: Any) -> Any:
    """Pointer to element `index`, as a pointer to `target`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), target.as_pointer())


def _vector_of(array: Any) -> Any:
    ok = isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C"
    return OF_ELEMENT.get(array.dtype) if ok else None


def _load(typingctx: Any, array: Any, index: Any) -> Any:
    """Elements ``index ...`` of an array."""
    kind = _vector_of(array)
    if kind is None:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, array, args[0], args[1], _llvm(context, kind))
        return builder.load(pointer, align=kind.element.bitwidth // 8)

    return kind(array, types.intp), codegen


def _store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a vector to elements ``index ...`` of an array."""
    if not isinstance(value, Vector) or _vector_of(array) != value:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, array, args[0], args[1], _llvm(context, value))
        builder.store(args[2], pointer, align=value.element.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


def _splat(typingctx: Any, scalar: Any) -> Any:
    """Repeat a scalar in every lane."""
    kind = OF_ELEMENT.get(scalar)
    if kind is None:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _llvm(context, kind)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), args[0], ir.Constant(WORD, 0))
        lanes = ir.Constant(ir.VectorType(WORD, kind.lanes), [0] * kind.lanes)
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)

    return kind(scalar), codegen


def _iota(typingctx: Any) -> Any:
    """0, 1, ..., 15 as words."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_llvm(context, WORDS), list(range(LANES)))

    return WORDS(), codegen


def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c`` rounded once."""
    if a not in (F32, F64) or not a == b == c:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _llvm(context, a)
        name = f"llvm.fma.v{a.lanes}f{a.element.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        return builder.call(function, args)

    return a(a, b, c), codegen


def _binary(name: str, kinds: tuple[Vector, ...], emit: Any) -> Any:
    def typed(typingctx: Any, a: Any, b: Any) -> Any:
        if a not in kinds or a != b:
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(context, builder, a, *args)

        return a(a, b), codegen

    typed.__name__ = name
    return intrinsic(typed)


def _arithmetic(on_float: str, on_integer: str | None = None) -> Any:
    def emit(context: Any, builder: Any, kind: Vector, a: Any, b: Any) -> Any:
        return getattr(builder, on_integer if kind == WORDS and on_integer else on_float)(a, b)

    return emit


def _select(comparison: str) -> Any:
    def emit(context: Any, builder: Any, kind: Vector, a: Any, b: Any) -> Any:
        return builder.select(builder.fcmp_ordered(comparison, a, b), a, b)

    return emit


def _product(context: Any, builder: Any, kind: Vector, a: Any, b: Any) -> Any:
    """All 64 bits of the product of two words."""
    low = ir.Constant(_llvm(context, WORDS), [0xFFFFFFFF] * LANES)
    return builder.mul(builder.and_(a, low), builder.and_(b, low))


def _upper(typingctx: Any, product: Any) -> Any:
    """Take the upper word of a product."""
    if product != WORDS:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.lshr(args[0], ir.Constant(_llvm(context, WORDS), [32] * LANES))

    return WORDS(product), codegen


def _lane(name: str, reduction: str) -> Any:
    def typed(typingctx: Any, vector: Any) -> Any:
        if vector not in (F32, F64):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            element = context.get_value_type(vector.element)
            kind = ir.FunctionType(element, [_llvm(context, vector)])
            suffix = f"v{vector.lanes}f{vector.element.bitwidth}"
            function = cgutils.get_or_insert_function(
                builder.module, kind, f"llvm.vector.reduce.{reduction}.{suffix}"
            )
            return builder.call(function, args)

        return vector.element(vector), codegen

    typed.__name__ = name
    return intrinsic(typed)


def _comparison(name: str, symbol: str) -> Any:
    """Bit k of the answer: lane k of one vector compares so with that of another; NaN never does."""

    def typed(typingctx: Any, a: Any, b: Any) -> Any:
        if a not in (F32, F64) or a != b:
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            bits = builder.bitcast(builder.fcmp_ordered(symbol, *args), ir.IntType(a.lanes))
            return builder.zext(bits, LONG)

        return types.uint64(a, b), codegen

    typed.__name__ = name
    return intrinsic(typed)


def _where(typingctx: Any, bits: Any, value: Any, other: Any) -> Any:
    """Take lane k of a vector where bit k is 1, else that of the other."""
    if bits != types.uint64 or value not in (F32, F64) or other != value:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        flags = builder.trunc(args[0], ir.IntType(value.lanes))
        flags = builder.bitcast(flags, ir.VectorType(ir.IntType(1), value.lanes))
        return builder.select(flags, *args[1:])

    return value(bits, value, other), codegen


def _store_bits(typingctx: Any, array: Any, index: Any, bits: Any) -> Any:
    """Write 64 bytes: 1 where bit k is 1, else 0."""
    if bits != types.uint64 or _byte_array(array) is None:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bytes_ = ir.VectorType(BYTE, 64)
        flags = builder.bitcast(args[2], ir.VectorType(ir.IntType(1), 64))
        builder.store(
            builder.zext(flags, bytes_), _address(context, builder, array, args[0], args[1], bytes_), align=1
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, bits), codegen


def _one_where_less(typingctx: Any, a: Any, b: Any) -> Any:
    """1.0 in the lanes where ``a < b``, else 0.0."""
    if a != F32 or b != F32:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _llvm(context, F32)
        less = builder.fcmp_ordered("<", *args)
        return builder.select(less, ir.Constant(vector, [1.0] * LANES), ir.Constant(vector, [0.0] * LANES))

    return F32(a, b), codegen


def _uniform_of(typingctx: Any, words: Any) -> Any:
    """Random words to [0, 1): (word >> 8) * 2**-24, exact."""
    if words != WORDS:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrow = ir.VectorType(WORD, LANES)
        top = builder.lshr(builder.trunc(args[0], narrow), ir.Constant(narrow, [8] * LANES))
        unit = ir.Constant(_llvm(context, F32), [2.0**-24] * LANES)
        return builder.fmul(builder.sitofp(top, _llvm(context, F32)), unit)

    return F32(words), codegen


def _nonzero_bits(typingctx: Any, array: Any, index: Any) -> Any:
    """Bit k of the answer: element ``index + k`` of a byte array is not 0, for 64 elements."""
    if _byte_array(array) is None:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(BYTE, 64)
        values = builder.load(_address(context, builder, array, args[0], args[1], vector), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", values, ir.Constant(vector, [0] * 64)), LONG)

    return types.uint64(array, types.intp), codegen


def _byte_array(array: Any) -> Any:
    ok = isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C"
    return array if ok and array.dtype in (types.uint8, types.int8) else None


def _transpose(typingctx: Any, source: Any, start: Any, stride: Any, target: Any, at: Any, step: Any) -> Any:
    """Transpose 16 x 16 float32: rows ``source[start + stride i :]`` to rows ``target[at + step i :]``."""
    if _vector_of(source) != F32 or _vector_of(target) != F32:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first, begin, between, second, there, apart = args
        vector = _llvm(context, F32)

        def row(array: Any, kind: Any, origin: Any, distance: Any, i: int) -> Any:
            index = builder.add(origin, builder.mul(distance, ir.Constant(LONG, i)))
            return _address(context, builder, kind, array, index, vector)

        rows = [builder.load(row(first, source, begin, between, i), align=4) for i in range(LANES)]
        for half in (8, 4, 2, 1):  # swap the off-diagonal quarters of ever smaller squares
            low = [i if not i & half else LANES + (i ^ half) for i in range(LANES)]
            high = [i | half if not i & half else LANES + i for i in range(LANES)]
            masks = [ir.Constant(ir.VectorType(WORD, LANES), lanes) for lanes in (low, high)]
            for i in range(LANES):
                if not i & half:
                    pair = rows[i], rows[i | half]
                    rows[i], rows[i | half] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        for i in range(LANES):
            builder.store(rows[i], row(second, target, there, apart, i), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), codegen


def _fetch_add(typingctx: Any, array: Any, index: Any) -> Any:
    """Add 1 to an element of a C-contiguous int64 array, counted flat, and return what it was, atomically."""
    if not (isinstance(array, types.Array) and array.dtype == types.int64 and array.layout == "C"):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = _address(context, builder, array, args[0], args[1], LONG)
        return builder.atomic_rmw("add", element, ir.Constant(LONG, 1), "seq_cst")

    return types.int64(array, types.intp), codegen


def _fetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Read an element of a C-contiguous int64 array, counted flat, that another thread may write."""
    if not (isinstance(array, types.Array) and array.dtype == types.int64 and array.layout == "C"):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = _address(context, builder, array, args[0], args[1], LONG)
        return builder.load_atomic(element, "seq_cst", 8)

    return types.int64(array, types.intp), codegen


def _trailing_zeros(typingctx: Any, word: Any) -> Any:
    """Count the zero bits below the lowest one; 64 for 0."""
    if word != types.uint64:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(word), codegen


def _store_stream(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a float32 vector to an address that is a multiple of 64, past the caches.

    For what is larger than the caches: they need not fetch what is overwritten. Call `fence` when done.
    """
    if value != F32 or _vector_of(array) != F32:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, array, args[0], args[1], _llvm(context, F32))
        written = builder.store(args[2], pointer, align=64)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(WORD, 1)]))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


def _fence(typingctx: Any) -> Any:
    """Let other threads see what `store_stream` wrote."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _store_at_least(typingctx: Any, array: Any, index: Any, a: Any, b: Any) -> Any:
    """Write sixteen bytes: 1 where ``a >= b``, else 0."""
    if a != F32 or b != F32 or _byte_array(array) is None:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        flags = ir.VectorType(BYTE, LANES)
        pointer = _address(context, builder, array, args[0], args[1], flags)
        builder.store(builder.zext(builder.fcmp_ordered(">=", args[2], args[3]), flags), pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, a, b), codegen


def _outside(typingctx: Any, value: Any, low: Any, high: Any) -> Any:
    """Bit k of the answer: lane k is NaN, or outside the range from that of `low` to that of `high`."""
    if value not in (F32, F64) or not value == low == high:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, least, most = args
        outside = builder.or_(
            builder.fcmp_unordered("<", number, least), builder.fcmp_unordered(">", number, most)
        )
        return builder.zext(builder.bitcast(outside, ir.IntType(value.lanes)), LONG)

    return types.uint64(value, low, high), codegen


def _cast(typingctx: Any, value: Any, like: Any) -> Any:
    """Take a number, or a vector of float32, as the kind that `like` is: float64, or a vector."""
    if value not in (types.float32, types.float64, F32) or like not in (types.float32, types.float64, F32):
        return None
    if value == types.float32 and like == F32:
        return like(value, like), _splat(typingctx, value)[1]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if value == like else builder.fpext(args[0], DOUBLE)

    return like(value, like), codegen


def _number_of(typingctx: Any, pixel: Any) -> Any:
    """Take the number that a voxel holds: a float, or float32 of a float16, of which int16 has the bits."""
    if pixel not in (types.int16, types.float32, types.float64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if pixel != types.int16:
            return args[0]
        bits = builder.zext(args[0], WORD)
        sign = builder.shl(builder.and_(bits, ir.Constant(WORD, 0x8000)), ir.Constant(WORD, 16))
        size = builder.shl(builder.and_(bits, ir.Constant(WORD, 0x7FFF)), ir.Constant(WORD, 13))
        # of another bias; exact, for numbers below the normal ones too
        scaled = builder.fmul(builder.bitcast(size, FLOAT), ir.Constant(FLOAT, 2.0**112))
        number = builder.bitcast(builder.or_(builder.bitcast(scaled, WORD), sign), FLOAT)
        strange = builder.icmp_unsigned(">=", size, ir.Constant(WORD, 0x7C00 << 13))
        return builder.select(strange, ir.Constant(FLOAT, float("nan")), number)

    return (types.float32 if pixel == types.int16 else pixel)(pixel), codegen


def _pixel_of(typingctx: Any, number: Any, like: Any) -> Any:
    """Return a number as a voxel like another holds it: `_number_of` backwards.

    To float16 it is rounded to nearest, ties to even, and must not be NaN. In integers: LLVM's own rounding
    calls a function that Numba lacks where a processor has no instruction.
    """
    if number not in (types.float32, types.float64) or like not in (types.int16, number):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like != types.int16:
            return args[0]
        whole = builder.bitcast(args[0], WORD)
        sign = builder.lshr(builder.and_(whole, ir.Constant(WORD, 0x80000000)), ir.Constant(WORD, 16))
        bits = builder.and_(whole, ir.Constant(WORD, 0x7FFFFFFF))
        number = builder.bitcast(bits, FLOAT)
        odd = builder.and_(builder.lshr(bits, ir.Constant(WORD, 13)), ir.Constant(WORD, 1))
        # of another bias, and rounded together with `odd`
        rebased = builder.add(bits, ir.Constant(WORD, ((15 - 127) << 23) + 0xFFF))
        normal = builder.lshr(builder.add(rebased, odd), ir.Constant(WORD, 13))
        # the last bit of a half below its normal numbers is that of a float32 of 0.5 and more
        shifted = builder.bitcast(builder.fadd(number, ir.Constant(FLOAT, 0.5)), WORD)
        small = builder.sub(shifted, ir.Constant(WORD, 0x3F000000))
        is_small = builder.fcmp_ordered("<", number, ir.Constant(FLOAT, 2.0**-14))
        is_large = builder.fcmp_ordered(">=", number, ir.Constant(FLOAT, 65520.0))
        size = builder.select(is_small, small, normal)
        size = builder.select(is_large, ir.Constant(WORD, 0x7C00), size)
        return builder.trunc(builder.or_(size, sign), ir.IntType(16))

    return like(number, like), codegen


def _ones(typingctx: Any, word: Any) -> Any:
    """Count the bits that are 1."""
    if word != types.uint64:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(word), codegen


def _pointer(typingctx: Any, address: Any) -> Any:
    """Turn an address into a pointer that `numba.carray` takes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), codegen


load: Any = intrinsic(_load)
store: Any = intrinsic(_store)
splat: Any = intrinsic(_splat)
iota: Any = intrinsic(_iota)
fma: Any = intrinsic(_fma)
least: Any = _binary("least", (F32, F64, types.float32, types.float64), _select("<"))
greatest: Any = _binary("greatest", (F32, F64, types.float32, types.float64), _select(">"))
least_lane: Any = _lane("least_lane", "fmin")
greatest_lane: Any = _lane("greatest_lane", "fmax")
product: Any = _binary("product", (WORDS,), _product)
upper: Any = intrinsic(_upper)
bits_at_most: Any = _comparison("bits_at_most", "<=")
bits_at_least: Any = _comparison("bits_at_least", ">=")
bits_other: Any = _comparison("bits_other", "!=")
where: Any = intrinsic(_where)
store_bits: Any = intrinsic(_store_bits)
one_where_less: Any = intrinsic(_one_where_less)
uniform_of: Any = intrinsic(_uniform_of)
nonzero_bits: Any = intrinsic(_nonzero_bits)
transpose: Any = intrinsic(_transpose)
fetch: Any = intrinsic(_fetch)
fetch_add: Any = intrinsic(_fetch_add)
trailing_zeros: Any = intrinsic(_trailing_zeros)
ones: Any = intrinsic(_ones)
cast: Any = intrinsic(_cast)
number_of: Any = intrinsic(_number_of)
pixel_of: Any = intrinsic(_pixel_of)
store_stream: Any = intrinsic(_store_stream)
store_at_least: Any = intrinsic(_store_at_least)
outside: Any = intrinsic(_outside)
fence: Any = intrinsic(_fence)
pointer: Any = intrinsic(_pointer)


def _operator(symbol: Any, kinds: tuple[Vector, ...], emit: Any) -> None:
    """Let kernels write ``a + b`` for vectors."""

    @infer_global(symbol)
    class _Typed(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and args[0] in kinds and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(symbol, Vector, Vector)
    def lowered(context: Any, builder: Any, typed: Any, args: Any) -> Any:
        return emit(context, builder, typed.return_type, *args)


_operator(operator.add, (F32, F64, WORDS), _arithmetic("fadd", "add"))
_operator(operator.sub, (F32, F64), _arithmetic("fsub"))
_operator(operator.mul, (F32, F64), _arithmetic("fmul"))
_operator(operator.xor, (WORDS,), _arithmetic("xor", "xor"))
