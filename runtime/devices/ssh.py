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
from . import limits

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
    # Nobody is there to type a password; a link that died is noticed in 45 s. What the user's settings start there
    # instead of a shell would take our commands' place.
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
    *("-o", "RemoteCommand=none"),
)


@dataclass(frozen=True)
class SshLink:
    """One device. ``command`` is ssh with everything before the device's command, ``login`` what a person types to get
    there; ``root`` is below the home folder there.
    """

    name: str
    command: tuple[str, ...]
    login: str = "ssh"
    root: PurePosixPath = _ROOT
    trusted_folder: PurePosixPath = PurePosixPath("/")  # noqa: RUF009  # a path cannot change
    system_accounts: int = 1  # root

    def shell(
        self, script: str, limit_s: float = limits.COMMAND_S, *, reply_bytes: int = limits.REPLY_BYTES
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a POSIX shell's script there, whatever the login shell: sh, csh or fish.

        Raises EngineError where the device cannot be reached or does not answer.
        """
        return self._run(script, limit_s, reply_bytes=reply_bytes)

    def send(self, source: Path, target: PurePosixPath) -> None:
        """Appends what ``target`` lacks of ``source``; the caller compares the whole. Raises EngineError."""
        place = shlex.quote(str(target))
        found = self._run(f"wc -c < {place} 2>/dev/null || echo 0").stdout.strip()
        have = int(found) if re.fullmatch(rb"[0-9]{1,18}", found) else 0
        size = source.stat().st_size
        if have > size:
            have = 0
        with source.open("rb") as stream:
            stream.seek(have)
            # ssh reads from the descriptor, which stands where the stream was moved to.
            limit_s = limits.transfer_s(size - have)
            done = self._run(f"cat {'>>' if have else '>'} {place}", limit_s, stdin=stream.fileno())
        if done.returncode:
            raise EngineError(f"{self.name}: cannot write {target}: {last_line(done)}")

    def _run(
        self,
        script: str,
        limit_s: float = limits.COMMAND_S,
        *,
        stdin: int = subprocess.DEVNULL,
        reply_bytes: int = limits.REPLY_BYTES,
    ) -> subprocess.CompletedProcess[bytes]:
        # The shell outlives a program that a signal ended: of one in its place, ssh would only say 255.
        command = [*self.command, for_any_shell(script + "\nexit $?")]
        try:
            done = limits.run(self.name, command, limit_s, stdin=stdin, reply_bytes=reply_bytes)
        except OSError as error:
            raise EngineError(f"{self.name}: needs ssh (apt install openssh-client): {error.strerror}") from error
        if done.returncode == _UNREACHABLE:
            # What the shared connection's process says of a timeout, it says elsewhere.
            reason = last_line(done) if done.stderr else "the connection broke off, or timed out"
            raise EngineError(f"{self.name}: cannot be reached: {reason}{self._advice(done.stderr)}")
        return done

    def _advice(self, said: bytes) -> str:
        """What to do about ssh's refusal, where that is known."""
        if b"REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
            return (
                "; its host key is not the one that was known: if the board was set up anew, remove the old key "
                f"(`ssh-keygen -R`, ssh names the place), then log in once by hand: {self.login}"
            )
        if b"Host key verification failed" in said:
            return f"; its host key is unknown here: log in once by hand and compare it: {self.login}"
        if b"Permission denied (" in said:
            copy = self.login.replace("ssh ", "ssh-copy-id ", 1)
            return f"; no key of yours is accepted there: `{copy}`, or name the right one in ~/.ssh/config"
        return ""


# What csh (!), fish (\\), a POSIX shell in double quotes, or printf's format takes for something else.
_SPECIAL = re.compile(rb"[^ -~]|[!\\'\"$`%]|\A-")


def for_any_shell(script: str) -> str:
    """A command that runs a POSIX shell's script and means the same to sh, csh and fish: csh ends a quoted word at a
    line's end and looks for its history in it."""
    octal = _SPECIAL.sub(lambda match: b"\\%03o" % match[0][0], script.encode("utf-8", "surrogateescape"))
    return f'sh -c \'eval "$(printf "{octal.decode("ascii")}")"\''


@functools.cache
def connect(name: str) -> SshLink:
    """The link for ``ssh://[USER@]HOST[:PORT]``; nothing is sent yet. Raises EngineError for any other form."""
    match = _ADDRESS.fullmatch(name)
    port = int(match["port"] or 22) if match else 0
    if match is None or not 0 < port < 65536:
        raise EngineError(f"no such device {name!r}; a device behind ssh is ssh://[USER@]HOST[:PORT]")
    words = ["ssh", *_OPTIONS]
    there = ["-p", match["port"]] if match["port"] else []
    there += ["-l", match["user"]] if match["user"] else []
    host = match["host"] or match["ipv6"]
    if sockets := _folder_for_sockets():  # shared and kept for a minute: a session is many short commands
        words += ["-o", "ControlMaster=auto", "-o", "ControlPersist=60", "-o", f"ControlPath={sockets}/s"]
        atexit.register(_disconnect, (*words, *there, "-O", "exit", "--", host), sockets)
    return SshLink(name, (*words, *there, "--", host), shlex.join(["ssh", *there, host]))


def _folder_for_sockets() -> str | None:
    """A new folder of this user's; None where there is none whose name ssh takes as it is, for a short path."""
    for place in (tempfile.gettempdir(), "/tmp"):
        if re.fullmatch(r"/[A-Za-z0-9/._-]{1,60}", place):
            with suppress(OSError):
                return tempfile.mkdtemp(prefix="xceptile-ssh-", dir=place)
    return None


def _disconnect(command: tuple[str, ...], sockets: str) -> None:
    with suppress(OSError, subprocess.TimeoutExpired):
        if any(Path(sockets).iterdir()):
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=10)
    shutil.rmtree(sockets, ignore_errors=True)
