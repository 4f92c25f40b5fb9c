"""A model of an NVIDIA GPU, good enough to choose between kernels: which tile, and what is fused.

Blocks are dealt to multiprocessors evenly; what a block costs there is the largest of its multiplications, what it
writes to shared memory and reads there (128 bytes a clock) and its loads (half of that, from the L2 cache), and no less
than its share of the time that a block alone would take, latency included. So large tiles win where there are pixels
enough, and smaller ones where 10x10 or 19x19 maps would leave multiprocessors idle. Figures of clocks are of the order
that microbenchmarks find on these architectures (Jia et al., arXiv:1804.06826, Volta); none was measured on a Jetson.
"""

from __future__ import annotations

from dataclasses import replace

from ....targets.spec import GpuSpec
from .depthwise import DepthwisePrologue
from .gemm import SHARED_BYTES, SLICE_BYTES, Gemm, Tile
from .tir import ceil_div

STATIC_SHARED_BYTES = 48 << 10  # what every block may have without asking the driver
_BLOCK_SHARED_BYTES = 1 << 10  # what the system keeps of every block's (CUDA C++ Programming Guide, 8.x)
_REGISTERS = 64 << 10
_OTHER_REGISTERS = 60  # of a thread, besides its sums
_SLICE_LATENCY = 150.0  # clocks from shared memory through the multiplications to the next slice
_BLOCK_LATENCY = 800.0  # clocks of the first loads and the last stores
_OUTPUT_INSTRUCTIONS = 9.0  # for an output of a product, and as many for an addition to it
_LANES = 128.0  # instructions a clock and multiprocessor
# For a value of a depthwise convolution, as its input comes and behind a ReLU: by runs of four, and by pairs. Counted
# in ptxas's code for sm_72 and sm_87, which differ by one in thirty.
_RUN_INSTRUCTIONS = {"int8": (20.0, 25.0), "float16": (29.0, 34.0)}
_PAIR_INSTRUCTIONS = {"int8": (24.0, 33.0), "float16": (39.0, 46.0)}
_CACHED_BYTES = 1 << 20  # a tensor of up to so many bytes is still in the L2 cache when the next kernel reads it

_TILES = {
    "mma": (
        Tile(128, 128, 2, 2, 3),
        Tile(96, 128, 2, 2, 3),
        Tile(96, 96, 2, 2, 4),
        Tile(128, 64, 2, 2, 4),
        Tile(64, 128, 2, 2, 4),
        Tile(64, 96, 2, 2, 4),
        Tile(64, 64, 2, 2, 4),
        Tile(32, 64, 2, 2, 4),
        Tile(64, 32, 4, 1, 4),
        Tile(32, 32, 2, 2, 4),
        Tile(16, 64, 1, 4, 4),
        Tile(64, 256, 2, 4, 2),
    ),
    "wmma": (Tile(128, 64, 4, 2), Tile(64, 128, 2, 4), Tile(64, 64, 2, 2), Tile(32, 64, 2, 2), Tile(32, 32, 2, 2)),
    "dot": (Tile(64, 64, 2, 2), Tile(32, 64, 2, 1), Tile(32, 32, 1, 1)),
}


def tiles(mode: str) -> tuple[Tile, ...]:
    return _TILES[mode]


def with_best_tile(gemm: Gemm, gpu: GpuSpec) -> Gemm:
    """The same product with the tile that costs least."""
    drafts = [replace(gemm, tile=tile) for tile in _TILES[gemm.mode]]
    fitting = [draft for draft in drafts if draft.shared_bytes <= STATIC_SHARED_BYTES]
    return min(fitting, key=lambda draft: gemm_us(draft, gpu))


def with_prologue(gemm: Gemm, prologue: DepthwisePrologue, gpu: GpuSpec) -> Gemm:
    """The same product with the depthwise convolution as its prologue."""
    return with_best_tile(replace(gemm, window=prologue.window, prologue=prologue), gpu)


