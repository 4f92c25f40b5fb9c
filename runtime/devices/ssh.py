"""``ssh://[USER@]HOST[:PORT]``: a device behind OpenSSH's client, with its keys, agent and configuration."""

from __future__ import annotations

import atexit
import functools
import re
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..engines.engine import EngineError, last_line
from . import time_limit

SCHEME = "ssh://"
# Below the home folder, where a command starts.
_ROOT = PurePosixPath(".cache/xceptile")
# A name never begins with a hyphen: ssh would take it for an option.
_ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@)?"
    r"(?:(?P<host>[A-Za-z0-9_][A-Za-z0-9._-]*)|\[(?P<ipv6>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9]+)?)\])"
    r"(?::(?P<port>[0-9]{1,5}))?/?"
)
# ssh's own failures, ssh(1); a program's status is passed on.
_UNREACHABLE = 255
_OPTIONS = (
    "-T",
    # Nobody is there to type a password; a link that died is noticed in 45 s; connections are shared and kept for a
    # minute, because a session is many short commands.
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
    *("-o", "ControlMaster=auto", "-o", "ControlPersist=60"),
)


@dataclass(frozen=True)
class SshLink:
    """One device. ``command`` is ssh with everything before the device's command; ``root`` is below its home folder."""

    name: str
    command: tuple[str, ...]
    root: PurePosixPath = _ROOT

    def shell(self, script: str, limit_s: float = time_limit.COMMAND_S) -> subprocess.CompletedProcess[bytes]:
        """Runs a POSIX shell's script there, behind any login shell that knows single quotes.

        Raises EngineError where the device cannot be reached or does not answer.
        """
        return self._run(script, limit_s)

    def send(self, source: Path, target: PurePosixPath) -> None:
        """Appends what ``target`` lacks of ``source``; the caller compares the whole. Raises EngineError."""
        place = shlex.quote(str(target))
        found = self._run(f"wc -c < {place} 2>/dev/null || echo 0").stdout.strip()
        have = int(found) if found.isdigit() else 0
        size = source.stat().st_size
        if have > size:
            have = 0
        with source.open("rb") as stream:
            stream.seek(have)
            # ssh reads from the descriptor, which stands where the stream was moved to.
            limit_s = time_limit.transfer_s(size - have)
            done = self._run(f"cat {'>>' if have else '>'} {place}", limit_s, stdin=stream.fileno())
        if done.returncode:
            raise EngineError(f"{self.name}: cannot write {target}: {last_line(done)}")

    def fetch(self, source: PurePosixPath, target: Path) -> None:
        """Raises EngineError where the file cannot be read there."""
        with target.open("wb") as stream:
            done = self._run(f"cat {shlex.quote(str(source))}", stdout=stream.fileno())
        if done.returncode:
            raise EngineError(f"{self.name}: cannot read {source}: {last_line(done)}")

    def _run(
        self,
        script: str,
        limit_s: float = time_limit.COMMAND_S,
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
    ) -> subprocess.CompletedProcess[bytes]:
        # Errors go to a file: the shared connection's process may keep a pipe open long after the command has ended.
        with tempfile.TemporaryFile() as errors:
            # The shell outlives a program that a signal ended: of one in its place, ssh would only say 255.
            command = [*self.command, "sh -c " + shlex.quote(script + "\nexit $?")]
            try:
                done = time_limit.run(self.name, command, limit_s, stdin=stdin, stdout=stdout, stderr=errors.fileno())
            except OSError as error:
                raise EngineError(f"{self.name}: needs ssh (apt install openssh-client): {error.strerror}") from error
            errors.seek(0)
            text = errors.read()
        result = subprocess.CompletedProcess(command, done.returncode, done.stdout or b"", text)
        if done.returncode == _UNREACHABLE:
            # What the shared connection's process says of a timeout, it says elsewhere.
            reason = last_line(result) if text else "the connection broke off, or timed out"
            raise EngineError(f"{self.name}: cannot be reached: {reason}")
        return result


@functools.cache
def connect(name: str) -> SshLink:
    """The link for ``ssh://[USER@]HOST[:PORT]``; nothing is sent yet. Raises EngineError for any other form."""
    match = _ADDRESS.fullmatch(name)
    port = int(match["port"] or 22) if match else 0
    if match is None or not 0 < port < 65536:
        raise EngineError(f"no such device {name!r}; a device behind ssh is ssh://[USER@]HOST[:PORT]")
    # For this user only. Not in TMPDIR: a socket's path is short, and ssh takes what it is given for it apart.
    sockets = tempfile.mkdtemp(prefix="xceptile-ssh-", dir="/tmp")
    words = ["ssh", *_OPTIONS, "-o", f"ControlPath={sockets}/s"]
    words += ["-p", match["port"]] if match["port"] else []
    words += ["-l", match["user"]] if match["user"] else []
    host = match["host"] or match["ipv6"]
    atexit.register(_disconnect, (*words, "-O", "exit", "--", host), sockets)
    return SshLink(name, (*words, "--", host))


def _disconnect(command: tuple[str, ...], sockets: str) -> None:
    if any(Path(sockets).iterdir()):
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=10)
    shutil.rmtree(sockets, ignore_errors=True)
