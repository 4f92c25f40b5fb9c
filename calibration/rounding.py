"""Rounding that looks at the data: weights go up or down so that the layer's output, not the weight, errs least.

The objective is that of AdaRound (M. Nagel et al., "Up or Down?", https://arxiv.org/abs/2004.10568), the squared error
of one layer's output before its activation, on the inputs that the quantized layers before it really give (the
asymmetric reconstruction of its section 3.3). It is solved without gradients: error feedback column by column
(E. Frantar et al., "GPTQ", https://arxiv.org/abs/2210.17323), then coordinate descent on the integers, both in float64
from second moments, so no image is looked at twice. Biases are set so that every channel's mean is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..models import graph as ir
from ..models.preprocess import InputSpec
from ..runtime.arithmetic import WEIGHT_MAX
from .images import Pixels
from .refine import Array, Layer, as_matrix, refine, rounded_bias, taps

DAMPING = 0.01  # of the mean second moment, added to all: GPTQ's "percdamp"
SWEEPS = 3


def optimize_rounding(
    graph: ir.Graph,
    int8_graph: ir.Graph,
    images: Sequence[Pixels],
    spec: InputSpec | None = None,
    progress: Callable[[float], None] | None = None,
) -> ir.Graph:
    """The int8 graph with weights rounded, and biases set, for least error on ``images`` (some tens).

    ``graph`` is the float graph that ``int8_graph`` was quantized from; ``spec`` as for ``collect``. Scales stay.
    """
    return refine(graph, int8_graph, images, _round_layer, spec, progress)


def _round_layer(layer: Layer) -> tuple[ir.Constant, ir.Constant]:
    """Weights as rows: (groups, rows, columns), one group for a dense layer, one per channel for a depthwise one."""
    op = layer.node.op
    scales = np.asarray(layer.int8_weights.type.per_axis.scales, np.float64)
    matrix = as_matrix(op, layer.weights).astype(np.float64)
    depthwise = isinstance(op, ir.DepthwiseConv2d)
    rows = matrix[:, None, :] if depthwise else matrix.reshape(1, matrix.shape[0], -1)
    steps = rows / scales[:, None, None] if depthwise else rows / scales[None, :, None]
    seen, cross, mean_float, mean_int8 = _moments(layer, depthwise)
    q = _solve(steps, seen, cross)
    if _squared_error(q, steps, seen, cross) > _squared_error(np.rint(steps), steps, seen, cross):
        q = np.rint(steps)  # clipped columns can leave the search worse than plain rounding
    real = q * (scales[:, None, None] if depthwise else scales[None, :, None])
    shift = (rows @ mean_float[..., None] - real @ mean_int8[..., None]).reshape(-1)
    bias = rounded_bias(layer.bias.astype(np.float64) + shift, layer.int8_bias)
    flat = q.reshape(matrix.shape).astype(np.int8)
    data = flat.T.reshape(layer.weights.shape) if depthwise else flat.reshape(layer.weights.shape)
    return ir.Constant(layer.int8_weights.type, np.ascontiguousarray(data)), bias


def _moments(layer: Layer, depthwise: bool) -> tuple[Array, Array, Array, Array]:
    """Centred second moments of what the window sees: int8 with int8 (G, K, K), float with int8 (G, K, K), and the
    means of both (G, K). All float64, per position.
    """
    op, count = layer.node.op, 0
    sums: list[Array] = []
    for image in range(len(layer.inputs)):
        f, x = (
            _columns(taps(op, layer.weights, v), depthwise) for v in (layer.inputs[image], layer.real_inputs(image))
        )
        count += f.shape[1]
        new = [x.transpose(0, 2, 1) @ x, f.transpose(0, 2, 1) @ x, f.sum(axis=1), x.sum(axis=1)]
        sums = new if not sums else [a + b for a, b in zip(sums, new, strict=True)]
    seen, cross, mean_float, mean_int8 = (total / count for total in sums)
    seen -= mean_int8[:, :, None] * mean_int8[:, None, :]
    cross -= mean_float[:, :, None] * mean_int8[:, None, :]
    return seen, cross, mean_float, mean_int8


def _columns(views: list[Array], depthwise: bool) -> Array:
    """(G, positions, K) float64 from the window's taps."""
    if depthwise:
        return np.stack(views, axis=-1).transpose(1, 0, 2).astype(np.float64)
    return np.concatenate(views, axis=-1)[None].astype(np.float64)


def _solve(steps: Array, seen: Array, cross: Array) -> Array:
    """Integers q (G, R, K) of little squared error of q x against steps f."""
    columns = seen.shape[1]
    damping = DAMPING * np.trace(seen, axis1=1, axis2=2) / columns
    damping = np.where(damping > 0, damping, 1.0)[:, None, None] * np.eye(columns)
    hessian = seen + damping
    wanted = steps @ (cross + damping)  # (G, R, K): the right-hand side of the normal equations
    best = np.linalg.solve(hessian, wanted.transpose(0, 2, 1)).transpose(0, 2, 1)
    q = _feed_errors_forward(best, hessian)
    return _descend(q, wanted, hessian)


def _feed_errors_forward(best: Array, hessian: Array) -> Array:
    """GPTQ: rounds column after column, and moves the columns still to come to make up for each one's error."""
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).transpose(0, 2, 1)  # inv(H) = U^T U
    rest, q = best.copy(), np.empty_like(best)
    for k in range(best.shape[2]):
        q[:, :, k] = np.clip(np.rint(rest[:, :, k]), -WEIGHT_MAX, WEIGHT_MAX)
        error = (rest[:, :, k] - q[:, :, k]) / upper[:, k, k][:, None]
        rest[:, :, k + 1 :] -= error[:, :, None] * upper[:, None, k, k + 1 :]
    return q


def _descend(q: Array, wanted: Array, hessian: Array) -> Array:
    """Coordinate descent: each weight in turn to the integer of least error, all rows at once."""
    gradient: Array = q @ hessian - wanted
    for _ in range(SWEEPS):
        for k in range(q.shape[2]):
            target = np.rint(q[:, :, k] - gradient[:, :, k] / hessian[:, k, k][:, None])
            change = np.clip(target, -WEIGHT_MAX, WEIGHT_MAX) - q[:, :, k]
            if change.any():
                q[:, :, k] += change
                gradient += change[:, :, None] * hessian[:, None, k, :]
    return q


def _squared_error(q: Array, steps: Array, seen: Array, cross: Array) -> float:
    """E (q x - steps f)^2 up to a constant."""
    return float(np.sum((q @ seen) * q) - 2 * np.sum((steps @ cross) * q))
