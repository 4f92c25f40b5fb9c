"""Runs a kit of compiled networks on an NVIDIA GPU: one command on a machine that has Python, torch and numpy.

    python borrowed_gpu.py [KIT] > figures.json
    python borrowed_gpu.py KIT PART      one part of it alone, such as: torch 8 max-autotune

KIT is the folder that ``make gpu-kit`` made on another machine, by default the one this file lies in. First every
operator and the whole network run through libxceptile and the GPU's own driver and are compared with the recorded
outputs of the reference, byte for byte; then batch 1 and 8 and every layer of them are timed. torch has no part in
that. Then they are timed in turns with torch in float16, channels last, under CUDA graphs and torch.compile, on the
same GPU. A GPU that is not the target's rehearses: its outputs count for the target, its times only against torch's
beside them.

Every part has a process of its own and a limit, so one that crashes, hangs or breaks the GPU's context costs only
itself; of a network whose outputs differ, or that fails, each step is run by itself to find the first wrong one.
``plan`` has the parts in their order and how long they take; all of them end within DEADLINE_S.

Standard output gets a line of JSON for each result as soon as it is known, standard error a shorter one. Exit status:
0 all outputs are equal, 1 some differ or a part that compares them failed, 2 there is no GPU or no kit.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TURNS, RUNS, WARMUP = 20, 20, 10
DEADLINE_S = 560
TIME_STEPS = 2  # XCT_TIME_STEPS
GPU = 1  # XCT_DEVICE_GPU
# Of the tensor cores, dense, int8 multiply-accumulates a clock and multiprocessor by compute capability: NVIDIA's data
# sheets of A100, A10, Orin, L40S, H100, B200 and RTX 5090, divided by multiprocessors and boost clock.
INT8_MACS_PER_CLOCK = {80: 2048, 86: 1024, 87: 2048, 89: 1024, 90: 4096, 100: 8192, 120: 1024}


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
    """A file, the driver or libxceptile refused; the message says what and why."""


class NoGpu(Unusable):
    """There is no GPU here, or no driver that starts."""


# ---- libxceptile ----


def load_runtime(path: Path) -> ctypes.CDLL:
    """libxceptile with the types of the functions used (xceptile.h)."""
    use_nvrtc_of_torch()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unusable(f"cannot load the kit's runtime: {error}") from error
    session, size = ctypes.c_void_p, ctypes.c_size_t
    library.xct_open.argtypes = [ctypes.c_char_p, ctypes.POINTER(Options), ctypes.POINTER(session)]
    library.xct_run.argtypes = [session, ctypes.c_void_p, size, ctypes.c_void_p, size]
    library.xct_last_error.argtypes, library.xct_last_error.restype = [session, ctypes.c_char_p, size], None
    library.xct_close.argtypes, library.xct_close.restype = [session], None
    library.xct_device.argtypes, library.xct_device.restype = [session], ctypes.c_char_p
    for name in ("xct_input_bytes", "xct_output_bytes"):
        getattr(library, name).argtypes, getattr(library, name).restype = [session], ctypes.c_uint64
    library.xct_step_count.argtypes, library.xct_step_count.restype = [session], ctypes.c_uint32
    library.xct_step.argtypes = [session, ctypes.c_uint32, ctypes.POINTER(StepInfo)]
    return library


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


class Network:
    """One compiled network of the kit, opened on the GPU."""

    def __init__(self, library: ctypes.CDLL, folder: Path, flags: int = 0) -> None:
        self.library, self.session = library, ctypes.c_void_p()
        options = Options(ctypes.sizeof(Options), 0, 0, flags, GPU)
        if library.xct_open(bytes(folder), ctypes.byref(options), ctypes.byref(self.session)):
            message = self.error()
            self.close()
            raise Unusable(message)
        self.device = library.xct_device(self.session).decode()
        self.output = np.empty(library.xct_output_bytes(self.session), np.uint8)

    def error(self) -> str:
        message = ctypes.create_string_buffer(2048)
        self.library.xct_last_error(self.session, message, len(message))
        return message.value.decode("utf-8", "replace")

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
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
        if said := difference(a, b, entry["tolerance"]):
            different[tensor["name"]] = said
    return {
        **result,
        "device": network.device,
        "tensors": len(entry["outputs"]),
        "equal": not different,
        "different": different,
    }


def difference(got: NDArray[Any], expected: NDArray[Any], tolerance: float) -> str:
    """What is different, from the first element on; empty where nothing is."""
    if got.dtype == np.float32:
        off = float(np.abs(got - expected).max() / max(float(np.abs(expected).max()), 1e-30))
        if off <= tolerance:
            return ""
        first = int(np.argmax(~(np.abs(got - expected) <= tolerance * np.abs(expected).max())))
        return f"{off:.3g} of the largest logit; the first is {first}: {got[first]}, expected {expected[first]}"
    places = np.flatnonzero(got != expected)
    if not places.size:
        return ""
    most = int(np.abs(got.astype(np.int32) - expected).max())
    first = int(places[0])
    return (
        f"{places.size} of {got.size} values, by at most {most}; the first is {first}: {got[first]}, "
        f"expected {expected[first]}; the last {places[-1]}"
    )


# ---- the driver by itself ----


class Driver:
    """The CUDA driver API, each call by its own name. Raises Unusable where one fails, with its result's name."""

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL(os.environ.get("XCEPTILE_CUDA") or "libcuda.so.1")
        except OSError as error:
            raise NoGpu(f"no CUDA driver: {error}") from error

    def __call__(self, name: str, *arguments: Any) -> None:
        """``arguments``: int is C's int; anything else has a ctypes type."""
        result = getattr(self.library, name)(*arguments)
        if result:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(result, ctypes.byref(text))
            raise Unusable(f"{name}: {(text.value or b'?').decode()} ({result})")

    def number(self, name: str, *arguments: Any) -> int:
        """An int that the call gives by its first argument."""
        value = ctypes.c_int()
        self(name, ctypes.byref(value), *arguments)
        return value.value

    def pointer(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """A handle or an address that the call gives by its first argument."""
        value = ctypes.c_void_p()
        self(name, ctypes.byref(value), *arguments)
        return value


def describe_gpu() -> dict[str, Any]:
    """The GPU as its driver describes it. Raises NoGpu where there is none."""
    driver = Driver()
    try:
        driver("cuInit", 0)
        count = driver.number("cuDeviceGetCount")
    except Unusable as error:
        raise NoGpu(str(error)) from error
    if not count:
        raise NoGpu("the CUDA driver finds no GPU; CUDA_VISIBLE_DEVICES can hide it")
    device, name = driver.number("cuDeviceGet", 0), ctypes.create_string_buffer(128)
    driver("cuDeviceGetName", name, len(name), device)
    wanted = {  # CUdevice_attribute
        "clock_khz": 13, "multiprocessors": 16, "integrated": 18, "memory_clock_khz": 36, "memory_bus_bits": 37,
        "l2_bytes": 38, "major": 75, "minor": 76, "shared_bytes_a_block": 97,
    }  # fmt: skip
    seen = dict.fromkeys(wanted, 0)
    for what, attribute in wanted.items():
        with contextlib.suppress(Unusable):  # one that this driver does not tell
            seen[what] = driver.number("cuDeviceGetAttribute", attribute, device)
    title, version = name.value.decode("utf-8", "replace"), driver.number("cuDriverGetVersion")
    return {"gpu": title, "cuda of driver": version, **seen, "peaks": peaks(seen)}


def machine() -> dict[str, Any]:
    """The GPU and what is around it. Raises NoGpu where there is none."""
    facts = describe_gpu()
    facts |= {"machine": platform.platform(), "processors": os.cpu_count()}
    facts |= {"python": platform.python_version(), "numpy": np.__version__}
    query = "driver_version,mig.mode.current,persistence_mode,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        facts["nvidia-smi"] = (done.stdout + done.stderr).strip()
    except (OSError, subprocess.SubprocessError) as error:
        facts["nvidia-smi"] = str(error)
    return facts


def peaks(seen: dict[str, int]) -> dict[str, float]:
    """What the GPU could do at its highest clocks: dense int8 multiply-accumulates and bytes a second."""
    macs = INT8_MACS_PER_CLOCK.get(10 * seen["major"] + seen["minor"], 0)
    found = {
        "int8_macs_per_s": 1e3 * macs * seen["multiprocessors"] * seen["clock_khz"],
        "bytes_per_s": 2e3 * seen["memory_clock_khz"] * seen["memory_bus_bits"] / 8,  # twice a clock
    }
    return {name: rate for name, rate in found.items() if rate}


def walk(kit: Path, name: str) -> dict[str, Any]:
    """Every step of an int8 network by itself and waited for, without libxceptile: the step that fails, or those whose
    output is not the reference's."""
    described = json.loads((kit / name / "steps.json").read_text())
    driver = Driver()
    driver("cuInit", 0)
    context = driver.pointer("cuDevicePrimaryCtxRetain", driver.number("cuDeviceGet", 0))
    driver("cuCtxPushCurrent_v2", context)
    stream = driver.pointer("cuStreamCreate", 1)

    def fill(data: NDArray[Any]) -> int:
        memory = driver.pointer("cuMemAlloc_v2", ctypes.c_size_t(max(data.nbytes, 1)))
        pointer = ctypes.c_void_p(data.ctypes.data)
        driver("cuMemcpyHtoDAsync_v2", memory, pointer, ctypes.c_size_t(data.nbytes), stream)
        driver("cuStreamSynchronize", stream)
        return memory.value or 0

    arena = np.full(described["arena_bytes"], 0xA5, np.uint8)
    given, start = np.fromfile(kit / name / "input.bin", np.uint8), 0
    for offset, size in described["inputs"]:
        arena[offset : offset + size] = given[start : start + size]
        start += size
    places = {"arena": fill(arena), "weights": fill(np.fromfile(kit / name / "weights.bin", np.uint8))}
    module, form = load_module(driver, kit / name)
    wrong: list[dict[str, Any]] = []
    compared = 0
    for index, step in enumerate(described["steps"]):
        seen = {"step": index, **{key: step[key] for key in ("name", "kernel", "groups", "group_size", "shared_bytes")}}
        print(f"step {index}: {step['name']} ({step['kernel']})", file=sys.stderr, flush=True)  # the last may hang
        try:
            launch(driver, module, stream, step, [places[space] + offset for space, offset in step["arguments"]])
        except Unusable as error:
            return {"kernels": form, "failed": {**seen, "error": str(error)}, "wrong": wrong}
        if step["rows"] is None:
            continue
        compared += 1
        data = np.empty(step["output"][1], np.uint8)
        there = ctypes.c_void_p(places["arena"] + step["output"][0])
        driver("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(data.ctypes.data), there, ctypes.c_size_t(data.nbytes), stream)
        driver("cuStreamSynchronize", stream)
        stored = data.reshape(len(step["rows"]), -1, step["stored"])[..., : step["channels"]]
        rows = [zlib.crc32(row.tobytes()) for row in stored]
        if bad := [i for i, (a, b) in enumerate(zip(rows, step["rows"], strict=True)) if a != b]:
            wrong.append({**seen, "wrong rows": len(bad), "of": len(rows), "first": bad[0]})
    return {"kernels": form, "steps": len(described["steps"]), "compared": compared, "wrong": wrong[:20]}


def load_module(driver: Driver, folder: Path) -> tuple[ctypes.c_void_p, str]:
    """The network's kernels and the form they loaded from. Raises Unusable with what the driver said of each form."""
    said = []
    for form in ("kernels.cubin", "kernels.ptx"):
        log = ctypes.create_string_buffer(4096)
        options = (ctypes.c_int * 2)(5, 6)  # CU_JIT_ERROR_LOG_BUFFER and its size
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log) - 1)
        try:
            return driver.pointer("cuModuleLoadDataEx", (folder / form).read_bytes(), 2, options, values), form
        except Unusable as error:
            said.append(f"{form}: {error} {log.value.decode('utf-8', 'replace')}")
    raise Unusable("; ".join(said))


