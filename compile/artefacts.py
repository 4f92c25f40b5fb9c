"""The executable forms of a network that a bundle holds: each a few files, and what is to be known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..calibration.table import CalibrationTable
from ..models.graph import Graph, GraphError
from ..runtime import bundle as bundles
from ..runtime.bundle import Artefact
from ..targets.spec import TargetSpec
from . import gpu_cost
from .backends import tflite
from .float16_range import Float16RangeError, check_float16_range
from .passes.take_int8_pixels import take_int8_pixels

Progress = Callable[[str, float], None]  # what is being done, and how much of it, 0..1


@dataclass(frozen=True)
class Made:
    """Artefacts with their files; ``told`` goes into the manifest's provenance; ``packages`` made them."""

    artefacts: tuple[Artefact, ...]
    files: Mapping[str, bytes] = field(repr=False)
    told: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()


def native_cpu(int8: Graph, target: TargetSpec, choices: Mapping[str, int] | None, progress: Progress) -> Made:
    """Kernels for the target's processor, the runtime, and the plan that measures the machine's roof, where it is
    known by which instruction."""
    from .backends import cpu, native_runtime, roof

    progress(f"compile kernels for {target.name}", 0.0)
    native = cpu.build_files(int8, target, choices)
    progress(f"compile the runtime for {target.name}", 0.6)
    files = {f"{bundles.NATIVE}/{name}": data for name, data in (native | native_runtime.build(target)).items()}
    if roof.knows(target):
        files |= {f"{bundles.ROOF}/{name}": data for name, data in roof.build_files(target).items()}
    return Made((Artefact("native", "int8", tuple(sorted(files))),), files, {}, ("apache-tvm", "ziglang"))


def native_gpu(int8: Graph, real: Graph, target: TargetSpec, table: CalibrationTable, progress: Progress) -> Made:
    """Kernels for the target's GPU in int8 and, as the rival, in float16; the runtime; an estimate of each latency.

    Where calibration saw values past float16's range, there is no float16 build, and the manifest says why.
    """
    from .backends import cuda, native_runtime, opencl
    from .kernels.cuda import lower as cuda_kernels
    from .kernels.opencl import lower as opencl_kernels

    assert target.gpu is not None
    runtime = native_runtime.build(target)
    rehearsal = {f"{bundles.REHEARSAL}/{name}": data for name, data in native_runtime.build_rehearsal().items()}
    told = {"model of the estimates": gpu_cost.MODEL}
    if target.engine == "cuda":
        told |= {f"needed by {name}": need for name, need in cuda.requirements(target).items()}
        told["litert"] = "runs on the board's processor cores: LiteRT has no CUDA delegate"
    graphs = {"int8": int8}
    try:
        check_float16_range(real, table)
        pixels = int8.inputs[0].type.per_tensor
        graphs["float16"] = take_int8_pixels(real, pixels)
    except Float16RangeError as error:
        told["no float16 build"] = str(error)
    artefacts: list[Artefact] = []
    files: dict[str, bytes] = {}
    for dtype, graph in graphs.items():
        progress(f"compile {dtype} kernels for {target.name}", 0.0)
        family = cuda_kernels if target.engine == "cuda" else opencl_kernels
        try:
            calls = family.lower(graph, target)
        except GraphError as error:
            if dtype == "int8":
                raise
            told["no float16 build"] = str(error)  # the rival alone
            continue
        made = (
            cuda.files_of(graph, calls, target.gpu.arch) if target.engine == "cuda" else opencl.files_of(graph, calls)
        )
        made[bundles.ESTIMATE] = gpu_cost.estimate_to_json(gpu_cost.estimate(calls, target.gpu, dtype))
        folder = bundles.NATIVE if dtype == "int8" else bundles.NATIVE_FLOAT16
        own = {f"{folder}/{name}": data for name, data in (made | runtime).items()}
        artefacts.append(Artefact("native", dtype, tuple(sorted(own | rehearsal))))
        files |= own
    return Made(tuple(artefacts), files | rehearsal, told, ("apache-tvm", "ziglang"))


def relax_vm(int8: Graph, target: TargetSpec, progress: Progress) -> Made:
    """The same kernels as a library for TVM's own virtual machine."""
    from .backends import relax_vm as backend

    progress("assemble the Relax module", 0.8)
    name = "relax/network.so"
    return Made((Artefact("relax-vm", "int8", (name,)),), {name: backend.build(int8, target)}, {}, ("apache-tvm",))


def litert(int8: Graph, real: Graph, progress: Progress) -> Made:
    """The int8 network for LiteRT with XNNPACK, and the float one as the yardstick."""
    progress("write TFLite", 0.9)
    files = {bundles.LITERT_INT8: tflite.serialize(int8), bundles.LITERT_FLOAT: tflite.serialize(real)}
    artefacts = (
        Artefact("litert", "int8", (bundles.LITERT_INT8,)),
        Artefact("litert", "float32", (bundles.LITERT_FLOAT,)),
    )
    return Made(artefacts, files, {}, ("tflite", "flatbuffers"))


def litert_gpu(int8: Graph, real: Graph) -> Made:
    """The files for LiteRT's GPU delegate, with what it does with each operator.

    The delegate computes in float: its int8 file saves memory, and is not the integer contract.
    """
    files = {
        bundles.GPU_DELEGATE_FLOAT16: tflite.serialize(real, for_gpu=True, half=True),
        bundles.GPU_DELEGATE_INT8: tflite.serialize(int8, for_gpu=True),
    }
    said = {
        bundles.GPU_DELEGATE_FLOAT16: tflite.gpu_statement(real, half=True),
        bundles.GPU_DELEGATE_INT8: tflite.gpu_statement(int8),
    }
    told = {f"GPU delegate, {name}": "; ".join(f"{op}: {how}" for op, how in ops.items()) for name, ops in said.items()}
    artefacts = (
        Artefact("gpu-delegate", "float16", (bundles.GPU_DELEGATE_FLOAT16,)),
        Artefact("gpu-delegate", "int8", (bundles.GPU_DELEGATE_INT8,)),
    )
    return Made(artefacts, files, told, ("tflite", "flatbuffers"))


def onnx_qdq(int8: Graph, inputs: NDArray[np.int8], outputs: NDArray[np.int8]) -> Made:
    """The two ONNX files, each with its distance from the contract on the golden ``inputs`` and ``outputs``."""
    from .backends import onnx_qdq as backend

    exact, symmetric = "onnx/qdq.onnx", "onnx/tensorrt.onnx"
    files = {exact: backend.serialize(int8), symmetric: backend.serialize_symmetric(int8)}
    said = {flag: str(backend.departure(int8, inputs, outputs, symmetric=flag)) for flag in (False, True)}
    told = {
        exact: f"the contract's scales and zero points; {said[False]}",
        symmetric: f"zero point 0 everywhere, as TensorRT demands: not the contract; {said[True]}",
    }
    return Made((Artefact("onnx-qdq", "int8", tuple(files)),), files, told, ("onnx",))
