"""Checks of the CUDA kernels on a real GPU, prepared on one machine and run on any other.

``write_checks`` needs the whole of Xceptile: it compiles networks for a Jetson and writes each with an input and what
the reference makes of it. ``run_checks`` needs Python alone, the native runtime's program built for that machine, and
a GPU of the architecture or a newer one, whose driver compiles the PTX: the result is a rehearsal.
"""

from __future__ import annotations

import array
import ctypes
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xceptile.models import graph as ir

FLOAT16_TOLERANCE = 0.02  # of the largest output


def gpu_capability() -> int | None:
    """87 and the like of the first GPU; None where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return major.value * 10 + minor.value


def write_checks(folder: Path, graphs: dict[str, ir.Graph], board: str = "jetson-orin") -> None:
    """A folder for each graph; a float graph behind ``with_pixels`` is compiled in float16."""
    import numpy as np

    from xceptile.compile.backends import cuda
    from xceptile.runtime import reference
    from xceptile.targets import catalog

    for name, graph in graphs.items():
        check = folder / name
        check.mkdir(parents=True)
        for file, data in cuda.build_files(graph, catalog.get(board)).items():
            (check / file).write_bytes(data)
        rng = np.random.default_rng(0)
        inputs = [rng.integers(-128, 128, node.type.shape, np.int8) for node in graph.inputs]
        outputs = reference.run(graph, *inputs)
        real = outputs[0].dtype == np.float32
        (check / "input.bin").write_bytes(b"".join(x.tobytes() for x in inputs))
        (check / "expected.bin").write_bytes(b"".join(y.tobytes() for y in outputs))
        (check / "check.json").write_text(json.dumps({"tolerance": FLOAT16_TOLERANCE if real else 0.0}))


def run_checks(folder: Path, program: Path) -> dict[str, str]:
    """What is wrong, by check; empty strings where nothing is. ``program`` is ``xceptile-run`` for this machine."""
    return {check.name: _run(check, program) for check in sorted(folder.iterdir()) if (check / "check.json").exists()}


def _run(check: Path, program: Path) -> str:
    result = check / "output.bin"
    command = [str(program), "--require-device=gpu", str(check), str(check / "input.bin"), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"exit status {done.returncode}: {done.stderr.strip()}"
    got, expected = result.read_bytes(), (check / "expected.bin").read_bytes()
    if len(got) != len(expected):
        return f"{len(got)} bytes instead of {len(expected)}"
    tolerance = json.loads((check / "check.json").read_text())["tolerance"]
    if not tolerance:
        wrong = sum(a != b for a, b in zip(got, expected, strict=True))
        return f"{wrong} of {len(expected)} values differ from the reference" if wrong else ""
    values, wanted = array.array("f", got), array.array("f", expected)
    error = max(abs(a - b) for a, b in zip(values, wanted, strict=True)) / max(map(abs, wanted))
    return "" if error <= tolerance else f"an error of {error:.3g} of the largest output, {tolerance} is allowed"