def launch(driver: Driver, module: ctypes.c_void_p, stream: ctypes.c_void_p, step: dict[str, Any], addresses: list[int],
           ) -> None:  # fmt: skip
    """One step, waited for."""
    function = driver.pointer("cuModuleGetFunction", module, step["kernel"].encode())
    if step["shared_bytes"] > 48 << 10:
        driver("cuFuncSetAttribute", function, 8, step["shared_bytes"])
    values = [ctypes.c_uint64(address) for address in addresses]
    parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    sizes = [*step["groups"], *step["group_size"], step["shared_bytes"]]
    driver("cuLaunchKernel", function, *sizes, stream, parameters, None)
    driver("cuStreamSynchronize", stream)


# ---- torch ----


def torch_network(described: dict[str, Any], weights: dict[str, NDArray[Any]] | None, device: str) -> Any:
    """The float network (N, C, H, W) -> (N, classes) as a torch module in float16, channels last.

    ``weights`` None: random ones, as times do not depend on them.
    """
    import torch
    from torch.nn import functional

    random = np.random.default_rng(0)
    if weights is None:
        shapes = described["weights"]
        weights = {n: random.standard_normal(s, np.float32) / np.prod(s[1:]) ** 0.5 for n, s in shapes.items()}
    root, graph = torch.nn.Module(), torch.fx.Graph()
    values = {described["input"]: graph.placeholder("x")}
    for index, node in enumerate(described["nodes"]):
        a = [values[name] for name in node["inputs"]]
        for place, name in enumerate(node["weights"]):
            value = torch.from_numpy(np.ascontiguousarray(weights[name], np.float16)).to(device)
            if value.ndim == 4:
                value = value.to(memory_format=torch.channels_last)
            root.register_parameter(f"p{index}_{place}", torch.nn.Parameter(value, requires_grad=False))
            a.append(graph.get_attr(f"p{index}_{place}"))
        if node["op"] == "conv":
            sizes = {"stride": tuple(node["strides"]), "padding": tuple(node["padding"]), "groups": node["groups"]}
            y = graph.call_function(functional.conv2d, tuple(a), sizes)
        elif node["op"] == "max_pool":
            sizes = {each: tuple(node[key]) for each, key in (("stride", "strides"), ("padding", "padding"))}
            y = graph.call_function(functional.max_pool2d, (a[0], tuple(node["kernel"])), sizes)
        else:
            functions: dict[str, Callable[..., Any]]
            functions = {"linear": functional.linear, "relu": functional.relu, "add": torch.add}
            mean = node["op"] == "mean"
            y = graph.call_function(torch.mean, (a[0], (2, 3))) if mean else (
                graph.call_function(functions[node["op"]], tuple(a))
            )  # fmt: skip
        values[node["name"]] = graph.call_function(functional.relu, (y,)) if node["relu"] else y
    graph.output(values[described["output"]])
    return torch.fx.GraphModule(root, graph).eval()


