"""What runs on a device is what was hashed there: nobody else can write to the store, or it is not used."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from support.needs import requires, requires_hardware
from support.ssh_server import sshd

from xceptile.runtime.bundle import Bundle
from xceptile.runtime.devices import limits, ssh, store
from xceptile.runtime.devices.link import ask
from xceptile.runtime.devices.remote import elf_loader
from xceptile.runtime.devices.store import Scratch
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.session import open_session

SOMEBODY = 54321  # an account that nobody has

pytestmark = [
    requires("ssh", package="openssh-client"),
    pytest.mark.skipif(sshd() is None, reason="needs sshd (apt install openssh-server)"),
]
as_root = requires_hardware(os.geteuid() == 0, "root, who gives files to another account")


def entry(path: Path, data: bytes) -> tuple[Path, str]:
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_the_store_is_its_account_s_alone(link: ssh.SshLink, home: Path, tmp_path: Path) -> None:
    name, digest = "native/x", entry(tmp_path / "x", b"data")
    scratch = Scratch(link, {name: digest})
    root = home / link.root
    assert {mode(each) for each in (root.parent, root, root / "files", root / "programs", Path(scratch.folder))} == {
        0o700
    }
    assert mode(root / "files" / digest[1]) == 0o500
    assert Path(scratch.folder / name).resolve() == (root / "files" / digest[1]).resolve()
    scratch.close()
    assert sorted(path.name for path in root.iterdir()) == ["files", "programs"]


@pytest.mark.parametrize("bits", [0o775, 0o757, 0o1777], ids=["group", "others", "sticky"])
@pytest.mark.parametrize("where", ["files", "programs", "."])
def test_a_store_that_others_can_write_to_is_not_used(
    link: ssh.SshLink, home: Path, tmp_path: Path, where: str, bits: int
) -> None:
    folder = home / link.root / where
    folder.mkdir(parents=True)
    folder.chmod(bits)
    with pytest.raises(EngineError, match=r"can be written to by other accounts \(drwx.*chmod go-w\)") as caught:
        Scratch(link, {"x": entry(tmp_path / "x", b"data")})
    assert str(folder.resolve()) in str(caught.value)
    assert not list((home / link.root).glob("run.*"))
    folder.chmod(0o755)
    Scratch(link, {}).close()


def test_a_folder_above_that_others_can_write_to_is_said(link: ssh.SshLink, home: Path) -> None:
    home.chmod(0o775)
    with pytest.raises(EngineError, match=f"{home.resolve()} there can be written to by other accounts"):
        Scratch(link, {})
    home.chmod(0o1777)  # as /tmp: names there are their owners'
    Scratch(link, {}).close()


@as_root
@pytest.mark.parametrize("where", ["files", "programs", ".", "..", "../.."])
def test_a_store_of_another_account_is_not_used(link: ssh.SshLink, home: Path, where: str) -> None:
    (home / link.root / "files").mkdir(parents=True, mode=0o755)
    folder = home / link.root / where
    folder.mkdir(exist_ok=True)
    os.chown(folder, SOMEBODY, SOMEBODY)
    with pytest.raises(EngineError, match=f"belongs to account {SOMEBODY}, not to 0"):
        Scratch(link, {})


def test_a_link_in_place_of_a_folder_of_the_store_is_not_followed(
    link: ssh.SshLink, home: Path, tmp_path: Path
) -> None:
    (home / link.root).mkdir(parents=True)
    (home / link.root / "files").symlink_to(tmp_path)
    with pytest.raises(EngineError, match="files there is no folder"):
        Scratch(link, {"x": entry(tmp_path / "x", b"data")})


def test_the_store_may_be_a_link_to_a_folder_of_one_s_own(link: ssh.SshLink, home: Path, tmp_path: Path) -> None:
    (home / ".cache").mkdir()
    (home / link.root).symlink_to(tmp_path)
    scratch = Scratch(link, {"x": entry(tmp_path / "x", b"data")})
    assert scratch.folder.parent == tmp_path
    assert Path(scratch.folder / "x").read_bytes() == b"data"


@as_root
@pytest.mark.parametrize("how", ["owner", "mode", "link", "part", "part link"])
def test_a_file_that_another_account_could_still_change_is_sent_anew(
    link: ssh.SshLink, home: Path, tmp_path: Path, how: str
) -> None:
    """The right contents do not make it ours: its owner, or who may write to it, could change it a moment later."""
    file, digest = entry(tmp_path / "x", b"data")
    store.open_store(link)
    files = home / link.root / "files"
    planted = files / (f"{digest}.{store._this_client()}.part" if how.startswith("part") else digest)
    if how.endswith("link"):
        planted.symlink_to(entry(tmp_path / "theirs", b"data")[0])
    else:
        planted.write_bytes(b"data")
        os.chown(planted, 0 if how == "mode" else SOMEBODY, 0)
        planted.chmod(0o775 if how == "mode" else 0o755)
    Scratch(link, {"x": (file, digest)})
    found = (files / digest).lstat()
    assert (files / digest).is_file()
    assert not (files / digest).is_symlink()
    assert (found.st_uid, found.st_mode & 0o7777) == (0, 0o500)
    assert (tmp_path / "x").read_bytes() == b"data"
    assert [path.name for path in files.iterdir()] == [digest]


def test_a_chatty_login_is_no_store(link: ssh.SshLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ask", lambda *_, **__: b"Welcome!\n0\ndrwx------ 0 0\n")
    with pytest.raises(EngineError, match="login script"):
        Scratch(link, {})


# ---- what a device answers has an end ----


def test_endless_answers_are_cut_off(link: ssh.SshLink) -> None:
    for script in ("yes", "cat /dev/zero", "yes >&2"):
        began = time.monotonic()
        with pytest.raises(EngineError, match="answers without end"):
            ask(link, script)
        assert time.monotonic() - began < limits.LAST_COMMAND_S
    assert ask(link, "echo here") == b"here\n"


def test_a_result_that_is_longer_than_asked_for_is_cut_off(link: ssh.SshLink) -> None:
    scratch = Scratch(link, {})
    words = ["sh", "-c", 'yes | head -c 100000 > "$1"', "sh"]
    assert len(scratch.execute(words, None, 100_000, 0)[1]) == 100_000
    with pytest.raises(EngineError, match="answers without end"):
        scratch.execute(words, None, 99_999, 0)
    scratch.close()
    assert not Path(scratch.folder).exists()


def test_an_answer_that_never_ends_leaves_nothing_here(
    link: ssh.SshLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(EngineError, match="answers without end"):
        ask(link, "yes")
    assert list(tmp_path.iterdir()) == []


# ---- what does not start there, and why ----


def test_a_missing_loader_is_not_called_a_missing_file(link: ssh.SshLink, small_bundle: Bundle, tmp_path: Path) -> None:
    program = small_bundle.file("native/xceptile-run")
    loader = elf_loader(program.read_bytes())
    assert loader is not None
    assert Path(loader).exists()
    assert elf_loader(b"#!/bin/sh\n") is None
    assert elf_loader(program.read_bytes()[:100]) is None
    from xceptile.runtime.devices.remote import RemoteNativeEngine

    other = loader.replace("ld-linux", "ld-alpin")
    data = program.read_bytes().replace(loader.encode(), other.encode())
    with pytest.raises(EngineError, match=f"xceptile-run cannot be started there: the device has no {other}; .*32-bit"):
        RemoteNativeEngine(link, {"xceptile-run": entry(tmp_path / "p", data)}, "xceptile-run", "xceptile-run")
    assert not list(Path(store.open_store(link)[0]).glob("run.*"))


def test_a_file_system_that_starts_nothing_is_named(
    link: ssh.SshLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xceptile.runtime.devices.remote import RemoteNativeEngine

    link_to = Scratch._link_to

    def noexec(self: Scratch, files: dict[str, tuple[Path, str]]) -> None:
        link_to(self, files)
        for _, digest in files.values():
            Path(self.folder.parent / "files" / digest).chmod(0o400)

    monkeypatch.setattr(Scratch, "_link_to", noexec)
    data = Path("/bin/true").read_bytes()
    with pytest.raises(EngineError, match=r"Permission denied; where its file system is mounted noexec, make \.cache"):
        RemoteNativeEngine(link, {"p": entry(tmp_path / "p", data)}, "p", "p")


def test_compiled_programs_are_kept_in_the_store(link: ssh.SshLink) -> None:
    scratch = Scratch(link, {})
    done, _ = scratch.execute(["sh", "-c", 'printf %s "$XCEPTILE_CACHE"'], None, 0, 0)
    assert PurePosixPath(done.stdout) == scratch.folder.parent / "programs"


def test_bit_exact_from_a_store_of_one_s_own(link: ssh.SshLink, small_bundle: Bundle) -> None:
    x, expected = small_bundle.golden()
    with open_session(small_bundle, device=link.name) as session:
        np.testing.assert_array_equal(session.engine.run(x), expected)
