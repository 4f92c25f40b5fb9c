"""Bundles of which one layer computes something else than the reference, and the compilers that make such."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from xceptile.compile import divergence
from xceptile.compile.backends import cpu, opencl, tflite
from xceptile.models import graph as ir
from xceptile.models import serialize
from xceptile.runtime import bundle as bundles
from xceptile.runtime.bundle import Bundle, write_bundle
from xceptile.targets.spec import TargetSpec


def with_other_bias(graph: ir.Graph, layer: str, steps: int = 3000) -> ir.Graph:
    if layer not in {node.name for node in graph.nodes}:
        return graph
    name = graph.node(layer).inputs[2]
    bias = graph.constants[name]
    changed = ir.Constant(bias.type, bias.data + np.int32(steps))
    return graph.with_nodes(graph.nodes, {**graph.constants, name: changed})


def plant_fault(patch: pytest.MonkeyPatch, layer: str) -> None:
    """From now on what is compiled computes a layer with another bias."""
    serialized, built = tflite.serialize, {module: module.build_files for module in (opencl, cpu)}
    patch.setattr(tflite, "serialize", lambda graph: serialized(with_other_bias(graph, layer)))
    for module, real in built.items():
        patch.setattr(
            module, "build_files", lambda graph, target, real=real: real(with_other_bias(graph, layer), target)
        )


def faulty_bundle(bundle: Bundle, path: Path, layer: str, engine: str, target: TargetSpec | None = None) -> Bundle:
    """A bundle for a target, with one artefact, which computes a layer with another bias."""
    target = target or bundle.manifest.target
    graph = serialize.load(bundle.file(bundles.INT8_GRAPH))
    graph = divergence.set_batch(graph, bundle.manifest.input.shape[0])
    with pytest.MonkeyPatch.context() as patch:
        plant_fault(patch, layer)
        artefact, files = divergence._compile(graph, target, engine)
    for name in (bundles.INT8_GRAPH, bundles.GOLDEN_INPUT, bundles.GOLDEN_OUTPUT):
        files[name] = bundle.file(name).read_bytes()
    return write_bundle(path, replace(bundle.manifest, target=target, artefacts=(artefact,)), files)
