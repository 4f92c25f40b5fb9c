"""The catalog of targets: its names, its rows against LLVM and the emulator, and the detection of the host."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from xceptile.targets import arm_cpu, catalog, host, jetson, mobile_gpu, riscv_cpu
from xceptile.targets.spec import TargetSpec

ROWS = arm_cpu.TARGETS + mobile_gpu.TARGETS + jetson.TARGETS + host.TARGETS + riscv_cpu.TARGETS
FEATURES = {"aarch64": {"neon", "dotprod", "i8mm"}, "x86_64": {"avx2", "avx512vnni"}, "riscv64": set()}


def row_id(row: TargetSpec) -> str:
    return row.board


def test_every_name_names_one_row() -> None:
    names = [name for row in ROWS for name in (row.name, row.board, *row.aliases)]
    assert len(names) == len(set(names))
    for row in ROWS:
        for name in (row.name, row.board, *row.aliases, row.board.upper().replace("-", "_")):
            assert catalog.get(name) is row


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raspberry-pi-3", "raspberrypi/raspberry-pi-3"),
        ("raspberry-pi-4", "raspberrypi/raspberry-pi-4"),
        ("raspberry-pi-5", "raspberrypi/raspberry-pi-5"),
        ("pi5", "raspberrypi/raspberry-pi-5"),
        ("arm-cpu", "generic/arm64"),
        ("x86-cpu", "generic/x86-64-avx2"),
        ("mobile-gpu", "generic/opencl-gpu"),
        ("adreno-740", "qualcomm/adreno-740"),
        ("mali-g710", "arm/mali-g710"),
        ("jetson-orin-cpu", "nvidia/jetson-agx-orin-cpu"),
        ("jetson", "nvidia/jetson-agx-orin"),
        ("jetson-xavier", "nvidia/jetson-agx-xavier"),
        ("jetson-thor", "nvidia/jetson-agx-thor"),
        ("generic-riscv64", "generic/riscv64"),
    ],
)
def test_names_people_type(name: str, expected: str) -> None:
    assert catalog.get(name).name == expected


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("raspbery-pi-5", "raspberry-pi-5"), ("pi-5", "raspberry-pi-5"), ("hots", "host"), ("jetson-thorr", "jetson-")],
)
def test_an_unknown_name_is_answered_with_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(catalog.UnknownTarget, match="did you mean") as caught:
        catalog.get(typo)
    assert any(suggestion.startswith(meant) for suggestion in caught.value.suggestions)
    assert typo in str(caught.value)


def test_a_name_like_no_other_points_to_the_list() -> None:
    with pytest.raises(catalog.UnknownTarget, match="xceptile targets"):
        catalog.get("zzz")


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_rows_are_sane(row: TargetSpec) -> None:
    assert row.name.count("/") == 1
    assert row.architecture in FEATURES
    assert set(row.features) <= FEATURES[row.architecture]
    assert bool(row.features) == bool(FEATURES[row.architecture])
    assert row.sources
    assert all(source.startswith("https://") for source in row.sources)
    assert 1 <= row.cores <= 64
    assert 16 << 10 <= row.l1d_bytes < row.l2_bytes < row.memory_bytes
    assert row.description
    assert (row.engine == "cpu") == (row.gpu is None)
    if row.gpu is not None:
        assert row.engine == {"mobile-gpu": "opencl", "jetson": "cuda"}[row.family]
        assert all(source.partition(": ")[2].startswith("https://") for source in row.gpu.sources)
        assert row.gpu.int8_gops >= row.gpu.fp16_gflops / 2 > 0
        assert 1 << 10 <= row.gpu.local_memory_bytes <= 256 << 10


@pytest.mark.parametrize("row", [row for row in ROWS if row.architecture == "aarch64"], ids=row_id)
def test_the_emulated_cpu_has_just_the_features_of_the_row(row: TargetSpec) -> None:
    has = {"cortex-a53": {"neon"}, "cortex-a57": {"neon"}, "cortex-a72": {"neon"}, "cortex-a76": {"neon", "dotprod"}}
    assert row.qemu_cpu is not None
    assert set(row.features) == has.get(row.qemu_cpu, {"neon", "dotprod", "i8mm"})


@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-aarch64 (Debian: qemu-user)")
def test_the_emulator_knows_every_cpu_named() -> None:
    known = subprocess.run(["qemu-aarch64", "-cpu", "help"], capture_output=True, text=True).stdout.split()
    named = {row.qemu_cpu.partition(",")[0] for row in arm_cpu.TARGETS if row.qemu_cpu}
    assert named <= set(known)


@pytest.mark.skipif(shutil.which("qemu-riscv64") is None, reason="needs qemu-riscv64 (Debian: qemu-user)")
def test_the_emulated_risc_v_is_one_that_qemu_knows() -> None:
    known = subprocess.run(["qemu-riscv64", "-cpu", "help"], capture_output=True, text=True).stdout.split()
    assert {row.qemu_cpu for row in riscv_cpu.TARGETS} <= set(known)


def llvm_features(row: TargetSpec) -> set[str]:
    """What TVM's LLVM enables for the row; an unknown cpu or feature is dropped with no more than a message."""
    tvm = pytest.importorskip("tvm")
    target = tvm.target.Target(
        {"kind": "llvm", "mtriple": row.triple, "mcpu": row.cpu, "mattr": list(row.llvm_features)}
    )
    return {str(feature) for feature in tvm.get_global_func("target.llvm_get_cpu_features")(target)}


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_llvm_agrees_with_the_row(row: TargetSpec) -> None:
    assert llvm_features(row) & FEATURES[row.architecture] == set(row.features)
    if row.architecture == "riscv64":
        assert set("imafdc") <= llvm_features(row)
        assert "v" not in llvm_features(row)


