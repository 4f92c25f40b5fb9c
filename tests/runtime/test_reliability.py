"""What goes wrong around a bundle: killed processes, full disks, several at once. A bundle is the old one or the new
one, whole, and the next writer finds no trace of the last."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.bundle_files import FILES, manifest
from support.needs import requires_mount
from support.tree import TESTS

from xceptile.compile import cli
from xceptile.runtime import atomic_directory
from xceptile.runtime import bundle as bundles
from xceptile.runtime.bundle import Bundle, BundleError, open_bundle, write_bundle
from xceptile.runtime.session import open_session


def in_process(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Python code in a process of its own, in which the tests' helpers can be imported."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]  # the keys are the caller's


def finished(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return printed


# ---- killed ----

# Writes "new" over "old" and is killed before one system call after the other: each time a child of its own, until one
# of them comes to its end. Prints what was found after each.
KILLED = """
import json, os, sys
from pathlib import Path
from support.bundle_files import FILES, manifest
from support.killing import killed_before
from xceptile.runtime.bundle import BundleError, open_bundle, write_bundle

folder, there = Path(sys.argv[1]), sys.argv[2] == "old"
def write(name):
    return write_bundle(folder / "b", manifest(network=name), FILES)

def found():
    try:
        return open_bundle(folder / "b").manifest.network
    except BundleError as error:
        return "none" if "no such bundle" in str(error) else str(error)

number, status = 0, 1
while status:
    if there:
        write("old")
        assert os.listdir(folder) == ["b"], os.listdir(folder)
    number += 1
    status = killed_before(number, lambda: write("new"))
    print(json.dumps([found(), status, len(os.listdir(folder))]))
    if not there:
        write("cleaned")
        assert os.listdir(folder) == ["b"], os.listdir(folder)
        __import__("shutil").rmtree(folder / "b")
"""


@pytest.mark.parametrize("before", ["old", "none"])
def test_a_writer_killed_at_any_step_leaves_the_old_bundle_or_the_new(tmp_path: Path, before: str) -> None:
    rows = [json.loads(line) for line in finished(in_process(KILLED, tmp_path, before)).splitlines()]
    states = [state for state, _, _ in rows]
    assert [status for _, status, _ in rows] == [signal.SIGKILL] * (len(rows) - 1) + [0]
    switch = states.index("new")
    assert states == [before] * switch + ["new"] * (len(rows) - switch)
    assert switch > 10
    # The killed ones left something, which the next removed.
    assert any(entries > (state != "none") for state, _, entries in rows)


def test_what_another_process_is_writing_is_no_leftover(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", manifest(), FILES)
    with atomic_directory._directory_aside(tmp_path / "b", tmp_path) as aside:
        dead = tmp_path / ".b.dead.part"
        dead.mkdir()
        other = tmp_path / ".b.mine"
        other.mkdir()
        write_bundle(tmp_path / "b", manifest(), FILES)
        assert aside.exists()
        assert not dead.exists()
        assert other.exists()


# ---- several at once ----

WRITER = """
import sys
from pathlib import Path
from support.bundle_files import FILES, manifest
from xceptile.runtime.bundle import write_bundle
for number in range(40):
    data = bytes([number]) * (10_000 + number)
    write_bundle(Path(sys.argv[1]), manifest(network=sys.argv[2]), FILES | {"litert/int8.tflite": data})
