"""What others wrote (names of classes, files, devices) as text that a terminal shows and does not obey."""

from __future__ import annotations

import re

# Controls (C0, DEL, C1), the separators of lines and paragraphs, what turns the direction of the text that follows
# (Unicode 16, UAX #9, table 4), and surrogates, which stand for the bytes of a file name that is not UTF-8 (PEP 383).
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""``text`` with every control character as an escape, such as ``\x1b``; tabs and ends of lines stay."""
    return CONTROLS.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if found[0] in "\n\t":
        return found[0]
    code -= 0xDC00 if 0xDC80 <= code < 0xDD00 else 0
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
