"""The native runtime's OpenCL driver: on PoCL, which runs OpenCL on a processor, and on a fake library that fails."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support import opencl_network
from support.fake_network import CLASSES, expected, images
from support.needs import requires, requires_hardware, requires_module, requires_pocl
from support.opencl_network import KERNELS, write_bundle
from support.tree import SOURCES, TEST_SOURCES

from xceptile.compile import doctor, opencl_devices
from xceptile.compile.backends import native_runtime
from xceptile.runtime.devices.qemu import QemuNativeEngine
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.engines.native import NativeEngine
from xceptile.runtime.engines.native_program import NativeProgramEngine
from xceptile.runtime.plan import Argument, Launch, Step
from xceptile.targets import catalog

pytestmark = requires("clang", package="clang")
pocl = requires_pocl()

FLAGS = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
CHECKED = [*FLAGS, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
LIBRARY = [SOURCES / name for name in native_runtime.LIBRARY_SOURCES]
LINK = ["-ldl", "-lpthread", "-lm"]


def compile_c(output: Path, *words: str | Path) -> Path:
    subprocess.run(["clang", *words, *LINK, "-o", output], check=True)
    return output


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime's object files with sanitizers."""
    folder = tmp_path_factory.mktemp("objects")
    subprocess.run(["clang", *CHECKED, "-c", *LIBRARY], check=True, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake OpenCL library."""
    library = tmp_path_factory.mktemp("fake") / "fake_opencl.so"
    return compile_c(library, *CHECKED, "-fPIC", "-shared", "-fvisibility=hidden", TEST_SOURCES / "fake_opencl.c")


@pytest.fixture(scope="module")
def checked(objects: Path) -> Path:
    """xceptile-run with sanitizers, for the fake library: PoCL's compiler is not for them."""
    return compile_c(objects / "checked", *CHECKED, SOURCES / "main.c", *sorted(objects.glob("*.o")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """xceptile-run and libxceptile without sanitizers, for PoCL."""
    folder = tmp_path_factory.mktemp("plain")
    compile_c(folder / "libxceptile.so", *FLAGS, "-fPIC", "-shared", "-DXCT_BUILD_SHARED", *LIBRARY)
    return compile_c(folder / "xceptile-run", *FLAGS, SOURCES / "main.c", *LIBRARY)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The AArch64 xceptile-run that is shipped, and the fake library. Before a test has caches of its own."""
    folder = tmp_path_factory.mktemp("shipped")
    program = folder / "xceptile-run"
    program.write_bytes(native_runtime.build(catalog.get("mali-g710"))["xceptile-run"])
    program.chmod(0o755)
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17", "-fPIC", "-shared"]
    subprocess.run([*zig, TEST_SOURCES / "fake_opencl.c", "-o", folder / "fake_opencl.so"], check=True)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XCEPTILE_CACHE", "XCEPTILE_OPENCL", "FAKE_OPENCL_DEVICE", "FAKE_OPENCL_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))  # programs are kept in xceptile below
    monkeypatch.setenv("POCL_CACHE_DIR", str(tmp_path / "pocl"))


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Where compiled programs are kept."""
    return tmp_path / "user cache/xceptile"


def run(program: Path, *words: object, **environment: object) -> subprocess.CompletedProcess[str]:
    changed = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run([program, *map(str, words)], env=changed, capture_output=True, text=True, check=False)
    assert "Sanitizer" not in done.stderr, done.stderr
    assert "runtime error" not in done.stderr, done.stderr
    return done


def refusal(program: Path, *words: object, **environment: object) -> str:
    """The one line with which the program ends with status 2."""
    done = run(program, *words, **environment)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    return lines[0]


def passes(program: Path, bundle: Path, *words: object, **environment: object) -> None:
    done = run(program, *words, "--self-test", bundle, **environment)
    assert (done.returncode, done.stderr) == (0, "self-test passed: 5 outputs, bit for bit\n"), done.stderr


# ---- on PoCL ----


@pocl
def test_images_become_outputs_on_pocl(plain: Path, bundle: Path, tmp_path: Path) -> None:
    x = images(20, seed=3)
    (tmp_path / "in.bin").write_bytes(x.tobytes())
    done = run(plain, "--require-device=cpu", bundle, tmp_path / "in.bin", tmp_path / "out.bin")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    result = np.fromfile(tmp_path / "out.bin", np.int8).reshape(-1, CLASSES)
    np.testing.assert_array_equal(result, expected(x))
    assert sorted(path.name for path in bundle.iterdir()) == ["golden", "manifest.json", "native"]


@pocl
def test_profiling_gives_the_time_of_every_step(plain: Path, bundle: Path) -> None:
    report = json.loads(run(plain, "--require-device=any", "--repeat=4", "--layers", bundle).stdout)
    assert "Portable Computing Language" in report["device"]
    assert [step["name"] for step in report["steps"]] == ["first", "second", "last"]
    for index, total in enumerate(report["samples_ms"]):
        assert 0 < sum(step["samples_ms"][index] for step in report["steps"]) <= total


@pocl
@pytest.mark.parametrize("words", [(), ("--require-device=gpu",)])
def test_a_processor_takes_no_gpus_place_unless_told_to(plain: Path, bundle: Path, words: tuple[str, ...]) -> None:
    assert "has no GPU here, only a processor: --require-device cpu" in refusal(plain, *words, "--self-test", bundle)


@pocl
def test_a_build_failure_shows_the_compilers_log(plain: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", KERNELS.replace(b"int sums[32]", b"float3000 sums[32]"))
    done = run(plain, "--require-device=cpu", "--self-test", bundle)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "generated" not in line]  # PoCL writes this itself
    assert "its compiler refuses kernels.cl with -DXCT_DOT=" in lines[0]
    assert lines[0].endswith("CL_BUILD_PROGRAM_FAILURE (-11)")
    assert any("float3000" in line for line in lines[1:])
    with pytest.raises(EngineError, match=r"native: xceptile-run: .*\n(.*\n)*.*float3000"):
        NativeProgramEngine((str(plain), "--require-device=cpu"), bundle, None)


@pocl
def test_pocl_takes_its_program_from_the_cache(plain: Path, bundle: Path, programs: Path) -> None:
    passes(plain, bundle, "--require-device=cpu")
    (kept,) = programs.iterdir()
    before = kept.stat()
    passes(plain, bundle, "--require-device=cpu")
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    passes(plain, bundle, "--require-device=cpu")
    assert kept.stat().st_ino != before.st_ino


@pocl
def test_the_engine_in_this_process(plain: Path, bundle: Path) -> None:
    x = images(3, seed=1)
    library = plain.parent / "libxceptile.so"
    with NativeEngine(bundle / "native", library=library, require_device="any", time_steps=True) as engine:
        np.testing.assert_array_equal(engine.run(x), expected(x))
        assert "Portable Computing Language" in engine.device
        assert all(step.last_ms > 0 for step in engine.steps())
        assert engine.threads == 1
    with pytest.raises(EngineError, match="has no GPU here"):
        NativeEngine(bundle / "native", library=library)


@pocl
def test_the_doctor_names_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = next(finding for finding in doctor.examine() if "OpenCL" in finding.what)
    assert finding.ok
    assert "(processor)" in finding.detail
    monkeypatch.setenv("XCEPTILE_OPENCL", "/no/such/library.so")
    finding = next(finding for finding in doctor.examine() if "OpenCL" in finding.what)
    assert (finding.ok, "no OpenCL library: /no/such/library.so" in finding.detail) == (False, True)


def test_the_doctor_looks_where_the_runtime_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under every name, the next one where a library is none of OpenCL."""
    source = (SOURCES / "opencl.c").read_text()
    usual = source.partition("usual[] = {")[2].partition("#else")[2].partition("#endif")[0]
    assert re.findall(r'"([^"]+)"', usual) == list(opencl_devices.LIBRARIES)
    (tmp_path / "some.c").write_text("int clGetPlatformIDs, clGetDeviceIDs, clGetDeviceInfo;")
    (tmp_path / "none.c").write_text("int other;")
    for name in ("some", "none"):
        subprocess.run(["cc", "-shared", "-fPIC", f"{name}.c", "-o", f"{name}.so"], cwd=tmp_path, check=True)
    monkeypatch.delenv("XCEPTILE_OPENCL", raising=False)
    names = tuple(str(tmp_path / name) for name in ("missing.so", "none.so", "some.so"))
    monkeypatch.setattr(opencl_devices, "LIBRARIES", names)
    assert opencl_devices.find_library()[0] == names[2]
    monkeypatch.setattr(opencl_devices, "LIBRARIES", names[:2])
    with pytest.raises(OSError, match=r"no OpenCL library: .*missing\.so, .*none\.so"):
        opencl_devices.find_library()


@pocl
def test_sessions_run_at_once(plain: Path, bundle: Path) -> None:
    """Four threads open a session each, on a cold cache, and share a fifth."""
    library = plain.parent / "libxceptile.so"
    with NativeEngine(bundle / "native", library=library, require_device="any") as shared:

        def work(seed: int) -> bool:
            x = images(10, seed)
            with NativeEngine(bundle / "native", library=library, require_device="any") as own:
                return all(np.array_equal(engine.run(x), expected(x)) for engine in (own, shared) * 5)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


# ---- what a device can and cannot ----


def test_the_fake_runs_the_network(checked: Path, fake: Path, bundle: Path) -> None:
    for device in ("gpu", "any"):
        passes(checked, bundle, f"--require-device={device}", XCEPTILE_OPENCL=fake)
    passes(checked, bundle, XCEPTILE_OPENCL=fake)
    described = json.loads(run(checked, "--describe", bundle, XCEPTILE_OPENCL=fake).stdout)
    assert described["device"] == "fake GPU (fake), OpenCL 1.2 fake, driver 1"
    numbered = {"XCEPTILE_OPENCL": fake, "FAKE_OPENCL_DEVICE": "102B=fake GPU 740"}
    described = json.loads(run(checked, "--describe", bundle, **numbered).stdout)
    assert described["device"] == "fake GPU 740 (fake), driver 1"
    wordy = {"XCEPTILE_OPENCL": fake, "FAKE_OPENCL_DEVICE": f"902={'p' * 120};102B={'n' * 120};102D={'d' * 120}"}
    passes(checked, bundle, **wordy)


@requires("qemu-aarch64", package="qemu-user")
@requires_module("ziglang", package="ziglang")
def test_the_runtime_for_a_phones_architecture(shipped: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shipped, under the emulator, with the fake library built for it."""
    target = catalog.get("mali-g710")
    (bundle / "native/xceptile-run").symlink_to(shipped / "xceptile-run")
    monkeypatch.setenv("XCEPTILE_OPENCL", str(shipped / "fake_opencl.so"))
    x = images(4)
    with QemuNativeEngine(bundle / "native", target) as engine:
        assert engine.device.startswith("fake GPU")
        np.testing.assert_array_equal(engine.run(x), expected(x))
    monkeypatch.setenv("XCEPTILE_OPENCL", "/no/such/library.so")
    with pytest.raises(EngineError, match="cannot load the OpenCL library"):
        QemuNativeEngine(bundle / "native", target)


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("101B=0x3b", "does not round float32 to nearest"),  # all but CL_FP_ROUND_TO_NEAREST
        ("102F=OpenCL 1.1 old", "its OpenCL is older than 1.2"),
        ("102F=OpenGL 4", "its OpenCL is older than 1.2"),
        ("1019=8192", "larger multiples than the plan's 512 bytes"),
        ("1026=0", "big endian"),
        ("1027=0", "not available"),
        ("1028=0", "no compiler"),
        ("1010=4607", "buffers of at most 4607 bytes, the network needs 4608 and 7"),
        ("1023=127", "has 127 bytes of local memory, the kernel add_weights needs 128"),
        ("11B0=39", "runs the kernel add_weights in groups of 39 at most, the plan wants 40"),
        ("1191=4", "the kernel add_weights has 4 parameters, step 0 of the plan gives it 3"),
        ("1000=2", "has no GPU here, only a processor"),
        ("1000=8", "has no GPU here"),
    ],
)
def test_a_device_that_cannot_run_the_plan_is_refused(
    checked: Path, fake: Path, bundle: Path, says: str, reason: str, programs: Path
) -> None:
    line = refusal(checked, "--self-test", bundle, XCEPTILE_OPENCL=fake, FAKE_OPENCL_DEVICE=says)
    assert reason in line
    assert not programs.exists()


def test_every_device_type_that_may_be_asked_for(checked: Path, fake: Path, bundle: Path) -> None:
    processor = {"XCEPTILE_OPENCL": fake, "FAKE_OPENCL_DEVICE": "1000=2"}
    passes(checked, bundle, "--require-device=cpu", **processor)
    passes(checked, bundle, "--require-device=any", **processor)
    line = refusal(checked, "--require-device=cpu", "--self-test", bundle, XCEPTILE_OPENCL=fake)
    assert "no OpenCL device that is a processor" in line


@pytest.mark.parametrize("platforms", [1, 2])
@pytest.mark.parametrize(
    "says",
    [
        "102F=OpenCL 1.1 old",
        "1005=16",  # of its groups, the first dimension
        "11B0=39",  # known once the kernels are built
        "F000=DOT",  # its compiler refuses every variant
    ],
)
def test_the_next_gpu_serves_where_the_first_cannot(
    checked: Path, fake: Path, bundle: Path, says: str, platforms: int
) -> None:
    """Of the same platform, or of another one."""
    two = {"XCEPTILE_OPENCL": fake, "FAKE_OPENCL_DEVICE": f"{says}|102B=GPU 2", "FAKE_OPENCL_PLATFORMS": platforms}
    passes(checked, bundle, **two)
    assert json.loads(run(checked, "--describe", bundle, **two).stdout)["device"] == "GPU 2 (fake), driver 1"


def test_where_no_device_serves_each_says_why(checked: Path, fake: Path, bundle: Path) -> None:
    three = {"XCEPTILE_OPENCL": fake, "FAKE_OPENCL_DEVICE": "102B=GPU 1;1026=0|102B=GPU 2;F000=DOT|102B=GPU 3;1023=127"}
    done = run(checked, "--self-test", bundle, **three)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    reasons = line.split("; ")
    assert "GPU 1 (fake), driver 1 cannot run this bundle: it is big endian" in reasons[0]
    assert reasons[1].startswith("GPU 2 (fake), driver 1: its compiler refuses kernels.cl with -DXCT_DOT=0")
    assert reasons[-1].startswith("GPU 3 (fake), driver 1 has 127 bytes of local memory")
    swapped = three | {"FAKE_OPENCL_DEVICE": "102B=GPU 2;F000=DOT|102B=GPU 1;1026=0"}
    first, *log = run(checked, "--self-test", bundle, **swapped).stderr.splitlines()
    assert first.endswith("FAILURE (-11); GPU 1 (fake), driver 1 cannot run this bundle: it is big endian")
    assert log == ["line 1: the fake's compiler", "line 2: is not content"]
    many = three | {"FAKE_OPENCL_DEVICE": "|".join(f"102B={'n' * 120};1026=0" for _ in range(4))}
    assert len(refusal(checked, "--self-test", bundle, **many)) < 2048


def test_a_processor_takes_no_failing_gpus_place(checked: Path, fake: Path, bundle: Path) -> None:
    both = {"XCEPTILE_OPENCL": fake, "FAKE_OPENCL_DEVICE": "1026=0|1000=2;102B=CPU 2"}
    assert "big endian" in refusal(checked, "--require-device=any", "--self-test", bundle, **both)
    passes(checked, bundle, "--require-device=cpu", **both)


@pytest.mark.parametrize(
    ("dtype", "extensions", "ending"),
    [
        ("float16", "cl_khr_fp16_no", "driver 1, float32 stands in for float16"),
        ("float16", "cl_khr_fp16", "driver 1"),
        ("int8", "", "driver 1"),
    ],
)
def test_the_device_says_where_float32_stands_in_for_float16(
    checked: Path, fake: Path, tmp_path: Path, dtype: str, extensions: str, ending: str
) -> None:
    """A plan with weights in float16 is the float16 build's."""
    x, _, y = opencl_network.plan().steps[0].arguments
    bundle = changed_plan(tmp_path, steps=with_first_step(arguments=(x, Argument("weights", dtype, 0, 3), y)))
    says = f"102B=GPU 1;1030={extensions}"
    described = run(checked, "--describe", bundle, XCEPTILE_OPENCL=fake, FAKE_OPENCL_DEVICE=says)
    assert json.loads(described.stdout)["device"] == f"GPU 1 (fake), {ending}"


@pytest.mark.parametrize(
    ("version", "extensions", "options"),
    [
        ("1.2", "cl_khr_fp16 cl_khr_integer_dot_product", "-DXCT_DOT=1 -DXCT_FP16=1"),
        ("3.0", "cl_khr_fp16 cl_khr_integer_dot_product", "-DXCT_DOT=1 -DXCT_FP16=1 -cl-std=CL3.0"),
        ("3.0", "cl_arm_integer_dot_product_accumulate_int8 cl_arm_x", "-DXCT_DOT=2"),
        ("1.2", "cl_qcom_dot_product8", "-DXCT_DOT=3"),
        ("2.0", "cl_qcom_dot_product8", "-DXCT_DOT=3 -cl-std=CL2.0"),
        ("1.2", "cl_arm_integer_dot_product_accumulate_int8 cl_khr_integer_dot_product", "-DXCT_DOT=1"),
        ("3.0", "cl_khr_integer_dot_product_2 not_cl_khr_fp16", "-DXCT_DOT=0"),
        ("1.2", "", "-DXCT_DOT=0"),
    ],
)
def test_the_kernels_are_told_what_the_device_has(
    checked: Path, fake: Path, bundle: Path, tmp_path: Path, version: str, extensions: str, options: str
) -> None:
    says, builds = f"102F=OpenCL {version} fake;1030={extensions}", tmp_path / "builds"
    passes(checked, bundle, XCEPTILE_OPENCL=fake, FAKE_OPENCL_DEVICE=says, FAKE_OPENCL_BUILDS=builds)
    assert builds.read_text().splitlines() == [options]


def test_a_compiler_that_lacks_what_its_device_announces(
    checked: Path, fake: Path, bundle: Path, tmp_path: Path
) -> None:
    """The next variant is built, down to the plain one; the next start takes that from the cache at once."""
    builds = tmp_path / "builds"
    device = {
        "XCEPTILE_OPENCL": fake,
        "FAKE_OPENCL_DEVICE": "102F=OpenCL 3.0 fake;1030=cl_khr_integer_dot_product",
        "FAKE_OPENCL_BUILDS": builds,
    }
    passes(checked, bundle, **device, FAKE_OPENCL_REFUSES="CL3.0", XCEPTILE_CACHE=tmp_path / "a")
    passes(checked, bundle, **device, FAKE_OPENCL_REFUSES="DOT=1", XCEPTILE_CACHE=tmp_path / "b")
    variants = ["-DXCT_DOT=1 -cl-std=CL3.0", "-DXCT_DOT=1", "-DXCT_DOT=0"]
    assert builds.read_text().splitlines() == variants[:2] + variants
    builds.unlink()
    passes(checked, bundle, **device, FAKE_OPENCL_REFUSES="DOT=1", XCEPTILE_CACHE=tmp_path / "b")
    assert builds.read_text().splitlines() == variants[2:]
    builds.unlink()
    done = run(checked, "--self-test", bundle, **device, FAKE_OPENCL_REFUSES="DOT", XCEPTILE_CACHE="/dev/null/none")
    assert done.returncode == 2
    assert builds.read_text().splitlines() == variants
    lines = done.stderr.splitlines()
    assert lines[0].endswith("refuses kernels.cl with -DXCT_DOT=0: CL_BUILD_PROGRAM_FAILURE (-11)")
    assert lines[1:] == ["line 1: the fake's compiler", "line 2: is not content"]


def changed_plan(tmp_path: Path, **fields: object) -> Path:
    plan = dataclasses.replace(opencl_network.plan(), **fields)  # type: ignore[arg-type]  # fields of any kind
    return write_bundle(tmp_path / "changed", changed=plan)


def with_first_step(**fields: object) -> tuple[Step, ...]:
    first, *others = opencl_network.plan().steps
    return (dataclasses.replace(first, **fields), *others)  # type: ignore[arg-type]  # fields of any kind


def test_a_plan_that_does_not_fit_the_device_or_the_kernels(checked: Path, fake: Path, tmp_path: Path) -> None:
    cases: Mapping[str, Mapping[str, object]] = {
        "lacks the OpenCL extension cl_khr_subgroups": {"features": ("cl_khr_fp16", "cl_khr_subgroups")},
        "groups of 1024 x 1024 x 64 at most, step 0 has 1 x 1 x 65": {
            "steps": with_first_step(launch=Launch((1, 1, 1), (1, 1, 65)))
        },
        "cannot find the kernel nowhere in kernels.cl: CL_INVALID_KERNEL_NAME": {
            "steps": with_first_step(kernel="nowhere")
        },
        "has 3 parameters, step 0 of the plan gives it 1": {
            "steps": with_first_step(arguments=(Argument("arena", "int8", 0, 1),), output=0)
        },
    }
    for index, (reason, fields) in enumerate(cases.items()):
        bundle = changed_plan(tmp_path / str(index), **fields)
        assert reason in refusal(checked, "--self-test", bundle, XCEPTILE_OPENCL=fake)


@pytest.mark.parametrize("fault", ["changed", "missing", "empty"])
def test_damaged_kernels_are_found_on_open(checked: Path, fake: Path, bundle: Path, fault: str) -> None:
    kernels = bundle / "native/kernels.cl"
    if fault == "missing":
        kernels.unlink()
    else:
        kernels.write_bytes(b"" if fault == "empty" else KERNELS.replace(b"% 7", b"% 5"))
    line = refusal(checked, "--self-test", bundle, XCEPTILE_OPENCL=fake)
    assert "kernels.cl" in line
    assert "SHA-256" in line or "No such file" in line


def test_a_library_that_is_not_there_or_is_none(checked: Path, bundle: Path, tmp_path: Path) -> None:
    line = refusal(checked, "--self-test", bundle, XCEPTILE_OPENCL="/no/such/libOpenCL.so")
    assert "cannot load the OpenCL library that XCEPTILE_OPENCL names" in line
    (tmp_path / "old.c").write_text("int clGetPlatformIDs(void);\nint clGetPlatformIDs(void) { return 0; }\n")
    old = compile_c(tmp_path / "old.so", "-fPIC", "-shared", tmp_path / "old.c")
    line = refusal(checked, "--self-test", bundle, XCEPTILE_OPENCL=old)
    assert "has no clGetPlatformInfo: it is no library of OpenCL 1.2" in line


PIXEL = """
#include <dlfcn.h>
#include <stdlib.h>
static void *library;
void enableOpenCL(void);
void *loadOpenCLPointer(const char *name);
void enableOpenCL(void) { library = dlopen(getenv("BEHIND"), RTLD_NOW); }
void *loadOpenCLPointer(const char *name) { return library != NULL ? dlsym(library, name) : NULL; }
"""


def test_a_library_that_hands_its_functions_out_itself(checked: Path, fake: Path, bundle: Path, tmp_path: Path) -> None:
    """As on Pixel phones."""
    (tmp_path / "pixel.c").write_text(PIXEL)
    pixel = compile_c(tmp_path / "libOpenCL-pixel.so", "-fPIC", "-shared", tmp_path / "pixel.c")
    passes(checked, bundle, XCEPTILE_OPENCL=pixel, BEHIND=fake)


# ---- compiled programs are kept ----


def kept_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def test_a_program_is_kept_for_each_device_and_driver(
    checked: Path, fake: Path, bundle: Path, tmp_path: Path, programs: Path
) -> None:
    for given in (bundle, bundle / "native", f"{bundle}/", bundle / "native/."):
        passes(checked, Path(given), XCEPTILE_OPENCL=fake)
        assert len(kept_in(programs)) == 1
    for says in ("102B=another GPU", "102D=driver 2", "102F=OpenCL 2.0 fake", "102C=another", "901=OpenCL 3.0"):
        before = kept_in(programs)
        passes(checked, bundle, XCEPTILE_OPENCL=fake, FAKE_OPENCL_DEVICE=says)
        assert len(kept_in(programs)) == len(before) + 1
        assert before.items() < kept_in(programs).items()
    other, before = write_bundle(tmp_path / "other", KERNELS + b"\n"), kept_in(programs)
    passes(checked, other, XCEPTILE_OPENCL=fake)
    assert len(kept_in(programs)) == len(before) + 1
    assert programs.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "other", "user cache"]


