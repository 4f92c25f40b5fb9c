"""What a test needs of the machine, as marks: a test without it is skipped by name, with the reason in the summary.

On CI (CI=true) conftest.py turns every skip into a failure, apart from those for hardware that no package installs.
"""

from __future__ import annotations

import importlib.util
import shutil
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


def requires_pocl() -> pytest.MarkDecorator:
    """The test runs OpenCL on the processor."""
    present = Path("/etc/OpenCL/vendors/pocl.icd").exists()
    return pytest.mark.skipif(not present, reason="needs PoCL (apt install pocl-opencl-icd ocl-icd-libopencl1)")
