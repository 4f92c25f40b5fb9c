"""A device behind ssh: a real sshd on the loopback interface."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ssh_server import ssh_server

from xceptile.runtime.devices import ssh


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A device and its home folder."""
    folder = tmp_path_factory.mktemp("store")
    device = ssh_server(folder / "server", folder / "home", folder / "programs")
    with pytest.MonkeyPatch.context() as patch, device as name:
        patch.setenv("PATH", f"{folder / 'programs'}{os.pathsep}{os.environ['PATH']}")
        yield name, folder / "home"


@pytest.fixture
def home(server: tuple[str, Path]) -> Path:
    """The home folder there, as new."""
    shutil.rmtree(server[1])
    server[1].mkdir(mode=0o755)
    return server[1]


@pytest.fixture
def link(server: tuple[str, Path], home: Path) -> ssh.SshLink:
    return ssh.connect(server[0])
