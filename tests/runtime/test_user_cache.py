"""What was built here is kept where nobody else can put something in its place, and containers' users find a place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.needs import requires_hardware

from xceptile.runtime.user_cache import CacheError, user_cache, who_else_writes

SOMEBODY = 54321  # an account that nobody has


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder and one for temporary files."""
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def test_it_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = user_cache("locks")
    assert folder == tmp_path / "home/.cache/xceptile/locks"
    assert {each.stat().st_mode & 0o777 for each in (folder, folder.parent, folder.parent.parent)} == {0o700}
    assert user_cache("locks") == folder


@pytest.mark.parametrize("home", [None, "/proc/none", "file"])
def test_without_a_home_folder_it_is_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    """Docker's --user: no HOME and no entry in the list of accounts, HOME=/, or a read-only one."""
    (tmp_path / "file").touch()
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / home) if home == "file" else home)
    folder = user_cache("x")
    assert folder == tmp_path / f"tmp/xceptile-{os.geteuid()}/x"
    assert folder.parent.stat().st_mode & 0o777 == 0o700


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_what_xdg_cache_home_names_is_taken_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert user_cache() == tmp_path / "mine/xceptile"
    (tmp_path / "mine").chmod(0o777)
    with pytest.raises(CacheError, match=r"other accounts can write to .*mine \(chmod.*set XDG_CACHE_HOME"):
        user_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(CacheError, match=r"/proc/none/xceptile: cannot be used: .*set XDG_CACHE_HOME"):
        user_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification has ignored
    assert user_cache() == tmp_path / "home/.cache/xceptile"


@pytest.mark.parametrize("where", ["home/.cache/xceptile/x", "home/.cache/xceptile", "home/.cache", "home"])
@pytest.mark.parametrize("bits", [0o775, 0o757])
def test_where_others_can_write_it_is_not(tmp_path: Path, where: str, bits: int) -> None:
    user_cache("x")
    (tmp_path / where).chmod(bits)
    assert user_cache("x") == tmp_path / f"tmp/xceptile-{os.geteuid()}/x"


@requires_hardware(os.geteuid() == 0, "root, who gives files to another account")
def test_where_another_account_owns_it_it_is_not(tmp_path: Path) -> None:
    folder = user_cache("x")
    for each in (folder, folder.parent.parent):
        os.chown(each, SOMEBODY, SOMEBODY)
        assert f"belongs to account {SOMEBODY}" in who_else_writes(folder)
        assert user_cache("x").is_relative_to(tmp_path / "tmp")
        os.chown(each, 0, 0)
    os.chown(tmp_path / f"tmp/xceptile-{os.geteuid()}", SOMEBODY, SOMEBODY)  # a name in /tmp that somebody else took
    (tmp_path / "home").chmod(0o777)
    with pytest.raises(CacheError, match=f"belongs to account {SOMEBODY}.*set XDG_CACHE_HOME"):
        user_cache("x")
