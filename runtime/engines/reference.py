"""The numpy reference as an engine: slow, and by definition right."""

from __future__ import annotations

import time

import numpy as np

from ...models.graph import Graph
from .. import reference
from .engine import Array, fill_batches


class ReferenceEngine:
    """Interprets a graph, int8 or float32."""

    name = "reference"

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._batch = graph.inputs[0].type.shape[0]

    def run(self, x: Array) -> Array:
        groups = fill_batches(x, self._batch).reshape(-1, self._batch, *x.shape[1:])
        return np.concatenate([reference.run(self._graph, group)[0] for group in groups])[: len(x)]

    def time_ms(self, x: Array, repeats: int, warmup: int) -> list[float]:
        samples = []
        for _ in range(warmup + repeats):
            start = time.perf_counter()
            self.run(x)
            samples.append((time.perf_counter() - start) * 1e3)
        return samples[warmup:]

    def close(self) -> None:
        pass