def compiled(network: Any, x: Any, mode: str, wait: Callable[[], None]) -> Callable[[], None]:
    """What runs torch.compile's program of the network once and waits for it. Raises whatever its compilers raise."""
    import torch

    program: Callable[[Any], Any] = torch.compile(network, mode=mode)

    def run() -> None:
        with torch.no_grad():
            program(x)
        wait()

    for _ in range(5):
        run()
    return run


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """What replays the step as one CUDA graph and waits for it."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch annotates not all of its functions
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


GRAPH, COPYING = "torch float16, CUDA graph", "torch float16, CUDA graph, copies"


def torch_makers(described: dict[str, Any], batch: int, which: str) -> dict[str, Callable[[], Callable[[], None]]]:
    """What makes what runs the network once and waits, by name; ``which`` is "graphs" or a mode of torch.compile.

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
    if which != "graphs":
        return {f"torch float16, compiled, {which}": lambda: compiled(network, x, which, torch.cuda.synchronize)}
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

    return {GRAPH: lambda: captured(lambda: network(x)), COPYING: copying}


def require_torch() -> dict[str, Any]:
    """torch's own versions. Raises Unusable where there is no torch that sees a GPU."""
    try:
        import torch
    except ImportError as error:
        raise Unusable(f"torch is not installed: {error}") from error
    if not torch.cuda.is_available():
        raise Unusable(f"torch {torch.__version__} finds no CUDA GPU here: it is to be a build of torch for CUDA")
    return {
        "torch": torch.__version__,
        "cuda of torch": str(torch.version.cuda),
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # torch annotates not all of its functions
        "triton": importlib.util.find_spec("triton") is not None,
        "C compiler": next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None),
    }


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


