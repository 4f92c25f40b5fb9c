"""The plan's file format: what is written is read, and nothing else is."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from support.plan_files import (
    ATTACKS,
    HASHES,
    HEADER_BYTES,
    LAUNCHES,
    PACKED,
    PACKED_GPU,
    gpu_plan,
    resealed_changes,
    small_plan,
)

from xceptile.runtime.plan import MAX_TASKS, Argument, Launch, Plan, PlanError, pack, seal, unpack


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
    assert PACKED[:16] == b"XCTPLAN\0" + struct.pack("<II", 3, HEADER_BYTES)
    assert len(PACKED) == HEADER_BYTES + 3 * 64 + 3 * 40 + 5 * 24 + 2 * 4 + 2 * 4 + 3 * 256 + len(
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
        (replace(small_plan(), tolerance=256), "tolerance"),
        (replace(small_plan(), pixel_table=bytes(256)), "bytes of pixels"),
        (replace(small_plan(), pixel_table=bytes(3 * 256), tensors=()), "no input"),
        (with_step(kind="dance"), "dance"),
        (with_step(output=2), "output 2"),
        (with_step(output=1), "output 1"),
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
    newer = seal(PACKED[:8] + struct.pack("<I", 4) + PACKED[12:])
    with pytest.raises(PlanError, match="version 4"):
        unpack(newer)


def test_another_file_is_no_plan() -> None:
    with pytest.raises(PlanError, match="XCTPLAN"):
        unpack(b"\x7fELF" + bytes(400))
