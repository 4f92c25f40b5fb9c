"""Instructions that one inference of Xception at 299x299 executes on one thread: ours and LiteRT's, under qemu.

An emulator's time says nothing; what it executes is exact and repeatable. One inference is the difference between a
process that runs n + 1 images and one that runs n, so that start-up, packing and the interpreter are not counted.

    PYTHONPATH=tests python tests/benchmarks/instructions.py [a53 a72 dotprod i8mm avx2]

Prints a table and ends with status 1 where a ratio is above its limit. About five minutes for each row. The plugin
knows the classes of AArch64 only: of x86-64 it counts all instructions together.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from support.emulated_bundle import EmulatedBundle
from support.int8_graphs import differences, photo, random_xception
from support.tree import TESTS

from xceptile.compile.backends import cpu as backend
from xceptile.compile.backends import tflite
from xceptile.models import graph as ir
from xceptile.runtime.devices import qemu
from xceptile.runtime.devices.qemu import emulator_command
from xceptile.runtime.engines.litert_qemu import LiteRtQemuEngine
from xceptile.targets import catalog


@dataclass(frozen=True)
class Row:
    """``most``: the ratio of ours to LiteRT's that we aim to stay below. On a Cortex-A72 LiteRT has a kernel of as many
    multiplications as ours (1,050 M) and twice the pairwise additions, on a Cortex-A53 one with far more."""

    target: str
    most: float


ROWS = {
    "a53": Row("raspberrypi/raspberry-pi-3", 0.75),
    "a72": Row("raspberrypi/raspberry-pi-4", 0.75),
    "dotprod": Row("raspberrypi/raspberry-pi-5", 0.85),
    "i8mm": Row("generic/android-arm64-i8mm", 0.80),
    "avx2": Row("generic/x86-64-avx2", 0.90),
}

# LiteRT in a process of its own: the file, the image, how often.
LITERT_RUNS = """
import sys
import numpy as np
from support.tree import TESTS
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
interpreter.set_tensor(interpreter.get_input_details()[0]["index"], np.load(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    interpreter.invoke()
np.save(sys.argv[4], interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
"""


def build_plugin(folder: Path) -> Path:
    """The counting plugin, compiled."""
    plugin = folder / "libcount.so"
    source = TESTS / "benchmarks" / "qemu_plugin" / "count.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(plugin), str(source)], check=True)
    return plugin


def ours(graph: ir.Graph, row: Row, image: np.ndarray, plugin: Path, folder: Path) -> dict[str, int]:
    """Counts by class, checked against the reference on the way."""
    target = catalog.get(row.target)
    bundle = EmulatedBundle(graph, backend.lower(graph, target), target, folder)

    def count(images: int) -> dict[str, int]:
        counts = folder / "counts.json"
        outputs = bundle.run([[image]] * images, emulator_options=["-plugin", f"{plugin},out={counts}"])
        assert differences(graph, [image], outputs[0]) == {}
        return dict(json.loads(counts.read_text()))

    return _difference(count(2), count(1))


def litert(graph: ir.Graph, row: Row, image: np.ndarray, plugin: Path, folder: Path) -> dict[str, int]:
    """The same of LiteRT with XNNPACK on the same file's numbers."""
    if catalog.get(row.target).architecture == "x86_64":
        return _litert_x86(graph, row, image, plugin, folder)
    cpu = catalog.get(row.target).qemu_cpu
    assert cpu is not None
    engine = LiteRtQemuEngine(tflite.serialize(graph), cpu)
    counts, wrapper = folder / "litert.json", folder / "counting-qemu"
    seed = "-E PYTHONHASHSEED=0"  # with another, Python executes 1 % more or less
    wrapper.write_text(f'#!/bin/sh\nexec {qemu.emulator("aarch64")} {seed} -plugin "{plugin},out={counts}" "$@"\n')
    wrapper.chmod(0o755)
    engine._emulator = str(wrapper)

    def count(images: int) -> dict[str, int]:
        engine.run(np.concatenate([image] * images))
        return dict(json.loads(counts.read_text()))

    return _difference(count(3), count(2))


def _litert_x86(graph: ir.Graph, row: Row, image: np.ndarray, plugin: Path, folder: Path) -> dict[str, int]:
    """This very Python and its LiteRT, emulated."""
    model, source, result = folder / "int8.tflite", folder / "image.npy", folder / "result.npy"
    model.write_bytes(tflite.serialize(graph))
    np.save(source, image)
    emulator, *options = emulator_command(catalog.get(row.target))

    def count(images: int) -> dict[str, int]:
        counts = folder / "litert.json"
        command = [emulator, "-plugin", f"{plugin},out={counts}", *options, sys.executable, "-c", LITERT_RUNS]
        subprocess.run([*command, str(model), str(source), str(images), str(result)], check=True, capture_output=True)
        assert differences(graph, [image], [np.load(result)]) == {}
        return dict(json.loads(counts.read_text()))

    return _difference(count(3), count(2))


def _difference(more: dict[str, int], less: dict[str, int]) -> dict[str, int]:
    return {name: more[name] - less[name] for name in more}


def count_row(row: Row, graph: ir.Graph, image: np.ndarray) -> dict[str, dict[str, int]]:
    """Instructions of one inference by class, of "ours" and of "LiteRT"."""
    with tempfile.TemporaryDirectory() as folder:
        plugin = build_plugin(Path(folder))
        return {
            "ours": ours(graph, row, image, plugin, Path(folder)),
            "LiteRT": litert(graph, row, image, plugin, Path(folder)),
        }


def main(names: list[str]) -> int:
    graph, image = random_xception(), photo(299, 299, 1)
    missed = 0
    print(f"millions of instructions, Xception int8 299x299, one thread; LiteRT {version('ai-edge-litert')}")
    print(f"{'':8} {'':7} {'total':>8} {'dot':>8} {'multiply':>9} {'other':>8} {'load':>8} {'store':>8} {'ratio':>7}")
    for name in names or list(ROWS):
        row = ROWS[name]
        counted = count_row(row, graph, image)
        ratio = counted["ours"]["total"] / counted["LiteRT"]["total"]
        missed += ratio > row.most
        for who, counts in counted.items():
            shown = [counts[key] for key in ("total", "dot", "multiply", "vector_other", "load", "store")]
            columns = " ".join(
                f"{value / 1e6:{width}.1f}" for value, width in zip(shown, (8, 8, 9, 8, 8, 8), strict=True)
            )
            end = f"{ratio:7.3f} (at most {row.most})" if who == "ours" else ""
            print(f"{name:8} {who:7} {columns} {end}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
