"""TFLite files under LiteRT (``ai-edge-litert``) with XNNPACK, and, for comparison, under ``tflite-runtime``.

LiteRT with XNNPACK executes an int8 file bit for bit as the reference. Two things do not, and say so here: the
``tflite-runtime`` package (its last release gives no int8 operator to XNNPACK and its own kernels round twice), and
LiteRT without XNNPACK.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .engine import Array, EngineError, fill_batches

Library = Literal["ai_edge_litert", "tflite_runtime"]

_INSTALL = {
    "ai_edge_litert": "the package ai-edge-litert: pip install 'xceptile[litert]'",
    "tflite_runtime": "the package tflite-runtime (Python 3.11 at most, numpy below 2): pip install tflite-runtime",
}


@dataclass(frozen=True)
class Placement:
    """Where one operator of a file runs. ``tensor`` is the tensor it makes, ``op`` its TFLite name."""

    tensor: str
    op: str
    delegated: bool


def _delegated_operators(operators: Sequence[Mapping[str, Any]]) -> set[int]:
    """Positions of the operators that a delegate took over.

    Given the interpreter's operators: those of the file, then one DELEGATE for each part taken over.
    A part is what lies between a DELEGATE's outputs and its inputs: walked from its outputs backwards.
    """
    maker = {
        output: index
        for index, operator in enumerate(operators)
        if operator["op_name"] != "DELEGATE"
        for output in operator["outputs"]
    }
    found: set[int] = set()
    for part in operators:
        if part["op_name"] != "DELEGATE":
            continue
        borders = set(part["inputs"])
        pending = list(part["outputs"])
        while pending:
            tensor = pending.pop()
            index = maker.get(tensor)
            if index is None or tensor in borders or index in found:
                continue
            found.add(index)
            pending.extend(operators[index]["inputs"])
    return found


class LiteRtEngine:
    """A ``.tflite`` file, as a path or as its bytes, on ``threads`` threads of this machine.

    ``library`` chooses the interpreter; ``xnnpack`` False keeps to the library's own kernels.
    Raises EngineError where the library is not installed or refuses the file.
    """

    def __init__(
        self, model: Path | bytes, threads: int = 1, *, library: Library = "ai_edge_litert", xnnpack: bool = True
    ) -> None:
        self.name = "litert" if library == "ai_edge_litert" else "tflite-runtime"
        try:
            module = importlib.import_module(f"{library}.interpreter")
        except ImportError as error:
            raise EngineError(f"{self.name} needs {_INSTALL[library]} ({error})") from error
        resolvers = module.OpResolverType
        source = {"model_content": model} if isinstance(model, bytes) else {"model_path": str(model)}
        try:
            self._interpreter = module.Interpreter(
                **source,
                num_threads=threads,
                experimental_op_resolver_type=(
                    resolvers.AUTO if xnnpack else resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
                ),
            )
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            where = "the given bytes" if isinstance(model, bytes) else str(model)
            raise EngineError(f"{self.name} refuses {where}: {error}") from error
        self._inputs = self._interpreter.get_input_details()
        self._outputs = self._interpreter.get_output_details()
        self._lock = threading.Lock()  # an interpreter has one set of tensors, which a run holds from input to output

    def placements(self) -> tuple[Placement, ...]:
        """Every operator of the file, in order, and whether a delegate (XNNPACK) runs it."""
        operators = [dict(operator) for operator in self._interpreter._get_ops_details()]
        delegated = _delegated_operators(operators)
        names = {detail["index"]: detail["name"] for detail in self._interpreter.get_tensor_details()}
        return tuple(
            Placement(names[operator["outputs"][0]], operator["op_name"], index in delegated)
            for index, operator in enumerate(operators)
            if operator["op_name"] != "DELEGATE"
        )

    def run_once(self, *inputs: Array) -> tuple[Array, ...]:
        """All inputs of the file, in its shapes -> all its outputs. Raises EngineError where an input does not fit."""
        with self._lock:
            try:
                for detail, value in zip(self._inputs, inputs, strict=True):
                    self._interpreter.set_tensor(detail["index"], value)
                self._interpreter.invoke()
            except (ValueError, RuntimeError) as error:
                raise EngineError(f"{self.name}: {error}") from error
            return tuple(self._interpreter.get_tensor(detail["index"]) for detail in self._outputs)

    def run(self, x: Array) -> Array:
        """(B, H, W, C) images, batch after batch -> (B, classes)."""
        batch = int(self._inputs[0]["shape"][0])
        groups = fill_batches(x, batch).reshape(-1, batch, *x.shape[1:])
        return np.concatenate([self.run_once(group)[0] for group in groups])[: len(x)]

    def time_ms(self, x: Array, repeats: int, warmup: int) -> list[float]:
        """Wall time of single inferences on the batch ``x`` (N, H, W, C), without copying tensors in and out, in ms."""
        self._interpreter.set_tensor(self._inputs[0]["index"], x)
        samples = []
        for _ in range(warmup + repeats):
            start = time.perf_counter()
            self._interpreter.invoke()
            samples.append((time.perf_counter() - start) * 1e3)
        return samples[warmup:]

    def close(self) -> None:
        """Frees the interpreter; the engine cannot be used afterwards."""
        self._interpreter = None
