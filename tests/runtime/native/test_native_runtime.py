"""The native runtime, built with sanitizers, on hand-written kernels; and the one that is shipped."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import fake_network
from support.fake_network import CLASSES, COUNT, expected, images, write_bundle
from support.native_build import ADDRESS, LIBRARY, WARNINGS, compile_program
from support.needs import requires, requires_root
from support.plan_files import ATTACKS, PACKED, PACKED_GPU, resealed_changes
from support.tree import ROOT, SOURCES, TEST_SOURCES

from xceptile.compile.backends import native_runtime, zig
from xceptile.models.preprocess import PixelEncoding
from xceptile.runtime.devices.qemu import QemuNativeEngine
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.engines.native import NativeEngine
from xceptile.runtime.engines.native_program import NativeProgramEngine
from xceptile.runtime.plan import Plan, PlanError, unpack
from xceptile.targets import catalog

pytestmark = requires("clang", package="clang")

THREAD = ["-g", "-O1", "-fsanitize=thread"]
SHIPPED_BYTES = 100_000  # the budget of the stripped CPU runtime


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The library's object files, with address and undefined-behaviour sanitizers."""
    folder = tmp_path_factory.mktemp("checked")
    subprocess.run(["clang", *WARNINGS, *ADDRESS, "-c", *LIBRARY], check=True, cwd=folder)
    return sorted(folder.glob("*.o"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, checked: list[Path]) -> Path:
    """xceptile-run with the same sanitizers, and the fake kernels."""
    folder = tmp_path_factory.mktemp("built")
    compile_program(folder / "xceptile-run", SOURCES / "main.c", *checked, flags=ADDRESS)
    fake_network.compile_kernels(folder / "kernels.so")
    return folder


@pytest.fixture(scope="module")
def kernels(built: Path) -> bytes:
    return (built / "kernels.so").read_bytes()


@pytest.fixture
def bundle(tmp_path: Path, kernels: bytes) -> Path:
    return write_bundle(tmp_path / "bundle", kernels)


def run(built: Path, *words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [str(built / "xceptile-run"), *map(str, words)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, cwd=built)
    assert b"Sanitizer" not in done.stderr, done.stderr.decode()
    assert b"runtime error" not in done.stderr, done.stderr.decode()
    return done


def make_device(path: Path, minor: int) -> Path:
    """A memory device: 3 is null, 7 is full. Never the machine's own, which a fault here would replace."""
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, minor))
    return path


def refusal(built: Path, *words: object) -> str:
    """The one line with which the program ends with status 2."""
    done = run(built, *words)
    assert done.returncode == 2
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1
    return lines[0]


# ---- what it computes ----


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_images_become_outputs(built: Path, bundle: Path, tmp_path: Path, threads: int) -> None:
    x = images(50, seed=threads)
    (tmp_path / "in.bin").write_bytes(x.tobytes())
    done = run(built, f"--threads={threads}", bundle, tmp_path / "in.bin", tmp_path / "out.bin")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    result = np.fromfile(tmp_path / "out.bin", np.int8).reshape(-1, CLASSES)
    np.testing.assert_array_equal(result, expected(x))


def test_images_pass_through_pipes(built: Path, bundle: Path) -> None:
    x = images(3)
    done = run(built, bundle / "native", "-", "-", stdin=x.tobytes())
    assert done.returncode == 0
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.int8).reshape(-1, CLASSES), expected(x))


@requires_root()
@pytest.mark.parametrize("linked", [True, False])
def test_a_device_as_output_stays_a_device(built: Path, bundle: Path, tmp_path: Path, linked: bool) -> None:
    device, link = make_device(tmp_path / "null", 3), tmp_path / "link"
    link.symlink_to(device)
    assert run(built, bundle, bundle / "golden/input.bin", link if linked else device).returncode == 0
    assert stat.S_ISCHR(device.stat().st_mode)
    assert link.is_symlink()


@pytest.mark.parametrize("there", [True, False])
def test_links_as_output_are_followed(built: Path, bundle: Path, tmp_path: Path, there: bool) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if there:
        (place / "end").write_bytes(b"before")
    (place / "second").symlink_to("end")
    (tmp_path / "first").symlink_to("place/second")
    assert run(built, bundle, bundle / "golden/input.bin", tmp_path / "first").returncode == 0
    assert (place / "end").read_bytes() == (bundle / "golden/output.bin").read_bytes()
    assert sorted(place.iterdir()) == [place / "end", place / "second"]
    assert [(tmp_path / "first").is_symlink(), (place / "end").is_symlink()] == [True, False]


