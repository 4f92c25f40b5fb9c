"""The TVM backend: an int8 graph -> TIR kernels -> one library of machine code, a plan and packed weights."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import tvm

from ...models import graph as ir
from ...runtime import native as native_sources
from ...runtime.plan import Plan, pack
from ...targets.spec import TargetSpec
from ..fusion import family_of
from ..kernels.arm import lower as arm
from ..kernels.batch import repeat
from ..kernels.generic import lower as generic
from ..kernels.kernel_call import KernelCall
from ..kernels.mixed import is_mixed, lower_mixed
from ..kernels.x86 import lower as x86
from ..passes.set_batch import set_batch
from . import zig
from .assembly import assemble

_FAMILIES: Mapping[str, Callable[..., tuple[KernelCall, ...]]] = {
    "x86": x86.lower,
    "arm": arm.lower,
    "generic": generic.lower,
}


@dataclass(frozen=True, eq=False)
class Compiled:
    """A network for one CPU: the plan, the weights it points into, and the kernels' shared object."""

    plan: Plan
    weights: bytes = field(repr=False)
    library: bytes = field(repr=False)


def lower(graph: ir.Graph, target: TargetSpec, choices: Mapping[str, int] | None = None) -> tuple[KernelCall, ...]:
    """The network as kernel calls, with measured task sizes where ``choices`` has them (``call.TaskSize``).

    Layers that stay in float run on the float kernels, which are the same for every processor; a batch runs image
    after image. Raises GraphError for what has no kernel, ValueError for a processor that its family knows no kernels
    for, or a choice that cannot be.
    """
    if graph.inputs[0].type.shape[0] != 1:
        return repeat(graph, lower(set_batch(graph, 1), target, choices))
    family = _FAMILIES[family_of(target)]
    return lower_mixed(graph, target, choices, family) if is_mixed(graph) else family(graph, target, choices)


def llvm_target(target: TargetSpec) -> tvm.target.Target:
    """What TVM generates code for."""
    options: dict[str, str | list[str]] = {"kind": "llvm", "mtriple": target.triple, "mcpu": target.cpu}
    if target.llvm_features:
        options["mattr"] = list(target.llvm_features)
    return tvm.target.Target(options)


def compile_kernels(calls: Sequence[KernelCall], target: TargetSpec) -> tvm.runtime.Executable:
    """Machine code for every distinct kernel, however often it is called."""
    builders = {call.symbol: call.build for call in calls}
    functions = {symbol: build() for symbol, build in builders.items()}
    # The pipeline "s_tir", the default, has a pass that is quadratic in the statements of an unrolled kernel.
    return tvm.compile(tvm.IRModule(functions), target=llvm_target(target), tir_pipeline="tirx")


def build(graph: ir.Graph, target: TargetSpec, choices: Mapping[str, int] | None = None) -> Compiled:
    """Given: an int8 graph. Result: everything the native runtime needs to run it on ``target``.

    Raises GraphError for what has no kernel, ValueError as ``lower`` does, RuntimeError where linking fails.
    """
    calls = lower(graph, target, choices)
    plan, weights = assemble(graph, calls, "cpu", target.features)
    return Compiled(plan, weights, link(compile_kernels(calls, target), target))


def build_files(graph: ir.Graph, target: TargetSpec, choices: Mapping[str, int] | None = None) -> dict[str, bytes]:
    """``build``'s result as the files of a bundle: plan.bin, weights.bin, kernels.so."""
    compiled = build(graph, target, choices)
    digests = (hashlib.sha256(data).hexdigest() for data in (compiled.weights, compiled.library))
    plan = pack(compiled.plan, *digests)
    return {"plan.bin": plan, "weights.bin": compiled.weights, "kernels.so": compiled.library}


def link(executable: tvm.runtime.Executable, target: TargetSpec) -> bytes:
    """The kernels as a shared object that needs no library, with the stub that stands for TVM's error function.

    Its segments begin at multiples of 64 KB: no Linux or Android has larger pages, and some no smaller ones.
    """
    stub = Path(native_sources.__file__).with_name("kernel_stub.c")
    return export(executable, target, stub, options=["-Wl,-z,max-page-size=65536"])


def export(
    executable: tvm.runtime.Executable, target: TargetSpec, *sources: Path, options: Sequence[str] = ()
) -> bytes:
    """A shared object of what was compiled, C ``sources`` added. Raises RuntimeError, OSError.

    LLVM ends the whole process, with status 1, where it cannot write a file: so it writes into memory, by links from
    the names that TVM gives its object files.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as memory:
        for name in ("lib0.o", "devc.o"):
            descriptor = os.memfd_create(name)
            memory.callback(os.close, descriptor)
            Path(folder, name).symlink_to(f"/proc/self/fd/{descriptor}")
        path = Path(folder) / "library.so"
        linker = zig_linker(target, *sources)
        executable.export_library(str(path), fcompile=linker, workspace_dir=folder, options=list(options))
        return path.read_bytes()


def zig_linker(target: TargetSpec, *sources: Path) -> Callable[..., None]:
    """What ``export_library`` calls to make a shared object of object files, C ``sources`` added."""

    def link_objects(output: str, objects: list[str], options: list[str] | None = None) -> None:
        for name in objects:
            data = Path(name).read_bytes()
            Path(name).unlink()  # a link into this process's memory, which another cannot follow
            Path(name).write_bytes(data)
        command = [*zig.compiler(target.architecture), "-shared", "-fPIC", "-O2", "-s", "-o", output]
        command += [*objects, *map(str, sources), *(options or [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip()[-2000:] or f"zig ended with status {done.returncode}; is a disk full?"
            raise RuntimeError(f"linking the kernels for {target.name} failed: {reason}")

    return link_objects
