"""A file is written whole or not at all, where its path leads, and a failure leaves nothing behind."""

from __future__ import annotations

import ast
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.needs import requires_mount, requires_root

import xceptile
from xceptile.models.atomic_write import check_writable, write_atomically

ROOT = Path(xceptile.__file__).parent
WRITE = "import sys; from xceptile.models.atomic_write import write_atomically as w; print('before'); "


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    write_atomically(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_keeps_the_file_it_has_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "before")
    with path.open() as reader:
        write_atomically(path, "after")
        assert (reader.read(), path.read_text()) == ("before", "after")


@pytest.mark.parametrize("way", ["no room", "no rename"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if way == "no rename":
        monkeypatch.setattr(os, "replace", lambda *_: os.stat("/nowhere/at/all"))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large" if way == "no room" else "No such file"):
            write_atomically(path, "after" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed_to_their_end(tmp_path: Path, there: bool) -> None:
    end = tmp_path / "elsewhere" / "end"
    if there:
        end.parent.mkdir()
        end.write_text("before")
    (tmp_path / "second").symlink_to("elsewhere/end")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    write_atomically(tmp_path / "first", "after")
    assert end.read_text() == "after"
    assert not end.is_symlink()
    assert [(tmp_path / name).is_symlink() for name in ("first", "second")] == [True, True]
    assert list(end.parent.iterdir()) == [end]


@requires_root()
@pytest.mark.parametrize("linked", [True, False])
def test_a_device_stays_one(tmp_path: Path, linked: bool) -> None:
    device, link = tmp_path / "null", tmp_path / "link"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    link.symlink_to(device)
    path = link if linked else device
    check_writable(path)
    write_atomically(path, "gone")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, device]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    check_writable(pipe)
    write_atomically(pipe, "through")
    reader.join(10)
    assert read == [b"through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@requires_root()
def test_a_full_device_is_an_error(tmp_path: Path) -> None:
    os.mknod(tmp_path / "full", stat.S_IFCHR | 0o666, os.makedev(1, 7))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "full", "x")


@pytest.mark.parametrize("path", ["stdout", "/proc/self/fd/1", "out"])
def test_standard_output_keeps_what_was_printed(tmp_path: Path, path: str) -> None:
    """Redirected to a file, to the end of one, or to a pipe, under whatever name."""
    said = [sys.executable, "-c", f"{WRITE} w({path!r}, 'written'); print('after')"]
    out, link = tmp_path / "out", tmp_path / "stdout"
    link.symlink_to("/proc/self/fd/1")  # as /dev/stdout is one
    for mode, expected in (("wb", ""), ("ab", "beforewrittenafter")):
        with out.open(mode) as file:
            subprocess.run(said, cwd=tmp_path, stdout=file, check=True)
        assert out.read_text().replace("\n", "") == expected + "beforewrittenafter"
        assert sorted(tmp_path.iterdir()) == [out, link]
        assert link.is_symlink()
    if path != "out":
        piped = subprocess.run(said, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout
        assert piped.replace(b"\n", b"") == b"beforewrittenafter"


def test_a_file_without_a_name_is_written(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        (tmp_path / "file").unlink()
        write_atomically(f"/proc/self/fd/{file.fileno()}", "written")
        assert file.read() == b"written"
    assert list(tmp_path.iterdir()) == []


@requires_mount()
def test_a_file_that_is_mounted_is_filled(tmp_path: Path) -> None:
    """As a container's volume of one file: it cannot be renamed over."""
    for name in ("host", "file"):
        (tmp_path / name).write_text("before")
    script = f"""{WRITE} import ctypes; mount = ctypes.CDLL(None).mount
assert mount(b'host', b'file', None, 4096, None) == 0
w('file', 'after')"""
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / name).read_text() for name in ("host", "file")] == ["after", "before"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/file")
    (tmp_path / "file").write_text("")
    for name in ("", "loop", "dangling", "file/below", "missing/file"):
        with pytest.raises(OSError, match=r"directory|symbolic links"):
            check_writable(tmp_path / name)
    for name in ("file", "new"):
        check_writable(tmp_path / name)
    (tmp_path / "nowhere").mkdir()
    check_writable(tmp_path / "dangling")


def test_files_are_put_in_place_in_one_function() -> None:
    """What renames otherwise moves a folder that it has made itself."""
    folders = {
        "compile/backends/native_runtime.py",
        "runtime/atomic_directory.py",
        "runtime/devices/qemu_root.py",
    }
    found = set()
    for folder in ("models", "targets", "runtime", "calibration", "compile"):
        for path in (ROOT / folder).rglob("*.py"):
            calls = (
                ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
            )
            if any(call in ("os.replace", "shutil.move") or call.endswith(".rename") for call in calls):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == folders | {"models/atomic_write.py"}