def test_a_loop_of_links_is_no_output(built: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "loop: Too many levels" in refusal(built, bundle, bundle / "golden/input.bin", tmp_path / "loop")


@pytest.mark.parametrize("name", ["stdout", "/proc/self/fd/1", "out"])
def test_standard_output_by_another_name_keeps_what_it_holds(
    built: Path, bundle: Path, tmp_path: Path, name: str
) -> None:
    """As /dev/stdout is a link. ``--describe`` is printed before the results."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "stdout").symlink_to("/proc/self/fd/1")
    command = [built / "xceptile-run", "--describe", bundle, bundle / "golden/input.bin", name]
    with (folder / "out").open("ab") as file:
        for _ in range(2):
            subprocess.run(command, cwd=folder, stdout=file, check=True)
    seen, golden = (folder / "out").read_bytes(), (bundle / "golden/output.bin").read_bytes()
    assert seen.endswith(golden)
    assert seen == seen[: len(seen) // 2] * 2
    assert json.loads(seen[: len(seen) // 2].removesuffix(golden))["inputs"]
    assert sorted(folder.iterdir()) == [folder / "out", folder / "stdout"]


def test_what_may_grow_no_more_leaves_nothing(built: Path, bundle: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE, with SIGXFSZ as a shell hands it on."""
    (tmp_path / "in.bin").write_bytes(images(50).tobytes())
    (tmp_path / "out.bin").write_bytes(b"before")
    limit = (
        "import os, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); os.execv(sys.argv[1], sys.argv[1:])"
    )
    words = [built / "xceptile-run", bundle, tmp_path / "in.bin", tmp_path / "out.bin"]
    done = subprocess.run([sys.executable, "-c", limit, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"xceptile-run: {tmp_path}/out.bin: File too large\n")
    assert (tmp_path / "out.bin").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "in.bin", "out.bin"]


@requires_root()
@pytest.mark.parametrize(
    "words",
    [
        ("--version",),
        ("--help",),
        ("--describe", "BUNDLE"),
        ("--repeat=1", "BUNDLE"),
        ("BUNDLE", "INPUT", "-"),
        ("BUNDLE", "INPUT", "FULL"),
    ],
    ids=" ".join,
)
def test_what_does_not_arrive_is_no_success(built: Path, bundle: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    full = make_device(tmp_path / "full", 7)
    places = {"BUNDLE": bundle, "INPUT": bundle / "golden/input.bin", "FULL": full}
    command = [built / "xceptile-run", *(places.get(word, word) for word in words)]
    with full.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"xceptile-run: (.*/full|-|standard output): No space left on device\n", done.stderr)


def test_a_closed_standard_output_harms_only_who_uses_it(built: Path, bundle: Path, tmp_path: Path) -> None:
    for words, status in (((bundle, bundle / "golden/input.bin", tmp_path / "out.bin"), 0), (("--version",), 2)):
        shell = ["sh", "-c", '"$@" >&-', "sh", built / "xceptile-run", *words]
        assert subprocess.run(shell, stderr=subprocess.DEVNULL, check=False).returncode == status


def test_names_are_shown_and_not_obeyed(built: Path, bundle: Path) -> None:
    name = "\x1b]0;owned\x07\x7f\x9b2J\u202e\u2066 café 猫\u200d"
    shown = "\\x1b]0;owned\\x07\\x7f\\x9b2J\\u202e\\u2066 café 猫\u200d"
    assert refusal(built, bundle, name, "out") == f"xceptile-run: {shown}: No such file or directory"
    assert shown in refusal(built, "--self-test", name)
    assert f"--{shown}: not an option" in refusal(built, f"--{name}", bundle)


@pytest.mark.parametrize("table", [False, True])
def test_pixels_enter_as_python_lets_them(
    built: Path, checked: list[Path], kernels: bytes, tmp_path: Path, table: bool
) -> None:
    """By the plan's table where it has one: another value for each pixel of each channel."""
    rows = tuple(tuple((5 * v + 50 * c) % 256 - 128 for c in range(3)) for v in range(256)) if table else None
    encoding = PixelEncoding(rows)
    plan = dataclasses.replace(fake_network.plan(), pixel_table=encoding.to_bytes())
    bundle = write_bundle(tmp_path / "bundle", kernels, plan)
    program = tmp_path / "pixels"
    compile_program(program, TEST_SOURCES / "pixels.c", *checked, flags=ADDRESS)
    pixels = np.random.default_rng(0).integers(0, 256, fake_network.SHAPE).astype(np.uint8)
    done = subprocess.run([program, bundle], input=pixels.tobytes(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.int8), encoding.encode(pixels).reshape(-1))


@pytest.mark.parametrize("which", ["bundle", "native"])
def test_the_self_test_passes(built: Path, bundle: Path, which: str) -> None:
    done = run(built, "--self-test", bundle if which == "bundle" else bundle / "native")
    assert done.returncode == 0
    assert b"passed: 5 outputs" in done.stderr


def test_the_self_test_finds_a_planted_fault(built: Path, bundle: Path) -> None:
    golden = bytearray((bundle / "golden/output.bin").read_bytes())
    golden[17] ^= 1
    (bundle / "golden/output.bin").write_bytes(golden)
    done = run(built, "--self-test", bundle)
    assert done.returncode == 1
    assert b"FAILED: 1 of 5 outputs differ, in 1 bytes" in done.stderr


def test_every_sample_is_reported(built: Path, bundle: Path) -> None:
    done = run(built, "--repeat=7", "--warmup=1", "--layers", "--threads=2", bundle)
    report = json.loads(done.stdout)
    assert len(report["samples_ms"]) == 7
    assert report["threads"] == 2
    assert [step["name"] for step in report["steps"]] == ["first", "second", "third", "last"]
    assert report["steps"][2]["path"] == 'odd "name"'
    assert [len(step["samples_ms"]) for step in report["steps"]] == [7] * 4
    for index, total in enumerate(report["samples_ms"]):
        assert 0 < sum(step["samples_ms"][index] for step in report["steps"]) <= total


def test_the_network_is_described(built: Path, bundle: Path) -> None:
    description = json.loads(run(built, "--describe", bundle).stdout)
    expected_input = {
        "name": "input", "dtype": "int8", "shape": [1, 20, 30, 3], "scale": 1, "zero_point": -128, "size_bytes": 1800,
    }  # fmt: skip
    assert description["inputs"] == [expected_input]
    assert description["outputs"][0]["scale"] == 0.25
    assert description["steps"][0]["kernel"] == "add_weights"


def test_threads_stay_on_the_named_cores(built: Path, bundle: Path) -> None:
    core = min(os.sched_getaffinity(0))
    assert run(built, "--cores", core, "--self-test", bundle).returncode == 0
    report = json.loads(run(built, "--cores", core, "--repeat=1", bundle).stdout)
    assert report["threads"] == 1


def test_help_and_version(built: Path) -> None:
    assert run(built, "--help").stdout.startswith(b"Usage: xceptile-run")
    assert run(built, "--version").stdout == b"xceptile-run development\n"


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--threads=0", "x"), "not a valid value"),
        (("--threads=-1", "x"), "not a valid value"),
        (("--threads=99999999999999999999", "x"), "not a valid value"),
        (("--require-device=tpu", "x"), "not a valid value"),
        (("--cores=1-", "x"), "not a valid value"),
        (("--cores=64", "x"), "not a valid value"),
        (("--cores=3-1", "x"), "not a valid value"),
        (("--repeat=many", "x"), "not a valid value"),
        (("--layers", "x"), "needs --repeat"),
        (("x",), "nothing to do"),
        (("x", "in"), "no OUTPUT"),
        (("--no-such-option",), "no-such-option"),
        (("no/such/bundle", "in", "out"), "no/such/bundle is no bundle"),
    ],
)
def test_a_wrong_command_line_is_refused(built: Path, words: tuple[str, ...], reason: str) -> None:
    assert reason in refusal(built, *words)


