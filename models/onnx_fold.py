"""What an ONNX network computes from constants alone, worked out while it is read: paddings, shapes, scaled weights.

A closed list of operators, each of which says how many elements it makes before it makes them: a file of a few bytes
can ask for any number. Whole numbers stay below 2^62, where numpy would wrap around.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from .onnx_file import Array, to_array

MAX_ELEMENTS = 1 << 28  # that one network may make of its constants; an Xception has a twelfth of that
_MAX_WHOLE = 1 << 62
_TYPES = {  # of Cast and ConstantOfShape; bfloat16 is computed in float32
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: np.float32,
    TensorProto.DOUBLE: np.float64,
    TensorProto.INT32: np.int32,
    TensorProto.INT64: np.int64,
    TensorProto.BOOL: np.bool_,
}


class FoldError(ValueError):
    """A value that is not computed beforehand, and why."""


class Folder:
    """Computes constants, up to ``MAX_ELEMENTS`` altogether."""

    def __init__(self) -> None:
        self.left = MAX_ELEMENTS

    def fold(self, operator: str, operands: Sequence[Array | None], attributes: Mapping[str, Any]) -> Array:
        """The operator's only result. Raises FoldError."""
        rule = _RULES.get(operator)
        if rule is None:
            raise FoldError(f"of constants, which is not computed beforehand; {', '.join(sorted(_RULES))} are")
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused where it becomes a weight
                return rule(_Call(self, operands, attributes))
        except FoldError:
            raise
        except Exception as error:  # numpy raises many kinds on shapes and types that do not go together
            raise FoldError(f"of constants that do not go together ({error})") from error

    def take(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape that may be made. Raises FoldError where that would be too much."""
        sizes = tuple(int(size) for size in shape)
        if any(size < 0 for size in sizes):
            raise FoldError(f"makes a constant of shape {list(sizes)}")
        self.left -= math.prod(sizes)
        if self.left < 0:
            raise FoldError(f"makes more than {MAX_ELEMENTS} elements of constants; no such network needs that many")
        return sizes


class _Call:
    """The operands of one operator and its attributes."""

    def __init__(self, folder: Folder, operands: Sequence[Array | None], attributes: Mapping[str, Any]) -> None:
        self.folder, self.operands, self.attributes = folder, operands, attributes

    def array(self, index: int) -> Array:
        array = self.operands[index]
        if array is None:
            raise FoldError("without an operand that it needs")
        return array

    def optional(self, index: int) -> Array | None:
        return self.operands[index] if index < len(self.operands) else None

    def whole(self, index: int) -> list[int]:
        """An operand of whole numbers, as a list."""
        array = self.array(index)
        if not np.issubdtype(array.dtype, np.integer):
            raise FoldError(f"takes whole numbers, got {array.dtype}")
        return [int(value) for value in array.reshape(-1)]

    def whole_or_attribute(self, index: int, name: str) -> list[int] | None:
        """An operand in newer opsets, an attribute in older ones; None where neither is there."""
        if self.optional(index) is not None:
            return self.whole(index)
        return [int(value) for value in self.attributes[name]] if name in self.attributes else None


def _elementwise(compute: Callable[..., Any], count: int = 2) -> Callable[[_Call], Array]:
    """Of operands that broadcast as numpy's do."""

    def rule(call: _Call) -> Array:
        if len(call.operands) != count:
            raise FoldError(f"of {len(call.operands)} constants; {count} are computed beforehand")
        arrays = [call.array(index) for index in range(count)]
        call.folder.take(np.broadcast_shapes(*(array.shape for array in arrays)))
        wide = [_wide(array) for array in arrays]
        result = np.asarray(compute(*wide))
        if np.issubdtype(arrays[-1].dtype, np.integer) and result.dtype != np.bool_:
            # Computed in float64 once more: it says whether the whole numbers went round.
            real = np.asarray(compute(*(array.astype(np.float64) for array in wide)), np.float64)
            if np.abs(real).max(initial=0.0) >= _MAX_WHOLE:
                raise FoldError("makes whole numbers of 2^62 or more")
        return result.astype(arrays[-1].dtype) if result.dtype != np.bool_ else result

    return rule


def _wide(array: Array) -> Array:
    return array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else array


def _divide(a: NDArray[Any], b: NDArray[Any]) -> Array:
    """ONNX divides whole numbers towards zero."""
    if not np.issubdtype(a.dtype, np.integer):
        return np.asarray(np.true_divide(a, b))
    if (b == 0).any():
        raise FoldError("divides whole numbers by zero")
    quotient = np.abs(a) // np.abs(b)
    return np.asarray(np.where((a < 0) != (b < 0), -quotient, quotient))


def _cast(call: _Call) -> Array:
    kind = call.attributes.get("to")
    if kind not in _TYPES:
        raise FoldError(f"to the type {kind}, which no weight or shape has")
    return _converted(call, np.dtype(_TYPES[kind]))


def _converted(call: _Call, dtype: np.dtype[Any]) -> Array:
    array = call.array(0)
    call.folder.take(array.shape)
    if np.issubdtype(dtype, np.integer) and not (np.abs(array.astype(np.float64)) < np.iinfo(dtype).max).all():
        raise FoldError(f"of numbers that {dtype} cannot hold")
    return array.astype(dtype)


def _concat(call: _Call) -> Array:
    arrays = [call.array(index) for index in range(len(call.operands))]
    call.folder.take((sum(array.size for array in arrays),))
    return np.concatenate(arrays, int(call.attributes["axis"]))


def _constant_of_shape(call: _Call) -> Array:
    shape = call.folder.take(call.whole(0))
    value = call.attributes.get("value")
    if value is None:
        return np.zeros(shape, np.float32)
    if value.data_type not in _TYPES or math.prod(value.dims) != 1:
        raise FoldError("of a value that is no number")
    return np.full(shape, to_array(value).reshape(-1)[0])


def _expand(call: _Call) -> Array:
    array, wanted = call.array(0), call.whole(1)
    shape = call.folder.take(_broadcast(array.shape, wanted))
    return np.broadcast_to(array, shape)


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """Python's numbers, which do not wrap around, unlike those of ``np.broadcast_shapes``."""
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b), strict=True)
    shape = []
    for x, y in pairs:
        if x != y and 1 not in (x, y):
            raise FoldError(f"of shapes {list(a)} and {list(b)}")
        shape.append(y if x == 1 else x)
    return tuple(shape)


