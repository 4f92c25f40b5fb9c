"""How long a device may take for what it was asked: far longer than a slow one does, but not for ever."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from ..engines.engine import EngineError

COMMAND_S = 600.0  # of one command; a GPU's driver that compiles 80 kernels at a program's start takes minutes
LAST_COMMAND_S = 60.0  # of removing a session's files, perhaps from a device that hangs
SLOWEST_TRANSFER_BYTES_S = 10_000
SLOWEST_INFERENCE_S = 60.0  # before any was seen; of the boards in targets/ the slowest takes seconds
SLOWDOWN = 10.0  # what throttling and other programs may make of the inferences that were seen


def transfer_s(size_bytes: int) -> float:
    """The limit for sending so much."""
    return COMMAND_S + size_bytes / SLOWEST_TRANSFER_BYTES_S


def run(
    device: str,
    command: Sequence[str],
    limit_s: float,
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[bytes]:
    """Runs ssh or adb. Raises EngineError where it has not ended after ``limit_s``, OSError where it cannot start."""
    try:
        return subprocess.run(command, stdin=stdin, stdout=stdout, stderr=stderr, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{device}: no answer after {limit_s:.0f} s; the device hangs, or the way to it") from error
