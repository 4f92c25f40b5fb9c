"""Runs a kit of compiled networks on an NVIDIA GPU: one command on a machine that has Python, torch and numpy.

    python borrowed_gpu.py [KIT]

KIT is the folder that ``gpu_kit.py`` made on another machine, by default the one this file lies in. Every operator and
the whole network run through libxceptile and the GPU's own driver and are compared with the recorded outputs of the
reference, byte for byte; torch has no part in that. Then batch 1 and 8 are timed in turns with torch in float16,
channels last, under CUDA graphs and torch.compile, on the same GPU. A GPU that is not the target's rehearses: its
outputs count for the target, its times only against torch's beside them. It takes less than five minutes: what
torch.compile has not done by then is left out, and that is said.

Prints JSON on standard output, and on standard error each result as it comes. Exit status: 0 all outputs are equal,
1 some differ, 2 there is no GPU or no kit.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TURNS, RUNS, WARMUP = 20, 20, 10
COMPILING_S, DEADLINE_S = 80, 220  # for one torch.compile; for the last of them, from the beginning
BEGAN = time.monotonic()
TIME_STEPS = 2  # XCT_TIME_STEPS
GPU = 1  # XCT_DEVICE_GPU
NO_DEVICE = 9  # XCT_ERROR_DEVICE


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
    """There is no GPU, no driver or no kit here, or libxceptile refused; the message says what. ``code`` is its own."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


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
            message = self.error()
            self.close()
            raise Unusable(message, code)
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
        session, self.session = self.session, ctypes.c_void_p()
        self.library.xct_close(session)


