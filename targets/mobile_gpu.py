"""Mobile GPUs through OpenCL: Adreno, Mali and PowerVR, in the phone or on the board they are best known from.

Rates are peaks. Where no one has published a GPU's int8 rate, it is derived, and the row says from what.
"""

from __future__ import annotations

from .spec import GpuSpec, TargetSpec

_KIB = 1 << 10
_GIB = 1 << 30

_LINUX = "aarch64-linux-gnu"
_ANDROID = "aarch64-linux-android"

# What a launch in an in-order queue costs at least, in all rows: the gap reported for several Mali GPUs. Measured
# latencies of a lone kernel are higher (78 us on a Mali-T860), those of queued ones are published nowhere.
_LAUNCH_US = 20.0
_LAUNCH = "launch_us: https://github.com/krrishnarraj/clpeak/pull/67"

_ADRENO_LOCAL = "local_memory_bytes: https://github.com/BOINC/boinc/issues/3613"
_ADRENO_7 = "fp16_gflops, subgroup_width: https://github.com/azhirnov/cpu-gpu-arch/blob/main/gpu/Adreno-700.md"
_ADRENO_6 = "fp16_gflops, subgroup_width: https://github.com/azhirnov/cpu-gpu-arch/blob/main/gpu/Adreno-600.md"
# 4.1 int8 TOPS where fp16 does 3.4 TFLOPS (Adreno X1-45): the ratio taken for the Adreno 700 series.
_ADRENO_7_INT8 = "int8_gops, 1.2 times fp16 as on Adreno X1-45: https://github.com/krrishnarraj/clpeak/issues/210"
# Mali-G610 with four cores at 1 GHz: 977 GFLOPS fp16 and 1,882 GOPS int8 measured, 256 and 512 a clock and core.
_MALI_PEAKS = "int8_gops, fp16_gflops, as measured on Mali-G610: https://gist.github.com/allanmac/d1711d77008af979a93042895f48aed8"
_MALI_CORES = "subgroup_width: https://arm-software.github.io/libGPUCounters/mali-g710_counter_reference.html"
_DIMENSITY_9000 = "compute_units, clock, bandwidth_gb_s: https://nanoreview.net/en/soc-compare/mediatek-dimensity-9000-vs-google-tensor-g2"

# Chips' part numbers, which Android gives as ro.soc.model.
_SNAPDRAGONS = "https://en.wikipedia.org/wiki/List_of_Qualcomm_Snapdragon_systems_on_chips"
_MEDIATEKS = "https://en.wikipedia.org/wiki/List_of_MediaTek_systems_on_chips"
_ANDROID_ABIS = "https://developer.android.com/ndk/guides/abis"
_LLVM_CORES = "https://github.com/llvm/llvm-project/blob/main/llvm/lib/Target/AArch64/AArch64Processors.td"

# The slowest of the rows with a dot product, so that a figure for the family is not one member's best.
_GENERIC_GPU = GpuSpec(
    arch="generic",
    compute_units=4,
    int8_gops=1882.0,
    fp16_gflops=977.0,
    bandwidth_gb_s=14.2,
    launch_us=_LAUNCH_US,
    local_memory_bytes=32 * _KIB,
    subgroup_width=16,
    dot_product=False,
    sources=(_MALI_PEAKS, _LAUNCH),
)

