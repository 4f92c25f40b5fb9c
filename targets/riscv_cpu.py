"""64-bit RISC-V CPUs. No kernels are written for their instructions: they run the portable ones."""

from __future__ import annotations

from .spec import TargetSpec

_GIB = 1 << 30

RISCV_LINUX = "https://wiki.debian.org/RISC-V"  # distributions are built for RV64GC
RV64GC = ("+m", "+a", "+f", "+d", "+c")

TARGETS = (
    TargetSpec(
        name="generic/riscv64",
        family="riscv-cpu",
        engine="cpu",
        triple="riscv64-linux-gnu",
        cpu="generic-rv64",
        features=(),
        llvm_features=RV64GC,
        cores=4,
        memory_bytes=2 * _GIB,
        l1d_bytes=32 << 10,
        l2_bytes=2 << 20,
        qemu_cpu="sifive-u54",  # RV64GC and no more
        aliases=("generic-riscv64",),
        description="Any 64-bit RISC-V Linux machine (RV64GC), with portable kernels",
        # Figures of the usual board, the VisionFive 2: four U74 at 1.5 GHz, 2 GB.
        sources=(
            RISCV_LINUX,
            "https://github.com/llvm/llvm-project/blob/main/llvm/lib/Target/RISCV/RISCVProcessors.td",
            "https://wiki.gentoo.org/wiki/StarFive_VisionFive_2/Hardware",
            "https://github.com/torvalds/linux/blob/master/arch/riscv/boot/dts/starfive/jh7110.dtsi",  # caches
            "https://github.com/sergev/vak-opensource/tree/master/sysinfo/StarFive-VisionFive-2",  # /proc/cpuinfo
        ),
    ),
)
