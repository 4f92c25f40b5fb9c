"""The plan's file format: what is written is read, and nothing else is."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest

from xceptile.runtime.plan import MAX_TASKS, Argument, Launch, Plan, PlanError, PlanTensor, Step, pack, seal, unpack

HASHES = ("0" * 64, "12ef" * 16)
HEADER_BYTES = 168


def small_plan() -> Plan:
    steps = (
        Step(
            "first_3x3", (Argument("arena", "int8", 0, 12), Argument("weights", "int32", 64, 4)), 3, "conv", "a.b", 100
        ),
        Step("second", (Argument("arena", "uint8", 64, 16), Argument("arena", "int8", 128, 4)), MAX_TASKS, "fc", "", 0),
        Step("first_3x3", (Argument("weights", "float32", 0, 1),), 1, "conv", "a.b", 1 << 40),
    )
    tensors = (
        PlanTensor("input", "input", "int8", (1, 2, 2, 3), 1.0, -128, 0),
        PlanTensor("logits", "output", "int8", (1, 4), 0.25, 3, 128),
        PlanTensor("extra", "output", "float32", (1,), 0.0, 0, 192),
    )
    return Plan("cpu", 256, 80, tensors, steps, ("neon", "dotprod"))


def gpu_plan(engine: str) -> Plan:
    """Two launches; those of CUDA have dynamic shared memory."""
    shared_bytes = 227 << 10 if engine == "cuda" else 0
    x, y = Argument("arena", "int8", 0, 12), Argument("arena", "int8", 512, 4)
    steps = (
        Step("conv", (x, Argument("weights", "int32", 512, 4), y), 1, "conv", "a.b", 100,
             Launch((2**31 - 1, 65535, 1), (32, 4, 8), shared_bytes)),
        Step("relu", (y, y), 1, "relu", "", 0, Launch((1, 1, 65535), (1, 1, 1))),
    )  # fmt: skip
    tensors = (
        PlanTensor("input", "input", "int8", (1, 2, 2, 3), 1.0, -128, 0),
        PlanTensor("logits", "output", "int8", (1, 4), 0.25, 3, 512),
    )
    return Plan(engine, 1024, 1024, tensors, steps, ("cl_khr_fp16",))


PACKED = pack(small_plan(), *HASHES)
PACKED_GPU = pack(gpu_plan("cuda"), *HASHES)


@pytest.mark.parametrize("plan", [small_plan(), gpu_plan("opencl"), gpu_plan("cuda")], ids=lambda plan: plan.engine)
def test_a_plan_survives_the_file(plan: Plan) -> None:
    packed = pack(plan, *HASHES)
    assert unpack(packed) == plan
    assert pack(unpack(packed), *HASHES) == packed


def test_launches_lie_behind_the_arguments() -> None:
    assert PACKED_GPU[LAUNCHES : LAUNCHES + 64] == struct.pack(
        "<16I", 2**31 - 1, 65535, 1, 32, 4, 8, 227 << 10, 0, 1, 1, 65535, 1, 1, 1, 0, 0
    )
    assert PACKED_GPU[136:140] == struct.pack("<I", 3)
    assert PACKED_GPU[164:168] == struct.pack("<I", 2)


def test_the_file_of_a_plan_is_fixed() -> None:
    """A change of the format is a new version: devices in the field read the old one."""
    assert PACKED[:16] == b"XCTPLAN\0" + struct.pack("<II", 1, HEADER_BYTES)
    assert len(PACKED) == HEADER_BYTES + 3 * 64 + 3 * 32 + 5 * 24 + 2 * 4 + 2 * 4 + len(
        b"conv\0a.b\0fc\0\0input\0logits\0extra\0first_3x3\0second\0neon\0dotprod\0"
    )
    assert PACKED[104:136].hex() == HASHES[1]


@pytest.mark.parametrize("packed", [PACKED, PACKED_GPU], ids=["cpu", "gpu"])
def test_every_changed_byte_is_noticed(packed: bytes) -> None:
    for position in range(len(packed)):
        damaged = bytearray(packed)
        damaged[position] ^= 0x10
        with pytest.raises(PlanError):
            unpack(bytes(damaged))


def test_every_truncation_is_noticed() -> None:
    for length in range(len(PACKED)):
        with pytest.raises(PlanError):
            unpack(PACKED[:length])
    with pytest.raises(PlanError):
        unpack(PACKED + b"\0")


@pytest.mark.parametrize("packed", [PACKED, PACKED_GPU], ids=["cpu", "gpu"])
def test_a_change_with_a_right_hash_is_noticed_or_harmless(packed: bytes) -> None:
    """An attacker can make the hash right: what is then accepted is a plan within its bounds."""
    accepted = 0
    for changed in resealed_changes(packed):
        try:
            plan = unpack(changed)
        except PlanError:
            continue
        accepted += 1
        assert pack(plan, *HASHES)  # within every bound
    assert accepted


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
ARGUMENTS = STEPS + 3 * 32
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
LAUNCHES = HEADER_BYTES + 2 * 64 + 2 * 32 + 5 * 24  # of PACKED_GPU
ARGUMENT = struct.pack("<IIQQ", 1, 1, 0, 1)
ATTACKS = {
    "an argument of no step": attack({ARGUMENT_COUNT: 6}, ARGUMENT),
    "a last step with arguments past their table": attack({STEPS + 64 + 16: 2}),
    "a last step whose arguments are far past their table": attack({STEPS + 64 + 16: 16}),
    "a step of 17 arguments": attack({ARGUMENT_COUNT: 21, STEPS + 64 + 16: 17}, 16 * ARGUMENT),
    "a step of no arguments": attack({ARGUMENT_COUNT: 5, STEPS + 16: 1, STEPS + 32 + 12: 1, STEPS + 32 + 16: 4,
                                      STEPS + 64 + 12: 5, STEPS + 64 + 16: 0}),
    "a tensor of rank 0": attack({TENSORS + 12: 0, **{TENSORS + 16 + 4 * i: 0 for i in range(8)}}),
    "a tensor of rank 9": attack({TENSORS + 12: 9, **{TENSORS + 16 + 4 * i: 1 for i in range(8)}}),
    "a tensor of 2^64 elements": attack({TENSORS + 16: 1 << 31, TENSORS + 20: 1 << 31, TENSORS + 24: 4}),
    "a tensor of 2^64 + 5 elements": attack({TENSORS + 16: 3 * 7 * 29, TENSORS + 20: 36760123, TENSORS + 24: 823996703,
                                             TENSORS + 28: 1}),
    "a tensor of 2^62 elements of 4 bytes": attack({TENSORS + 8: 9, TENSORS + 16: 1 << 31, TENSORS + 20: 1 << 31,
                                                    TENSORS + 24: 1, TENSORS + 28: 1}),
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


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(name: str) -> None:
    with pytest.raises(PlanError):
        unpack(ATTACKS[name])


def with_step(**changes: object) -> Plan:
    plan = small_plan()
    return replace(plan, steps=(replace(plan.steps[0], **changes), *plan.steps[1:]))


def with_tensor(**changes: object) -> Plan:
    plan = small_plan()
    return replace(plan, tensors=(replace(plan.tensors[0], **changes), *plan.tensors[1:]))


def with_argument(**changes: object) -> Plan:
    return with_step(arguments=(replace(small_plan().steps[0].arguments[0], **changes),))


def with_gpu_step(**changes: object) -> Plan:
    plan = gpu_plan("opencl")
    return replace(plan, steps=(replace(plan.steps[0], **changes), *plan.steps[1:]))


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (replace(small_plan(), engine="abacus"), "abacus"),
        (replace(small_plan(), arena_bytes=0), "arena"),
        (replace(small_plan(), arena_bytes=1 << 41), "arena"),
        (replace(small_plan(), arena_bytes=-1), "header"),
        (replace(small_plan(), weights_bytes=1 << 41), "weights"),
        (replace(small_plan(), tensors=small_plan().tensors[1:]), "no input"),
        (replace(small_plan(), tensors=small_plan().tensors[:1]), "no output"),
        (replace(small_plan(), steps=()), "no step"),
        (replace(small_plan(), features=("not a word",)), "not a word"),
        (with_step(kernel="two words"), "two words"),
        (with_step(kernel=""), "identifier"),
        (with_step(kernel="k" * 201), "identifier"),
        (with_step(name=""), "no name"),
        (with_step(name="größer"), "ASCII"),
        (with_step(path="a\nb"), "ASCII"),
        (with_step(tasks=0), "0 tasks"),
        (with_step(tasks=MAX_TASKS + 1), "tasks"),
        (with_step(macs=-1), "conv"),
        (with_step(arguments=()), "0 arguments"),
        (with_step(arguments=(Argument("arena", "int8", 0, 1),) * 17), "17 arguments"),
        (with_argument(space="register"), "register"),
        (with_argument(dtype="int4"), "int4"),
        (with_argument(offset_bytes=32), "multiple of 64"),
        (with_argument(offset_bytes=256), "do not fit"),
        (with_argument(count=257), "do not fit"),
        (with_argument(count=0), "no elements"),
        (with_argument(space="weights", count=81), "do not fit"),
        (with_tensor(kind="state"), "state"),
        (with_tensor(shape=()), "rank 0"),
        (with_tensor(shape=(1,) * 9), "rank 9"),
        (with_tensor(shape=(1, 0, 3)), "dimensions"),
        (with_tensor(shape=(1 << 31, 1 << 31, 1 << 31)), "do not fit"),
        (with_tensor(scale=float("nan")), "scale"),
        (with_tensor(scale=-1.0), "scale"),
        (with_tensor(scale=0.1), "does not survive"),  # no float32
        (with_tensor(zero_point=256), "zero point"),
        (with_tensor(offset_bytes=1), "multiple of 64"),
        (with_step(launch=Launch((1, 1, 1), (1, 1, 1))), "launches"),
        (replace(gpu_plan("cuda"), engine="cpu"), "launches"),
        (replace(small_plan(), engine="cuda"), "launches"),
        (with_gpu_step(launch=None), "launches"),
        (with_gpu_step(launch=Launch((0, 1, 1), (1, 1, 1))), "groups"),
        (with_gpu_step(launch=Launch((1, 65536, 1), (1, 1, 1))), "groups"),
        (with_gpu_step(launch=Launch((1, 1, 1), (1024, 2, 1))), "groups of"),
        (with_gpu_step(launch=Launch((1, 1, 1), (-1, 1, 1))), "conv"),
        (with_gpu_step(launch=Launch((1, 1), (1, 1, 1))), "conv"),  # type: ignore[arg-type]  # what is tested
        (with_gpu_step(launch=Launch((1, 1, 1), (1, 1, 1), 1)), "shared memory"),
        (with_gpu_step(tasks=2), "2 tasks"),
        (with_gpu_step(arguments=(Argument("arena", "int8", 64, 1),)), "multiple of 512"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_not_written(plan: Plan, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        pack(plan, *HASHES)


def test_a_hash_must_be_one() -> None:
    with pytest.raises(PlanError, match="SHA-256"):
        pack(small_plan(), "0" * 63, HASHES[1])


def test_a_newer_version_is_named() -> None:
    newer = seal(PACKED[:8] + struct.pack("<I", 2) + PACKED[12:])
    with pytest.raises(PlanError, match="version 2"):
        unpack(newer)


def test_another_file_is_no_plan() -> None:
    with pytest.raises(PlanError, match="XCTPLAN"):
        unpack(b"\x7fELF" + bytes(400))
