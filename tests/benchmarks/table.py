"""Every goal of speed, size and compile time in one table: what, goal, reached, how it was obtained.

    PYTHONPATH=tests python tests/benchmarks/table.py [PART ...] [--all] [--peers-python .venv-peers/bin/python]

Parts: host, memory, open, compile, throughput, onnxruntime, openvino, executorch; --all adds a53, a72, dotprod,
i8mm and avx2, which count the instructions of ours and LiteRT's on emulated processors. A part's lines are kept in
build/bench, and the table shows the last ones of every part: an interrupted run goes on with the parts that are named.
About 6 minutes (2 without peers); with --all about 20 more. Leave the machine alone meanwhile. Nothing is asserted:
`xceptile check` judges a device, and this is one desk.

Peers beyond LiteRT want an environment of their own, with another numpy than TVM's:

    python3.11 -m venv .venv-peers
    .venv-peers/bin/pip install -c .ci/peers.txt -e '.[peers]'
    make bench BENCH_FLAGS='--peers-python .venv-peers/bin/python'
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
from benchmarks import cpu, instructions, throughput
from benchmarks.interleaved import interleave, ratio
from support.int8_graphs import as_float, photo, random_xception
from support.tree import ROOT, TESTS

from xceptile.calibration.recipe import QuantRecipe
from xceptile.calibration.table import CalibrationTable
from xceptile.compile.backends import cpu as backend
from xceptile.compile.backends import native_runtime, tflite
from xceptile.compile.pipeline import Quantized, build_bundle_files
from xceptile.models import graph as ir
from xceptile.models import zoo
from xceptile.models.to_onnx import to_onnx
from xceptile.runtime import reference
from xceptile.runtime.bundle import write_bundle
from xceptile.runtime.engines.litert import LiteRtEngine
from xceptile.runtime.engines.native import NativeEngine
from xceptile.targets import host

KEPT = ROOT / "build" / "bench"
THREADS = (1, 2)
ROUNDS = 30


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    what: str
    goal: str
    reached: str
    how: str


@dataclass(frozen=True)
class Network:
    """The full Xception of random weights, compiled for this machine. ``wall_s`` and ``cpu_s`` are what that took."""

    graph: ir.Graph
    image: np.ndarray
    native: Path
    wall_s: float
    cpu_s: float


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@functools.cache
def network() -> Network:
    """All that `compile` does once a network is quantized, in a folder that goes with this process."""
    graph, image = random_xception(), photo(299, 299, 1)
    pixels = np.stack([(photo(299, 299, seed)[0].astype(np.int16) + 128).astype(np.uint8) for seed in range(4)])
    recipe, table = QuantRecipe("benchmark"), CalibrationTable({}, len(pixels), "")
    quantized = Quantized(zoo.load("xception"), as_float(graph), graph, recipe, table, pixels, None)
    bundle = scratch() / "bundle"
    start, cpu_start = time.perf_counter(), cpu_seconds()
    manifest, files = build_bundle_files(quantized, host.detect(), ("native", "litert"), (), lambda *_: None)
    write_bundle(bundle, manifest, files)
    wall_s, cpu_s = time.perf_counter() - start, cpu_seconds() - cpu_start
    return Network(graph, image, bundle / "native", wall_s, cpu_s)


@functools.cache
def scratch() -> Path:
    KEPT.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=KEPT, prefix="scratch."))


def version(*names: str) -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def processor_ms(run: Callable[[], object], rounds: int) -> float:
    start = time.process_time_ns()
    for _ in range(rounds):
        run()
    return (time.process_time_ns() - start) / 1e6 / rounds


# --- The parts. ---


def host_part(_: argparse.Namespace) -> list[Line]:
    net, lines = network(), []
    model = tflite.serialize(net.graph)
    (expected,) = reference.run(net.graph, net.image)
    for threads in THREADS:
        theirs = LiteRtEngine(model, threads)
        with NativeEngine(net.native, threads) as ours:
            if not all(np.array_equal(engine.run(net.image), expected) for engine in (ours, theirs)):
                raise SystemExit("the outputs differ from the reference: nothing is measured")
            runs = (partial(ours.run, net.image), partial(theirs.run, net.image))
            wall = interleave(*runs, ROUNDS, time.perf_counter_ns)
            spent = interleave(*runs, ROUNDS, time.process_time_ns)
        ms = [statistics.median(samples) for samples in wall]
        lines.append(
            Line(
                f"int8, {threads} thread{'s' * (threads > 1)}: ours / {version('ai-edge-litert')}",
                "0.85 (aim 0.80)",
                f"{ratio(wall):.3f} ({ms[0]:.1f} / {ms[1]:.1f} ms)",
                f"measured, {host.detect().features[-1]}, median of {ROUNDS} interleaved rounds; outputs equal bit for "
                f"bit; of processor time {ratio(spent):.3f}",
            )
        )
    return lines


def _rss_kib(smaps: str, file: Path) -> int:
    """Resident part of a file's mappings."""
    resident, counted = 0, False
    for line in smaps.splitlines():
        key, _, value = line.partition(":")
        if "-" in key.split(" ")[0]:
            counted = line.endswith(str(file))
        elif key == "Rss" and counted:
            resident += int(value.split()[0])
    return resident


