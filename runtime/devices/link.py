"""A way to a device that a shell reaches, and asking it. Whatever becomes part of a command for it is quoted here."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from ..engines.engine import EngineError, last_line
from . import adb, limits, ssh


class Link(Protocol):
    """A way to one device. ``name`` is what --device says; ``root`` is where files go there."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def root(self) -> PurePosixPath: ...

    @property
    def trusted_folder(self) -> PurePosixPath:
        """From here on upwards nobody but the device's own system can exchange folders."""

    @property
    def system_accounts(self) -> int:
        """Accounts and groups of lower numbers are the device's own system."""

    def shell(
        self, script: str, limit_s: float = limits.COMMAND_S, *, reply_bytes: int = limits.REPLY_BYTES
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a POSIX shell's script there. Raises EngineError where the device cannot be reached, does not answer in
        time or answers with more than ``reply_bytes``.
        """

    def send(self, source: Path, target: PurePosixPath) -> None:
        """Makes ``target`` a copy of ``source``; one that was cut off may be completed. Raises EngineError."""


def connect(device: str) -> Link | None:
    """The link to a device behind ssh or adb, None for one that is neither. Raises EngineError for a bad address."""
    if device.startswith(ssh.SCHEME):
        return ssh.connect(device)
    return adb.connect(device) if device.startswith(adb.SCHEME) else None


def quoted(words: Sequence[object]) -> str:
    """Words as a POSIX shell's command."""
    return shlex.join(str(word) for word in words)


def ask(link: Link, script: str, *, reply_bytes: int = limits.REPLY_BYTES) -> bytes:
    """What the script prints. Raises EngineError with the device's last line where it fails."""
    done = link.shell(script, reply_bytes=reply_bytes)
    if done.returncode:
        raise EngineError(f"{link.name}: {last_line(done)}")
    return done.stdout
