"""A bundle is put where its path leads, or into the directory that is there where nothing can take its place."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.bundle_files import FILES, manifest
from support.needs import HARDWARE, requires_mount
from support.tree import TESTS

from xceptile.runtime import bundle as bundles
from xceptile.runtime.atomic_directory import is_filled_in_place
from xceptile.runtime.bundle import BundleError, check_output, open_bundle, write_bundle


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = ["unshare", "--mount", sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def network(path: Path) -> str:
    return open_bundle(path).manifest.network


# ---- links ----


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, there: bool) -> None:
    target, link = tmp_path / "place" / "target", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to("place/target")
    if there:
        write_bundle(target, manifest(network="old"), FILES)
    check_output(link)
    assert write_bundle(link, manifest(network="new"), FILES).path == link
    assert (network(link), network(target)) == ("new", "new")
    assert link.is_symlink()
    assert not target.is_symlink()
    assert (sorted(os.listdir(tmp_path)), os.listdir(target.parent)) == (["link", "place"], ["target"])


def test_a_link_that_leads_nowhere_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    (tmp_path / "into").symlink_to("file/below")
    for name in ("loop", "into"):
        with pytest.raises(BundleError, match=r"cannot be written: .*; choose another --output"):
            check_output(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "into", "loop"]


# ---- what nothing can take the place of ----


@pytest.mark.parametrize("name", [".", "../b", "/absolute"])
def test_the_directory_that_this_process_works_in_stays_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    home = tmp_path / "b"
    write_bundle(home, manifest(network="old"), FILES | {"native/plan.bin": b"old", "native/roof/plan.bin": b"old"})
    (home / "notes.txt").write_text("mine")
    (home / bundles.SIGNATURE).write_bytes(b"of the old one")
    monkeypatch.chdir(home)
    here = os.stat(".").st_ino
    path = home if name == "/absolute" else Path(name)
    assert is_filled_in_place(path)
    check_output(path)
    write_bundle(path, manifest(network="new"), FILES)
    assert network(path) == "new"
    assert (os.stat(".").st_ino, os.stat(home).st_ino) == (here, here)
    assert (home / "notes.txt").read_text() == "mine"
    names = {file.relative_to(home).as_posix() for file in home.rglob("*")}
    assert names == {*FILES, "golden", "litert", bundles.MANIFEST, "notes.txt"}
    assert os.listdir(tmp_path) == ["b"]


def test_what_fails_before_the_move_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "b", manifest(network="old"), FILES)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(BundleError, match="File name too long"):
        write_bundle(Path("."), manifest(network="new"), FILES | {"x" * 300: b""})
    assert network(Path(".")) == "old"
    assert sorted(os.listdir(".")) == ["golden", "litert", bundles.MANIFEST]


def test_links_within_it_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("int8.tflite", "extra"):
        (elsewhere / name).write_text("precious")
    write_bundle(tmp_path / "b", manifest(network="old"), FILES | {"native/extra": b"old", "litert/extra": b"old"})
    monkeypatch.chdir(tmp_path / "b")
    for name in ("litert", "native"):
        Path(name).rename(f"../{name}")
        Path(name).symlink_to(elsewhere)
    write_bundle(Path("."), manifest(network="new"), FILES)
    assert network(Path(".")) == "new"
    assert not Path("litert").is_symlink()
    assert {file.read_text() for file in elsewhere.iterdir()} == {"precious"}
    assert len(list(elsewhere.iterdir())) == 2


MOUNTED = """
import ctypes, os, subprocess, sys
from pathlib import Path
from support.bundle_files import FILES, manifest
from xceptile.runtime.atomic_directory import is_filled_in_place
from xceptile.runtime.bundle import check_output, open_bundle, write_bundle

kind, folder = sys.argv[1], Path(sys.argv[2])
for name in ("host", "place/b", "upper", "work", "lower"):
    (folder / name).mkdir(parents=True, exist_ok=True)
write_bundle(folder / "lower/b", manifest(network="old"), FILES)
command = {
    "tmpfs": ["mount", "-t", "tmpfs", "none", "place/b"],
    "bind": ["mount", "--bind", "host", "place/b"],
    "overlay": ["mount", "-t", "overlay", "-o", "lowerdir=lower,upperdir=upper,workdir=work", "none", "place"],
}[kind]
if subprocess.run(command, cwd=folder).returncode:
    sys.exit(77)
path = folder / "place/b"
for name in ("first", "second"):
    print(is_filled_in_place(path))
    check_output(path)
    write_bundle(path, manifest(network=name), FILES)
    print(open_bundle(path).manifest.network, os.listdir(folder / "place"), sorted(os.listdir(path)))
"""


@requires_mount()
@pytest.mark.parametrize("kind", ["tmpfs", "bind", "overlay"])
def test_a_mounted_directory_is_filled(tmp_path: Path, kind: str) -> None:
    done = python(MOUNTED, kind, tmp_path)
    if done.returncode == 77:
        pytest.skip(f"{HARDWARE} {kind} to mount")
    assert done.returncode == 0, done.stderr
    files = ["golden", "litert", bundles.MANIFEST]
    expected = [line for name in ("first", "second") for line in ("True", f"{name} ['b'] {files}")]
    assert done.stdout.splitlines() == expected


KILLED = """
import json, os, sys
from pathlib import Path
from support.bundle_files import FILES, manifest
from support.killing import killed_before
from xceptile.runtime.bundle import BundleError, check_output, open_bundle, write_bundle

home = Path(sys.argv[1]) / "b"
def write(name):
    write_bundle(Path("."), manifest(network=name), FILES)

def found():
    try:
        return open_bundle(home).manifest.network
    except BundleError as error:
        return "none" if "holds no manifest.json" in str(error) else str(error)

home.mkdir()
os.chdir(home)
number, status = 0, 1
while status:
    write("old")
    assert sorted(os.listdir()) == ["golden", "litert", "manifest.json"], os.listdir()
    number += 1
    status = killed_before(number, lambda: write("new"))
    print(json.dumps([found(), status]))
    check_output(Path("."))
assert os.listdir("..") == ["b"], os.listdir("..")
"""


def test_a_writer_killed_while_it_fills_leaves_what_the_next_takes_over(tmp_path: Path) -> None:
    """The old bundle, then none, then the new one; never a mixture, and never a directory that is refused later."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [status for _, status in rows] == [signal.SIGKILL] * (len(rows) - 1) + [0]
    states = [state for state, _ in rows]
    counts = [states.count(state) for state in ("old", "none", "new")]
    assert states == [state for state, count in zip(("old", "none", "new"), counts, strict=True) for _ in range(count)]
    assert min(counts) > 1


# ---- modes ----


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_bundle(tmp_path / "b", manifest(), FILES | {"native/program": b"\x7fELF and more"})
    finally:
        os.umask(before)
    for file in (tmp_path / "b", *(tmp_path / "b").rglob("*")):
        wanted = 0o777 if file.is_dir() or file.name == "program" else 0o666
        assert stat.S_IMODE(file.stat().st_mode) == wanted & ~mask, file