def check(library: ctypes.CDLL, kit: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of one network against the reference. int8 must be equal; float within the entry's tolerance."""
    folder = kit / entry["name"]
    result: dict[str, Any] = {"name": entry["name"], "target": entry["target"], "dtype": entry["dtype"]}
    try:
        network = Network(library, folder)
    except Unusable as error:
        return {**result, "equal": False, "error": str(error), "code": error.code}
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


def torch_network(described: dict[str, Any], weights: dict[str, np.ndarray] | None, device: str) -> Any:
    """The float network (N, C, H, W) -> (N, classes) as a torch module in float16, channels last.

    ``weights`` None: random ones, as times do not depend on them.
    """
    import torch
    from torch.nn import functional

    random = np.random.default_rng(0)
    if weights is None:
        shapes = described["weights"]
        weights = {n: random.standard_normal(s, np.float32) / np.prod(s[1:]) ** 0.5 for n, s in shapes.items()}

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nodes = described["nodes"]
            for index, node in enumerate(self.nodes):
                for place, name in enumerate(node["weights"]):
                    value = torch.from_numpy(np.ascontiguousarray(weights[name], np.float16)).to(device)
                    if value.ndim == 4:
                        value = value.to(memory_format=torch.channels_last)
                    self.register_parameter(f"p{index}_{place}", torch.nn.Parameter(value, requires_grad=False))

        def forward(self, x: Any) -> Any:
            values = {described["input"]: x}
            for index, node in enumerate(self.nodes):
                a = [values[name] for name in node["inputs"]]
                w = [getattr(self, f"p{index}_{place}") for place in range(len(node["weights"]))]
                if node["op"] == "conv":
                    y = functional.conv2d(a[0], w[0], w[1], node["strides"], node["padding"], groups=node["groups"])
                elif node["op"] == "linear":
                    y = functional.linear(a[0], w[0], w[1])
                elif node["op"] == "relu":
                    y = functional.relu(a[0])
                elif node["op"] == "add":
                    y = a[0] + a[1]
                elif node["op"] == "max_pool":
                    y = functional.max_pool2d(a[0], node["kernel"], node["strides"], node["padding"])
                else:
                    y = a[0].mean((2, 3))
                values[node["name"]] = functional.relu(y) if node["relu"] else y
            return values[described["output"]]

    return Network().eval()


class TooLong(BaseException):
    """No Exception, so that torch's compilers, which go on after one, do not keep it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError where what is done within takes longer."""

    def interrupt(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 2)  # and again, should something keep the first one
    try:
        yield
    except TooLong:
        raise TimeoutError(f"not done in {max(seconds, 0):.0f} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled(network: Any, x: Any, mode: str, wait: Callable[[], None]) -> Callable[[], None]:
    """What runs torch.compile's program of the network once and waits for it. Raises whatever its compilers raise, or
    TimeoutError."""
    import torch

    program = torch.compile(network, mode=mode)
    with at_most(min(COMPILING_S, DEADLINE_S - (time.monotonic() - BEGAN))), torch.no_grad():
        for _ in range(5):
            program(x)
        wait()

    def run() -> None:
        with torch.no_grad():
            program(x)
        wait()

    return run


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """What replays the step as one CUDA graph and waits for it."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):  # so that what is chosen and allocated once, is before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        step()

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run


COPYING = "torch float16, CUDA graph, copies"


def torch_contenders(described: dict[str, Any], batch: int) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """What runs the network once and waits, by name, and why one cannot be had.

    Inputs lie on the GPU already and outputs stay there, but for the one with copies: that takes pixels from the
    processor's memory and puts logits there, as ours does.
    """
    import torch

    torch.backends.cudnn.benchmark = True  # its fastest algorithm for each layer
    network = torch_network(described, None, "cuda")
    pixels = torch.randint(0, 256, (batch, *described["shape"]), dtype=torch.uint8)
    pixels = pixels.to(memory_format=torch.channels_last)
    pinned = pixels.pin_memory()
    there = pinned.to("cuda")
    x = there.half()
    with torch.no_grad():
        logits = network(x).float().cpu().pin_memory()

    def with_copies() -> Any:
        there.copy_(pinned, non_blocking=True)
        return logits.copy_(network(there.half()).float(), non_blocking=True)

    def copying() -> Callable[[], None]:
        replay = captured(with_copies)

        def run() -> None:
            pinned.copy_(pixels)
            replay()

        return run

    makers = {
        "torch float16, CUDA graph": lambda: captured(lambda: network(x)),
        COPYING: copying,
        **{
            f"torch float16, compiled, {mode}": lambda mode=mode: compiled(network, x, mode, torch.cuda.synchronize)
            for mode in ("reduce-overhead", "max-autotune")
        },
    }
    found: dict[str, Callable[[], None]] = {}
    refused: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:  # whatever its compilers raise
            refused[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
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
    """Our builds, from and to the processor's memory, against torch."""
    described = json.loads((kit / "torch.json").read_text())
    with contextlib.ExitStack() as opened:
        contenders: dict[str, Callable[[], Any]] = {}
        for entry in entries:
            network = Network(library, kit / entry["name"])
            opened.callback(network.close)
            x = np.fromfile(kit / entry["name"] / "input.bin", np.uint8)
            contenders[f"xceptile {entry['dtype']}"] = lambda network=network, x=x: network.run(x)
        theirs, refused = torch_contenders(described, batch)
        times = time_in_turns(contenders | theirs)
    result: dict[str, Any] = {"batch": batch, "times": times, "refused": refused}
    ours = times["xceptile int8"]["median_ms"]
    alone = [each["median_ms"] for name, each in times.items() if name.startswith("torch") and name != COPYING]
    result["int8 with copies, of torch's best without"] = ours / min(alone)
    if COPYING in times:
        result["int8 with copies, of torch's CUDA graph with copies"] = ours / times[COPYING]["median_ms"]
    return result


def release() -> None:
    """Gives back what torch keeps of the GPU's memory."""
    import torch

    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def seconds(run: Callable[[], Any]) -> float:
    """Of one run, the least of five rounds of ten."""
    import torch

    taken = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            run()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) / 10)
    return min(taken)


def roof() -> dict[str, float]:
    """What this GPU does at best: int8 multiply-accumulates in torch's matrix product, bytes in a copy."""
    import torch

    a = torch.randint(-10, 10, (8192, 8192), dtype=torch.int8, device="cuda")
    b = torch.randint(-10, 10, (8192, 8192), dtype=torch.int8, device="cuda").t()
    big = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    rates = {"gb_per_s": 2 * big.numel() / seconds(lambda: other.copy_(big)) / 1e9}
    # torch has no public product of int8 matrices; this one has been there since 2.1.
    with contextlib.suppress(AttributeError, RuntimeError):
        rates["int8_gmac_per_s"] = 8192**3 / seconds(lambda: torch._int_mm(a, b)) / 1e9
    return rates