def roof() -> dict[str, Any]:
    """What this GPU reaches at best: int8 multiply-accumulates in torch's matrix product, bytes in a copy."""
    import torch

    big = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    rates: dict[str, Any] = {"bytes_per_s": 2 * big.numel() / seconds(lambda: other.copy_(big))}
    try:  # torch has no public product of int8 matrices; this one has been there since 2.1
        a = torch.randint(-10, 10, (8192, 8192), dtype=torch.int8, device="cuda")
        b = torch.randint(-10, 10, (8192, 8192), dtype=torch.int8, device="cuda").t()
        rates["int8_macs_per_s"] = 8192**3 / seconds(lambda: torch._int_mm(a, b))
    except (AttributeError, RuntimeError) as error:
        rates["no int8 product"] = f"{type(error).__name__}: {error}"[:600]
    return rates


# ---- times ----


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


OURS = "xceptile int8"


def bench(library: ctypes.CDLL, kit: Path, entry: dict[str, Any], which: str | None) -> dict[str, Any]:
    """Our build, from and to the processor's memory; against torch, if ``which`` says what of it."""
    made: dict[str, Callable[[], Any]] = {}
    refused: dict[str, str] = {}
    network = Network(library, kit / entry["name"])
    try:
        x = np.fromfile(kit / entry["name"] / "input.bin", np.uint8)
        start = time.monotonic()
        makers = torch_makers(json.loads((kit / "torch.json").read_text()), entry["batch"], which) if which else {}
        for name, make in makers.items():
            try:
                made[name] = make()
            except Exception as error:  # whatever its compilers raise
                refused[name] = f"{type(error).__name__}: {str(error).strip()[:1500]}"
        took = {"making_s": time.monotonic() - start} if which else {}
        times = time_in_turns({OURS: lambda: network.run(x), **made})
    finally:
        network.close()
    ratios = {name: times[OURS]["median_ms"] / times[name]["median_ms"] for name in made}
    return {
        "batch": entry["batch"], "device": network.device, **took, "times": times,
        "ours with copies, of theirs": ratios, "refused": refused,
    }  # fmt: skip


