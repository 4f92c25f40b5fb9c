"""64-bit Arm CPUs: Raspberry Pi, Android phones, the processors of Jetson boards, and any other."""

from __future__ import annotations

from .spec import TargetSpec

_KIB = 1 << 10
_MIB = 1 << 20
_GIB = 1 << 30

_LINUX = "aarch64-linux-gnu"
_ANDROID = "aarch64-linux-android"

# Which core has which instructions: the feature lists of LLVM's processor models.
_LLVM_CORES = "https://github.com/llvm/llvm-project/blob/main/llvm/lib/Target/AArch64/AArch64Processors.td"
_PI_PROCESSORS = "https://www.raspberrypi.com/documentation/computers/processors.html"
_JETSON_MODULES = "https://developer.nvidia.com/embedded/jetson-modules"
_ANDROID_ABIS = "https://developer.android.com/ndk/guides/abis"
_ANDROID_MEMORY = "https://source.android.com/docs/compatibility/16/android-16-cdd"  # section 7.6.1
_ARM_FEATURES = "https://developer.arm.com/documentation/109697/latest/Feature-descriptions"
_LINUX_HWCAPS = "https://docs.kernel.org/arch/arm64/elf_hwcaps.html"  # asimddp is dotprod

# QEMU's cortex-a76 has the dot product and no i8mm; its `max` has both, but wrong results with SME left on.
_QEMU_DOTPROD = "cortex-a76"
_QEMU_I8MM = "max,sme=off"