def faulty(data: bytes) -> dict[str, bytes]:
    header = 80
    middle = header + (len(data) - header) // 2
    return {
        "empty": b"",
        "shorter than its header": data[: header - 1],
        "no program": data[:header],
        "truncated": data[:-1],
        "longer": data + b"x",
        "other magic": b"Y" + data[1:],
        "other key": data[:8] + bytes([data[8] ^ 1]) + data[9:],
        "other hash": data[:40] + bytes([data[40] ^ 1]) + data[41:],
        "other length": data[:72] + b"\0" + data[73:],
        "changed": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "foreign": os.urandom(len(data)),
    }


def test_a_damaged_or_foreign_cache_is_made_anew(checked: Path, fake: Path, bundle: Path, programs: Path) -> None:
    passes(checked, bundle, XCEPTILE_OPENCL=fake)
    (file,) = programs.iterdir()
    whole = file.read_bytes()
    for fault, data in faulty(whole).items():
        file.write_bytes(data)
        passes(checked, bundle, XCEPTILE_OPENCL=fake)
        assert file.read_bytes() == whole, fault
        assert len(list(file.parent.iterdir())) == 1, fault
    file.unlink()
    file.mkdir()  # cannot be replaced: the program is made, and not kept
    passes(checked, bundle, XCEPTILE_OPENCL=fake)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_program_that_the_driver_no_longer_takes_is_made_anew(
    checked: Path, fake: Path, bundle: Path, programs: Path
) -> None:
    """The cache is whole, but the driver refuses the binary, or kernels are not in it."""
    passes(checked, bundle, XCEPTILE_OPENCL=fake)
    (file,) = programs.iterdir()
    whole = file.read_bytes()
    for program in (b"refused", b"binary without kernels"):
        tail = hashlib.sha256(program).digest() + struct.pack("<Q", len(program)) + program
        file.write_bytes(whole[:40] + tail)
        passes(checked, bundle, XCEPTILE_OPENCL=fake)
        assert file.read_bytes() == whole