@pytest.mark.parametrize("row", [row for row in ROWS if row.cpu != "generic"], ids=row_id)
def test_llvm_knows_the_processor(row: TargetSpec) -> None:
    generic = dataclasses.replace(row, cpu="generic")
    tvm = pytest.importorskip("tvm")
    known = tvm.get_global_func("target.llvm_get_cpu_archlist")(
        tvm.target.Target({"kind": "llvm", "mtriple": generic.triple})
    )
    assert row.cpu in {str(name) for name in known}


def test_a_planted_processor_without_the_feature_is_seen() -> None:
    wrong = dataclasses.replace(catalog.get("raspberry-pi-5"), cpu="cortex-a53", llvm_features=())
    assert "dotprod" not in llvm_features(wrong)


V3 = "fpu sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
VNNI = V3 + " avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni"


def detect(tmp_path: Path, machine: str, *cores: str) -> TargetSpec:
    """The host as a /proc/cpuinfo with these flags, one string a core, would have it."""
    key = {"x86_64": "flags", "riscv64": "isa"}.get(machine, "Features")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("".join(f"processor\t: {i}\nmodel name\t: A\n{key}\t: {f}\n\n" for i, f in enumerate(cores)))
    return host.detect(cpuinfo, machine)


@pytest.mark.parametrize(
    ("machine", "cores", "features"),
    [
        ("x86_64", [V3], ("avx2",)),
        ("x86_64", [VNNI], ("avx2", "avx512vnni")),
        ("x86_64", [VNNI.replace("avx512bw ", "")], ("avx2",)),
        ("aarch64", ["fp asimd evtstrm crc32 cpuid"], ("neon",)),
        ("aarch64", ["fp asimd asimdrdm asimddp"], ("neon", "dotprod")),
        ("aarch64", ["fp asimd asimddp i8mm", "fp asimd asimddp i8mm bf16"], ("neon", "dotprod", "i8mm")),
        ("aarch64", ["fp asimd", "fp asimd asimddp"], ("neon",)),  # big and little cores
        ("riscv64", ["rv64imafdc_zicntr_zicsr_zifencei_zihpm_zba_zbb", "rv64gc"], ()),
    ],
)
def test_the_host_is_detected(tmp_path: Path, machine: str, cores: list[str], features: tuple[str, ...]) -> None:
    row = detect(tmp_path, machine, *cores)
    assert row.name == "local/host"
    assert row.features == features
    assert row.architecture == machine


@pytest.mark.parametrize(
    ("machine", "flags", "reason"),
    [
        ("x86_64", "fpu sse4_2 avx", "avx2"),
        ("aarch64", "fp", "NEON"),
        ("riscv64", "rv64imac", "RV64GC"),
        ("mips64", "", "mips64"),
    ],
)
def test_a_host_no_kernel_is_made_for_is_refused(tmp_path: Path, machine: str, flags: str, reason: str) -> None:
    with pytest.raises(host.UnsupportedHost, match=reason):
        detect(tmp_path, machine, flags)


def test_a_host_without_cpuinfo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(host.UnsupportedHost, match="No such file"):
        host.detect(tmp_path / "missing", "x86_64")


def test_all_targets_begin_with_this_machine() -> None:
    first, *rest = catalog.all_targets()
    assert first == catalog.get("host")
    assert tuple(rest) == ROWS