def test_a_partial_image_is_refused_and_nothing_is_left(built: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(images(2).tobytes()[:-1])
    assert "no whole number of images" in refusal(built, bundle, tmp_path / "in.bin", tmp_path / "out.bin")
    (tmp_path / "in.bin").write_bytes(b"")
    assert "holds no image" in refusal(built, bundle, tmp_path / "in.bin", tmp_path / "out.bin")
    assert "No such file" in refusal(built, bundle, tmp_path / "none.bin", tmp_path / "out.bin")
    assert "No such file" in refusal(built, bundle, bundle / "golden/input.bin", tmp_path / "none" / "out.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "in.bin"]


@pytest.mark.parametrize("name", ["plan.bin", "weights.bin", "kernels.so"])
def test_a_missing_file_is_named(built: Path, bundle: Path, name: str) -> None:
    (bundle / "native" / name).unlink()
    reason = refusal(built, "--self-test", bundle)
    assert "is no bundle" in reason if name == "plan.bin" else f"{name}: No such file" in reason


@pytest.mark.parametrize("name", ["plan.bin", "weights.bin", "kernels.so"])
def test_a_folder_is_no_file(built: Path, bundle: Path, name: str) -> None:
    (bundle / "native" / name).unlink()
    (bundle / "native" / name).mkdir()
    assert f"{name} is no regular file" in refusal(built, "--self-test", bundle)


@pytest.mark.parametrize("name", ["plan.bin", "weights.bin", "kernels.so"])
def test_a_fifo_is_refused_and_not_waited_for(built: Path, bundle: Path, name: str) -> None:
    (bundle / "native" / name).unlink()
    os.mkfifo(bundle / "native" / name)
    command = [built / "xceptile-run", "--self-test", bundle]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert done.returncode == 2
    assert f"{name} is no regular file" in done.stderr.decode()


@pytest.mark.parametrize("name", ["plan.bin", "weights.bin", "kernels.so"])
@pytest.mark.parametrize("fault", ["changed", "truncated", "empty"])
def test_damage_is_found_on_open(built: Path, bundle: Path, name: str, fault: str) -> None:
    path = bundle / "native" / name
    data = path.read_bytes()
    middle = len(data) // 2
    changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes({"changed": changed, "truncated": data[:-1], "empty": b""}[fault])
    reason = refusal(built, "--self-test", bundle)
    assert name in reason
    assert "SHA-256" in reason or "truncated" in reason or "too short" in reason


def test_a_bundle_for_the_processor_is_refused_where_a_gpu_is_required(built: Path, bundle: Path) -> None:
    assert "a GPU is required" in refusal(built, "--require-device=gpu", "--self-test", bundle)
    assert run(built, "--require-device=cpu", "--self-test", bundle).returncode == 0


def test_a_plan_of_a_terabyte_is_refused_unread(built: Path, bundle: Path) -> None:
    os.truncate(bundle / "native/plan.bin", 1 << 40)
    assert "too long for a plan" in refusal(built, "--self-test", bundle)


@pytest.mark.parametrize("kind", ["loop", "folder", "fifo"])
@pytest.mark.parametrize("name", ["golden/input.bin", "golden/output.bin", "native/plan.bin", "native/roof/plan.bin"])
def test_what_is_there_and_cannot_be_read_is_not_missing(built: Path, bundle: Path, name: str, kind: str) -> None:
    path = bundle / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    {"loop": lambda: path.symlink_to(path.name), "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[kind]()
    words = ("--repeat=1", "--layers") if "roof" in name else ("--self-test",)
    command = [built / "xceptile-run", *words, bundle]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    reason = "Too many levels of symbolic links" if kind == "loop" else "is no regular file"
    assert re.search(rf"{path.name}:? {reason}", done.stderr)


def test_golden_files_may_be_missing_or_of_unequal_length(built: Path, bundle: Path) -> None:
    golden = bundle / "golden/output.bin"
    golden.write_bytes(golden.read_bytes()[:-CLASSES])
    assert "equally many" in refusal(built, "--self-test", bundle)
    golden.unlink()
    assert "to test itself with" in refusal(built, "--self-test", bundle)
    assert "none.bin: No such file" in refusal(built, "--repeat=1", bundle, bundle / "none.bin")
    (bundle / "golden/input.bin").unlink()
    assert "nothing to time" in refusal(built, "--repeat=1", bundle)


def test_a_kernel_that_fails_says_why_and_the_session_lives_on(built: Path, bundle: Path, tmp_path: Path) -> None:
    x = images(2)
    x[1].flat[100] = -128 - int(fake_network.WEIGHTS[100 % 7])
    (tmp_path / "in.bin").write_bytes(x.tobytes())
    reason = refusal(built, "--threads=2", bundle, tmp_path / "in.bin", tmp_path / "out.bin")
    assert "step 1 (second) failed: ValueError: expected no -128!" in reason
    assert not (tmp_path / "out.bin").exists()


def bundle_of(tmp_path: Path, kernels: bytes, plan: Plan) -> Path:
    return write_bundle(tmp_path / "changed", kernels, plan)


def test_a_kernel_that_wants_threads_of_its_own_fails(built: Path, tmp_path: Path, kernels: bytes) -> None:
    changed = bundle_of(tmp_path, kernels, fake_network.with_kernel("parallel"))
    assert "expected threads" in refusal(built, "--self-test", changed)


def test_a_kernel_that_is_not_there_is_named(built: Path, tmp_path: Path, kernels: bytes) -> None:
    changed = bundle_of(tmp_path, kernels, fake_network.with_kernel("nowhere"))
    assert "has no kernel __tvm_ffi_nowhere" in refusal(built, "--self-test", changed)


def test_an_arena_that_cannot_be_had_is_refused(built: Path, tmp_path: Path, kernels: bytes) -> None:
    changed = bundle_of(tmp_path, kernels, dataclasses.replace(fake_network.plan(), arena_bytes=1 << 40))
    limited = f"ulimit -v unlimited; exec {built / 'xceptile-run'} --threads=1 --self-test {changed}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "no memory for an arena" in done.stderr  # the system may promise a terabyte


def test_a_processor_feature_that_is_missing_is_named(built: Path, tmp_path: Path, kernels: bytes) -> None:
    changed = bundle_of(tmp_path, kernels, dataclasses.replace(fake_network.plan(), features=("warp_drive",)))
    assert 'needs the processor feature "warp_drive"' in refusal(built, "--self-test", changed)


def test_kernels_that_are_no_library_are_refused(built: Path, tmp_path: Path, kernels: bytes) -> None:
    assert "is no shared library" in refusal(built, "--self-test", write_bundle(tmp_path / "a", b"#!/bin/sh\n" * 20))
    header_only = write_bundle(tmp_path / "b", kernels[:64])
    assert "cannot load the kernels" in refusal(built, "--self-test", header_only)


def test_kernels_for_another_architecture_are_refused(built: Path, tmp_path: Path, kernels: bytes) -> None:
    for machine, name in ((243, "riscv64"), (258, "another processor")):  # 258: LoongArch
        foreign = write_bundle(tmp_path / name, kernels[:18] + struct.pack("<H", machine) + kernels[20:])
        assert f"holds code for {name} (ELF machine {machine})" in refusal(built, "--self-test", foreign)


def test_a_newer_plan_is_named(built: Path, bundle: Path) -> None:
    path = bundle / "native/plan.bin"
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<I", 2) + data[12:])
    assert "version 2" in refusal(built, "--self-test", bundle)


# ---- the library ----


def test_the_example_of_the_documentation(checked: list[Path], bundle: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "runtime.md").read_text()
    (tmp_path / "app.c").write_text(page.partition("```c\n")[2].partition("```")[0])
    program = compile_program(tmp_path / "app", tmp_path / "app.c", *checked, flags=ADDRESS)
    image = fake_network.images(1)
    (tmp_path / "image").write_bytes((image.view(np.uint8) ^ 0x80).tobytes())
    printed = subprocess.run([program, bundle, tmp_path / "image"], check=True, capture_output=True, text=True).stdout
    logits = 0.25 * (fake_network.expected(image)[0].astype(int) - 3)
    assert printed.splitlines() == [f"{i} {logit:g}" for i, logit in enumerate(logits)]
    for arguments, error in (
        ([tmp_path, tmp_path / "image"], "is no bundle"),
        ([bundle, bundle / "plan.bin"], "no image"),
    ):
        refused = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert refused.returncode == 2
        assert error in refused.stderr


@pytest.mark.parametrize("language", [("c", "c99"), ("c++", "c++98"), ("c++", "c++17")], ids="{0[1]}".format)
def test_the_header_serves_c_and_cpp(language: tuple[str, str]) -> None:
    flags = ["-x", language[0], f"-std={language[1]}", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    subprocess.run(["clang", *flags, "-fsyntax-only", "-include", SOURCES / "xceptile.h", "/dev/null"], check=True)


def test_misuse_is_answered(checked: list[Path], bundle: Path, tmp_path: Path) -> None:
    program = compile_program(tmp_path / "misuse", TEST_SOURCES / "misuse.c", *checked, flags=ADDRESS)
    subprocess.run([program, bundle], check=True)


@pytest.mark.parametrize("flags", [ADDRESS, THREAD], ids=["address", "thread"])
def test_a_session_of_years_counts_on(tmp_path: Path, flags: list[str]) -> None:
    sources = TEST_SOURCES / "pool_positions.c", SOURCES / "error.c"
    subprocess.run([compile_program(tmp_path / "positions", *sources, flags=flags)], check=True, timeout=60)


@pytest.mark.parametrize("flags", [ADDRESS, THREAD], ids=["address", "thread"])
def test_each_thread_gets_the_message_of_its_own_kernel(tmp_path: Path, flags: list[str]) -> None:
    sources = TEST_SOURCES / "kernel_errors.c", SOURCES / "kernel_stub.c"
    subprocess.run([compile_program(tmp_path / "errors", *sources, flags=flags)], check=True, timeout=60)


@pytest.fixture(scope="module", params=[ADDRESS, THREAD], ids=["address", "thread"])
def concurrent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The program ``concurrent`` and a bundle, kernels included, under one sanitizer."""
    folder = tmp_path_factory.mktemp("concurrent")
    program = compile_program(folder / "concurrent", TEST_SOURCES / "concurrent.c", *LIBRARY, flags=request.param)
    sanitizer = next(flag for flag in request.param if flag.startswith("-fsanitize="))
    kernels = fake_network.compile_kernels(folder / "kernels.so", ("clang", sanitizer)).read_bytes()
    return program, write_bundle(folder / "bundle", kernels)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_sessions_run_at_once(concurrent: tuple[Path, Path], threads: int) -> None:
    """Three sessions on four threads, one of them shared; the thread sanitizer sees every access to the arena."""
    program, bundle = concurrent
    subprocess.run([program, bundle, str(threads)], check=True, timeout=120)


def test_the_parser_in_c_agrees_with_the_one_in_python(checked: list[Path], tmp_path: Path) -> None:
    """On plans changed in every byte and cut at every length, hashes made right: same verdict, no stray access."""
    program = compile_program(tmp_path / "verdicts", TEST_SOURCES / "plan_verdicts.c", *checked, flags=ADDRESS)
    plans = [
        PACKED,
        *resealed_changes(PACKED),
        *resealed_changes(PACKED_GPU),
        *ATTACKS.values(),
        *(PACKED[:length] for length in range(0, len(PACKED), 7)),
    ]
    stream = b"".join(struct.pack("<I", len(plan)) + plan for plan in plans)
    done = subprocess.run([program], input=stream, capture_output=True, check=True)
    verdicts = [verdict == ord("1") for verdict in done.stdout]
    assert verdicts == [is_sound(plan) for plan in plans]
    assert verdicts[0]
    assert any(verdicts[1 + len(resealed_changes(PACKED)) :])


def is_sound(data: bytes) -> bool:
    try:
        unpack(data)
    except PlanError:
        return False
    return True


HASH_PROGRAM = """
#include <stdio.h>
#include "internal.h"
int main(void)
{
    static uint8_t data[300];
    for (int i = 0; i < 300; i++)
        data[i] = (uint8_t)(i * 7);
    for (size_t length = 0; length <= 300; length++) {
        uint8_t digest[32];
        xct_sha256(data, length, digest);
        for (int i = 0; i < 32; i++)
            printf("%02x", digest[i]);
        puts("");
    }
    return 0;
}
"""


def check_hashes(*command: str | Path) -> None:
    data = bytes(i * 7 & 255 for i in range(300))
    digests = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert digests == [hashlib.sha256(data[:length]).hexdigest() for length in range(301)]


def test_sha256_of_every_length_around_a_block(checked: list[Path], tmp_path: Path) -> None:
    """By this processor's instructions for it, if there are any."""
    (tmp_path / "hash.c").write_text(HASH_PROGRAM)
    check_hashes(compile_program(tmp_path / "hash", tmp_path / "hash.c", *checked, flags=ADDRESS))


@requires("qemu-x86_64", package="qemu-user")
def test_sha256_on_an_older_x86(tmp_path: Path) -> None:
    """Haswell has no instructions for it: the plain C."""
    (tmp_path / "hash.c").write_text(HASH_PROGRAM)
    program = compile_program(tmp_path / "hash", tmp_path / "hash.c", *LIBRARY, flags=["-O2"])
    check_hashes("qemu-x86_64", "-cpu", "Haswell", program)


@requires("qemu-aarch64", package="qemu-user")
def test_sha256_on_arm(tmp_path: Path) -> None:
    (tmp_path / "hash.c").write_text(HASH_PROGRAM)
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    sources = [str(tmp_path / "hash.c"), str(SOURCES / "sha256.c")]
    subprocess.run([*zig, *WARNINGS, *sources, "-o", tmp_path / "hash"], check=True)
    check_hashes("qemu-aarch64", "-cpu", "cortex-a53", tmp_path / "hash")


# ---- what is shipped ----


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle with the runtime that zig builds, by architecture."""
    pytest.importorskip("ziglang", reason="needs ziglang (pip install ziglang)")
    folders = {}
    for name in ("generic/arm64", "generic/riscv64", catalog.get("host").name):
        target = catalog.get(name)
        folder = tmp_path_factory.mktemp(target.architecture)
        compiler = tuple(zig.compiler(target.architecture))
        kernels = fake_network.compile_kernels(folder / "kernels.so", compiler).read_bytes()
        bundle = write_bundle(folder / "bundle", kernels)
        for file, data in native_runtime.build(target).items():
            (bundle / "native" / file).write_bytes(data)
            (bundle / "native" / file).chmod(0o755)
        folders[target.architecture] = bundle
    return folders


def test_the_runtime_keeps_its_budget(shipped: dict[str, Path]) -> None:
    for bundle in shipped.values():
        for name in ("xceptile-run", "libxceptile.so"):
            assert (bundle / "native" / name).stat().st_size <= SHIPPED_BYTES


def test_the_runtime_is_built_alike_every_time(
    shipped: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    again = native_runtime.build(catalog.get("generic/arm64"))
    assert again == {name: (shipped["aarch64"] / "native" / name).read_bytes() for name in again}
    assert [path.name for path in (tmp_path / "xceptile/native-runtime").iterdir() if "building" in path.name] == []


def test_only_the_api_is_visible(shipped: dict[str, Path]) -> None:
    for bundle in shipped.values():
        command = ["nm", "-D", "--defined-only", str(bundle / "native/libxceptile.so")]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = {line.split()[-1] for line in listing.splitlines()}
        assert names
        assert all(name.startswith("xct_") for name in names)


def here(shipped: dict[str, Path]) -> Path:
    return shipped[catalog.get("host").architecture] / "native"


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_library_in_this_process(shipped: dict[str, Path], threads: int) -> None:
    x = images(20)
    with NativeEngine(here(shipped), threads=threads, time_steps=True) as engine:
        np.testing.assert_array_equal(engine.run(x), expected(x))
        assert engine.threads == threads
        assert engine.input.shape == fake_network.SHAPE
        assert [step.name for step in engine.steps()] == ["first", "second", "third", "last"]
        assert all(step.last_ms > 0 for step in engine.steps())
        assert len(engine.time_ms(x[:1], repeats=4, warmup=2)) == 4


def test_a_bundle_that_takes_the_place_of_an_open_one(shipped: dict[str, Path], tmp_path: Path) -> None:
    """The dynamic loader would take the old one's kernels, which have the same path, for the new one's."""
    source = Path(fake_network.KERNEL_SOURCES[0])
    (tmp_path / "other.c").write_text(source.read_text().replace("% w->shape[0]]);", "% w->shape[0]] + 1);"))
    compile_program(
        tmp_path / "other.so", tmp_path / "other.c", fake_network.KERNEL_SOURCES[1], flags=["-fPIC", "-shared"]
    )
    library = here(shipped) / "libxceptile.so"
    x = images(2)
    write_bundle(tmp_path / "bundle", (here(shipped) / "kernels.so").read_bytes())
    (tmp_path / "bundle/native/libxceptile.so").symlink_to(library)
    with NativeEngine(tmp_path / "bundle/native") as old:
        (tmp_path / "bundle").rename(tmp_path / "old")
        write_bundle(tmp_path / "bundle", (tmp_path / "other.so").read_bytes())
        (tmp_path / "bundle/native/libxceptile.so").symlink_to(library)
        with NativeEngine(tmp_path / "bundle/native") as new, NativeEngine(tmp_path / "bundle/native") as again:
            added = (expected(x) + 2 * COUNT // CLASSES).astype(np.int8)
            np.testing.assert_array_equal(new.run(x), added)
            np.testing.assert_array_equal(again.run(x), added)
            np.testing.assert_array_equal(old.run(x), expected(x))


def unblocked_signals(task: Path) -> set[int]:
    (blocked,) = re.findall(r"SigBlk:\s*([0-9a-f]+)", (task / "status").read_text())
    return {number for number in range(1, 32) if not int(blocked, 16) >> (number - 1) & 1}


def test_threads_take_no_signals_but_those_of_their_own_faults(shipped: dict[str, Path]) -> None:
    always = {signal.SIGKILL, signal.SIGSTOP}
    before = {task.name for task in Path("/proc/self/task").iterdir()}
    with NativeEngine(here(shipped), threads=2):
        (worker,) = (task for task in Path("/proc/self/task").iterdir() if task.name not in before)
        for _ in range(1000):
            taken = unblocked_signals(worker)
            if taken != always:  # as a thread is that the C library has not begun
                break
            time.sleep(0.01)
    faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS}
    assert taken == faults | always


def test_arrays_that_are_not_contiguous(shipped: dict[str, Path]) -> None:
    x = images(6)
    with NativeEngine(here(shipped)) as engine:
        np.testing.assert_array_equal(engine.run(x[::-2]), expected(x[::-2]))


def test_arrays_that_do_not_fit_are_refused(shipped: dict[str, Path]) -> None:
    with NativeEngine(here(shipped)) as engine:
        with pytest.raises(EngineError, match="takes int8"):
            engine.run(images(1).astype(np.uint8))
        with pytest.raises(EngineError, match="takes int8"):
            engine.run(images(1)[:, :-1])


def test_a_closed_engine_and_a_failing_kernel(shipped: dict[str, Path]) -> None:
    importlib.import_module("tvm")  # its functions, loaded for all to see, must not take the place of the bundle's own
    engine = NativeEngine(here(shipped))
    bad = images(1)
    bad.flat[0] = -128 - int(fake_network.WEIGHTS[0])
    with pytest.raises(EngineError, match="expected no -128"):
        engine.run(bad)
    x = images(1)
    np.testing.assert_array_equal(engine.run(x), expected(x))  # it goes on
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(x)


def test_an_engine_that_is_dropped_frees_its_threads_and_memory(shipped: dict[str, Path]) -> None:
    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/task")), maps.count("/weights.bin")

    before, x = held(), images(1)
    engines = [NativeEngine(here(shipped), threads=3) for _ in range(5)]
    np.testing.assert_array_equal(engines[0].run(x), expected(x))
    assert held() == (before[0] + 5 * 2, before[1] + 5)
    engines.clear()
    assert held() == before
    with NativeEngine(here(shipped), threads=3) as engine:
        engine.close()  # which ends it once
    assert held() == before


def test_a_folder_without_a_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot load the bundle's runtime"):
        NativeEngine(tmp_path)


def test_the_runtime_of_another_architecture_is_refused(shipped: dict[str, Path]) -> None:
    for name in shipped.keys() - {catalog.get("host").architecture}:
        with pytest.raises(EngineError, match="cannot load the bundle's runtime"):
            NativeEngine(shipped[name] / "native")


def test_the_program_here(shipped: dict[str, Path]) -> None:
    x = images(4)
    with NativeProgramEngine((str(here(shipped) / "xceptile-run"),), here(shipped), 2) as engine:
        np.testing.assert_array_equal(engine.run(x), expected(x))
        assert engine.self_test()
        assert len(engine.time_ms(x[:1], repeats=3, warmup=0)) == 3


# ---- on emulated processors ----


@requires("qemu-aarch64", package="qemu-user")
@pytest.mark.parametrize("name", ["generic/arm64", "generic/riscv64"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_program_on_another_processor(shipped: dict[str, Path], name: str, threads: int) -> None:
    x, target = images(4), catalog.get(name)
    with QemuNativeEngine(shipped[target.architecture] / "native", target, threads=threads) as engine:
        np.testing.assert_array_equal(engine.run(x), expected(x))
        assert engine.self_test()
        assert len(engine.time_ms(x[:1], repeats=3, warmup=0)) == 3


@requires("qemu-aarch64", package="qemu-user")
@pytest.mark.parametrize(
    ("cpu", "missing"), [("cortex-a53", "dotprod"), ("cortex-a76", "i8mm"), ("max,sme=off", ""), ("cortex-a53", "avx2")]
)
def test_a_feature_that_the_arm_lacks_is_refused_before_it_is_used(
    shipped: dict[str, Path], tmp_path: Path, cpu: str, missing: str
) -> None:
    features = ("neon", missing) if missing else ("neon", "dotprod", "i8mm")
    kernels = (shipped["aarch64"] / "native/kernels.so").read_bytes()
    native = (
        write_bundle(tmp_path / "b", kernels, dataclasses.replace(fake_network.plan(), features=features)) / "native"
    )
    for file in ("xceptile-run", "libxceptile.so"):
        (native / file).symlink_to(shipped["aarch64"] / "native" / file)
    target = dataclasses.replace(catalog.get("generic/arm64"), qemu_cpu=cpu)
    if missing:
        with pytest.raises(EngineError, match=f'"{missing}"'):
            QemuNativeEngine(native, target)
    else:
        assert QemuNativeEngine(native, target).self_test()


@requires("qemu-aarch64", package="qemu-user")
@pytest.mark.parametrize("name", ["generic/arm64", "generic/riscv64"])
def test_kernels_of_this_machine_are_refused_on_another(
    shipped: dict[str, Path], tmp_path: Path, kernels: bytes, name: str
) -> None:
    native, target = write_bundle(tmp_path / "b", kernels) / "native", catalog.get(name)
    (native / "xceptile-run").symlink_to(shipped[target.architecture] / "native/xceptile-run")
    with pytest.raises(EngineError, match=rf"holds code for x86_64 .* this runtime is for {target.architecture}"):
        QemuNativeEngine(native, target)


@requires("qemu-riscv64", package="qemu-user")
def test_a_feature_of_another_architecture_is_none_of_risc_v(shipped: dict[str, Path], tmp_path: Path) -> None:
    plan = dataclasses.replace(fake_network.plan(), features=("neon",))
    native = write_bundle(tmp_path / "b", (shipped["riscv64"] / "native/kernels.so").read_bytes(), plan) / "native"
    (native / "xceptile-run").symlink_to(shipped["riscv64"] / "native/xceptile-run")
    with pytest.raises(EngineError, match='"neon", which is none of riscv64'):
        QemuNativeEngine(native, catalog.get("generic/riscv64"))


@requires("qemu-x86_64", package="qemu-user")
def test_a_feature_that_an_older_x86_lacks_is_refused(built: Path, tmp_path: Path, kernels: bytes) -> None:
    program = compile_program(tmp_path / "plain", SOURCES / "main.c", *LIBRARY, flags=["-O1"])
    vnni = write_bundle(tmp_path / "a", kernels, dataclasses.replace(fake_network.plan(), features=("avx512vnni",)))
    avx2 = write_bundle(tmp_path / "b", kernels, dataclasses.replace(fake_network.plan(), features=("avx2",)))
    haswell, nehalem = ["qemu-x86_64", "-cpu", "Haswell", program], ["qemu-x86_64", "-cpu", "Nehalem", program]
    assert subprocess.run([*haswell, "--self-test", avx2], check=False).returncode == 0
    for command, bundle, feature in ((haswell, vnni, "avx512vnni"), (nehalem, avx2, "avx2")):
        done = subprocess.run([*command, "--self-test", bundle], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert f'lacks "{feature}"' in done.stderr
