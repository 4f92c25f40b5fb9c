"""The CUDA backend: a graph -> TIR kernels -> CUDA C++ -> a cubin, PTX, a plan and packed weights.

Three forms of the kernels ship, and the runtime tries them in this order: ``kernels.cubin``, machine code for exactly
the target's architecture; ``kernels.ptx``, which a driver as old as that architecture turns into machine code for it or
for a newer one; ``kernels.cu``, for a GPU that is older, by its own NVRTC: no header is included.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tvm

from ...models import graph as ir
from ...runtime.plan import Plan, pack
from ...targets.spec import TargetSpec
from ..kernels.cuda import lower as family
from ..kernels.kernel_call import KernelCall
from . import nvrtc
from .assembly import assemble

_PREAMBLE = Path(family.__file__).with_name("preamble.cuh")
_SIGNATURE = re.compile(r'(extern "C" __global__ void (?:__launch_bounds__\([\d, ]+\) )?)(\w+)_kernel\(([^)]*)\)')
_C_TYPES = {"int8": "signed char", "int16": "short", "int32": "int", "float32": "float"}


@dataclass(frozen=True, eq=False)
class Compiled:
    """A network for one GPU architecture. ``log`` names each kernel's registers and spills."""

    plan: Plan
    weights: bytes = field(repr=False)
    cubin: bytes = field(repr=False)
    ptx: bytes = field(repr=False)
    source: str = field(repr=False)
    log: str = field(repr=False)


def build(graph: ir.Graph, target: TargetSpec) -> Compiled:
    """Given: an int8 graph, or a float graph behind ``passes.take_int8_pixels``, of any batch size. Result: everything
    the native runtime needs to run it on ``target``, in int8 or in float16.

    Raises GraphError for what has no kernel, ValueError for a target without a GPU, nvrtc.NvrtcMissing or
    nvrtc.NvrtcError where the kernels cannot be compiled.
    """
    calls = family.lower(graph, target)
    assert target.gpu is not None
    return _compile(graph, calls, target.gpu.arch)


def _compile(graph: ir.Graph, calls: Sequence[KernelCall], arch: str) -> Compiled:
    plan, weights = assemble(graph, calls, "cuda")
    source = kernel_source(calls, arch)
    binary = nvrtc.compile_source(source, arch)
    return Compiled(plan, weights, binary.cubin, binary.ptx, source, binary.log)


def build_files(graph: ir.Graph, target: TargetSpec) -> dict[str, bytes]:
    """``build``'s result as the files of a bundle."""
    assert target.gpu is not None
    return files_of(graph, family.lower(graph, target), target.gpu.arch)


def files_of(graph: ir.Graph, calls: Sequence[KernelCall], arch: str) -> dict[str, bytes]:
    """``build_files`` for a graph that ``cuda.lower`` has made ``calls`` of."""
    compiled = _compile(graph, calls, arch)
    kernels = {
        "kernels.cubin": compiled.cubin,
        "kernels.ptx": compiled.ptx,
        "kernels.cu": compiled.source.encode(),
    }
    digests = (hashlib.sha256(data).hexdigest() for data in (compiled.weights, b"".join(kernels.values())))
    return {"plan.bin": pack(compiled.plan, *digests), "weights.bin": compiled.weights, **kernels}


def requirements(target: TargetSpec) -> dict[str, str]:
    """By file name, which driver and compiler versions each form of the kernels needs: for the bundle's manifest.

    Sources: CUDA Compatibility (a cubin runs on every driver of its compiler's major version, and later ones), the
    PTX ISA's table of releases (a driver reads the PTX of its own CUDA version and older), the JetPack archive.
    """
    assert target.gpu is not None
    arch = target.gpu.arch
    _, version = nvrtc.library_for(arch)
    ptx = nvrtc.ptx_version(arch) or "9.0"
    reader = {"6.3": "10.0 (JetPack 4)", "7.4": "11.4 (JetPack 5)", "9.0": "13.0 (JetPack 7)"}[ptx]
    jetpack = {12: "JetPack 6", 13: "JetPack 7"}[version.major]
    oldest = {12: "10.2 (JetPack 4)", 13: "13.0 (JetPack 7)"}[version.major]
    return {
        "kernels.cubin": f"{arch} exactly; a driver of CUDA {version.major}.0 or later ({jetpack})",
        "kernels.ptx": f"{arch} or later; PTX ISA {ptx}: a driver of CUDA {reader} or later",
        "kernels.cu": f"{arch} or later; the device's own NVRTC, CUDA {oldest} or later, no headers",
    }


def kernel_source(calls: Sequence[KernelCall], arch: str) -> str:
    """CUDA C++ of every distinct kernel, however often it is launched. Kernels bear their symbols' names."""
    functions = {call.symbol: call.build() for call in {call.symbol: call for call in calls}.values()}
    target = tvm.target.Target({"kind": "cuda", "arch": arch, "max_threads_per_block": 1024}, host={"kind": "llvm"})
    executable = tvm.compile(tvm.IRModule(functions), target=target, tir_pipeline="tirx")
    (module,) = executable.mod.imports
    return _PREAMBLE.read_text() + _rewrite(module.inspect_source(), functions)


def _rewrite(generated: str, functions: dict[str, tvm.tirx.PrimFunc]) -> str:
    """TVM's source without its headers. TVM orders a kernel's parameters by their use and drops unused ones: here they
    are those of the PrimFunc, in its order, as the plan's arguments are."""
    start = _SIGNATURE.search(generated)
    assert start is not None, "TVM generated no kernel"

    def signature(match: re.Match[str]) -> str:
        head, symbol, text = match.groups()
        known = {part.split()[-1]: part.strip() for part in text.split(",") if part.strip()}
        parameters = []
        for buffer in functions[symbol].params:
            name = f"{buffer.name}_ptr"
            parameters.append(known.pop(name, f"const {_C_TYPES[str(buffer.dtype)]}* __restrict__ {name}"))
        assert not known, f"{symbol}: unknown parameters {sorted(known)}"
        return f"{head}{symbol}({', '.join(parameters)})"

    body = _SIGNATURE.sub(signature, generated[start.start() :])
    body = re.sub(r"^extern .*\);\n", "", body, flags=re.MULTILINE)  # declarations before the definitions
    # Hexadecimal floats are C++17: NVRTC before CUDA 12 does not take them.
    body = re.sub(r"(0x[0-9a-f.]+p[+-]\d+)f/\*.*?\*/", lambda match: f"{float.fromhex(match[1])!r}f", body)
    # What shall be unrolled is written out already; unrolling more costs registers and minutes of compilation.
    return re.sub(r"^( *)for \(", r"\1#pragma unroll 1\n\1for (", body, flags=re.MULTILINE)
