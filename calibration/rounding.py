"""Rounding that looks at the data: weights go up or down so that the layer's output, not the weight, errs least.

The objective is that of AdaRound (M. Nagel et al., "Up or Down?", https://arxiv.org/abs/2004.10568), the squared error
of one layer's output before its activation, on the inputs that the quantized layers before it really give. It is
solved without gradients: error feedback column by column (E. Frantar et al., "GPTQ", https://arxiv.org/abs/2210.17323),
then coordinate descent on the integers, both in float64 from second moments, so no image is looked at twice. What
rounding moves a channel's mean by goes into its bias. Making up for the error of earlier layers as well (AdaRound's
asymmetric reconstruction) was tried and lost one decibel at the logits: at 8 bits that error is mostly activation
noise, which does not repeat on other images.
"""

from __future__ import annotations

import numpy as np

from ..models import graph as ir
from ..runtime.arithmetic import WEIGHT_MAX
from .refine import Array, Layer, as_matrix, rounded_bias, taps

DAMPING = 0.01  # of the mean second moment, added to all: GPTQ's "percdamp"
SWEEPS = 3


def round_layer(layer: Layer) -> tuple[ir.Constant, ir.Constant]:
    """The layer's weights rounded, and its bias set, for least error on the images: a step of ``refine``.

    Scales stay.
    """
    op = layer.node.op
    # Weights as rows: (groups, rows, columns), one group for a dense layer, one per channel for a depthwise one.
    depthwise = isinstance(op, ir.DepthwiseConv2d)
    matrix = as_matrix(op, layer.weights).astype(np.float64)
    rows = matrix[:, None, :] if depthwise else matrix.reshape(1, matrix.shape[0], -1)
    scales = np.asarray(layer.int8_weights.type.per_axis.scales, np.float64)
    scales = scales[:, None, None] if depthwise else scales[None, :, None]
    moments, mean = _moments(layer, depthwise)
    steps = rows / scales
    nearest = np.clip(np.rint(steps), -WEIGHT_MAX, WEIGHT_MAX)
    solved = _solve(steps, moments)
    # Per row the better of the two: a search among clipped columns may end above plain rounding.
    better = _squared_error(solved - steps, moments) < _squared_error(nearest - steps, moments)
    q = np.where(better[:, :, None], solved, nearest)
    shift = ((rows - q * scales) @ mean[:, :, None]).reshape(-1)
    bias = rounded_bias(layer.bias.astype(np.float64) + shift, layer.int8_bias)
    flat = q.reshape(matrix.shape).astype(np.int8)
    data = flat.T.reshape(layer.weights.shape) if depthwise else flat.reshape(layer.weights.shape)
    return ir.Constant(layer.int8_weights.type, np.ascontiguousarray(data)), bias


def _moments(layer: Layer, depthwise: bool) -> tuple[Array, Array]:
    """Covariance (G, K, K) and mean (G, K) of what the window sees of the int8 inputs, float64."""
    count, second, first = 0, np.zeros(()), np.zeros(())
    for image in range(len(layer.int8_inputs)):
        x = _columns(taps(layer.node.op, layer.weights, layer.real_inputs(image)), depthwise)
        count += x.shape[1]
        second = second + x.transpose(0, 2, 1) @ x
        first = first + x.sum(axis=1)
    mean = first / count
    return second / count - mean[:, :, None] * mean[:, None, :], mean


def _columns(views: list[Array], depthwise: bool) -> Array:
    """(G, positions, K) float64 from the window's taps."""
    if depthwise:
        return np.stack(views, axis=-1).transpose(1, 0, 2).astype(np.float64)
    return np.concatenate(views, axis=-1)[None].astype(np.float64)


def _solve(steps: Array, moments: Array) -> Array:
    """Integers q (G, R, K) for which (q - steps) x has little variance."""
    columns = moments.shape[1]
    damping = DAMPING * np.trace(moments, axis1=1, axis2=2) / columns
    hessian = moments + np.where(damping > 0, damping, 1.0)[:, None, None] * np.eye(columns)
    return _descend(_feed_errors_forward(steps, hessian), steps, hessian)


def _feed_errors_forward(steps: Array, hessian: Array) -> Array:
    """GPTQ: rounds column after column, and moves the columns still to come to make up for each one's error."""
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).transpose(0, 2, 1)  # inv(H) = U^T U
    rest, q = steps.copy(), np.empty_like(steps)
    for k in range(steps.shape[2]):
        q[:, :, k] = np.clip(np.rint(rest[:, :, k]), -WEIGHT_MAX, WEIGHT_MAX)
        error = (rest[:, :, k] - q[:, :, k]) / upper[:, k, k][:, None]
        rest[:, :, k + 1 :] -= error[:, :, None] * upper[:, None, k, k + 1 :]
    return q


def _descend(q: Array, steps: Array, hessian: Array) -> Array:
    """Coordinate descent: each weight in turn to the integer of least error, all rows at once."""
    gradient: Array = (q - steps) @ hessian
    for _ in range(SWEEPS):
        for k in range(q.shape[2]):
            target = np.rint(q[:, :, k] - gradient[:, :, k] / hessian[:, k, k][:, None])
            change = np.clip(target, -WEIGHT_MAX, WEIGHT_MAX) - q[:, :, k]
            if change.any():
                q[:, :, k] += change
                gradient += change[:, :, None] * hessian[:, None, k, :]
    return q


def _squared_error(error: Array, moments: Array) -> Array:
    """Variance of ``error`` x, per group and row (G, R)."""
    return np.asarray(np.sum((error @ moments) * error, axis=2))