def layers(library: ctypes.CDLL, kit: Path, entry: dict[str, Any], peak: dict[str, float]) -> dict[str, Any]:
    """Each step's median time on the GPU and its share of the GPU's peak, int8 or bandwidth, whichever bounds it.

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
        row = {key: step[key] for key in ("name", "kernel", "macs", "bytes")}
        rows.append({**row, "median_us": float(ns) / 1e3, **share(step["macs"], step["bytes"], float(ns) / 1e9, peak)})
    together_s = float(np.median(np.sum(samples[5:], axis=1))) / 1e9
    whole = share(sum(step["macs"] for step in steps), sum(step["bytes"] for step in steps), together_s, peak)
    return {
        "batch": entry["batch"], "device": device, "all layers, without copies, ms": 1e3 * together_s, **whole,
        "layers": rows,
    }  # fmt: skip


def share(macs: int, moved_bytes: int, took_s: float, peak: dict[str, float]) -> dict[str, Any]:
    """Of the peak that bounds this work; without peaks, or without a time, nothing."""
    work = {"int8": (macs, "int8_macs_per_s"), "bandwidth": (moved_bytes, "bytes_per_s")}
    least_s = {name: amount / peak[rate] for name, (amount, rate) in work.items() if rate in peak}
    if not took_s or not least_s:
        return {}
    bound = max(least_s, key=lambda name: least_s[name])
    return {"bound": bound, "share_of_peak": least_s[bound] / took_s}


# ---- parts ----


@contextlib.contextmanager
def unpacked(kit: Path) -> Iterator[Path]:
    """A folder with the kit's files and the networks that are packed in it, for as long as it is used.

    Raises Unusable where ``kit`` is none.
    """
    if not (kit / "kit.json").is_file():
        raise Unusable(f"{kit} is no kit: it has no kit.json; `make gpu-kit` makes one")
    with tempfile.TemporaryDirectory(prefix="xceptile-kit-") as place:
        for file in kit.iterdir():
            if file.suffix == ".zip":
                shutil.unpack_archive(file, Path(place, file.stem))
            else:
                Path(place, file.name).symlink_to(file)
        yield Path(place)


@dataclass(frozen=True)
class Part:
    words: tuple[str, ...]
    expected_s: int
    limit_s: int | None  # None: what is left, shared with the other parts that have none


def plan(entries: list[dict[str, Any]]) -> list[Part]:
    """All parts but ``machine`` and ``walk``, in their order: what matters most comes first."""
    batches = [str(batch) for batch in sorted({entry["batch"] for entry in entries} - {0})]
    return [
        *(Part(("check", entry["name"]), 4, 60) for entry in entries),
        *(Part(("ours", batch), 4, 60) for batch in batches),
        *(Part(("layers", batch), 4, 60) for batch in batches),
        Part(("roof",), 15, 120),
        *(Part(("torch", batch, "graphs"), 30, 120) for batch in batches),
        *(Part(("torch", batch, "reduce-overhead"), 50, 150) for batch in batches),
        *(Part(("torch", batch, "max-autotune"), 150, None) for batch in batches),
    ]


def do(kit: Path, words: list[str]) -> dict[str, Any]:
    """One part. Raises whatever it raises."""
    entries = json.loads((kit / "kit.json").read_text())["networks"]
    what, rest = words[0], words[1:]
    if what == "machine":
        return machine()
    if what == "walk":
        return walk(kit, rest[0])
    if what == "roof":
        return require_torch() | roof()
    if what == "torch":
        require_torch()
    library = load_runtime(kit / f"libxceptile-{platform.machine()}.so")
    if what == "check":
        return check(library, kit, next(entry for entry in entries if entry["name"] == rest[0]))
    entry = next(entry for entry in entries if str(entry["batch"]) == rest[0])
    if what == "layers":
        return layers(library, kit, entry, describe_gpu()["peaks"])
    return bench(library, kit, entry, rest[1] if what == "torch" else None)


def heading(words: Sequence[str]) -> dict[str, Any]:
    """What every result begins with."""
    return {"how": "rehearsed", "part": " ".join(words)}


def do_part(kit: Path, words: list[str]) -> int:
    """A part in this process: one line of JSON on standard output, whatever else is printed on standard error."""
    faulthandler.enable()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive who started it
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    line = heading(words)
    try:
        line |= do(kit, words)
    except Exception as error:
        line |= {"error": f"{type(error).__name__}: {error}"[:4000]}
        if not isinstance(error, Unusable):
            line["traceback"] = traceback.format_exc()[-3000:]
    print(json.dumps(line), file=results, flush=True)
    return 0


def start_part(kit: Path, words: tuple[str, ...], limit_s: float) -> dict[str, Any]:
    """A part in a process of its own, killed with all that it started when it takes longer. What it found, or how it
    ended."""
    environment = {"CUDA_LOG_FILE": "stderr", **os.environ}  # since CUDA 12.9 the driver says there what it refuses
    command = [sys.executable, str(Path(__file__).resolve()), str(kit), *words]
    late = threading.Event()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True
        )

        def end() -> None:
            late.set()
            kill(process)

        timer = threading.Timer(limit_s, end)
        timer.start()
        try:
            text = process.stdout.readline() if process.stdout else b""
            process.wait()
        finally:
            timer.cancel()
            kill(process)
        errors.seek(0)
        said = errors.read()[-3000:].decode("utf-8", "replace")
    line = heading(words)
    if text.endswith(b"\n"):
        line = json.loads(text)
    elif late.is_set():
        line["error"] = f"not done in {limit_s:.0f} s"
    else:
        code = process.returncode
        line["error"] = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return line | ({"stderr": said} if said and failed(line) else {})


def kill(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def failed(line: dict[str, Any]) -> bool:
    return "error" in line or line.get("equal") is False or bool(line.get("refused"))


def tell(line: dict[str, Any]) -> None:
    """A result, on both outputs."""
    print(json.dumps(line), flush=True)
    say(f"{line['part']}: {json.dumps({k: v for k, v in line.items() if k not in ('how', 'part')})[:400]}")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def run(kit: Path, end: float) -> Iterator[dict[str, Any]]:
    """Everything until ``end`` on the clock of time.monotonic(), result by result. Raises NoGpu where there is none."""
    entries = json.loads((kit / "kit.json").read_text())["networks"]
    first = start_part(kit, ("machine",), 60)
    if first.get("error", "").startswith("NoGpu: "):
        raise NoGpu(first["error"].removeprefix("NoGpu: "))
    yield first
    waiting = plan(entries)
    with_steps = {entry["name"] for entry in entries if entry["dtype"] == "int8"}
    while waiting:
        part = waiting.pop(0)
        left_s = end - time.monotonic()
        if part.limit_s is None:
            limit_s = left_s / (1 + sum(each.limit_s is None for each in waiting))
        else:
            limit_s = min(left_s, part.limit_s)
        if limit_s < 5:
            yield {**heading(part.words), "error": "left out: no time is left for it"}
            continue
        say(f"{' '.join(part.words)}: about {part.expected_s} s, at most {limit_s:.0f} s")
        line = start_part(kit, part.words, limit_s)
        yield line
        if part.words[0] == "check" and not line.get("equal") and part.words[1] in with_steps:
            waiting.insert(0, Part(("walk", part.words[1]), 5, 60))


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """In a line: whether all is equal, and our time of the best of torch's."""
    found = {**heading(("summary",)), "equal": all_equal(lines)}
    found["failed"] = [line["part"] for line in lines if failed(line)]
    ratios: dict[str, dict[str, float]] = {}
    for line in lines:
        if line["part"].startswith("torch "):
            ratios.setdefault(f"batch {line['part'].split()[1]}", {}).update(
                line.get("ours with copies, of theirs", {})
            )
    for batch, theirs in ratios.items():
        alone = {name: ratio for name, ratio in theirs.items() if name != COPYING}
        if alone:
            best = max(alone, key=lambda name: alone[name])
            found[batch] = {"ours with copies, of torch's best without": alone[best], "best": best}
        if COPYING in theirs:
            found.setdefault(batch, {})["ours with copies, of torch's CUDA graph with copies"] = theirs[COPYING]
    return found


def all_equal(lines: list[dict[str, Any]]) -> bool:
    return all(line.get("equal") is True for line in lines if line["part"].startswith("check "))


def main() -> int:
    end = time.monotonic() + DEADLINE_S
    kit = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part under way is ended, too
    lines: list[dict[str, Any]] = []
    try:
        with unpacked(kit if kit.is_dir() else kit.parent) as folder:
            if sys.argv[2:]:
                return do_part(folder, sys.argv[2:])
            for line in run(folder, end):
                tell(line)
                lines.append(line)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tell(summary(lines))
    return 0 if all_equal(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
