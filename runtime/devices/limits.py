"""How long a device may take for what it was asked, and how much it may answer: far more than one does, with an end."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Sequence

from ..engines.engine import EngineError

COMMAND_S = 600.0  # of one command; a GPU's driver that compiles 80 kernels at a program's start takes minutes
LAST_COMMAND_S = 60.0  # of removing a session's files, perhaps from a device that hangs
SLOWEST_TRANSFER_BYTES_S = 10_000
SLOWEST_INFERENCE_S = 60.0  # before any was seen; of the boards in targets/ the slowest takes seconds
SLOWDOWN = 10.0  # what throttling and other programs may make of the inferences that were seen
REPLY_BYTES = 32 << 20  # of an answer; a million samples of time are ten
ERROR_BYTES = 1 << 20  # of what a command says of what went wrong
_PIECE_BYTES = 1 << 16
_LOOK_S = 0.1  # how soon it is noticed that a command has ended whose pipe another process holds


def transfer_s(size_bytes: int) -> float:
    """The limit for sending so much."""
    return COMMAND_S + size_bytes / SLOWEST_TRANSFER_BYTES_S


def run(
    device: str,
    command: Sequence[str],
    limit_s: float,
    *,
    stdin: int = subprocess.DEVNULL,
    reply_bytes: int = REPLY_BYTES,
) -> subprocess.CompletedProcess[bytes]:
    """Runs ssh or adb. Raises EngineError where it has not ended after ``limit_s`` or answers with more than
    ``reply_bytes``, OSError where it cannot start. Then it is ended, and what it said is dropped.
    """
    process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        try:
            said = _listen(device, process, time.monotonic() + limit_s, (reply_bytes, ERROR_BYTES))
        except subprocess.TimeoutExpired:
            process.kill()
            raise EngineError(
                f"{device}: no answer after {limit_s:.0f} s; the device hangs, or the way to it"
            ) from None
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, *said)


def _listen(
    device: str, process: subprocess.Popen[bytes], deadline: float, most: tuple[int, int]
) -> tuple[bytes, bytes]:
    """What a process writes to its two pipes until it ends: ssh's shared connection holds one open for longer."""
    assert process.stdout is not None
    assert process.stderr is not None
    said = (bytearray(), bytearray())
    with selectors.DefaultSelector() as waiting:
        for index, pipe in enumerate((process.stdout, process.stderr)):
            os.set_blocking(pipe.fileno(), False)
            waiting.register(pipe, selectors.EVENT_READ, index)
        while waiting.get_map():
            ended = process.poll() is not None
            ready = waiting.select(0 if ended else _LOOK_S)
            for key, _ in ready:
                piece = os.read(key.fd, _PIECE_BYTES)
                said[key.data].extend(piece)
                if not piece:
                    waiting.unregister(key.fileobj)
                elif len(said[key.data]) > most[key.data]:
                    raise EngineError(
                        f"{device}: answers without end (more than {most[key.data]} bytes); does a login script of it "
                        "print something?"
                    )
            if ended and not ready:
                break
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(process.args, 0.0)
    process.wait(max(0.0, deadline - time.monotonic()))
    return bytes(said[0]), bytes(said[1])