TARGETS = (
    TargetSpec(
        name="generic/arm64",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="generic",
        features=("neon",),
        llvm_features=("+neon",),
        cores=4,
        memory_bytes=1 * _GIB,
        qemu_cpu="cortex-a53",
        aliases=("aarch64",),
        description="Any 64-bit Arm Linux machine (Armv8.0-A)",
        sources=(_ARM_FEATURES, _LINUX_HWCAPS),
    ),
    TargetSpec(
        name="raspberrypi/raspberry-pi-3",
        device_tree_model="Raspberry Pi 3",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="cortex-a53",
        features=("neon",),
        llvm_features=("+neon",),
        cores=4,
        memory_bytes=512 * _MIB,
        l1d_bytes=32 * _KIB,
        l2_bytes=512 * _KIB,
        qemu_cpu="cortex-a53",
        aliases=("pi3", "rpi3"),
        description="Raspberry Pi 3: BCM2837, four Cortex-A53 at 1.2 to 1.4 GHz",
        sources=(
            _PI_PROCESSORS,
            _LLVM_CORES,
            "https://github.com/raspberrypi/linux/pull/4751",  # caches, from the Arm manuals
            "https://github.com/hrw/arm-socs-table/issues/6",  # /proc/cpuinfo
            "https://www.raspberrypi.com/products/raspberry-pi-3-model-a-plus/",  # 512 MB
        ),
    ),
    TargetSpec(
        name="raspberrypi/raspberry-pi-4",
        device_tree_model="Raspberry Pi 4",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="cortex-a72",
        features=("neon",),
        llvm_features=("+neon",),
        cores=4,
        memory_bytes=1 * _GIB,
        l1d_bytes=32 * _KIB,
        l2_bytes=1 * _MIB,
        qemu_cpu="cortex-a72",
        aliases=("pi4", "rpi4"),
        description="Raspberry Pi 4: BCM2711, four Cortex-A72 at 1.5 to 1.8 GHz",
        sources=(_PI_PROCESSORS, _LLVM_CORES, "https://www.raspberrypi.com/products/raspberry-pi-4-model-b/"),
    ),
    TargetSpec(
        name="raspberrypi/raspberry-pi-5",
        device_tree_model="Raspberry Pi 5",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="cortex-a76",
        features=("neon", "dotprod"),
        llvm_features=("+neon", "+dotprod"),
        cores=4,
        memory_bytes=1 * _GIB,
        l1d_bytes=64 * _KIB,
        l2_bytes=512 * _KIB,
        qemu_cpu=_QEMU_DOTPROD,
        aliases=("pi5", "rpi5"),
        description="Raspberry Pi 5: BCM2712, four Cortex-A76 at 2.4 GHz",
        sources=(
            _PI_PROCESSORS,
            _LLVM_CORES,
            "https://github.com/raspberrypi/linux/pull/6061",  # caches
            "https://github.com/sergev/vak-opensource/tree/master/sysinfo/Raspberry-Pi-5-Model-B",  # /proc/cpuinfo
            "https://www.raspberrypi.com/products/raspberry-pi-5/",
        ),
    ),
    TargetSpec(
        name="generic/android-arm64",
        family="arm-cpu",
        engine="cpu",
        triple=_ANDROID,
        cpu="cortex-a53",
        features=("neon",),
        llvm_features=("+neon",),
        cores=8,
        memory_bytes=2 * _GIB,
        qemu_cpu="cortex-a53",
        aliases=("arm64-v8a",),
        description="Any 64-bit Android phone (Cortex-A53, A57, A72, A73 and all later ones)",
        sources=(_ANDROID_ABIS, _ANDROID_MEMORY, _LLVM_CORES),
    ),
    TargetSpec(
        name="generic/android-arm64-dotprod",
        family="arm-cpu",
        engine="cpu",
        triple=_ANDROID,
        cpu="generic",
        features=("neon", "dotprod"),
        llvm_features=("+neon", "+dotprod"),
        cores=8,
        memory_bytes=2 * _GIB,
        qemu_cpu=_QEMU_DOTPROD,
        description="An Android phone with the dot product (Cortex-A55, A75, A76 and later, from 2018 on)",
        sources=(_ANDROID_ABIS, _ANDROID_MEMORY, _LLVM_CORES, _LINUX_HWCAPS),
    ),
    TargetSpec(
        name="generic/android-arm64-i8mm",
        family="arm-cpu",
        engine="cpu",
        triple=_ANDROID,
        cpu="generic",
        features=("neon", "dotprod", "i8mm"),
        llvm_features=("+neon", "+dotprod", "+i8mm"),
        cores=8,
        memory_bytes=2 * _GIB,
        qemu_cpu=_QEMU_I8MM,
        description="An Android phone with 8-bit matrix multiplication (Cortex-A510, A710, X2 and later, from 2022 on)",
        sources=(_ANDROID_ABIS, _ANDROID_MEMORY, _LLVM_CORES, _LINUX_HWCAPS),
    ),
    TargetSpec(
        name="nvidia/jetson-nano-cpu",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="cortex-a57",
        features=("neon",),
        llvm_features=("+neon",),
        cores=4,
        memory_bytes=2 * _GIB,
        l1d_bytes=32 * _KIB,
        l2_bytes=2 * _MIB,
        qemu_cpu="cortex-a57",
        device_tree_model="Jetson Nano",
        description="The CPU of a Jetson Nano: four Cortex-A57 at 1.43 GHz",
        sources=(
            _JETSON_MODULES,
            _LLVM_CORES,
            "https://github.com/archmangler/cuda",  # lscpu: caches
            "https://github.com/hrw/arm-socs-table/issues/91",  # /proc/cpuinfo
        ),
    ),
    TargetSpec(
        name="nvidia/jetson-tx2-cpu",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="cortex-a57",  # LLVM has no model of Denver 2; it runs the same Armv8.0-A instructions
        features=("neon",),
        llvm_features=("+neon",),
        cores=6,
        memory_bytes=4 * _GIB,
        l1d_bytes=32 * _KIB,
        l2_bytes=2 * _MIB,
        qemu_cpu="cortex-a57",
        description="The CPU of a Jetson TX2: four Cortex-A57 and two Denver 2 at 2.0 GHz",
        sources=(
            _JETSON_MODULES,
            _LLVM_CORES,
            "https://github.com/hrw/arm-socs-table/issues/25",  # /proc/cpuinfo of both kinds of core
        ),
    ),
    TargetSpec(
        name="nvidia/jetson-agx-xavier-cpu",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="carmel",  # Armv8.2-A without the dot product
        features=("neon",),
        llvm_features=("+neon",),
        cores=8,
        memory_bytes=32 * _GIB,
        l1d_bytes=64 * _KIB,
        l2_bytes=2 * _MIB,
        qemu_cpu="cortex-a57",
        aliases=("jetson-xavier-cpu",),
        description="The CPU of a Jetson AGX Xavier: eight Carmel at 2.26 GHz",
        sources=(
            _JETSON_MODULES,
            _LLVM_CORES,
            "https://github.com/hrw/arm-socs-table/issues/63",  # /proc/cpuinfo: no asimddp
            "https://github.com/cilynx/rtl88x2bu/issues/265",  # lscpu: caches
        ),
    ),
    TargetSpec(
        name="nvidia/jetson-xavier-nx-cpu",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="carmel",
        features=("neon",),
        llvm_features=("+neon",),
        cores=6,
        memory_bytes=8 * _GIB,
        l1d_bytes=64 * _KIB,
        l2_bytes=2 * _MIB,
        qemu_cpu="cortex-a57",
        device_tree_model="Jetson Xavier NX",
        description="The CPU of a Jetson Xavier NX: six Carmel at 1.9 GHz",
        sources=(
            _JETSON_MODULES,
            _LLVM_CORES,
            "https://github.com/hrw/arm-socs-table/issues/26",  # /proc/cpuinfo: no asimddp
            "https://github.com/cilynx/rtl88x2bu/issues/265",  # lscpu: caches
        ),
    ),
    TargetSpec(
        name="nvidia/jetson-agx-orin-cpu",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="cortex-a78ae",
        features=("neon", "dotprod"),
        llvm_features=("+neon", "+dotprod"),
        cores=12,
        memory_bytes=64 * _GIB,
        l1d_bytes=64 * _KIB,
        l2_bytes=256 * _KIB,
        qemu_cpu=_QEMU_DOTPROD,
        aliases=("jetson-orin-cpu",),
        device_tree_model="Jetson AGX Orin",
        description="The CPU of a Jetson AGX Orin 64GB: twelve Cortex-A78AE at 2.2 GHz",
        sources=(
            _JETSON_MODULES,
            _LLVM_CORES,
            "https://github.com/KavrakiLab/vamp/issues/20",  # lscpu: asimddp, caches
            "https://github.com/apache/tvm/pull/16231",  # 12 cores with 64 GB, 8 with 32 GB
            "https://github.com/rbonghi/jetson_stats/issues/864",  # /proc/device-tree/model
        ),
    ),
    TargetSpec(
        name="nvidia/jetson-orin-nx-cpu",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="cortex-a78ae",
        features=("neon", "dotprod"),
        llvm_features=("+neon", "+dotprod"),
        cores=8,
        memory_bytes=16 * _GIB,
        l1d_bytes=64 * _KIB,
        l2_bytes=256 * _KIB,
        qemu_cpu=_QEMU_DOTPROD,
        device_tree_model="Orin NX",
        description="The CPU of a Jetson Orin NX 16GB: eight Cortex-A78AE at 2.0 GHz",
        sources=(_JETSON_MODULES, _LLVM_CORES, "https://github.com/KavrakiLab/vamp/issues/20"),
    ),
    TargetSpec(
        name="nvidia/jetson-orin-nano-cpu",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="cortex-a78ae",
        features=("neon", "dotprod"),
        llvm_features=("+neon", "+dotprod"),
        cores=6,
        memory_bytes=4 * _GIB,
        l1d_bytes=64 * _KIB,
        l2_bytes=256 * _KIB,
        qemu_cpu=_QEMU_DOTPROD,
        device_tree_model="Orin Nano",
        description="The CPU of a Jetson Orin Nano: six Cortex-A78AE at 1.5 to 1.7 GHz",
        sources=(
            _JETSON_MODULES,
            _LLVM_CORES,
            "https://github.com/KavrakiLab/vamp/issues/20",
            "https://github.com/rbonghi/jetson_stats/issues/400",  # /proc/device-tree/model
        ),
    ),
    TargetSpec(
        name="nvidia/jetson-agx-thor-cpu",
        family="arm-cpu",
        engine="cpu",
        triple=_LINUX,
        cpu="neoverse-v3ae",
        features=("neon", "dotprod", "i8mm"),
        llvm_features=("+neon", "+dotprod", "+i8mm"),
        cores=14,
        memory_bytes=128 * _GIB,
        l1d_bytes=64 * _KIB,
        l2_bytes=1 * _MIB,
        qemu_cpu=_QEMU_I8MM,
        aliases=("jetson-thor-cpu",),
        device_tree_model="Jetson AGX Thor",
        description="The CPU of a Jetson AGX Thor (T5000): fourteen Neoverse V3AE at 2.6 GHz",
        sources=(
            _JETSON_MODULES,
            _LLVM_CORES,
            "https://developer.ridgerun.com/wiki/index.php/NVIDIA_Jetson_AGX_Thor/Introduction/SoM_Overview",
            "https://github.com/apache/tvm/pull/20259",
            "https://github.com/rbonghi/jetson_stats/issues/711",  # /proc/device-tree/model
        ),
    ),
)
