"""The plan: a compiled network as a straight line of kernel calls on slices of one arena, as a flat binary file.

The file (``plan.bin``), version 3. Little endian throughout; tables follow the header without gaps in the order given,
so that no table has an offset of its own. ``native/plan.c`` reads the same file and refuses what ``unpack`` refuses.

Header, 176 bytes::

    magic           8 bytes  "XCTPLAN" and a zero byte
    version         u32      3
    header_bytes    u32      176
    plan_sha256     32 bytes of everything after this field: finds damage (an attacker can recompute it, so every
                             field is checked as well)
    file_bytes      u64      length of the whole file
    arena_bytes     u64      size of the one block that all activations live in
    weights_bytes   u64      length of weights.bin
    weights_sha256  32 bytes of weights.bin
    kernels_sha256  32 bytes of the kernels: cpu kernels.so; opencl kernels.cl; cuda kernels.cubin, kernels.ptx and
                             kernels.cu one after the other, a missing one counting as empty
    engine          u32      1 cpu, 2 opencl, 3 cuda
    tensor_count    u32
    step_count      u32
    argument_count  u32
    kernel_count    u32
    feature_count   u32
    strings_bytes   u32
    launch_count    u32      0 for cpu, step_count for a GPU
    tolerance       u32      by how many steps an int8 output may differ from the recorded one: 0, or up to 255 for a
                             network with layers in float
    pixel_bytes     u32      size of the table of pixels: 0, or 256 for each channel of the one int8 input

Tables::

    tensor   64 bytes  name u32, kind u32 (1 input, 2 output), dtype u32, rank u32 (1..8), dims u32[8] (0 past the
                       rank), scale f32, zero_point i32, offset u64 in the arena
    step     40 bytes  kernel u32 (index), name u32, path u32, first_argument u32, argument_count u32 (1..16),
                       tasks u32 (1..2^24-1; 1 for a GPU), macs u64, kind u32, output u32 (which of its arguments it
                       writes, from 0)
    argument 24 bytes  space u32 (1 arena, 2 weights), dtype u32, offset u64, count u64 (elements, 1..)
    launch   32 bytes  groups u32[3] (x 1..2^31-1, y and z 1..65535), group_size u32[3] (product 1..1024),
                       shared_bytes u32 (dynamic shared memory, 0..227 KB; 0 unless cuda), reserved u32 (0). One for
                       each step, in their order
    kernel    4 bytes  name u32, letters, digits and underscores: the function __tvm_ffi_NAME of the library; for a GPU
                       the kernel NAME of the source or module, with one pointer parameter for each argument, no others
    feature   4 bytes  name u32: what the processor must have, such as dotprod; for opencl an extension of the device,
                       such as cl_khr_fp16
    strings            zero-terminated printable ASCII; a name is the offset of its first byte in this table
    pixels             pixel_bytes of i8: pixel p of channel c enters the network as the value at 256 * c + p. Without
                       a table, pixel p of an int8 input enters as p - 128

dtype: 1 int8, 2 uint8, 3 int16, 4 uint16, 5 int32, 6 uint32, 7 int64, 8 float16, 9 float32. kind: see ``STEP_KINDS``,
from 1. Every offset is a
multiple of 64, for a GPU of 512: an OpenCL sub-buffer must begin at a multiple of what the device says. The arguments
of the steps lie one after the other in the order of the steps.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from dataclasses import dataclass, replace
from typing import Any

ALIGNMENT_BYTES = 64  # of every offset into the arena and the weights
GPU_ALIGNMENT_BYTES = 512  # CL_DEVICE_MEM_BASE_ADDR_ALIGN is at most 4096 bits on every device seen
MAX_RANK = 8
MAX_ARGUMENTS = 16  # of one step
MAX_TASKS = (1 << 24) - 1  # the runtime's threads claim tasks in a word with 24 bits for the task
MAX_BYTES = 1 << 40  # of the arena and of the weights, so that no sum of two sizes overflows
MAX_FILE_BYTES = 1 << 24
# CUDA C++ Programming Guide, "Compute Capabilities": the largest grid and thread block; shared memory of sm_90.
MAX_GROUPS = (2**31 - 1, 65535, 65535)
MAX_GROUP_SIZE = 1024
MAX_SHARED_BYTES = 227 << 10

DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float16", "float32")  # code: index + 1
ITEM_BYTES = {
    "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8, "float16": 2, "float32": 4,
}  # fmt: skip
ENGINES = ("cpu", "opencl", "cuda")
COPY = "copy"  # of a tensor into another layout
# What a step computes; a kernel that computes several things is of the first of these that it does.
STEP_KINDS = (
    "depthwise + pointwise",
    "convolution",
    "depthwise",
    "max pool",
    "mean",
    "addition",
    "relu",
    "lookup",
    "multiplication",
    "resize",
    "concatenation",
    "quantize",
    "dequantize",
    COPY,
    "probe",  # a kernel that measures the machine
)
MAX_TOLERANCE = 255
PIXEL_VALUES = 256
KINDS = ("input", "output")
SPACES = ("arena", "weights")

_MAGIC = b"XCTPLAN\0"
_VERSION = 3
_HEADER = struct.Struct("<8sII32sQQQ32s32sIIIIIIIIII")
_HASHED_FROM = 48  # the first byte after plan_sha256
_TENSOR = struct.Struct("<IIII8IfiQ")
_STEP = struct.Struct("<IIIIIIQII")
_ARGUMENT = struct.Struct("<IIQQ")
_LAUNCH = struct.Struct("<IIIIIIII")
_NAME = struct.Struct("<I")


class PlanError(ValueError):
    """A plan that cannot be written, or bytes that are no sound plan. The message says which field and why."""


@dataclass(frozen=True)
class PlanTensor:
    """A network input or output: plain NHWC, at ``offset_bytes`` of the arena.

    ``scale`` holds a float32 exactly; 0 with ``zero_point`` 0 for a tensor that is not quantized.
    """

    name: str
    kind: str  # "input" or "output"
    dtype: str
    shape: tuple[int, ...]
    scale: float
    zero_point: int
    offset_bytes: int


@dataclass(frozen=True)
class Argument:
    """A flat buffer handed to a kernel: ``count`` elements of ``dtype`` in the ``arena`` or in the ``weights``."""

    space: str
    dtype: str
    offset_bytes: int
    count: int


@dataclass(frozen=True)
class Launch:
    """How a GPU runs a kernel: ``groups`` (x, y, z) work-groups of ``group_size`` (x, y, z) work-items each, with
    ``shared_bytes`` of dynamic shared memory (CUDA only)."""

    groups: tuple[int, int, int]
    group_size: tuple[int, int, int]
    shared_bytes: int = 0


@dataclass(frozen=True)
class Step:
    """One kernel call; ``name``, ``kind`` (one of STEP_KINDS), ``path``, ``macs`` are for per-layer tables. It writes
    ``arguments[output]`` and reads the others.

    On a CPU it is ``tasks`` independent tasks. On a GPU it has a ``launch``, and ``tasks`` is 1.
    """

    kernel: str
    arguments: tuple[Argument, ...]
    tasks: int
    name: str
    path: str
    macs: int
    kind: str
    output: int
    launch: Launch | None = None


@dataclass(frozen=True)
class Plan:
    """The whole network. ``engine`` is the driver that runs it: one of ENGINES. ``features`` are the processor
    features, in the words of ``TargetSpec.features``, for ``opencl`` the extensions of the device, without which the
    runtime refuses to open the plan. ``tolerance`` are the steps by which an int8 output may differ from the recorded
    one. ``pixel_table`` holds 256 int8 values for each channel of the input, or nothing where pixel p enters as
    p - 128."""

    engine: str
    arena_bytes: int
    weights_bytes: int
    tensors: tuple[PlanTensor, ...]
    steps: tuple[Step, ...]
    features: tuple[str, ...] = ()
    tolerance: int = 0
    pixel_table: bytes = b""


def pack(plan: Plan, weights_sha256: str, kernels_sha256: str) -> bytes:
    """The plan as a file, with the hexadecimal SHA-256 of ``weights.bin`` and of the kernels it belongs to.

    Raises PlanError where the plan breaks a rule of the format (alignment, bounds, characters of a name).
    """
    strings = _Strings()
    kernels = tuple(dict.fromkeys(step.kernel for step in plan.steps))
    tensors = b"".join(_pack_tensor(tensor, strings) for tensor in plan.tensors)
    steps, arguments, first = [], [], 0
    for step in plan.steps:
        head = (kernels.index(step.kernel), strings.add(step.name), strings.add(step.path), first)
        tail = (step.tasks, step.macs, _code(STEP_KINDS, step.kind, "kind"), step.output)
        steps.append(_pack_record(_STEP, step.name, *head, len(step.arguments), *tail))
        arguments += [_pack_argument(argument, step.name) for argument in step.arguments]
        first += len(step.arguments)
    launches = [_pack_launch(step.launch, step.name) for step in plan.steps if step.launch is not None]
    names = [_NAME.pack(strings.add(name)) for name in (*kernels, *plan.features)]
    body = b"".join((tensors, *steps, *arguments, *launches, *names, bytes(strings.data), plan.pixel_table))
    header = _pack_record(
        _HEADER, "header", _MAGIC, _VERSION, _HEADER.size, bytes(32), _HEADER.size + len(body), plan.arena_bytes,
        plan.weights_bytes, _digest(weights_sha256), _digest(kernels_sha256), _code(ENGINES, plan.engine, "engine"),
        len(plan.tensors), len(plan.steps), first, len(kernels), len(plan.features), len(strings.data), len(launches),
        plan.tolerance, len(plan.pixel_table),
    )  # fmt: skip
    data = seal(header + body)
    if unpack(data) != plan:  # the reader's checks are the format's rules: a plan that breaks one is not written
        raise PlanError("the plan does not survive being written: a field does not fit its type")
    return data


def unpack(data: bytes) -> Plan:
    """The plan in a file's bytes. Raises PlanError for anything but a sound plan of this version."""
    if len(data) < _HEADER.size or len(data) > MAX_FILE_BYTES:
        raise PlanError(f"a plan has {_HEADER.size} to {MAX_FILE_BYTES} bytes, this file has {len(data)}")
    (magic, version, header_bytes, sha256, file_bytes, arena_bytes, weights_bytes, _, _, engine_code,
     tensor_count, step_count, argument_count, kernel_count, feature_count, strings_bytes, launch_count,
     tolerance, pixel_bytes) = _HEADER.unpack_from(data)  # fmt: skip
    _check(magic == _MAGIC, "not a plan: it does not begin with XCTPLAN")
    _check(version == _VERSION, f"the plan has format version {version}, this code reads version {_VERSION}")
    _check(header_bytes == _HEADER.size, f"the header claims {header_bytes} bytes")
    _check(file_bytes == len(data), f"the header claims {file_bytes} bytes, the file has {len(data)}")
    _check(hashlib.sha256(data[_HASHED_FROM:]).digest() == sha256, "the plan is damaged: its SHA-256 differs")
    engine = _name(ENGINES, engine_code, "engine")
    expected_launches = 0 if engine == "cpu" else step_count
    _check(launch_count == expected_launches, f"{launch_count} launches of {step_count} steps on {engine}")
    _check(0 < arena_bytes <= MAX_BYTES, f"an arena of {arena_bytes} bytes")
    _check(weights_bytes <= MAX_BYTES, f"weights of {weights_bytes} bytes")
    sizes = (
        tensor_count * _TENSOR.size, step_count * _STEP.size, argument_count * _ARGUMENT.size,
        launch_count * _LAUNCH.size, kernel_count * _NAME.size, feature_count * _NAME.size, strings_bytes,
        pixel_bytes,
    )  # fmt: skip
    _check(_HEADER.size + sum(sizes) == len(data), "the tables do not fill the file")
    tables, position = [], _HEADER.size
    for size in sizes:
        tables.append(data[position : position + size])
        position += size
    text, pixel_table = tables[6:]
    _check(tolerance <= MAX_TOLERANCE, f"a tolerance of {tolerance} steps")
    _check(text.endswith(b"\0"), "the string table does not end with a zero byte")
    _check(all(byte == 0 or 0x20 <= byte <= 0x7E for byte in text), "a string is not printable ASCII")
    room = {"arena": arena_bytes, "weights": weights_bytes}
    alignment = ALIGNMENT_BYTES if engine == "cpu" else GPU_ALIGNMENT_BYTES
    arguments = [_unpack_argument(fields, room, alignment) for fields in _ARGUMENT.iter_unpack(tables[2])]
    launches = [_unpack_launch(fields, engine) for fields in _LAUNCH.iter_unpack(tables[3])]
    kernels = [_identifier(text, offset, "kernel") for (offset,) in _NAME.iter_unpack(tables[4])]
    features = tuple(_identifier(text, offset, "feature") for (offset,) in _NAME.iter_unpack(tables[5]))
    tensors = tuple(_unpack_tensor(fields, text, arena_bytes, alignment) for fields in _TENSOR.iter_unpack(tables[0]))
    for kind in KINDS:
        _check(any(tensor.kind == kind for tensor in tensors), f"the plan has no {kind}")
    steps = _unpack_steps(tables[1], text, kernels, arguments, launches)
    if pixel_table:
        inputs = [tensor for tensor in tensors if tensor.kind == "input"]
        sound = len(inputs) == 1 and inputs[0].dtype == "int8"
        _check(sound and pixel_bytes == PIXEL_VALUES * inputs[0].shape[-1], f"{pixel_bytes} bytes of pixels")
    return Plan(engine, arena_bytes, weights_bytes, tensors, steps, features, tolerance, pixel_table)


