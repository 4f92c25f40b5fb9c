"""Programs of the native runtime's sources, as tests build them: by clang, every warning an error."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.tree import SOURCES

from xceptile.compile.backends import native_runtime

LIBRARY = [str(SOURCES / name) for name in native_runtime.LIBRARY_SOURCES]

WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]

ADDRESS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compile_program(output: Path, *sources: str | Path, flags: list[str]) -> Path:
    command = ["clang", *WARNINGS, *flags, *sources, "-ldl", "-lpthread", "-lm", "-o", output]
    subprocess.run(command, check=True)
    return output
