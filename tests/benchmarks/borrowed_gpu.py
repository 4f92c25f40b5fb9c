"""Runs a kit of compiled networks on an NVIDIA GPU: one command on a machine that has Python, torch and numpy.

    python borrowed_gpu.py [KIT]

KIT is the folder that ``gpu_kit.py`` made on another machine, by default the one this file lies in. Every operator and
the whole network run through libxceptile and the GPU's own driver and are compared with the recorded outputs of the
reference, byte for byte; then batch 1 and 8 are timed in turns with torch in float16, channels last, under CUDA graphs
and torch.compile, on the same GPU. A GPU that is not the target's rehearses: its outputs count for the target, its
times only against torch's beside them.

Prints JSON on standard output. Exit status: 0 all outputs are equal, 1 some differ, 2 there is no GPU or no kit.
"""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TURNS, RUNS, WARMUP = 20, 20, 10
TIME_STEPS = 2  # XCT_TIME_STEPS
GPU = 1  # XCT_DEVICE_GPU


class Options(ctypes.Structure):  # xct_options
    _fields_ = [
        ("struct_bytes", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("core_mask", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
    ]


class StepInfo(ctypes.Structure):  # xct_step_info
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("path", ctypes.c_char_p),
        ("kernel", ctypes.c_char_p),
        ("tasks", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("macs", ctypes.c_uint64),
        ("last_ns", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
    ]


class Unusable(RuntimeError):
    """There is no GPU, no driver or no kit here; the message says which."""


def load_runtime(path: Path) -> ctypes.CDLL:
    """libxceptile with the types of the functions used (xceptile.h)."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unusable(f"cannot load the kit's runtime: {error}") from error
    session, size = ctypes.c_void_p, ctypes.c_size_t
    library.xct_open.argtypes = [ctypes.c_char_p, ctypes.POINTER(Options), ctypes.POINTER(session)]
    library.xct_run.argtypes = [session, ctypes.c_void_p, size, ctypes.c_void_p, size]
    library.xct_last_error.argtypes = [session, ctypes.c_char_p, size]
    library.xct_close.argtypes = [session]
    library.xct_device.argtypes, library.xct_device.restype = [session], ctypes.c_char_p
    for name in ("xct_input_bytes", "xct_output_bytes"):
        getattr(library, name).argtypes, getattr(library, name).restype = [session], ctypes.c_uint64
    library.xct_step_count.argtypes, library.xct_step_count.restype = [session], ctypes.c_uint32
    library.xct_step.argtypes = [session, ctypes.c_uint32, ctypes.POINTER(StepInfo)]
    return library


class Network:
    """One compiled network of the kit, opened on the GPU."""

    def __init__(self, library: ctypes.CDLL, folder: Path, flags: int = 0) -> None:
        self.library, self.session = library, ctypes.c_void_p()
        options = Options(ctypes.sizeof(Options), 0, 0, flags, GPU)
        code = library.xct_open(bytes(folder), ctypes.byref(options), ctypes.byref(self.session))
        if code:
            raise Unusable(self.error())
        self.device = library.xct_device(self.session).decode()
        self.output = np.empty(library.xct_output_bytes(self.session), np.uint8)

    def error(self) -> str:
        message = ctypes.create_string_buffer(2048)
        self.library.xct_last_error(self.session, message, len(message))
        return message.value.decode("utf-8", "replace")

    def run(self, x: np.ndarray) -> np.ndarray:
        """Bytes in, bytes out; the result is overwritten by the next run."""
        x_pointer, y_pointer = x.ctypes.data, self.output.ctypes.data
        if self.library.xct_run(self.session, x_pointer, x.nbytes, y_pointer, self.output.nbytes):
            raise Unusable(self.error())
        return self.output

    def steps(self) -> list[dict[str, Any]]:
        """Name, multiply-accumulates, bytes and time of every step of the last run."""
        info, found = StepInfo(), []
        for index in range(self.library.xct_step_count(self.session)):
            self.library.xct_step(self.session, index, ctypes.byref(info))
            names = {"name": info.name.decode(), "kernel": info.kernel.decode()}
            found.append({**names, "macs": info.macs, "bytes": info.bytes, "ns": info.last_ns})
        return found

    def close(self) -> None:
        self.library.xct_close(self.session)


def check(library: ctypes.CDLL, kit: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of one network against the reference. int8 must be equal; float within the entry's tolerance."""
    folder = kit / entry["name"]
    result: dict[str, Any] = {"name": entry["name"], "target": entry["target"], "dtype": entry["dtype"]}
    try:
        network = Network(library, folder)
    except Unusable as error:
        return {**result, "equal": False, "error": str(error)}
    try:
        got = network.run(np.fromfile(folder / "input.bin", np.uint8)).copy()
    except Unusable as error:
        return {**result, "device": network.device, "equal": False, "error": str(error)}
    finally:
        network.close()
    expected = np.fromfile(folder / "expected.bin", np.uint8)
    different, start = {}, 0
    for tensor in entry["outputs"]:
        part = slice(start, start + tensor["bytes"])
        start += tensor["bytes"]
        a, b = got[part].view(entry["dtype"]), expected[part].view(entry["dtype"])
        if entry["dtype"] == "float32":
            off = float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30))
            if not off <= entry["tolerance"]:
                different[tensor["name"]] = f"{off:.3g} of the largest logit"
        elif count := int((a != b).sum()):
            different[tensor["name"]] = f"{count} of {a.size} values"
    return {
        **result,
        "device": network.device,
        "tensors": len(entry["outputs"]),
        "equal": not different,
        "different": different,
    }


def torch_network(kit: Path, device: str = "cuda") -> Callable[[Any], Any]:
    """The float network (N, C, H, W) -> (N, classes) in torch, in float16, channels last."""
    import torch
    from torch.nn import functional

    described = json.loads((kit / "torch.json").read_text())
    weights = np.load(kit / "torch.npz")
    on_gpu = {name: torch.from_numpy(weights[name]).to(device) for name in weights.files}
    on_gpu = {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in on_gpu.items()}

    def forward(x: Any) -> Any:
        values = {described["input"]: x}
        for node in described["nodes"]:
            a = [values[name] for name in node["inputs"]]
            w = [on_gpu[name] for name in node["weights"]]
            match node["op"]:
                case "conv":
                    y = functional.conv2d(a[0], w[0], w[1], node["strides"], node["padding"], groups=node["groups"])
                case "linear":
                    y = functional.linear(a[0], w[0], w[1])
                case "relu":
                    y = functional.relu(a[0])
                case "add":
                    y = a[0] + a[1]
                case "max_pool":
                    y = functional.max_pool2d(a[0], node["kernel"], node["strides"], node["padding"])
                case _:
                    y = a[0].mean((2, 3))
            values[node["name"]] = functional.relu(y) if node["relu"] else y
        return values[described["output"]]

    return forward


def torch_contenders(kit: Path, batch: int) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """What runs the network once and waits, by name, and why one cannot be had. Inputs lie on the GPU already."""
    import torch

    forward = torch_network(kit)
    shape = (batch, *json.loads((kit / "torch.json").read_text())["shape"])
    x = torch.randint(0, 256, shape, device="cuda").half().to(memory_format=torch.channels_last)
    found: dict[str, Callable[[], None]] = {}
    refused: dict[str, str] = {}
    torch.backends.cudnn.benchmark = True  # its fastest algorithm for each layer
    with torch.inference_mode():
        for _ in range(3):
            forward(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward(x)

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        found["torch float16, CUDA graph"] = replay
        try:
            compiled = torch.compile(forward, mode="max-autotune")
            for _ in range(5):
                compiled(x)
            torch.cuda.synchronize()
        except Exception as error:  # whatever its compilers raise
            refused["torch float16, compiled"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return found, refused

    def run_compiled() -> None:
        with torch.inference_mode():
            compiled(x)
        torch.cuda.synchronize()

    found["torch float16, compiled"] = run_compiled
    return found, refused


def time_in_turns(contenders: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Median and tenth percentile in milliseconds, every contender in every turn."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(TURNS):
        for name, run in contenders.items():
            for _ in range(WARMUP if turn == 0 else 1):
                run()
            for _ in range(RUNS):
                start = time.perf_counter_ns()
                run()
                samples[name].append((time.perf_counter_ns() - start) / 1e6)
    return {n: {"median_ms": statistics.median(s), "p10_ms": float(np.percentile(s, 10))} for n, s in samples.items()}


def bench(library: ctypes.CDLL, kit: Path, entries: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Our builds, from and to the processor's memory, against torch, on the GPU alone."""
    ours = {f"xceptile {e['dtype']}": Network(library, kit / e["name"]) for e in entries}
    inputs = {f"xceptile {e['dtype']}": np.fromfile(kit / e["name"] / "input.bin", np.uint8) for e in entries}
    contenders: dict[str, Callable[[], Any]] = {n: (lambda n=n: ours[n].run(inputs[n])) for n in ours}
    theirs, refused = torch_contenders(kit, batch)
    times = time_in_turns(contenders | theirs)
    for network in ours.values():
        network.close()
    best = min(times[name]["median_ms"] for name in theirs)
    ratio = times["xceptile int8"]["median_ms"] / best if "xceptile int8" in times else None
    return {"batch": batch, "times": times, "int8 of torch's best": ratio, "refused": refused}


def roof() -> dict[str, float]:
    """What this GPU does at best: int8 multiply-accumulates in torch's matrix product, bytes in a copy."""
    import torch

    a = torch.randint(-10, 10, (8192, 8192), dtype=torch.int8, device="cuda")
    b = torch.randint(-10, 10, (8192, 8192), dtype=torch.int8, device="cuda").t()
    big = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)

    def seconds(run: Callable[[], Any]) -> float:
        taken = []
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return min(taken)

    return {
        "int8_gmac_per_s": 8192**3 / seconds(lambda: torch._int_mm(a, b)) / 1e9,
        "gb_per_s": 2 * big.numel() / seconds(lambda: other.copy_(big)) / 1e9,
    }


def layers(library: ctypes.CDLL, kit: Path, entry: dict[str, Any], roof_: dict[str, float]) -> list[dict[str, Any]]:
    """Each step's median time and how much of the GPU's rate it reaches, of the one that bounds it."""
    network = Network(library, kit / entry["name"], TIME_STEPS)
    x = np.fromfile(kit / entry["name"] / "input.bin", np.uint8)
    samples = []
    for _ in range(50):
        network.run(x)
        samples.append([step["ns"] for step in network.steps()])
    rows = []
    for step, ns in zip(network.steps(), np.median(samples[5:], axis=0), strict=True):
        bound = max(step["macs"] / roof_["int8_gmac_per_s"], step["bytes"] / roof_["gb_per_s"])  # in ns
        row = {key: step[key] for key in ("name", "kernel", "macs", "bytes")}
        rows.append({**row, "median_us": ns / 1e3, "share_of_roof": bound / ns if ns else None})
    network.close()
    return rows


def gpu_name() -> dict[str, str]:
    """The GPU as torch sees it. Raises Unusable where there is none."""
    try:
        import torch
    except ImportError as error:
        raise Unusable(f"torch is not installed: {error}") from error
    if not torch.cuda.is_available():
        raise Unusable("torch finds no CUDA GPU here: run this on a machine that has one, with a CUDA build of torch")
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "cuda of torch": str(torch.version.cuda),
        "python": platform.python_version(),
    }


def run(kit: Path) -> dict[str, Any]:
    """Everything; the checks come first, so that a benchmark that fails does not hide them."""
    if not (kit / "kit.json").is_file():
        raise Unusable(f"{kit} is no kit: it has no kit.json; tests/benchmarks/gpu_kit.py makes one")
    described = json.loads((kit / "kit.json").read_text())
    library = load_runtime(kit / f"libxceptile-{platform.machine()}.so")
    report: dict[str, Any] = {"how": "rehearsed", "machine": gpu_name(), "checks": []}
    for entry in described["networks"]:
        print(f"check {entry['name']}", file=sys.stderr)
        report["checks"].append(check(library, kit, entry))
    report["roof"] = roof()
    whole = [entry for entry in described["networks"] if entry["batch"]]
    report["benchmarks"] = []
    for batch in sorted({entry["batch"] for entry in whole}):
        print(f"time batch {batch}", file=sys.stderr)
        ours = [entry for entry in whole if entry["batch"] == batch]
        try:
            report["benchmarks"].append(bench(library, kit, ours, batch))
            int8 = next(entry for entry in ours if entry["dtype"] == "int8")
            report["benchmarks"][-1]["layers"] = layers(library, kit, int8, report["roof"])
        except Exception as error:  # the checks are to be printed whatever torch or the driver raises
            report["benchmarks"].append({"batch": batch, "error": f"{type(error).__name__}: {error}"})
    return report


def main() -> int:
    kit = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
    try:
        report = run(kit if kit.is_dir() else kit.parent)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1))
    return 0 if all(checked["equal"] for checked in report["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
