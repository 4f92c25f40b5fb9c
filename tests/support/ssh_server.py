"""A real sshd on the loopback interface, with keys and settings of its own, as a context manager."""

from __future__ import annotations

import getpass
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/client_key.pub
PidFile {folder}/pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
# A bash that sshd starts reads ~/.bashrc, which may take long, unless it is told that it is not the first.
SetEnv SHLVL=2
ForceCommand cd {home} && exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"
"""
_CLIENT = """
Host 127.0.0.1
IdentityFile {folder}/client_key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking yes
"""


def sshd() -> str | None:
    return shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")


@contextmanager
def ssh_server(folder: Path, home: Path, programs: Path) -> Iterator[str]:
    """Commands start in ``home``. ``programs`` gets an ``ssh`` that knows this server's keys, to be first in the PATH.

    Yields the device: ssh://USER@127.0.0.1:PORT.
    """
    for folder_ in (folder, home, programs):
        folder_.mkdir(parents=True, exist_ok=True)
    for name in ("host_key", "client_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"folder": folder, "home": shlex.quote(str(home)), "port": port}
    (folder / "sshd_config").write_text(_SSHD.format(**settings))
    (folder / "ssh_config").write_text(_CLIENT.format(**settings))
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    wrapper = programs / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {shlex.quote(str(folder / "ssh_config"))} "$@"\n')
    wrapper.chmod(0o755)
    command = [str(sshd()), "-D", "-e", "-f", str(folder / "sshd_config")]
    Path("/run/sshd").mkdir(exist_ok=True)  # Debian's sshd, started by root, wants it
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait_for(port, server, folder / "log")
            yield f"ssh://{getpass.getuser()}@127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"sshd did not start: {log.read_text()}")
