"""The GPUs of NVIDIA Jetson boards through CUDA. The processors beside them are targets of their own, ``*-cpu``.

Peaks are dense (NVIDIA's headline figures for Orin and Thor count the zeros of structured sparsity, and on Xavier and
Orin the two DLAs too), at the highest clock of the module; where NVIDIA gives none for int8, the row says from what
it is derived.
"""

from __future__ import annotations

from dataclasses import replace

from . import arm_cpu
from .spec import GpuSpec, TargetSpec

_KIB = 1 << 10

_MODULES = "https://developer.nvidia.com/embedded/jetson-modules"
_PROGRAMMING_GUIDE = "https://docs.nvidia.com/cuda/archive/12.9.1/cuda-c-programming-guide/index.html"
_LIMITS = f"local_memory_bytes, subgroup_width, dot_product: {_PROGRAMMING_GUIDE}#compute-capabilities"
_ARCHITECTURE = "arch: https://developer.nvidia.com/cuda-gpus"
_RATES = f"fp16_gflops, int8_gops, bandwidth_gb_s, compute_units: {_MODULES}"
# NVIDIA publishes no launch cost on Jetson; 1.5 to 3 us a kernel of a CUDA graph is what its graphs page shows.
_LAUNCH = "launch_us, an assumption for a graph's kernels: https://developer.nvidia.com/blog/cuda-graphs/"
_COMMON = (_ARCHITECTURE, _RATES, _LIMITS, _LAUNCH)
_NANO = "compute_units, clock: https://github.com/Technica-Corporation/Tegra-Docker/issues/12"
# Seen in ptxas 12.9: a dp4a is one instruction for sm_61 and many for sm_62. The rates of sm_53 and sm_62 are those of
# one multiplication a product, of int16 or of float32. Pairs of float16 would go twice as fast, but sum in float16.
_TX2_INT8 = "int8_gops, no dp4a in its GPU (GP10B): https://github.com/GPU-correlators/xGPU/pull/14"
_THOR_ARCH = "arch, sm_101 until CUDA 12.9, sm_110 from 13.0: https://developer.nvidia.com/blog/whats-new-and-important-in-cuda-toolkit-13-0/"
_THOR_UNITS = "compute_units, clock: https://forums.developer.nvidia.com/t/clarification-on-cuda-core-and-tensor-core-counts-for-jetson-agx-thor/356355"


def _gpu(
    arch: str,
    compute_units: int,
    int8_gops: float,
    fp16_gflops: float,
    bandwidth_gb_s: float,
    launch_us: float,
    local_memory_bytes: int,
    *sources: str,
) -> GpuSpec:
    return GpuSpec(
        arch=arch,
        compute_units=compute_units,
        int8_gops=int8_gops,
        fp16_gflops=fp16_gflops,
        bandwidth_gb_s=bandwidth_gb_s,
        launch_us=launch_us,
        local_memory_bytes=local_memory_bytes,
        subgroup_width=32,
        dot_product=arch not in ("sm_53", "sm_62"),
        sources=(*_COMMON, *sources),
    )


def _board(board: str, description: str, gpu: GpuSpec, *aliases: str) -> TargetSpec:
    """The GPU of the board whose processor is the target ``nvidia/BOARD-cpu``."""
    (beside,) = (row for row in arm_cpu.TARGETS if row.name == f"nvidia/{board}-cpu")
    return replace(
        beside,
        name=f"nvidia/{board}",
        family="jetson",
        engine="cuda",
        aliases=aliases,
        description=description,
        gpu=gpu,
    )


# Multiply-accumulates a clock and multiprocessor, twice for operations: Xavier's tensor cores 1,024 int8 and 512 fp16,
# Orin's 2,048 and 1,024 (85 and 43 TOPS dense of 16 at 1.3 GHz), Thor's 8,192 and 4,096 (517 and 258 of 20 at 1.575).
TARGETS = (
    _board(
        "jetson-nano",
        "Jetson Nano: Maxwell, one multiprocessor at 0.92 GHz; int8 by int16 multiplications",
        _gpu("sm_53", 1, 236.0, 236.0, 25.6, 5.0, 48 * _KIB, _NANO),
    ),
    _board(
        "jetson-tx2",
        "Jetson TX2: Pascal, two multiprocessors at 1.3 GHz; int8 by int16 multiplications",
        _gpu("sm_62", 2, 665.5, 665.5, 59.7, 4.0, 48 * _KIB, _TX2_INT8),
    ),
    _board(
        "jetson-agx-xavier",
        "Jetson AGX Xavier: Volta, eight multiprocessors at 1.38 GHz with int8 tensor cores",
        _gpu("sm_72", 8, 22600.0, 11300.0, 136.5, 3.0, 96 * _KIB),
        "jetson-xavier",
    ),
    _board(
        "jetson-xavier-nx",
        "Jetson Xavier NX: Volta, six multiprocessors at 1.1 GHz with int8 tensor cores",
        _gpu("sm_72", 6, 13500.0, 6750.0, 59.7, 3.0, 96 * _KIB),
    ),
    _board(
        "jetson-agx-orin",
        "Jetson AGX Orin 64GB: Ampere, sixteen multiprocessors at 1.3 GHz",
        _gpu("sm_87", 16, 85200.0, 42600.0, 204.8, 2.0, 163 * _KIB),
        "jetson-orin",
    ),
    _board(
        "jetson-orin-nx",
        "Jetson Orin NX 16GB: Ampere, eight multiprocessors at 0.92 GHz",
        _gpu("sm_87", 8, 30100.0, 15000.0, 102.4, 2.0, 163 * _KIB),
    ),
    _board(
        "jetson-orin-nano",
        "Jetson Orin Nano 8GB: Ampere, eight multiprocessors at 0.63 GHz",
        _gpu("sm_87", 8, 20500.0, 10200.0, 68.0, 2.0, 163 * _KIB),
    ),
    _board(
        "jetson-agx-thor",
        "Jetson AGX Thor (T5000): Blackwell, twenty multiprocessors at 1.58 GHz",
        _gpu("sm_110", 20, 517000.0, 258000.0, 273.0, 2.0, 227 * _KIB, _THOR_ARCH, _THOR_UNITS),
        "jetson-thor",
    ),
)