def test_where_programs_are_kept(checked: Path, fake: Path, bundle: Path, tmp_path: Path, programs: Path) -> None:
    passes(checked, bundle, XCEPTILE_OPENCL=fake, XCEPTILE_CACHE=tmp_path / "own/chosen")
    assert len(kept_in(tmp_path / "own/chosen")) == 1
    assert not programs.exists()
    (tmp_path / "home").mkdir()
    passes(checked, bundle, XCEPTILE_OPENCL=fake, XDG_CACHE_HOME="", HOME=tmp_path / "home")
    assert kept_in(tmp_path / "home/.cache/xceptile") == kept_in(tmp_path / "own/chosen")
    passes(checked, bundle, XCEPTILE_OPENCL=fake, XDG_CACHE_HOME="relative", HOME="")  # nowhere: every start compiles
    # Nowhere at all: every start compiles.
    (tmp_path / "file").write_text("")
    passes(checked, bundle, XCEPTILE_OPENCL=fake, XCEPTILE_CACHE=tmp_path / "file/none")


def plant(file: Path) -> None:
    """A whole cache of another program, which fails where it is used: it holds no kernels."""
    program, whole = b"binary without kernels", file.read_bytes()
    file.write_bytes(whole[:40] + hashlib.sha256(program).digest() + struct.pack("<Q", len(program)) + program)


