"""Plans as files: sound ones, and those that an attacker writes with the right hash."""

from __future__ import annotations

import random
import struct

from xceptile.runtime.plan import MAX_TASKS, Argument, Launch, Plan, PlanTensor, Step, pack, seal

HASHES = ("0" * 64, "12ef" * 16)

HEADER_BYTES = 176
STEP_BYTES = 40


def small_plan() -> Plan:
    steps = (
        Step(
            "first_3x3",
            (Argument("arena", "int8", 0, 12), Argument("weights", "int32", 64, 4)),
            3,
            "conv",
            "a.b",
            100,
            "convolution",
            0,
        ),
        Step(
            "second",
            (Argument("arena", "uint8", 64, 16), Argument("arena", "int8", 128, 4)),
            MAX_TASKS,
            "fc",
            "",
            0,
            "copy",
            1,
        ),
        Step("first_3x3", (Argument("arena", "float32", 0, 1),), 1, "conv", "a.b", 1 << 40, "convolution", 0),
    )
    tensors = (
        PlanTensor("input", "input", "int8", (1, 2, 2, 3), 1.0, -128, 0),
        PlanTensor("logits", "output", "int8", (1, 4), 0.25, 3, 128),
        PlanTensor("extra", "output", "float32", (1,), 0.0, 0, 192),
    )
    return Plan("cpu", 256, 80, tensors, steps, ("neon", "dotprod"), 2, bytes(3 * 256))


def gpu_plan(engine: str) -> Plan:
    """Two launches; those of CUDA have dynamic shared memory."""
    shared_bytes = 227 << 10 if engine == "cuda" else 0
    x, y = Argument("arena", "int8", 0, 12), Argument("arena", "int8", 512, 4)
    steps = (
        Step("conv", (x, Argument("weights", "int32", 512, 4), y), 1, "conv", "a.b", 100, "convolution", 2,
             Launch((2**31 - 1, 65535, 1), (32, 4, 8), shared_bytes)),
        Step("relu", (y, y), 1, "relu", "", 0, "relu", 1, Launch((1, 1, 65535), (1, 1, 1))),
    )  # fmt: skip
    tensors = (
        PlanTensor("input", "input", "int8", (1, 2, 2, 3), 1.0, -128, 0),
        PlanTensor("logits", "output", "int8", (1, 4), 0.25, 3, 512),
    )
    return Plan(engine, 1024, 1024, tensors, steps, ("cl_khr_fp16",))


PACKED = pack(small_plan(), *HASHES)

PACKED_GPU = pack(gpu_plan("cuda"), *HASHES)


