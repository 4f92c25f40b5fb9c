"""Which tensors live where in the arena, and from which step to which: read back from a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .plan import ITEM_BYTES, Argument, Plan


@dataclass(frozen=True)
class Resident:
    """A tensor at ``offset_bytes`` of the arena, from the step that writes it to the last that reads it, both included.

    An input is there from step 0 on, an output until the last step. ``name`` is the writing step's, or the input's.
    """

    name: str
    offset_bytes: int
    size_bytes: int
    first: int
    last: int

    def overlaps(self, offset_bytes: int, size_bytes: int) -> bool:
        return self.offset_bytes < offset_bytes + size_bytes and offset_bytes < self.offset_bytes + self.size_bytes


def residents(plan: Plan) -> tuple[Resident, ...]:
    """In the order of their first steps. A step writes its last operand and only reads the others, which is how every
    family of kernels orders them."""
    live = [
        Resident(t.name, t.offset_bytes, math.prod(t.shape) * ITEM_BYTES[t.dtype], 0, 0)
        for t in plan.tensors
        if t.kind == "input"
    ]
    done: list[Resident] = []
    for index, step in enumerate(plan.steps):
        for number, argument in enumerate(step.arguments):
            if argument.space == "arena" and number != step.output:
                live = [_read(each, argument, index) for each in live]
        written = step.arguments[step.output]
        size = _size_bytes(written)
        # What it overwrites was read for the last time before, or by this step.
        over = [each for each in live if each.overlaps(written.offset_bytes, size)]
        done += over
        live = [each for each in live if each not in over]
        live.append(Resident(step.name, written.offset_bytes, size, index, index))
    last = len(plan.steps) - 1
    for tensor in (t for t in plan.tensors if t.kind == "output"):
        size = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        live = [
            Resident(each.name, each.offset_bytes, each.size_bytes, each.first, last)
            if each.overlaps(tensor.offset_bytes, size)
            else each
            for each in live
        ]
    return tuple(sorted((*done, *live), key=lambda each: (each.first, each.offset_bytes)))


def _read(resident: Resident, argument: Argument, step: int) -> Resident:
    if not resident.overlaps(argument.offset_bytes, _size_bytes(argument)):
        return resident
    return Resident(resident.name, resident.offset_bytes, resident.size_bytes, resident.first, step)


def _size_bytes(argument: Argument) -> int:
    return argument.count * ITEM_BYTES[argument.dtype]


def live_bytes(plan: Plan) -> tuple[int, ...]:
    """The bytes of the tensors that live at each step."""
    each = residents(plan)
    return tuple(sum(r.size_bytes for r in each if r.first <= step <= r.last) for step in range(len(plan.steps)))