def test_a_program_beside_a_bundle_is_not_looked_at(
    checked: Path, fake: Path, bundle: Path, programs: Path, tmp_path: Path
) -> None:
    """It came with the bundle, in the same archive; whoever unpacked that owns it, and did not make it."""
    passes(checked, bundle, XCEPTILE_OPENCL=fake)
    (file,) = programs.iterdir()
    beside = [Path(f"{bundle}.cache"), bundle / "native.cache"]
    for folder in beside:
        folder.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(file, folder)
        plant(folder / file.name)
    planted = (beside[0] / file.name).read_bytes()
    passes(checked, bundle, XCEPTILE_OPENCL=fake, XDG_CACHE_HOME=tmp_path / "another")
    assert (beside[0] / file.name).read_bytes() == planted  # one that is used and fails is made anew


@pytest.mark.parametrize("where", ["file", "folder", "above", "link"])
@pytest.mark.parametrize("bits", [0o775, 0o757])
def test_a_program_that_others_could_put_there_is_not_run(
    checked: Path, fake: Path, bundle: Path, programs: Path, tmp_path: Path, where: str, bits: int
) -> None:
    """XCEPTILE_CACHE and the XDG folders are used where they are the user's own, checked up to the root."""
    chosen = tmp_path / "chosen/folder"
    for variables in ({}, {"XCEPTILE_CACHE": chosen}):
        passes(checked, bundle, XCEPTILE_OPENCL=fake, **variables)
        (file,) = (chosen if variables else programs).iterdir()
        plant(file)
        planted = file.read_bytes()
        if where == "link":
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
            (tmp_path / "elsewhere").chmod(bits)
        else:
            {"file": file, "folder": file.parent, "above": file.parent.parent}[where].chmod(bits)
        passes(checked, bundle, XCEPTILE_OPENCL=fake, **variables)
        if where in ("folder", "above"):  # nor is anything written there
            assert kept_in(file.parent) == {file.name: planted}
        else:  # the user's own takes its place
            assert file.read_bytes() != planted
            assert not file.is_symlink()
        if where == "link":
            assert (tmp_path / "elsewhere").read_bytes() == planted


