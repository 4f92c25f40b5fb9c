"""The machine's roof, to be measured on the device: a plan of its own that multiplies and reads as fast as can be.

Steps: ``fill`` writes a buffer, so that its pages exist; ``stream`` reads it; ``peak`` multiplies and accumulates in
registers with the best instruction of the target. The buffer is about the size of a network's weights and activations:
``stream`` gives the rate at which those arrive, from memory or from a cache that holds them all.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore architectures",
Communications of the ACM 52 (2009) 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ...runtime.plan import ALIGNMENT_BYTES, Argument, Plan, PlanTensor, Step, pack
from ...targets.spec import TargetSpec
from ..kernels.arm import neon as arm_neon
from ..kernels.arm.neon import Register
from ..kernels.kernel_call import Activation, KernelCall, Weights
from ..kernels.prim_func import Parameter, prim_func
from ..kernels.x86 import vector as x86_vector
from .cpu import compile_kernels, link

Expr: TypeAlias = tirx.Expr

LANES = 16  # int32 words written by a task: 64 bytes, a cache line
BLOCK_BYTES = 64 << 10  # of the buffer, filled or read by one task
BLOCKS = 480  # 30 MiB: with the results, less than 32 MiB of memory
SUMS = 8  # independent sums of a reading task
PEAK_TASKS = 128
PEAK_ROUNDS = 2048  # instructions on every accumulator, per task: about a millisecond on two fast cores in all


@dataclass(frozen=True)
class MultiplyAccumulate:
    """An instruction: acc = ``emit(acc, x)`` on vectors of int32 words does ``macs`` multiply-accumulates.

    ``accumulators`` independent ones hide its latency and fit into the registers with one operand. Where LLVM knows
    what the instruction does, ``emit`` multiplies acc itself: a product of constants would leave the loop.
    """

    name: str
    words: int
    macs: int
    accumulators: int
    emit: Callable[[Expr, Expr], Expr]


def _vpdpbusd(acc: Expr, x: Expr) -> Expr:
    a, w = (x86_vector.reinterpret(x, dtype) for dtype in ("uint8x64", "int8x64"))
    return x86_vector.dot(x86_vector.AVX512VNNI, acc, a, w)


def _vpmaddwd(acc: Expr, x: Expr) -> Expr:
    a, w = (x86_vector.reinterpret(each, "int16x16") for each in (acc, x))
    return x86_vector.dot(x86_vector.AVX2, acc, a, w)


def _sdot(acc: Expr, x: Expr) -> Expr:
    w = T.reinterpret("int8x16", x)
    return arm_neon.sdot(acc, w, w)


def _smmla(acc: Expr, x: Expr) -> Expr:
    w = T.reinterpret("int8x16", x)
    return arm_neon.smmla(acc, w, w)


def _smlal(acc: Expr, x: Expr) -> Expr:
    a, w = (arm_neon.low(T.reinterpret("int8x16", each), 16) for each in (acc, x))
    return T.reinterpret("int32x4", T.reinterpret("int16x8", acc) + arm_neon.smull(a, w))


# Best first, by the feature that brings it.
INSTRUCTIONS = {
    "avx512vnni": MultiplyAccumulate("vpdpbusd", 16, 64, 24, _vpdpbusd),
    "avx2": MultiplyAccumulate("vpmaddwd", 8, 16, 12, _vpmaddwd),
    "i8mm": MultiplyAccumulate("smmla", 4, 32, 24, _smmla),
    "dotprod": MultiplyAccumulate("sdot", 4, 16, 24, _sdot),
    "neon": MultiplyAccumulate("smlal", 4, 8, 24, _smlal),
}


def knows(target: TargetSpec) -> bool:
    """Whether any instruction of the target's is known here: portable kernels promise none."""
    return any(feature in target.features for feature in INSTRUCTIONS)


def best_instruction(target: TargetSpec) -> MultiplyAccumulate:
    """The instruction with the most multiply-accumulates. Raises ValueError where none is known."""
    for feature, instruction in INSTRUCTIONS.items():
        if feature in target.features:
            return instruction
    raise ValueError(f"{target.name}: no multiply-accumulate instruction is known for {target.features}")


def peak_macs(instruction: MultiplyAccumulate) -> int:
    """Multiply-accumulates of the step ``peak``."""
    return PEAK_TASKS * PEAK_ROUNDS * instruction.accumulators * instruction.macs


def operands(instruction: MultiplyAccumulate) -> NDArray[np.int32]:
    """What ``peak`` starts from: (accumulators + 1, words), the last row being the other factor."""
    rng = np.random.default_rng(0)
    shape = (instruction.accumulators + 1, instruction.words)
    return rng.integers(-(1 << 31), 1 << 31, shape, np.int64).astype(np.int32)


def _load(buffer: tirx.Buffer, offset: Expr | int, words: int) -> Expr:
    return buffer.vload([offset], f"int32x{words}")


def _total(registers: list[Register]) -> Expr:
    total = registers[0].get()
    for register in registers[1:]:
        total = total + register.get()
    return total


def _kernel(symbol: str, counts: dict[str, int], task: Callable[..., None]) -> tirx.PrimFunc:
    """A kernel over flat int32 buffers of ``counts`` words, whose task t is ``task(*buffers, t)``."""
    parameters = [Parameter(name, "int32", count) for name, count in counts.items()]
    return prim_func(symbol, parameters, lambda *buffers: partial(task, *buffers))


