"""A writer that is killed before one system call after the other."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

# Audit events (Python's "Audit events table") that stand for a change of the file system, or the lock before it.
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym", "fcntl.flock"}


def killed_before(number: int, action: Callable[[], object]) -> int:
    """Runs ``action`` in a child that SIGKILL ends before its ``number``-th event; the child's status, 0 if it came to
    its end."""
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        seen += event in EVENTS
        if event in EVENTS and seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        sys.addaudithook(hook)
        action()
        os._exit(0)
    return os.waitpid(child, 0)[1]