TARGETS = (
    TargetSpec(
        name="generic/opencl-gpu",
        family="mobile-gpu",
        engine="opencl",
        triple=_ANDROID,
        cpu="cortex-a53",
        features=("neon",),
        llvm_features=("+neon",),
        cores=8,
        memory_bytes=2 * _GIB,
        qemu_cpu="cortex-a53",
        gpu=_GENERIC_GPU,
        aliases=("opencl",),
        description="Any OpenCL 1.2 GPU with 32 KiB of local memory, beside a 64-bit Arm processor",
        sources=(_ANDROID_ABIS,),
    ),
    TargetSpec(
        name="qualcomm/adreno-750",
        family="mobile-gpu",
        engine="opencl",
        triple=_ANDROID,
        cpu="cortex-a76",
        features=("neon", "dotprod"),
        llvm_features=("+neon", "+dotprod"),
        cores=8,
        memory_bytes=8 * _GIB,
        qemu_cpu="cortex-a76",
        gpu=GpuSpec(
            arch="adreno-750",
            compute_units=6,
            int8_gops=7370.0,
            fp16_gflops=6140.0,
            bandwidth_gb_s=77.0,
            launch_us=_LAUNCH_US,
            local_memory_bytes=32 * _KIB,
            subgroup_width=64,
            dot_product=True,
            sources=(_ADRENO_7, _ADRENO_7_INT8, _ADRENO_LOCAL, _LAUNCH),
        ),
        aliases=("snapdragon-8-gen-3-gpu",),
        description="Adreno 750 (Snapdragon 8 Gen 3)",
        device_tree_model="SM8650",
        sources=(_LLVM_CORES, _SNAPDRAGONS),
    ),
    TargetSpec(
        name="qualcomm/adreno-740",
        family="mobile-gpu",
        engine="opencl",
        triple=_ANDROID,
        cpu="cortex-a76",
        features=("neon", "dotprod"),
        llvm_features=("+neon", "+dotprod"),
        cores=8,
        memory_bytes=8 * _GIB,
        qemu_cpu="cortex-a76",
        gpu=GpuSpec(
            arch="adreno-740",
            compute_units=6,
            int8_gops=5010.0,
            fp16_gflops=4180.0,  # 1,536 lanes at 680 MHz
            bandwidth_gb_s=64.0,
            launch_us=_LAUNCH_US,
            local_memory_bytes=32 * _KIB,
            subgroup_width=64,
            dot_product=True,
            sources=(
                _ADRENO_7,
                "clock, bandwidth_gb_s, cache_bytes: https://primua.com/adreno-740/",
                _ADRENO_7_INT8,
                _ADRENO_LOCAL,
                _LAUNCH,
            ),
            cache_bytes=1024 * _KIB,
        ),
        aliases=("snapdragon-8-gen-2-gpu",),
        description="Adreno 740 (Snapdragon 8 Gen 2)",
        device_tree_model="SM8550",
        sources=(_LLVM_CORES, _SNAPDRAGONS),
    ),
    TargetSpec(
        name="qualcomm/adreno-660",
        family="mobile-gpu",
        engine="opencl",
        triple=_ANDROID,
        cpu="cortex-a76",
        features=("neon", "dotprod"),
        llvm_features=("+neon", "+dotprod"),
        cores=8,
        memory_bytes=6 * _GIB,
        qemu_cpu="cortex-a76",
        gpu=GpuSpec(
            arch="adreno-660",
            compute_units=3,
            int8_gops=2765.0,  # no published int8 rate: taken as fp16's, which its dot product can only exceed
            fp16_gflops=2765.0,
            bandwidth_gb_s=51.2,
            launch_us=_LAUNCH_US,
            local_memory_bytes=32 * _KIB,
            subgroup_width=64,
            dot_product=True,
            sources=(
                _ADRENO_6,
                "bandwidth_gb_s: https://nanoreview.net/en/soc-compare/qualcomm-snapdragon-875-vs-qualcomm-snapdragon-662",
                _ADRENO_LOCAL,
                _LAUNCH,
            ),
        ),
        aliases=("snapdragon-888-gpu",),
        description="Adreno 660 (Snapdragon 888)",
        device_tree_model="SM8350",
        sources=(_LLVM_CORES, _SNAPDRAGONS),
    ),
    TargetSpec(
        name="arm/mali-g710",
        family="mobile-gpu",
        engine="opencl",
        triple=_ANDROID,
        cpu="cortex-a76",
        features=("neon", "dotprod"),
        llvm_features=("+neon", "+dotprod"),
        cores=8,
        memory_bytes=8 * _GIB,
        qemu_cpu="cortex-a76",
        gpu=GpuSpec(
            arch="mali-g710",
            compute_units=10,
            int8_gops=4352.0,  # 10 cores at 850 MHz
            fp16_gflops=2176.0,
            bandwidth_gb_s=60.0,
            launch_us=_LAUNCH_US,
            local_memory_bytes=32 * _KIB,
            subgroup_width=16,
            dot_product=True,
            sources=(_MALI_PEAKS, _DIMENSITY_9000, _MALI_CORES, _LAUNCH),
        ),
        aliases=("dimensity-9000-gpu",),
        description="Mali-G710 with ten cores (Dimensity 9000)",
        device_tree_model="MT6983",
        sources=(_LLVM_CORES, _MEDIATEKS),
    ),
    TargetSpec(
        name="arm/mali-g610",
        family="mobile-gpu",
        engine="opencl",
        triple=_LINUX,
        cpu="cortex-a76",
        features=("neon", "dotprod"),
        llvm_features=("+neon", "+dotprod"),
        cores=8,
        memory_bytes=4 * _GIB,
        qemu_cpu="cortex-a76",
        gpu=GpuSpec(
            arch="mali-g610",
            compute_units=4,
            int8_gops=1882.0,
            fp16_gflops=977.0,
            bandwidth_gb_s=14.2,
            launch_us=_LAUNCH_US,
            local_memory_bytes=32 * _KIB,
            subgroup_width=16,
            dot_product=True,
            sources=(_MALI_PEAKS, _MALI_CORES, _LAUNCH),
        ),
        aliases=("rk3588-gpu",),
        description="Mali-G610 with four cores (Rockchip RK3588 boards)",
        sources=(_LLVM_CORES,),
    ),
    TargetSpec(
        name="imagination/powervr-ge8320",
        family="mobile-gpu",
        engine="opencl",
        triple=_ANDROID,
        cpu="cortex-a53",
        features=("neon",),
        llvm_features=("+neon",),
        cores=8,
        memory_bytes=2 * _GIB,
        qemu_cpu="cortex-a53",
        gpu=GpuSpec(
            arch="powervr-ge8320",
            compute_units=2,
            int8_gops=40.0,  # no dot product: as its 32-bit rate
            fp16_gflops=80.0,
            bandwidth_gb_s=12.8,
            launch_us=_LAUNCH_US,
            local_memory_bytes=16 * _KIB,  # published nowhere: half of what a full-profile device must have
            subgroup_width=32,
            dot_product=False,
            sources=(
                "fp16_gflops, compute_units: https://hmc-tech.com/gpu/imagination-powervr-ge8320-650mhz-vs-qualcomm-adreno-610",
                "bandwidth_gb_s, 1600 MHz on 32 bits: https://nanoreview.net/en/soc-compare/mediatek-helio-p22-vs-hisilicon-kirin-650",
                _LAUNCH,
            ),
        ),
        aliases=("helio-p22-gpu",),
        description="PowerVR GE8320 (Helio P22)",
        device_tree_model="MT6762",
        sources=(_LLVM_CORES, _MEDIATEKS),
    ),
)