def restate(data: bytes, tolerance: int, pixel_table: bytes) -> bytes:
    """The same plan file with another tolerance and table of pixels. Raises PlanError."""
    header = _HEADER.unpack_from(data)
    hashes = (digest.hex() for digest in header[7:9])
    return pack(replace(unpack(data), tolerance=tolerance, pixel_table=pixel_table), *hashes)


def seal(data: bytes) -> bytes:
    """The same plan file with ``plan_sha256`` made right for its contents."""
    digest = hashlib.sha256(data[_HASHED_FROM:]).digest()
    return data[: _HASHED_FROM - 32] + digest + data[_HASHED_FROM:]


class _Strings:
    """The string table while it grows; equal strings are stored once."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._offsets: dict[str, int] = {}

    def add(self, text: str) -> int:
        if text not in self._offsets:
            _check(all(" " <= letter <= "~" for letter in text), f"the name {text!r} is not printable ASCII")
            self._offsets[text] = len(self.data)
            self.data += text.encode("ascii") + b"\0"
        return self._offsets[text]


def _pack_tensor(tensor: PlanTensor, strings: _Strings) -> bytes:
    rank = len(tensor.shape)
    _check(1 <= rank <= MAX_RANK, f"tensor {tensor.name}: rank {rank}")
    dims = tensor.shape + (0,) * (MAX_RANK - rank)
    kind, dtype = _code(KINDS, tensor.kind, "kind"), _code(DTYPES, tensor.dtype, "dtype")
    tail = (tensor.scale, tensor.zero_point, tensor.offset_bytes)
    return _pack_record(_TENSOR, tensor.name, strings.add(tensor.name), kind, dtype, rank, *dims, *tail)


def _unpack_tensor(fields: tuple[Any, ...], text: bytes, arena_bytes: int, alignment: int) -> PlanTensor:
    name_offset, kind_code, dtype_code, rank, *dims, scale, zero_point, offset_bytes = fields
    name = _string(text, name_offset, "tensor")
    kind, dtype = _name(KINDS, kind_code, "kind"), _name(DTYPES, dtype_code, "dtype")
    _check(name != "", "a tensor has no name")
    _check(1 <= rank <= MAX_RANK, f"tensor {name}: rank {rank}")
    shape = tuple(dims[:rank])
    _check(all(d > 0 for d in shape) and not any(dims[rank:]), f"tensor {name}: dimensions {dims}")
    size_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    _check_range(f"tensor {name}", offset_bytes, size_bytes, arena_bytes, alignment)
    _check(math.isfinite(scale) and scale >= 0, f"tensor {name}: scale {scale}")
    _check(-128 <= zero_point <= 255, f"tensor {name}: zero point {zero_point}")
    return PlanTensor(name, kind, dtype, shape, scale, zero_point, offset_bytes)


def _pack_argument(argument: Argument, step: str) -> bytes:
    space, dtype = _code(SPACES, argument.space, "space"), _code(DTYPES, argument.dtype, "dtype")
    return _pack_record(_ARGUMENT, step, space, dtype, argument.offset_bytes, argument.count)


def _unpack_argument(fields: tuple[int, ...], room: dict[str, int], alignment: int) -> Argument:
    space, dtype = _name(SPACES, fields[0], "space"), _name(DTYPES, fields[1], "dtype")
    argument = Argument(space, dtype, fields[2], fields[3])
    _check(argument.count > 0, "an argument of no elements")
    _check_range(f"an argument in the {space}", fields[2], fields[3] * ITEM_BYTES[dtype], room[space], alignment)
    return argument


def _pack_launch(launch: Launch, step: str) -> bytes:
    return _pack_record(_LAUNCH, step, *launch.groups, *launch.group_size, launch.shared_bytes, 0)


def _unpack_launch(fields: tuple[int, ...], engine: str) -> Launch:
    launch = Launch((fields[0], fields[1], fields[2]), (fields[3], fields[4], fields[5]), fields[6])
    sound = all(1 <= count <= limit for count, limit in zip(launch.groups, MAX_GROUPS, strict=True))
    _check(sound, f"a launch of {launch.groups} groups")
    _check(1 <= math.prod(launch.group_size) <= MAX_GROUP_SIZE, f"a launch of groups of {launch.group_size}")
    _check(launch.shared_bytes <= (MAX_SHARED_BYTES if engine == "cuda" else 0), f"{fields[6]} bytes of shared memory")
    _check(fields[7] == 0, "a reserved field of a launch is not zero")
    return launch


def _unpack_steps(
    table: bytes, text: bytes, kernels: list[str], arguments: list[Argument], launches: list[Launch]
) -> tuple[Step, ...]:
    steps: list[Step] = []
    first = 0
    for fields in _STEP.iter_unpack(table):
        kernel, name_offset, path_offset, first_argument, count, tasks, macs, kind_code, output = fields
        name, path = _string(text, name_offset, "step"), _string(text, path_offset, "path")
        _check(name != "", "a step has no name")
        _check(kernel < len(kernels), f"step {name}: kernel {kernel} of {len(kernels)}")
        _check(first_argument == first, f"step {name}: its arguments begin at {first_argument}, not at {first}")
        _check(1 <= count <= MAX_ARGUMENTS, f"step {name}: {count} arguments")
        _check(1 <= tasks <= (1 if launches else MAX_TASKS), f"step {name}: {tasks} tasks")
        _check(first + count <= len(arguments), f"step {name}: its arguments are past the end of their table")
        kind = _name(STEP_KINDS, kind_code, f"step {name}: kind")
        own = tuple(arguments[first : first + count])
        _check(output < count and own[output].space == "arena", f"step {name}: output {output}")
        launch = launches[len(steps)] if launches else None
        steps.append(Step(kernels[kernel], own, tasks, name, path, macs, kind, output, launch))
        first += count
    _check(len(steps) > 0, "the plan has no step")
    _check(first == len(arguments), f"{len(arguments) - first} arguments belong to no step")
    return tuple(steps)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise PlanError(message)


def _check_range(what: str, offset_bytes: int, size_bytes: int, room_bytes: int, alignment: int) -> None:
    _check(offset_bytes % alignment == 0, f"{what}: offset {offset_bytes} is no multiple of {alignment}")
    inside = offset_bytes <= room_bytes and size_bytes <= room_bytes - offset_bytes
    _check(inside, f"{what}: {size_bytes} bytes at {offset_bytes} do not fit into {room_bytes}")


def _pack_record(record: struct.Struct, what: str, *fields: bytes | float) -> bytes:
    try:
        return record.pack(*fields)
    except (struct.error, OverflowError) as error:
        raise PlanError(f"{what}: a field does not fit the plan's format: {error}") from error


def _digest(text: str) -> bytes:
    _check(re.fullmatch("[0-9a-f]{64}", text) is not None, f"not a SHA-256 in hexadecimal: {text!r}")
    return bytes.fromhex(text)


def _code(names: tuple[str, ...], name: str, what: str) -> int:
    _check(name in names, f"{what} {name!r} is none of {', '.join(names)}")
    return names.index(name) + 1


def _name(names: tuple[str, ...], code: int, what: str) -> str:
    _check(1 <= code <= len(names), f"{what} {code} is unknown")
    return names[code - 1]


def _string(text: bytes, offset: int, what: str) -> str:
    _check(offset < len(text), f"a {what} name at {offset} is past the end of the string table")
    return text[offset : text.index(b"\0", offset)].decode("ascii")


def _identifier(text: bytes, offset: int, what: str) -> str:
    name = _string(text, offset, what)
    _check(re.fullmatch("[A-Za-z0-9_]{1,200}", name) is not None, f"{what} name {name!r} is no identifier")
    return name