BLOCK_WORDS = BLOCK_BYTES // 4
_BUFFER = Activation("buffer", "int32", BLOCKS * BLOCK_WORDS)
_SUMS = Activation("sums", "int32", BLOCKS * LANES)
_PRODUCTS = Activation("products", "int32", PEAK_TASKS * LANES)


def _fill(words: int) -> tirx.PrimFunc:
    """Every word of block t: t."""

    def task(buffer: tirx.Buffer, t: Expr) -> None:
        with T.serial(0, BLOCK_WORDS // words) as i:
            T.buffer_store(buffer, T.Broadcast(t, words), [T.Ramp(t * BLOCK_WORDS + i * words, 1, words)])

    return _kernel("roof_fill", {"buffer": _BUFFER.count}, task)


def _stream(words: int) -> tirx.PrimFunc:
    """The sums of block t's words, each ``words``-th together."""

    def task(buffer: tirx.Buffer, sums: tirx.Buffer, t: Expr) -> None:
        registers = [Register(f"int32x{words}") for _ in range(SUMS)]
        for register in registers:
            register.set(T.Broadcast(T.int32(0), words))
        with T.serial(0, BLOCK_WORDS // (SUMS * words)) as i:
            for j, register in enumerate(registers):
                at = t * BLOCK_WORDS + (i * SUMS + j) * words
                register.set(register.get() + _load(buffer, at, words))
        T.buffer_store(sums, _total(registers), [T.Ramp(t * LANES, 1, words)])

    return _kernel("roof_stream", {"buffer": _BUFFER.count, "sums": _SUMS.count}, task)


def _peak(instruction: MultiplyAccumulate) -> tirx.PrimFunc:
    """The sum of the accumulators, each started from its operand plus t."""
    words, count = instruction.words, instruction.accumulators

    def task(start: tirx.Buffer, products: tirx.Buffer, t: Expr) -> None:
        x = T.Bind(_load(start, count * words, words))
        registers = [Register(f"int32x{words}") for _ in range(count)]
        for i, register in enumerate(registers):
            register.set(_load(start, i * words, words) + T.Broadcast(t, words))
        with T.serial(0, PEAK_ROUNDS):
            for register in registers:
                register.set(instruction.emit(register.get(), x))
        T.buffer_store(products, _total(registers), [T.Ramp(t * LANES, 1, words)])

    return _kernel("roof_peak", {"start": (count + 1) * words, "products": _PRODUCTS.count}, task)


def lower(target: TargetSpec) -> tuple[KernelCall, ...]:
    """The three steps. Raises ValueError where no multiply-accumulate instruction is known."""
    best = best_instruction(target)
    start = Weights(operands(best).reshape(-1))
    macs = peak_macs(best)
    return (
        KernelCall("roof_fill", lambda: _fill(best.words), (_BUFFER,), "buffer", "fill", tasks=BLOCKS),
        KernelCall("roof_stream", lambda: _stream(best.words), (_BUFFER, _SUMS), "sums", "stream", tasks=BLOCKS),
        KernelCall(
            "roof_peak",
            lambda: _peak(best),
            (start, _PRODUCTS),
            "products",
            "peak",
            path=best.name,
            macs=macs,
            tasks=PEAK_TASKS,
        ),
    )


def assemble(target: TargetSpec) -> tuple[Plan, bytes]:
    """The plan and its weights. The input, 64 bytes, is not looked at; the output is what both steps wrote."""
    sums_bytes, products_bytes = 4 * _SUMS.count, 4 * _PRODUCTS.count
    offsets = {"sums": 0, "products": sums_bytes, "buffer": sums_bytes + products_bytes}
    input_offset = offsets["buffer"] + 4 * _BUFFER.count
    weights = operands(best_instruction(target)).tobytes()
    weights += bytes(-len(weights) % ALIGNMENT_BYTES)
    steps = []
    for call in lower(target):
        arguments = tuple(
            Argument("weights", "int32", 0, operand.data.size)
            if isinstance(operand, Weights)
            else Argument("arena", operand.dtype, offsets[operand.name], operand.count)
            for operand in call.operands
        )
        steps.append(
            Step(call.symbol, arguments, call.tasks, call.name, call.path, call.macs, call.kind, len(arguments) - 1)
        )
    results = (1, _SUMS.count + _PRODUCTS.count)
    tensors = (
        PlanTensor("unused", "input", "int8", (1, 64), 0.0, 0, input_offset),
        PlanTensor("results", "output", "int32", results, 0.0, 0, 0),
    )
    return Plan("cpu", input_offset + 64, len(weights), tensors, tuple(steps), target.features), weights


def build_files(target: TargetSpec) -> dict[str, bytes]:
    """plan.bin, weights.bin and kernels.so of the roof, for the folder ``roof`` beside the network's."""
    plan, weights = assemble(target)
    library = link(compile_kernels(lower(target), target), target)
    digests = (hashlib.sha256(data).hexdigest() for data in (weights, library))
    return {"plan.bin": pack(plan, *digests), "weights.bin": weights, "kernels.so": library}