def _gather(call: _Call) -> Array:
    array, indices, axis = call.array(0), call.array(1), int(call.attributes.get("axis", 0))
    rest = array.size // max(array.shape[axis], 1)
    call.folder.take((indices.size, rest))
    return np.take(array, indices.astype(np.int64), axis)


def _range(call: _Call) -> Array:
    start, limit, step = (call.whole(index)[0] for index in range(3))
    if step == 0:
        raise FoldError("in steps of 0")
    (count,) = call.folder.take((max(0, -((start - limit) // step)),))
    return np.arange(count, dtype=np.int64) * step + start


def _reshape(call: _Call) -> Array:
    array, wanted = call.array(0), call.whole(1)
    if not call.attributes.get("allowzero", 0):
        wanted = [array.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    call.folder.take(array.shape)
    return array.reshape(wanted)


def _slice(call: _Call) -> Array:
    array = call.array(0)
    starts, ends = call.whole_or_attribute(1, "starts") or [], call.whole_or_attribute(2, "ends") or []
    axes = call.whole_or_attribute(3, "axes") or list(range(len(starts)))
    steps = call.whole(4) if call.optional(4) is not None else [1] * len(starts)
    index = [slice(None)] * array.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # An end of -2^63 or so is "before the first", which Python's -1 is not.
        index[axis] = slice(start, None if step < 0 and end < -array.shape[axis] else end, step)
    return array[tuple(index)]


def _squeeze(call: _Call) -> Array:
    axes = call.whole_or_attribute(1, "axes")
    return np.squeeze(call.array(0), None if axes is None else tuple(axes))


def _unsqueeze(call: _Call) -> Array:
    return np.expand_dims(call.array(0), tuple(call.whole_or_attribute(1, "axes") or ()))


def _tile(call: _Call) -> Array:
    array, repeats = call.array(0), call.whole(1)
    if len(repeats) != array.ndim:
        raise FoldError(f"{repeats} times a constant of {array.ndim} dimensions")
    call.folder.take([size * times for size, times in zip(array.shape, repeats, strict=True)])
    return np.tile(array, repeats)


def _transpose(call: _Call) -> Array:
    array = call.array(0)
    return array.transpose(call.attributes.get("perm", range(array.ndim)[::-1]))


def _where(call: _Call) -> Array:
    condition, a, b = (call.array(index) for index in range(3))
    call.folder.take(_broadcast(_broadcast(condition.shape, a.shape), b.shape))
    return np.where(condition, a, b)


def _shape(call: _Call) -> Array:
    return shape_of(call.array(0).shape, call.attributes)


def shape_of(shape: tuple[int, ...], attributes: Mapping[str, Any]) -> Array:
    """What Shape makes of a tensor of this shape."""
    return np.array(shape[attributes.get("start", 0) : attributes.get("end", len(shape))], np.int64)


_RULES: Mapping[str, Callable[[_Call], Array]] = {
    "Add": _elementwise(np.add),
    "Cast": _cast,
    "CastLike": lambda call: _converted(call, call.array(1).dtype),
    "Ceil": _elementwise(np.ceil, 1),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _elementwise(_divide),
    "Equal": _elementwise(np.equal),
    "Expand": _expand,
    "Floor": _elementwise(np.floor, 1),
    "Gather": _gather,
    "Greater": _elementwise(np.greater),
    "Identity": lambda call: call.array(0),
    "Less": _elementwise(np.less),
    "Max": _elementwise(np.maximum),
    "Min": _elementwise(np.minimum),
    "Mul": _elementwise(np.multiply),
    "Neg": _elementwise(np.negative, 1),
    "Range": _range,
    "Reciprocal": _elementwise(np.reciprocal, 1),
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Sqrt": _elementwise(np.sqrt, 1),
    "Squeeze": _squeeze,
    "Sub": _elementwise(np.subtract),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
