"""``adb:SERIAL``: an Android device behind adb of the platform tools, with the shell's status (Android 7 or later)."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..engines.engine import EngineError, last_line
from . import limits

SCHEME = "adb:"
# The folder from which Android lets the shell's user start programs.
_ROOT = PurePosixPath("/data/local/tmp/xceptile")
# Accounts from here on are apps: AID_APP_START of Android's private/android_filesystem_config.h.
_FIRST_APP = 10000
# Of a USB device, or HOST:PORT of one on the network; never an option.
_SERIAL = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9._:%\[\]-]*")
# What adb itself says, perhaps after lines of its server's start.
_UNREACHABLE = re.compile(rb"^(adb|error): .*(device|offline|unauthorized|closed|protocol fault)", re.MULTILINE)


@dataclass(frozen=True)
class AdbLink:
    """One device, by its serial number as `adb devices` lists it."""

    name: str
    serial: str
    root: PurePosixPath = _ROOT
    trusted_folder: PurePosixPath = _ROOT.parent
    system_accounts: int = _FIRST_APP

    def shell(
        self, script: str, limit_s: float = limits.COMMAND_S, *, reply_bytes: int = limits.REPLY_BYTES
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs the device's shell. Raises EngineError where the device cannot be reached or does not answer."""
        # adb joins its words with spaces for the device's shell: one quoted word leaves it nothing to take apart.
        done = self._run(limit_s, "shell", "-T", "-n", f"sh -c {shlex.quote(script)}", reply_bytes=reply_bytes)
        if done.returncode and _UNREACHABLE.search(done.stderr):
            raise EngineError(f"{self.name}: cannot be reached: {last_line(done)}")
        return done

    def send(self, source: Path, target: PurePosixPath) -> None:
        """Writes the whole file again: adb cannot go on where it was cut off. Raises EngineError."""
        limit_s = limits.transfer_s(source.stat().st_size)
        done = self._run(limit_s, "push", str(source.absolute()), str(target))
        if done.returncode:
            raise EngineError(f"{self.name}: cannot write {target}: {last_line(done)}")

    def _run(
        self, limit_s: float, *words: str, reply_bytes: int = limits.REPLY_BYTES
    ) -> subprocess.CompletedProcess[bytes]:
        try:
            return limits.run(self.name, ["adb", "-s", self.serial, *words], limit_s, reply_bytes=reply_bytes)
        except OSError as error:
            raise EngineError(
                f"{self.name}: needs adb of Android's platform tools (apt install adb): {error.strerror}"
            ) from error


@functools.cache
def connect(name: str) -> AdbLink:
    """The link for ``adb:SERIAL``; nothing is sent yet. Raises EngineError for any other form."""
    serial = name.removeprefix(SCHEME)
    if not name.startswith(SCHEME) or not _SERIAL.fullmatch(serial):
        raise EngineError(f"no such device {name!r}; an Android device is adb:SERIAL, as `adb devices` lists it")
    return AdbLink(name, serial)