def prologue_pays(gemm: Gemm, prologue: DepthwisePrologue, gpu: GpuSpec) -> bool:
    """Whether the depthwise convolution is better computed by the product: it saves a launch and a tensor's way to
    memory and back, and is computed anew for every block of columns."""
    outputs = prologue.window.pixels * prologue.window.pixel_bytes
    instructions = outputs / gemm.item_bytes * _RUN_INSTRUCTIONS[gemm.dtype][prologue.depthwise.after_relu]
    alone_us = instructions / _LANES / gpu.compute_units / clock_mhz(gemm.mode, gpu)
    traffic_us = 2 * outputs / (gpu.bandwidth_gb_s * 1e3) if outputs > _CACHED_BYTES else 0.0
    apart = gemm_us(gemm, gpu) + alone_us + traffic_us + gpu.launch_us
    return gemm_us(with_prologue(gemm, prologue, gpu), gpu) < apart


def clock_mhz(mode: str, gpu: GpuSpec) -> float:
    """Of the multiprocessors, from the peak of int8 that the target's row gives."""
    return gpu.int8_gops * 1e3 / 2 / gpu.compute_units / _macs_per_clock(mode, gpu)


def gemm_us(gemm: Gemm, gpu: GpuSpec) -> float:
    """Estimated time of the product."""
    tile = gemm.tile
    a_block = ceil_div(gemm.blocks, gpu.compute_units)
    resident = min(_resident_blocks(gemm, gpu), a_block)
    values = gemm.slice_bytes // gemm.item_bytes  # of a slice's row
    rate = _macs_per_clock(gemm.mode, gpu) / (1 if gemm.mode == "dot" else gemm.item_bytes)
    multiply = tile.rows * tile.columns * values / rate
    loaded = (tile.rows + tile.columns) * gemm.slice_bytes
    written = (tile.rows + tile.columns) * SLICE_BYTES
    busy = max(multiply, (written + _shared_bytes_read(gemm)) / 128)
    computed = 0.0
    if gemm.prologue:
        instructions = _PAIR_INSTRUCTIONS[gemm.dtype][gemm.prologue.depthwise.after_relu]
        computed = tile.rows * values * instructions / _LANES
    a_slice = max(busy, loaded / 64, (busy + _SLICE_LATENCY) / resident) + computed
    outputs = tile.rows * tile.columns * _OUTPUT_INSTRUCTIONS * (2 if gemm.addition else 1) / _LANES
    clocks = a_block * (gemm.slices * a_slice + outputs) + ceil_div(a_block, resident) * _BLOCK_LATENCY
    return clocks / clock_mhz(gemm.mode, gpu)


def _resident_blocks(gemm: Gemm, gpu: GpuSpec) -> int:
    """How many share a multiprocessor: its shared memory (from sm_80 on 1 KB more than the most of a block) and its
    registers."""
    shared = gpu.local_memory_bytes + _BLOCK_SHARED_BYTES if gemm.mode == "mma" else SHARED_BYTES[gemm.mode]
    registers = gemm.tile.rows * gemm.tile.columns + gemm.tile.threads * _OTHER_REGISTERS
    return max(1, min(shared // (gemm.shared_bytes + _BLOCK_SHARED_BYTES), _REGISTERS // registers))


def _macs_per_clock(mode: str, gpu: GpuSpec) -> float:
    """Of one multiprocessor in int8: CUDA C++ Programming Guide, arithmetic instructions, and the boards' peaks. Tensor
    cores make half as many in float16; without them int8 goes by int16, float16 by float32, as many of each."""
    if gpu.arch == "sm_110":
        return 8192.0
    return {"mma": 2048.0, "wmma": 1024.0, "dot": 128.0}[mode]


def _shared_bytes_read(gemm: Gemm) -> float:
    """From shared memory for one slice, by all warps of a block."""
    tile = gemm.tile
    if gemm.mode == "dot":  # each thread 8 rows and 4 columns; threads that read the same are served once
        return tile.threads * 12 * SLICE_BYTES / 4
    warps = tile.warps_m * tile.warps_n
    return warps * (tile.rows / tile.warps_m + tile.columns / tile.warps_n) * SLICE_BYTES