def memory_part(_: argparse.Namespace) -> list[Line]:
    """While the program, images behind it, waits for the next one on standard input."""
    net, lines = network(), []
    weights = net.native / "weights.bin"
    for threads in THREADS:
        command = [net.native / "xceptile-run", f"--threads={threads}", net.native, "-", "-"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(net.image.tobytes() * 8)  # their outputs are more than standard output's buffer holds
            process.stdin.flush()
            process.stdout.read(1)
            status = Path(f"/proc/{process.pid}/status").read_text()
            mapped = _rss_kib(Path(f"/proc/{process.pid}/smaps").read_text(), weights)
            process.stdin.close()
            process.stdout.read()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        assert mapped > 0
        lines.append(
            Line(
                f"peak resident memory of xceptile-run above the mapped weights, {threads} thread{'s' * (threads > 1)}",
                "20 MB",
                f"{(peak - mapped) * 1024 / 1e6:.1f} MB",
                f"measured: VmHWM less what smaps has resident of weights.bin ({mapped * 1024 / 1e6:.1f} MB)",
            )
        )
    return lines


def open_part(_: argparse.Namespace) -> list[Line]:
    net, openings, inferences = network(), [], []
    processes = []
    image, output = scratch() / "image.bin", scratch() / "output.bin"
    image.write_bytes(net.image.tobytes())
    program = [net.native / "xceptile-run", "--threads=1", net.native, image, output]
    for _round in range(12):
        start = time.perf_counter()
        subprocess.run(program, check=True)
        processes.append(time.perf_counter() - start)
        start = time.perf_counter()
        with NativeEngine(net.native, 1) as engine:
            engine.run(net.image)
            openings.append(time.perf_counter() - start)
            inferences.append(engine.time_ms(net.image, 1, 0)[0] / 1e3)

    def inferences_of(samples: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(samples[2:], inferences[2:], strict=True))

    return [
        Line(
            "bundle open to first result, warm page cache, 1 thread",
            "2 inferences",
            f"{inferences_of(openings):.2f} inferences ({statistics.median(openings[2:]) * 1e3:.0f} ms)",
            "measured: xct_open (every file hashed) and one xct_run; the whole process xceptile-run, image file to "
            f"output file: {inferences_of(processes):.2f}",
        )
    ]


def compile_part(_: argparse.Namespace) -> list[Line]:
    net = network()
    calls = [call for call in backend.lower(net.graph, host.detect()) if call.tasks]
    repeated = {call.symbol for call in calls if _middle_block(call.path) > 0}
    rest = {call.symbol for call in calls if _middle_block(call.path) <= 0}
    symbols = repeated | rest
    return [
        Line(
            f"compile of the full Xception for {' '.join(host.detect().features[-1:])}, after calibration",
            "60 s on 2 cores",
            f"{net.wall_s:.0f} s",
            f"measured: kernels, C runtime, TFLite files and golden outputs, as `xceptile compile` does; "
            f"{net.cpu_s:.0f} s of processor time; {version('apache-tvm', 'ziglang')}",
        ),
        Line(
            "kernels that the second to eighth block of the middle flow add",
            "0",
            f"{len(repeated - rest)}",
            f"counted: {len(symbols)} distinct kernels for {len(calls)} calls",
        ),
    ]


def _middle_block(path: str) -> int:
    """0 to 7 for the eight blocks of one shape, -1 elsewhere."""
    words = path.split(".")
    index = int(words[1]) if words[0] == "blocks" else 0
    return index - 3 if 3 <= index <= 10 else -1


def throughput_part(_: argparse.Namespace) -> list[Line]:
    mca = next((path for name in ("llvm-mca-19", "llvm-mca") if (path := shutil.which(name))), None)
    if mca is None:
        return [Line("inner loops on llvm-mca", "85 %", "skipped", "llvm-mca is not installed: apt install llvm-19")]
    return [
        Line(
            f"pointwise inner loop on {loop.cpu}, of its multiply-accumulate peak",
            "at least 85 %",
            f"{throughput.share_of_peak(loop, mca):.1%}",
            f"estimated by {Path(mca).name}'s model of the core, no memory hierarchy",
        )
        for loop in throughput.LOOPS
    ]


def instructions_part(name: str, _: argparse.Namespace) -> list[Line]:
    row = instructions.ROWS[name]
    counted = instructions.count_row(row, random_xception(), photo(299, 299, 1))
    ours, theirs = (counted[who]["total"] for who in ("ours", "LiteRT"))
    return [
        Line(
            f"{name}: instructions of one inference, 1 thread, ours / {version('ai-edge-litert')}",
            f"{row.most:.2f}",
            f"{ours / theirs:.3f} ({ours / 1e6:.0f} / {theirs / 1e6:.0f} million)",
            f"counted under qemu, {row.target}; outputs equal bit for bit",
        )
    ]


@functools.cache
def peers_folder() -> Path:
    """What peers.py reads."""
    folder = scratch() / "peers"
    (folder / "native").mkdir(parents=True)
    graph = random_xception(same_padding=False)  # symmetric pools: all that torch and ExecuTorch know
    for name, data in (backend.build_files(graph, host.detect()) | native_runtime.build(host.detect())).items():
        (folder / "native" / name).write_bytes(data)
    (folder / "float.onnx").write_bytes(to_onnx(as_float(graph)).SerializeToString())
    np.save(folder / "photos.npy", np.concatenate([photo(299, 299, seed) for seed in range(8)]))
    return folder


def peer_part(name: str, options: argparse.Namespace) -> list[Line]:
    known = [options.peers_python, "-c", f"import {name}"]
    if subprocess.run(known, capture_output=True, check=False).returncode != 0:
        return [Line(f"int8: ours / {name}", "", "skipped", f"{name} is not installed: see tests/benchmarks/table.py")]
    command = [options.peers_python, str(TESTS / "benchmarks" / "peers.py"), name, str(peers_folder())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"{name}: {done.stderr}", file=sys.stderr)
        return [Line(f"int8: ours / {name}", "", "skipped", reason)]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    return [
        Line(
            f"int8, {m['threads']} thread{'s' * (m['threads'] > 1)}: ours / {versions}",
            "",
            f"{m['ratio']:.3f} ({m['ours_ms']:.1f} / {m['theirs_ms']:.1f} ms)",
            f"measured, interleaved; its own quantization of the float network (outputs correlate with ours by "
            f"{m['correlation']:.3f}); of processor time {m['cpu_ratio']:.3f}",
        )
        for m in result["measured"]
    ]


PARTS = {
    "host": host_part,
    "memory": memory_part,
    "open": open_part,
    "compile": compile_part,
    "throughput": throughput_part,
    **{name: partial(instructions_part, name) for name in instructions.ROWS},
    **{name: partial(peer_part, name) for name in ("onnxruntime", "openvino", "executorch")},
}


def keep(name: str, lines: list[Line]) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    aside = KEPT / f".{name}.json"
    when = datetime.now(UTC).isoformat(" ", "minutes")
    aside.write_text(json.dumps({"when": when, "on": cpu.processor(), "lines": [asdict(line) for line in lines]}))
    os.replace(aside, KEPT / f"{name}.json")


def print_table() -> None:
    kept = {name: json.loads(path.read_text()) for name in PARTS if (path := KEPT / f"{name}.json").exists()}
    print("| what | at most | reached | how |\n|---|---|---|---|")
    for part in kept.values():
        for line in part["lines"]:
            print(f"| {line['what']} | {line['goal']} | {line['reached']} | {line['how']} |")
    print("\nXception at 299x299, batch 1, random weights.")
    for machine in sorted({part["on"] for part in kept.values()}):
        parts = (f"{name} {part['when']}" for name, part in kept.items() if part["on"] == machine)
        print(f"{machine}: {', '.join(parts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART")
    parser.add_argument("--all", action="store_true", help="the instructions under emulators, too")
    parser.add_argument("--peers-python", default=sys.executable, help="the interpreter that has the extra [peers]")
    options = parser.parse_args()
    quick = [name for name in PARTS if name not in instructions.ROWS]
    try:
        for name in options.parts or (list(PARTS) if options.all else quick):
            print(f"{name} ...", file=sys.stderr, flush=True)
            keep(name, PARTS[name](options))
    finally:
        if scratch.cache_info().currsize:
            shutil.rmtree(scratch(), ignore_errors=True)
    print_table()


if __name__ == "__main__":
    main()