def layers(library: ctypes.CDLL, kit: Path, entry: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """Each step's median time on the GPU and how much of the GPU's rate it reaches, of the one that bounds it.

    More than all of it is no mistake: what stays in the GPU's cache is faster than its memory.
    """
    network = Network(library, kit / entry["name"], TIME_STEPS)
    try:
        x = np.fromfile(kit / entry["name"] / "input.bin", np.uint8)
        samples = []
        for _ in range(50):
            network.run(x)
            samples.append([step["ns"] for step in network.steps()])
        steps, device = network.steps(), network.device
    finally:
        network.close()
    rows = []
    for step, ns in zip(steps, np.median(samples[5:], axis=0), strict=True):
        bound_ns = max(step["macs"] / rates.get("int8_gmac_per_s", np.inf), step["bytes"] / rates["gb_per_s"])
        row = {key: step[key] for key in ("name", "kernel", "macs", "bytes")}
        rows.append({**row, "median_us": float(ns) / 1e3, "share_of_roof": float(bound_ns / ns) if ns else None})
    together = float(np.median(np.sum(samples[5:], axis=1))) / 1e6
    return {"device": device, "all layers, without copies, ms": together, "layers": rows}


def describe_machine() -> dict[str, Any]:
    """The GPU as torch sees it. Raises Unusable where there is no torch that sees one."""
    try:
        import torch
    except ImportError as error:
        raise Unusable(f"torch is not installed: {error}") from error
    if not torch.cuda.is_available():
        raise Unusable(f"torch {torch.__version__} finds no CUDA GPU here: it is to be a build of torch for CUDA")
    seen = torch.cuda.get_device_properties(0)
    return {
        "gpu": seen.name,
        "compute capability": f"{seen.major}.{seen.minor}",
        "multiprocessors": seen.multi_processor_count,
        "memory_bytes": seen.total_memory,
        "torch": torch.__version__,
        "cuda of torch": str(torch.version.cuda),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def use_nvrtc_of_torch() -> None:
    """torch's packages bring NVRTC, where the system has none: a GPU older than the kit's PTX (sm_87) needs it."""
    found = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (found.submodule_search_locations or ()) if found] if found else []
    libraries = [path for root in roots for path in root.glob("*/lib/libnvrtc.so.1[0-9]")]
    libraries.sort(key=lambda path: path.name)  # of several the oldest: its machine code loads on newer drivers too
    if libraries and not os.environ.get("XCEPTILE_NVRTC"):
        with contextlib.suppress(OSError):  # looked for by its bare name, so it has to be there
            for builtins in libraries[0].parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        os.environ["XCEPTILE_NVRTC"] = str(libraries[0])


@contextlib.contextmanager
def unpacked(kit: Path) -> Iterator[Path]:
    """A folder with the kit's files and the networks that are packed in it, for as long as it is used.

    Raises Unusable where ``kit`` is none.
    """
    if not (kit / "kit.json").is_file():
        raise Unusable(f"{kit} is no kit: it has no kit.json; tests/benchmarks/gpu_kit.py makes one")
    with tempfile.TemporaryDirectory(prefix="xceptile-kit-") as place:
        for file in kit.iterdir():
            if file.suffix == ".zip":
                shutil.unpack_archive(file, Path(place, file.stem))
            else:
                Path(place, file.name).symlink_to(file)
        yield Path(place)


def say(name: str, result: Any) -> None:
    took = time.monotonic() - BEGAN
    print(f"{took:5.0f} s  {name}: {json.dumps(result)[:400]}", file=sys.stderr, flush=True)


def run(kit: Path) -> dict[str, Any]:
    """Everything; the checks come first and need no torch, so that a benchmark that fails does not hide them."""
    entries = json.loads((kit / "kit.json").read_text())["networks"]
    library = load_runtime(kit / f"libxceptile-{platform.machine()}.so")
    use_nvrtc_of_torch()
    report: dict[str, Any] = {"how": "rehearsed", "checks": [], "benchmarks": []}
    for entry in entries:
        checked = check(library, kit, entry)
        if not report["checks"] and checked.get("code") == NO_DEVICE:
            raise Unusable(checked["error"])
        report["checks"].append(checked)
        say(f"check {entry['name']}", checked)
    try:
        report["machine"] = describe_machine()
        report["roof"] = roof()
        say("roof", report["roof"])
    except Exception as error:  # the checks are to be printed whatever torch or the driver raises
        report["error"] = f"{type(error).__name__}: {error}"
        return report
    for batch in sorted({entry["batch"] for entry in entries} - {0}):
        ours = [entry for entry in entries if entry["batch"] == batch]
        int8 = next(entry for entry in ours if entry["dtype"] == "int8")
        result: dict[str, Any] = {"batch": batch}
        try:
            release()
            result |= bench(library, kit, ours, batch)
            result |= layers(library, kit, int8, report["roof"])
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
        report["benchmarks"].append(result)
        say(f"batch {batch}", result)
    return report


def main() -> int:
    kit = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
    try:
        with unpacked(kit if kit.is_dir() else kit.parent) as folder:
            report = run(folder)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1))
    return 0 if all(checked["equal"] for checked in report["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
