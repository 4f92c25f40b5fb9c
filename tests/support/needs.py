"""What a test needs of the machine, as marks: a test without it is skipped by name, with the reason in the summary.

On CI (CI=true) conftest.py turns every skip into a failure, apart from those for hardware that no package installs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HARDWARE = "this machine has no"  # how the reason of a skip begins that CI accepts


def requires(program: str, *, package: str) -> pytest.MarkDecorator:
    """The test runs ``program``, which the apt package ``package`` brings."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program} (apt install {package})")


def requires_module(module: str, *, package: str) -> pytest.MarkDecorator:
    """The test imports ``module``, which the Python package ``package`` brings."""
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"needs {module} (pip install {package})"
    )


def requires_hardware(present: bool, what: str) -> pytest.MarkDecorator:
    """The test runs only where this machine has ``what``: a processor feature, a GPU, an older Python."""
    return pytest.mark.skipif(not present, reason=f"{HARDWARE} {what}")


def requires_root() -> pytest.MarkDecorator:
    """The test makes a device of its own: never the machine's, which a fault in what is tested would replace."""
    return requires_hardware(os.geteuid() == 0, "root account for the test, which alone makes a device")


def requires_mount() -> pytest.MarkDecorator:
    """The test mounts a file system."""
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    able = os.geteuid() == 0 and shutil.which("unshare") is not None
    able = able and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return requires_hardware(able, "file system that this process may mount")


def requires_pocl() -> pytest.MarkDecorator:
    """The test runs OpenCL on the processor."""
    present = Path("/etc/OpenCL/vendors/pocl.icd").exists()
    return pytest.mark.skipif(not present, reason="needs PoCL (apt install pocl-opencl-icd ocl-icd-libopencl1)")
