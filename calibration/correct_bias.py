"""Empirical bias correction: rounding weights and clipping activations shift a layer's mean; its bias takes it back.

Source: M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
https://arxiv.org/abs/1906.04721, appendix D: on calibration images, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..models import graph as ir
from .refine import Array, Layer, as_matrix, real_weights, rounded_bias, taps


def shift_bias(layer: Layer) -> tuple[ir.Constant, ir.Constant]:
    """The layer's int8 weights as they are, and the bias with which every channel's mean before the activation equals
    the float network's: a step of ``refine``.
    """
    count = range(len(layer.inputs))
    expected = mean_output(layer, layer.weights, [layer.inputs[i] for i in count])
    seen = mean_output(layer, real_weights(layer.int8_weights), [layer.real_inputs(i) for i in count])
    return layer.int8_weights, rounded_bias(layer.bias.astype(np.float64) + expected - seen, layer.int8_bias)


def mean_output(layer: Layer, weights: Array, inputs: Sequence[Array]) -> Array:
    """Each channel's mean over images and positions, without bias and activation, (C,) float64.

    The layer is linear: the mean of its outputs is the output for the mean of its inputs.
    """
    op = layer.node.op
    means = np.mean([[tap.mean(axis=0, dtype=np.float64) for tap in taps(op, weights, x)] for x in inputs], axis=0)
    matrix = as_matrix(op, weights).astype(np.float64)  # (O, positions, I) or (C, positions)
    if isinstance(op, ir.DepthwiseConv2d):
        return np.asarray((matrix * means.T).sum(axis=1))
    return np.asarray(np.tensordot(matrix, means, axes=([1, 2], [0, 1])))
