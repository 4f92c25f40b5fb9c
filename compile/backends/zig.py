"""zig as the C compiler and linker for every processor, from PyPI alone."""

from __future__ import annotations

import sys

# The oldest C library (glibc) that zig links against; the first with RISC-V is 2.27 (2018).
_GLIBC = {"riscv64": "2.27"}
_OLDEST_GLIBC = "2.17"  # of 2012; JetPack 4 has 2.27


def triple(architecture: str) -> str:
    """A processor's Linux in zig's words."""
    return f"{architecture}-linux-gnu.{_GLIBC.get(architecture, _OLDEST_GLIBC)}"


def compiler(architecture: str) -> list[str]:
    """The words that a command line begins with."""
    return [sys.executable, "-m", "ziglang", "cc", "-target", triple(architecture)]