def resealed_changes(data: bytes) -> list[bytes]:
    """The file with one byte changed, each in many ways, and cut at every length; hash and length are made right."""
    changes = []
    for position in range(16, len(data)):
        values = {data[position] ^ 1 << bit for bit in range(8)} | {0, 1, 0x7F, 0x80, 0xFF}
        for value in values - {data[position]}:
            changes.append(seal(data[:position] + bytes([value]) + data[position + 1 :]))
    for length in range(HEADER_BYTES, len(data)):
        cut = data[:48] + struct.pack("<Q", length) + data[56:length]
        changes.append(seal(cut))
    dice = random.Random(0)
    for _ in range(2000):  # several words at once: counts that agree with each other, offsets near an overflow
        damaged = bytearray(data)
        for _ in range(dice.randint(1, 3)):
            at = 4 * dice.randrange(12, len(data) // 4)
            damaged[at : at + 4] = struct.pack("<I", dice.choice((0, 1, 2, 63, 64, 1 << 24, 1 << 31, (1 << 32) - 1)))
        changes.append(seal(bytes(damaged[: len(data)])))
    return changes


TENSORS, STEPS = HEADER_BYTES, HEADER_BYTES + 3 * 64

ARGUMENTS = STEPS + 3 * STEP_BYTES

KERNELS = ARGUMENTS + 5 * 24


def with_words(data: bytes, words: dict[int, int]) -> bytes:
    """The file with other 32-bit words at the given positions."""
    changed = bytearray(data)
    for position, word in words.items():
        changed[position : position + 4] = struct.pack("<I", word)
    return bytes(changed)


def attack(words: dict[int, int], inserted: bytes = b"", at: int = KERNELS, packed: bytes = PACKED) -> bytes:
    """A plan that breaks one rule only: ``words`` changed, bytes ``inserted`` before position ``at``."""
    data = with_words(packed, words)
    data = data[:at] + inserted + data[at:]
    return seal(data[:48] + struct.pack("<Q", len(data)) + data[56:])


ARGUMENT_COUNT = 148

LAUNCHES = HEADER_BYTES + 2 * 64 + 2 * STEP_BYTES + 5 * 24  # of PACKED_GPU

ARGUMENT = struct.pack("<IIQQ", 1, 1, 0, 1)

SECOND, THIRD = STEPS + STEP_BYTES, STEPS + 2 * STEP_BYTES

ATTACKS = {
    "an argument of no step": attack({ARGUMENT_COUNT: 6}, ARGUMENT),
    "a last step with arguments past their table": attack({THIRD + 16: 2}),
    "a last step whose arguments are far past their table": attack({THIRD + 16: 16}),
    "a step of 17 arguments": attack({ARGUMENT_COUNT: 21, THIRD + 16: 17}, 16 * ARGUMENT),
    "a step of no arguments": attack({ARGUMENT_COUNT: 5, STEPS + 16: 1, SECOND + 12: 1, SECOND + 16: 4,
                                      THIRD + 12: 5, THIRD + 16: 0}),
    "a tensor of rank 0": attack({TENSORS + 12: 0, **{TENSORS + 16 + 4 * i: 0 for i in range(8)}}),
    "a tensor of rank 9": attack({TENSORS + 12: 9, **{TENSORS + 16 + 4 * i: 1 for i in range(8)}}),
    "a tensor of 2^64 elements": attack({TENSORS + 16: 1 << 31, TENSORS + 20: 1 << 31, TENSORS + 24: 4}),
    "a tensor of 2^64 + 5 elements": attack({TENSORS + 16: 3 * 7 * 29, TENSORS + 20: 36760123, TENSORS + 24: 823996703,
                                             TENSORS + 28: 1}),
    "a tensor of 2^62 elements of 4 bytes": attack({TENSORS + 8: 9, TENSORS + 16: 1 << 31, TENSORS + 20: 1 << 31,
                                                    TENSORS + 24: 1, TENSORS + 28: 1}),
    "a step of no kind": attack({STEPS + 32: 0}),
    "a step of an unknown kind": attack({STEPS + 32: 16}),
    "an output that is not an argument": attack({STEPS + 36: 2}),
    "an output among the weights": attack({STEPS + 36: 1}),
    "a tolerance beyond int8": attack({168: 256}),
    "a pixel table that is too short": attack({172: 2 * 256}, packed=PACKED[:-256]),
    "a pixel table without its bytes": attack({}, packed=PACKED[:-768]),
    "a pixel table of a float input": attack({TENSORS + 8: 9}),
    "no input": attack({TENSORS + 4: 2}),
    "no output": attack({TENSORS + 64 + 4: 1, TENSORS + 128 + 4: 1}),
    "bytes behind the strings": attack({}, b"text\0", len(PACKED)),
    "counts that add up to 2^32 and the length": attack({152: 2 + (1 << 30)}),
    "no strings": attack({160: 0}),
    "launches of a processor": attack({164: 3}, 3 * struct.pack("<8I", 1, 1, 1, 1, 1, 1, 0, 0)),
    "a GPU without launches": attack({136: 2}),
    "an unknown engine": attack({136: 4}),
    "a launch too few": attack({164: 1}, packed=PACKED_GPU[:LAUNCHES] + PACKED_GPU[LAUNCHES + 32 :]),
    "a launch too many": attack({164: 3}, struct.pack("<8I", 1, 1, 1, 1, 1, 1, 0, 0), LAUNCHES, PACKED_GPU),
    "shared memory on OpenCL": attack({136: 2}, packed=PACKED_GPU),
    "too much shared memory": attack({LAUNCHES + 24: (227 << 10) + 1}, packed=PACKED_GPU),
    "groups of 1025": attack({LAUNCHES + 12: 1025, LAUNCHES + 16: 1, LAUNCHES + 20: 1}, packed=PACKED_GPU),
    "groups of 2^64": attack({LAUNCHES + 12: 1 << 31, LAUNCHES + 16: 1 << 31, LAUNCHES + 20: 4}, packed=PACKED_GPU),
    "2^31 groups": attack({LAUNCHES: 1 << 31}, packed=PACKED_GPU),
    "65536 groups in y": attack({LAUNCHES + 4: 65536}, packed=PACKED_GPU),
    "no groups": attack({LAUNCHES + 8: 0}, packed=PACKED_GPU),
    "a launch with a flag": attack({LAUNCHES + 28: 1}, packed=PACKED_GPU),
    "two tasks on a GPU": attack({HEADER_BYTES + 128 + 20: 2}, packed=PACKED_GPU),
    "a GPU's offset of 64": attack({HEADER_BYTES + 56: 64}, packed=PACKED_GPU),
}  # fmt: skip
