"""The bundle's own libxceptile on this machine: what runs here is what is shipped."""

from __future__ import annotations

import ctypes
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from .engine import Array, EngineError, fill_batches

LIBRARY = "libxceptile.so"
MAX_THREADS = 64  # that a session takes, xceptile.h
_TIME_STEPS = 2
DEVICES = ("default", "gpu", "cpu", "any")  # xceptile.h: XCT_DEVICE_...


class _Options(ctypes.Structure):  # xct_options
    _fields_ = [
        ("struct_bytes", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("core_mask", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
    ]


class _TensorInfo(ctypes.Structure):  # xct_tensor_info
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("is_output", ctypes.c_int32),
        ("rank", ctypes.c_uint32),
        ("dims", ctypes.c_uint32 * 8),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
        ("size_bytes", ctypes.c_uint64),
    ]


class _StepInfo(ctypes.Structure):  # xct_step_info
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


@dataclass(frozen=True)
class NetworkTensor:
    """A network input or output as the runtime describes it."""

    name: str
    dtype: str
    is_output: bool
    shape: tuple[int, ...]
    scale: float
    zero_point: int


@dataclass(frozen=True)
class NativeStep:
    """One kernel call of the plan, with its time in the last run (0 unless opened with ``time_steps``).

    ``bytes_moved`` are those of its distinct operands: what must pass between memory or caches and the processor.
    """

    name: str
    path: str
    kernel: str
    tasks: int
    macs: int
    bytes_moved: int
    last_ms: float


class NativeEngine:
    """A bundle's ``native`` folder on this machine, with one input and one output tensor.

    ``threads`` compute, the calling one included (None: one for each processor); ``time_steps`` keeps the time of every
    step. ``library`` is the runtime where the folder holds none. ``require_device``: one of DEVICES; by default a plan
    for a GPU runs on a GPU or not at all, ``any`` lets one for OpenCL rehearse on a processor. Several threads may call
    one engine: they wait for each other. Raises EngineError where the folder's code cannot run here or a file is
    damaged.
    """

    name = "native"

    def __init__(
        self,
        directory: Path,
        threads: int | None = None,
        *,
        time_steps: bool = False,
        library: Path | None = None,
        require_device: str = "default",
    ) -> None:
        self._session = ctypes.c_void_p()
        self._library = _load(library or directory / LIBRARY)
        flags = _TIME_STEPS if time_steps else 0
        options = _Options(ctypes.sizeof(_Options), threads or 0, 0, flags, DEVICES.index(require_device))
        code = self._library.xct_open(bytes(directory), ctypes.byref(options), ctypes.byref(self._session))
        # Also of an engine that is dropped: its threads and its memory are nobody's then.
        self._end = weakref.finalize(self, self._library.xct_close, ctypes.c_void_p(self._session.value))
        self._end.atexit = False  # the system takes them all
        if code != 0:
            message = self._last_error()
            self.close()
            raise EngineError(f"native: {message}")
        tensors = self.tensors()
        if sorted(tensor.is_output for tensor in tensors) != [False, True]:
            self.close()
            raise EngineError(f"native: {directory}: the network has not just one input and one output")
        self.input = next(tensor for tensor in tensors if not tensor.is_output)
        self.output = next(tensor for tensor in tensors if tensor.is_output)

    def tensors(self) -> tuple[NetworkTensor, ...]:
        """The network's inputs and outputs in the order of the plan."""
        info, tensors = _TensorInfo(), []
        for index in range(self._library.xct_tensor_count(self._session)):
            self._check(self._library.xct_tensor(self._session, index, ctypes.byref(info)))
            shape = tuple(info.dims[: info.rank])
            tensors.append(
                NetworkTensor(
                    info.name.decode(), info.dtype.decode(), bool(info.is_output), shape, info.scale, info.zero_point
                )
            )
        return tuple(tensors)

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return int(self._library.xct_threads(self._session))

    @property
    def device(self) -> str:
        """What computes: ``cpu``, or the GPU's name and the version of its driver."""
        return str(self._library.xct_device(self._session).decode())

    @property
    def arena_bytes(self) -> int:
        """The size of the one block that holds all activations."""
        return int(self._library.xct_arena_bytes(self._session))

    def run(self, x: Array) -> Array:
        """(B, H, W, C) images, batch after batch -> (B, classes). Raises EngineError where ``x`` does not fit."""
        batches = self._batches(x)
        results = np.empty((len(batches), *self.output.shape), self.output.dtype)
        for batch, result in zip(batches, results, strict=True):
            self._run_one(batch, result)
        return results.reshape(-1, *self.output.shape[1:])[: len(x)]

    def time_ms(self, x: Array, repeats: int, warmup: int) -> list[float]:
        """Wall time of single inferences on the batch ``x`` (N, H, W, C), every sample kept, in milliseconds."""
        image = self._batches(x)[0]
        result = np.empty(self.output.shape, self.output.dtype)
        samples = []
        for _ in range(warmup + repeats):
            start = time.perf_counter_ns()
            self._run_one(image, result)
            samples.append((time.perf_counter_ns() - start) / 1e6)
        return samples[warmup:]

    def steps(self) -> tuple[NativeStep, ...]:
        """The plan's steps in order, with their times in the last run."""
        info, steps = _StepInfo(), []
        for index in range(self._library.xct_step_count(self._session)):
            self._check(self._library.xct_step(self._session, index, ctypes.byref(info)))
            names = (info.name.decode(), info.path.decode(), info.kernel.decode())
            steps.append(NativeStep(*names, info.tasks, info.macs, info.bytes, info.last_ns / 1e6))
        return tuple(steps)

    def close(self) -> None:
        """Ends the threads and frees the memory; the engine cannot be used afterwards."""
        self._session = ctypes.c_void_p()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _batches(self, x: Array) -> Array:
        """(B, H, W, C) -> (batches, N, H, W, C), contiguous."""
        expected = self.input
        if x.shape[1:] != expected.shape[1:] or str(x.dtype) != expected.dtype:
            raise EngineError(f"native: the network takes {expected.dtype} {expected.shape}, not {x.dtype} {x.shape}")
        return np.ascontiguousarray(fill_batches(x, expected.shape[0])).reshape(-1, *expected.shape)

    def _run_one(self, image: Array, result: Array) -> None:
        # Pointers into the arrays: nothing is copied here, and ctypes lets other threads run meanwhile.
        code = self._library.xct_run(self._session, image.ctypes.data, image.nbytes, result.ctypes.data, result.nbytes)
        self._check(code)

    def _check(self, code: int) -> None:
        if code != 0:
            raise EngineError(f"native: {self._last_error() if self._session else 'the engine is closed'}")

    def _last_error(self) -> str:
        message = ctypes.create_string_buffer(2048)
        self._library.xct_last_error(self._session, message, len(message))
        return message.value.decode("utf-8", "replace")


def _load(path: Path) -> ctypes.CDLL:
    """The library with the types of its functions (xceptile.h)."""
    try:
        library = ctypes.CDLL(str(path.absolute()))
    except OSError as error:
        raise EngineError(f"native: cannot load the bundle's runtime: {error}") from error
    session, size = ctypes.c_void_p, ctypes.c_size_t
    signatures = {
        "xct_open": ([ctypes.c_char_p, ctypes.POINTER(_Options), ctypes.POINTER(session)], ctypes.c_int),
        "xct_close": ([session], None),
        "xct_last_error": ([session, ctypes.c_char_p, size], None),
        "xct_tensor_count": ([session], ctypes.c_uint32),
        "xct_tensor": ([session, ctypes.c_uint32, ctypes.POINTER(_TensorInfo)], ctypes.c_int),
        "xct_arena_bytes": ([session], ctypes.c_uint64),
        "xct_threads": ([session], ctypes.c_uint32),
        "xct_device": ([session], ctypes.c_char_p),
        "xct_run": ([session, ctypes.c_void_p, size, ctypes.c_void_p, size], ctypes.c_int),
        "xct_step_count": ([session], ctypes.c_uint32),
        "xct_step": ([session, ctypes.c_uint32, ctypes.POINTER(_StepInfo)], ctypes.c_int),
    }
    for name, (arguments, result) in signatures.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise EngineError(f"native: {path} is no runtime of this version: {error}") from error
        function.argtypes, function.restype = arguments, result
    return library