"""


def test_several_write_and_read_one_bundle(tmp_path: Path) -> None:
    path = tmp_path / "b"
    write_bundle(path, manifest(network="first"), FILES)
    writers = [in_process(WRITER, path, f"writer {number}") for number in range(3)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(open_bundle(path).manifest.network)
    for writer in writers:
        finished(writer)
    assert len(seen) > 1
    assert open_bundle(path).manifest.network in seen | {f"writer {number}" for number in range(3)}
    assert os.listdir(tmp_path) == ["b"]


def test_the_exchange_in_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot exchange two names at once."""
    monkeypatch.setattr(atomic_directory.ctypes, "CDLL", lambda *_, **__: object())
    write_bundle(tmp_path / "b", manifest(), FILES)
    write_bundle(tmp_path / "b", manifest(network="other"), FILES)
    assert open_bundle(tmp_path / "b").manifest.network == "other"
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("engine", ["native", "litert"])
def test_sessions_in_several_threads_agree(small_bundle: Bundle, engine: str) -> None:
    """Each on a session of its own, and all on one that they share."""
    golden, expected = small_bundle.golden()
    outputs: list[tuple[np.ndarray, np.ndarray]] = []

    def work(shared: object) -> None:
        with open_session(small_bundle, engine=engine, threads=2) as own:
            for _ in range(10):
                outputs.append((own.engine.run(golden), shared.engine.run(golden)))  # type: ignore[attr-defined]

    with open_session(small_bundle, engine=engine, threads=2) as shared:
        threads = [threading.Thread(target=work, args=(shared,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outputs) == 40
    for own, common in outputs:
        np.testing.assert_array_equal(own, expected)
        np.testing.assert_array_equal(common, expected)


SESSION = """
import hashlib, sys
from pathlib import Path
from xceptile.runtime.bundle import open_bundle
from xceptile.runtime.session import open_session
bundle = open_bundle(Path(sys.argv[1]))
golden, _ = bundle.golden()
with open_session(bundle, threads=2) as session:
    for _ in range(20):
        print(hashlib.sha256(session.engine.run(golden).tobytes()).hexdigest())
"""


def test_sessions_in_several_processes_agree(small_bundle: Bundle) -> None:
    _, expected = small_bundle.golden()
    processes = [in_process(SESSION, small_bundle.path) for _ in range(3)]
    printed = {line for process in processes for line in finished(process).split()}
    assert printed == {hashlib.sha256(expected.tobytes()).hexdigest()}


# ---- a full disk ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@requires_mount()
def test_a_full_disk_is_one_line_and_leaves_the_old_bundle(
    small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_disk / "b"
    write_bundle(path, manifest(), FILES)
    large = FILES | {f"large{i}": bytes(300_000) for i in range(4)}
    with pytest.raises(BundleError, match="could not be written: No space left on device"):
        write_bundle(path, manifest(network="new"), large)
    assert open_bundle(path).manifest == write_bundle(path, manifest(), FILES).manifest
    assert os.listdir(small_disk) == ["b"]
    (small_disk / "filler").write_bytes(bytes((1 << 20) - 5 * 4096))
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filler2").write_bytes(bytes(1 << 16))
    (small_disk / "filler2").unlink(missing_ok=True)
    key = small_disk.parent / "key.pem"
    key.write_bytes(KEY)
    (small_disk / "rest").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    assert cli._invoke(cli.app, ["sign", str(path), "--key", str(key)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(os.listdir(small_disk)) == ["b", "filler", "rest"]
    assert not (path / bundles.SIGNATURE).exists()
    open_bundle(path)


# A key for this test alone (openssl genpkey -algorithm ed25519).
KEY = b"""-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g
-----END PRIVATE KEY-----
"""


def test_a_limit_on_the_size_of_files_is_one_line_and_leaves_the_old_bundle(tmp_path: Path) -> None:
    """As on a full disk, for who may mount none."""
    write_bundle(tmp_path / "b", manifest(), FILES)
    code = """
import sys
from pathlib import Path
from support.bundle_files import FILES, manifest
from xceptile.runtime.bundle import BundleError, write_bundle
try:
    write_bundle(Path(sys.argv[1]), manifest(network="new"), FILES | {"large": bytes(300_000)})
except BundleError as error:
    print(error)
"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731  # runs in the child
    printed = finished(in_process(code, tmp_path / "b", preexec_fn=limit))
    assert printed == f"{tmp_path / 'b'}: could not be written: File too large\n"
    assert open_bundle(tmp_path / "b").manifest.network == "tiny"
    assert os.listdir(tmp_path) == ["b"]


COMPILE = """
import os, signal, sys
from pathlib import Path
from support.small_bundle import compiled_model, quantize
from xceptile.compile.pipeline import build_bundle_files
from xceptile.runtime.bundle import write_bundle
from xceptile.targets import catalog

def progress(what, share):
    if what.startswith("compile the runtime"):
        os.kill(os.getpid(), signal.SIGKILL)

files = build_bundle_files(quantize(compiled_model(), images=4), catalog.get("host"), ("native",), (), progress)
write_bundle(Path(sys.argv[1]), *files)
"""


@pytest.mark.slow
def test_a_compile_killed_in_the_middle_leaves_the_old_bundle(tmp_path: Path, small_bundle: Bundle) -> None:
    files = {name: small_bundle.file(name).read_bytes() for name in small_bundle.manifest.files}
    write_bundle(tmp_path / "b", small_bundle.manifest, files)
    process = in_process(COMPILE, tmp_path / "b")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["b"]
    golden, expected = small_bundle.golden()
    with open_session(open_bundle(tmp_path / "b")) as session:
        np.testing.assert_array_equal(session.engine.run(golden), expected)
