"""Arrays and texts of an HDF5 file from a stranger, read by a process of its own (``hdf5_child.py``).

A single wrong byte can make the HDF5 library run for ever (a damaged heap of texts does), take all memory or crash. So
it runs in a process with limits, and what it cannot read is one error here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_CHILD = Path(__file__).with_name("hdf5_child.py")
_SECONDS = 20  # of processor time, and one more for each 10 MB of the file; a file of 90 MB takes one or two in all
_MEMORY_BYTES = 4 << 30  # of addresses, and eight times the file; most of it is what libraries map


class Hdf5Error(ValueError):
    """A file that is not read. The message says what is wrong and what to do, without the file's name."""


@dataclass(frozen=True)
class Hdf5File:
    """Arrays of real numbers by their path in the file (without leading slash), as float32; the attributes
    ``model_config`` and ``name`` that are texts, by (path of the object, name of the attribute)."""

    arrays: dict[str, NDArray[np.float32]]
    texts: dict[tuple[str, str], str]


def read_hdf5(file: BinaryIO, skipped: tuple[str, ...] = ()) -> Hdf5File:
    """What an open file of the file system holds, but for the arrays in the ``skipped`` groups of its top.

    Raises Hdf5Error for a file that names another file, promises more than it holds, is damaged or not HDF5.
    """
    if importlib.util.find_spec("h5py") is None:
        raise ModuleNotFoundError("No module named 'h5py'", name="h5py")
    size_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    seconds, memory_bytes = _SECONDS + size_bytes // 10_000_000, _MEMORY_BYTES + 8 * size_bytes
    # -P: the modules beside the program are not its own. One thread: each takes addresses.
    done = subprocess.run(
        [sys.executable, "-P", str(_CHILD), str(seconds), str(memory_bytes), json.dumps(skipped)],
        stdin=file,
        capture_output=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise Hdf5Error(f"cannot be read in {seconds} seconds: damaged; copy it again")
    head, _, values = done.stdout.partition(b"\n")
    if done.returncode != 0 or not head:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise Hdf5Error(f"cannot be read by the HDF5 library ({last}): damaged; copy it again")
    told = json.loads(head)
    if "error" in told:
        raise Hdf5Error(told["error"])
    arrays, place = {}, 0
    for path, shape in told["arrays"]:
        count = math.prod(shape)
        arrays[path] = np.frombuffer(values, np.float32, count, 4 * place).reshape(shape)
        place += count
    return Hdf5File(arrays, {(path, name): text for path, name, text in told["texts"]})