@requires_hardware(os.geteuid() == 0, "root, who gives files to another account")
@pytest.mark.parametrize("where", ["file", "folder", "above"])
def test_a_program_of_another_account_is_not_run(
    checked: Path, fake: Path, bundle: Path, programs: Path, where: str
) -> None:
    passes(checked, bundle, XCEPTILE_OPENCL=fake)
    (file,) = programs.iterdir()
    plant(file)
    planted = file.read_bytes()
    os.chown({"file": file, "folder": programs, "above": programs.parent}[where], 54321, 54321)
    passes(checked, bundle, XCEPTILE_OPENCL=fake)
    assert (file.read_bytes() == planted) == (where != "file")


def test_a_folder_below_one_in_which_names_are_their_owners_serves(
    checked: Path, fake: Path, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    passes(checked, bundle, XCEPTILE_OPENCL=fake, XCEPTILE_CACHE=tmp_path / "tmp/mine")
    assert len(kept_in(tmp_path / "tmp/mine")) == 1
    passes(checked, bundle, XCEPTILE_OPENCL=fake, XCEPTILE_CACHE=tmp_path / "tmp")
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["mine"]


def test_starts_at_once_leave_one_whole_program(checked: Path, fake: Path, bundle: Path, programs: Path) -> None:
    environment = os.environ | {"XCEPTILE_OPENCL": str(fake)}
    command = [checked, "--self-test", bundle]
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    for process in started:
        assert process.communicate()[1] == "self-test passed: 5 outputs, bit for bit\n"
    assert len(list(programs.iterdir())) == 1


def test_a_full_disk_only_costs_the_next_start(checked: Path, fake: Path, bundle: Path, programs: Path) -> None:
    """A limit on the size of files stands in for the disk: the program is cut off while it is written."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk, the write fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    environment = os.environ | {"XCEPTILE_OPENCL": str(fake)}
    command = [checked, "--self-test", bundle]
    done = subprocess.run(command, env=environment, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert kept_in(programs) == {}
    passes(checked, bundle, XCEPTILE_OPENCL=fake)
    assert len(kept_in(programs)) == 1


# ---- failures of every call ----


@pytest.fixture
def long_bundle(tmp_path: Path) -> Path:
    """With more steps than are handed to the device at a time."""
    first, second, last = opencl_network.plan().steps
    return changed_plan(tmp_path, steps=(*(first, second) * 8, last))


@pytest.fixture(scope="module")
def faults(objects: Path) -> Path:
    wrap = "-Wl,--wrap=malloc,--wrap=calloc"
    return compile_c(objects / "faults", *CHECKED, wrap, TEST_SOURCES / "opencl_faults.c", *sorted(objects.glob("*.o")))


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_every_failure_is_told_and_leaves_nothing_behind(
    faults: Path, fake: Path, long_bundle: Path, tmp_path: Path, cache: str
) -> None:
    """AddressSanitizer finds what is used after it was freed, LeakSanitizer what is left, the fake what is not
    released."""
    folder = tmp_path / "cache" if cache == "warm" else Path("/dev/null/none")
    done = run(faults, long_bundle, XCEPTILE_OPENCL=fake, XCEPTILE_CACHE=folder)
    assert done.returncode == 0, done.stderr
    told: dict[str, list[tuple[str, int, str]]] = {}
    for line in done.stdout.splitlines():
        function, _, when, code, message = line.split("\t")
        told.setdefault(function, []).append((when, int(code), message))
    assert len(told) == 24
    # What only the cache needs may fail unseen; without a failure to explain, nobody asks for a log.
    unseen = {"clGetProgramInfo", "clCreateProgramWithBinary", "clGetProgramBuildInfo", "malloc"}
    if cache == "warm":
        unseen |= {"clBuildProgram", "clCreateKernel", "clSetKernelArg", "clGetKernelInfo", "clGetKernelWorkGroupInfo"}
        unseen |= {"clCreateProgramWithSource", "clGetDeviceInfo"}
    for function, outcomes in told.items():
        last = [outcome for outcome in outcomes if outcome == ("run", 0, "")]
        # For each code the call that was not reached; a device need not say whether it shares the host's memory.
        quiet = 2 if function == "clGetDeviceInfo" else 1
        assert function in unseen or len(last) == 2 * quiet, function
        for when, code, message in outcomes:
            if code:
                assert ("CL_" in message) == (function != "malloc"), message
                assert function != "malloc" or "memory" in message
                assert (
                    when == "open" or "input" in message or "output" in message or "step" in message or "run" in message
                )


def test_a_failure_on_the_way_to_the_next_device_leaves_nothing_behind(faults: Path, fake: Path, bundle: Path) -> None:
    """Whatever fails once on the first device, the second opens; only the list of platforms has no second."""
    places = {"XCEPTILE_OPENCL": fake, "XCEPTILE_CACHE": "/dev/null/none"}
    done = run(faults, bundle, **places, FAKE_OPENCL_DEVICE="|102B=GPU 2", FAKE_OPENCL_PLATFORMS=2)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    refused = {function for function, _, when, code, _ in rows if when == "open" and code != "0"}
    assert refused == {"clGetPlatformIDs", "malloc"}


def test_a_failure_on_the_way_to_another_variant_leaves_nothing_behind(faults: Path, fake: Path, bundle: Path) -> None:
    says = "102F=OpenCL 3.0 fake;1030=cl_khr_integer_dot_product"
    places = {"XCEPTILE_OPENCL": fake, "XCEPTILE_CACHE": "/dev/null/none"}
    done = run(faults, bundle, **places, FAKE_OPENCL_DEVICE=says, FAKE_OPENCL_REFUSES="CL3.0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "            (void)gpu->cl.clReleaseEvent(gpu->events[i]);\n",
        "        (void)gpu->cl.clReleaseCommandQueue(gpu->queue);\n",
        "    free(gpu->output);\n",
    ],
)
def test_a_planted_leak_is_seen(objects: Path, fake: Path, bundle: Path, tmp_path: Path, line: str) -> None:
    source = (SOURCES / "opencl.c").read_text()
    assert source.count(line) == 1
    (tmp_path / "opencl.c").write_text(source.replace(line, ";\n"))
    others = [path for path in sorted(objects.glob("*.o")) if path.name != "opencl.o"]
    words = ["-Wl,--wrap=malloc,--wrap=calloc", TEST_SOURCES / "opencl_faults.c", tmp_path / "opencl.c", *others]
    program = compile_c(tmp_path / "faults", *CHECKED, *words)
    environment = os.environ | {"XCEPTILE_OPENCL": str(fake), "XCEPTILE_CACHE": "/dev/null/none"}
    done = subprocess.run([program, bundle], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "live_objects() == 0" in done.stderr or "LeakSanitizer" in done.stderr
