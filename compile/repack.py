"""A bundle's plans, weights and TFLite files, made anew of its graphs: a changed bit that no image shows is seen here.

Nothing is compiled: what is compared says what a kernel computes on, and the plan holds the hashes of the kernels.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .. import __version__
from ..models import serialize
from ..models.graph import Graph
from ..runtime import bundle as bundles
from ..runtime.bundle import Bundle
from ..runtime.plan import Plan, pack, unpack
from .passes.set_batch import set_batch
from .passes.take_int8_pixels import take_int8_pixels
from .tuning import TUNED

if TYPE_CHECKING:  # which TVM comes with
    from .kernels.kernel_call import KernelCall


@dataclass(frozen=True)
class Repacked:
    """Which files of a bundle equal those made anew, which do not, and why others were not compared."""

    equal: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        parts = [f"{', '.join(self.equal)} are what the bundle's graphs make"] if self.equal else []
        parts += [f"{', '.join(self.differing)} DIFFER from it: damaged, or exchanged"] if self.differing else []
        return "; ".join([*parts, *([f"not compared: {self.reason}"] if self.reason else [])])


def repack(bundle: Bundle) -> Repacked:
    """Compares. Never raises for what cannot be made here: that is the ``reason``."""
    if bundle.manifest.xceptile != __version__:
        return Repacked(reason=f"made by xceptile {bundle.manifest.xceptile}, this is {__version__}")
    equal, differing, reasons = list[str](), list[str](), list[str]()
    batch = bundle.manifest.input.shape[0]
    int8, real = (
        set_batch(serialize.load(bundle.file(name)), batch) for name in (bundles.INT8_GRAPH, bundles.FLOAT_GRAPH)
    )
    for make in (_native, _litert):
        try:
            for name, data in make(bundle, int8, real):
                (equal if bundle.file(name).read_bytes() == data else differing).append(name)
        except ModuleNotFoundError as error:
            reasons.append(f"that needs the package {error.name}: pip install 'xceptile[compile]'")
        except (ValueError, LookupError, RuntimeError) as error:
            reasons.append(str(error))
    return Repacked(tuple(equal), tuple(differing), "; ".join(dict.fromkeys(reasons)))


def _litert(bundle: Bundle, int8: Graph, real: Graph) -> Iterator[tuple[str, bytes]]:
    graphs = {bundles.LITERT_INT8: int8, bundles.LITERT_FLOAT: real}
    for name in filter(bundle.holds, graphs):
        from .backends import tflite

        yield name, tflite.serialize(graphs[name])


def _native(bundle: Bundle, int8: Graph, real: Graph) -> Iterator[tuple[str, bytes]]:
    target, manifest = bundle.manifest.target, bundle.manifest
    float16 = real if target.engine == "cpu" else take_int8_pixels(real, int8.inputs[0].type.per_tensor)
    for folder, graph in ((bundles.NATIVE, int8), (bundles.NATIVE_FLOAT16, float16)):
        plan_name, weights_name = f"{folder}/plan.bin", f"{folder}/weights.bin"
        if not bundle.holds(plan_name):
            continue
        written = bundle.file(plan_name).read_bytes()
        plan, weights = _assembled(bundle, graph, unpack(written))
        kernels = b"".join(bundle.file(name).read_bytes() for name in _kernels(bundle, folder))
        plan = replace(plan, tolerance=manifest.allowed_steps, pixel_table=manifest.pixels.to_bytes())
        yield plan_name, pack(plan, *(hashlib.sha256(data).hexdigest() for data in (weights, kernels)))
        yield weights_name, weights


def _kernels(bundle: Bundle, folder: str) -> Sequence[str]:
    """The files whose hash together is in the plan, in that order (CUDA's: as the runtime tries them)."""
    names = (f"{folder}/kernels.{suffix}" for suffix in ("so", "cl", "cubin", "ptx", "cu"))
    return [name for name in names if bundle.holds(name)]


def _assembled(bundle: Bundle, graph: Graph, written: Plan) -> tuple[Plan, bytes]:
    from .backends.assembly import assemble

    target = bundle.manifest.target
    if target.engine == "cuda":
        from .kernels.cuda import lower as cuda

        return assemble(graph, cuda.lower(graph, target), "cuda")
    if target.engine == "opencl":
        from .kernels.opencl import lower as opencl

        return assemble(graph, opencl.lower(graph, target), "opencl")
    from .backends import cpu

    calls = cpu.lower(graph, target)
    if TUNED in bundle.manifest.provenance:
        calls = cpu.lower(graph, target, _choices(calls, written))
    return assemble(graph, calls, "cpu", target.features)


def _choices(calls: Sequence[KernelCall], written: Plan) -> dict[str, int]:
    """The task sizes of a plan whose network was lowered with others: a kernel's name holds its own."""
    found = {}
    for call, step in zip(calls, written.steps, strict=False):
        if call.size is None or call.symbol == step.kernel:
            continue
        pairs = enumerate(zip(call.symbol, call.size.key, strict=False))
        start = next(index for index, (mine, key) in pairs if mine != key)  # where the key has 0 for the size
        pattern = re.escape(call.size.key[:start]) + r"([1-9]\d{0,9})" + re.escape(call.size.key[start + 1 :])
        if match := re.fullmatch(pattern, step.kernel):
            found[call.size.key] = int(match[1])
    return found
