"""Code in the strings of a file, and a witness of whatever Python is told to do while the file is read."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What Python tells an audit hook where it compiles, runs, imports or unpickles, starts a program or changes a file.
DEEDS = ("compile", "exec", "import", "pickle.", "marshal.", "ctypes.", "os.", "subprocess.", "shutil.", "socket.")
HARMLESS = ("os.listdir", "os.scandir")


class Witness:
    """Counts what Python is told to do between ``begin`` and ``end``."""

    def __init__(self) -> None:
        self.watching = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)  # for the life of the process: there is no way back

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or (event.startswith(DEEDS) and event not in HARMLESS):
            self.seen.append(f"{event} {arguments!r:.2000}")

    def begin(self) -> None:
        self.seen.clear()
        self.watching = True

    def end(self) -> list[str]:
        self.watching = False
        return list(self.seen)


def call(marker: Path) -> str:
    return f"__import__('os').makedirs({str(marker)!r}, exist_ok=True)"


def payloads(marker: Path) -> tuple[str, ...]:
    """What runs where a string is evaluated, stands in generated Python, closes its quotes, or names a thing."""
    code = call(marker)
    return (
        code,
        f"x={code}",
        f"x': {code}, 'y",
        f'x"); {code}; ("',
        f"x':0}}), self._in_spec)\n{code}\ndef unused(self, input):\n    pass #",
        f"Symbol('s0', positive={code})",
        "torch.os.abort",
        "os:abort",
        "this.d",
    )


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each string lies: the keys that lead to it, None last for a key itself."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key, None)
            yield from strings(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings(item, (*path, index))
    elif isinstance(value, str):
        yield path


def plant(value: Any, path: tuple[Any, ...], payload: str) -> str:
    """Replaces the string at ``path``, and returns what was there."""
    *way, last = path
    for key in way[:-1] if last is None else way:
        value = value[key]
    if last is None:
        value[payload] = value.pop(way[-1])
        return str(way[-1])
    before, value[last] = value[last], payload
    return str(before)


def mutants(contents: Any, marker: Path) -> Iterator[Any]:
    """With code in each string and each key in turn, then in all strings at once."""
    codes = payloads(marker)
    places = list(strings(contents))
    for index, place in enumerate(places):
        for code in (codes[index % len(codes)], codes[(index + 4) % len(codes)]):
            before = plant(contents, place, code)
            yield contents
            plant(contents, (*place[:-2], code, None) if place[-1] is None else place, before)
    for code in codes:
        everywhere = copy.deepcopy(contents)
        for place in places:
            if place[-1] is not None:
                plant(everywhere, place, code)
        yield everywhere
