"""What is known of a target before anything is compiled for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuSpec:
    """What kernels and the cost model want to know of a GPU.

    ``arch`` names the processor: ``sm_87``, ``adreno-740``, ``mali-g710``. ``int8_gops`` and ``fp16_gflops`` are peaks
    in 10^9 operations a second, a multiply-accumulate counted as two; ``bandwidth_gb_s`` of the memory it shares or
    owns; ``launch_us`` what one kernel costs in a queue even if it does nothing. ``subgroup_width`` work-items run in
    step; ``local_memory_bytes`` is what one work-group may have. ``dot_product``: whether it multiplies int8 by fours.
    ``cache_bytes`` is the last-level cache of the GPU itself, None where it is published nowhere.
    ``sources`` are where these were read, each beginning with what it says.
    """

    arch: str
    compute_units: int
    int8_gops: float
    fp16_gflops: float
    bandwidth_gb_s: float
    launch_us: float
    local_memory_bytes: int
    subgroup_width: int
    dot_product: bool
    sources: tuple[str, ...]
    cache_bytes: int | None = None


@dataclass(frozen=True)
class TargetSpec:
    """One board, phone or machine.

    ``name`` is ``vendor/board``; ``aliases`` name it without the vendor. ``engine`` is ``cpu``, ``opencl`` or
    ``cuda``. ``triple``, ``cpu`` and ``llvm_features`` are LLVM's words; ``features`` are ours and select kernels:
    ``neon``, ``dotprod``, ``i8mm``, ``avx2``, ``avx512vnni``; portable kernels need none of them. ``qemu_cpu`` is the
    emulator's CPU model that has just these features, or None where no emulator has them. ``cores`` are those of the
    board's usual model and ``memory_bytes`` the least memory sold with them. ``l1d_bytes`` is per core; ``l2_bytes`` is
    the L2 that one core reaches, and may be shared with its neighbours. ``device_tree_model`` is what the board's
    firmware calls it in /proc/device-tree/model, or the part of it that every revision shares; for a phone the part
    number of its chip. ``gpu`` is there where the engine is not ``cpu``; the other fields are then those of the
    processor beside it, which the runtime is built for. ``sources`` are where the facts of the row were read.
    """

    name: str
    family: str
    engine: str
    triple: str
    cpu: str
    features: tuple[str, ...]
    llvm_features: tuple[str, ...]
    cores: int
    memory_bytes: int
    sources: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    qemu_cpu: str | None = None
    gpu: GpuSpec | None = None
    description: str = ""
    l1d_bytes: int = 32 << 10
    l2_bytes: int = 256 << 10
    device_tree_model: str | None = None

    @property
    def architecture(self) -> str:
        """``x86_64``, ``aarch64`` or ``riscv64``."""
        return self.triple.split("-", maxsplit=1)[0]

    @property
    def board(self) -> str:
        """The name without its vendor."""
        return self.name.split("/", maxsplit=1)[1]
