"""The OpenCL backend: a graph -> TIR kernels -> OpenCL C, a plan and packed weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import tvm

from ...models import graph as ir
from ...runtime.plan import pack
from ...targets.spec import TargetSpec
from ..kernels.kernel_call import KernelCall
from ..kernels.opencl import lower as opencl
from .assembly import assemble

PREAMBLE = Path(opencl.__file__).with_name("preamble.cl")


def generate(calls: Sequence[KernelCall]) -> str:
    """OpenCL C of every distinct kernel, behind the preamble. A kernel's name is its symbol."""
    functions = {symbol: build() for symbol, build in {call.symbol: call.build for call in calls}.items()}
    # The host's code is not used; the kernels do not depend on which Mali or Adreno it is.
    target = tvm.target.Target({"kind": "opencl"}, host={"kind": "llvm"})
    executable = tvm.compile(tvm.IRModule(functions), target=target, tir_pipeline="tirx")
    (module,) = executable.mod.imports
    source = module.inspect_source()
    source = re.sub(r"^__kernel void (\w+)_kernel\([^;{]*\);\n", "", source, flags=re.MULTILINE)
    sizes = {call.symbol: ", ".join(map(str, call.launch.group_size)) for call in calls if call.launch}
    # With a group's size known, a compiler gives each work-item the registers that there are for it and no more.
    source = re.sub(
        r"^__kernel void (\w+)_kernel\(",
        lambda found: f"__kernel __attribute__((reqd_work_group_size({sizes[found[1]]}))) void {found[1]}(",
        source,
        flags=re.MULTILINE,
    )
    source = re.sub(r"^// Function: .*\n", "", source, flags=re.MULTILINE)
    for call in calls:
        _check_parameters(source, call)
    return PREAMBLE.read_text(encoding="utf-8") + "\n" + source


def _check_parameters(source: str, call: KernelCall) -> None:
    """Raises RuntimeError where the generated kernel does not take the call's operands in order: the code generator
    sorts parameters by name and drops those that nothing reads."""
    found = re.search(rf"^__kernel .* void {call.symbol}\((.*)\) {{$", source, flags=re.MULTILINE)
    names = re.findall(r"\bp(\d\d)_ptr\b", found.group(1)) if found else []
    if names != [f"{i:02d}" for i in range(len(call.operands))]:
        raise RuntimeError(f"{call.symbol}: the code generator made the parameters {names}")


def build_files(graph: ir.Graph, target: TargetSpec) -> dict[str, bytes]:
    """The files of a bundle's native folder: plan.bin, weights.bin, kernels.cl.

    ``graph`` is int8, or a float one behind ``passes.take_int8_pixels`` for the float16 build. Raises what
    ``opencl.lower`` does.
    """
    return files_of(graph, opencl.lower(graph, target))


def files_of(graph: ir.Graph, calls: Sequence[KernelCall]) -> dict[str, bytes]:
    """``build_files`` for a graph that ``opencl.lower`` has made ``calls`` of."""
    plan, weights = assemble(graph, calls, "opencl")
    kernels = generate(calls).encode()
    digests = (hashlib.sha256(data).hexdigest() for data in (weights, kernels))
    return {"plan.bin": pack(plan, *digests), "weights.bin": weights, "kernels.cl": kernels}
