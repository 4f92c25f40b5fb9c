"""Where the tensors of a state dict lie in a file of ``torch.save``, by its pickle, which is read and not run.

A pickle is a program for a machine with a stack: it names functions and says what to call them with. Here the few
instructions that torch writes for a dict of tensors move texts, numbers and tuples about, and the four functions that
such a dict names become plain records. No function is looked up, nothing of the file's is called; another name or
instruction is refused. Source: torch 2.8, torch/_utils.py (``_rebuild_tensor_v2``), torch/serialization.py.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# torch's class of storage -> numpy's type, little-endian; bfloat16 is none of numpy's.
_STORAGES = {
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch DoubleStorage": "<f8",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "|i1",
    "torch ByteStorage": "|u1",
    "torch BoolStorage": "|b1",
}


class PickleError(ValueError):
    """A pickle of something else than a dict of tensors."""


@dataclass(frozen=True)
class Place:
    """A tensor as a view of a storage: ``offset``, ``sizes`` and ``strides`` count elements. Nothing is checked yet."""

    storage: str
    kind: str
    offset: Any
    sizes: Any
    strides: Any


@dataclass(frozen=True)
class _Name:
    """ "module name" of a function or class."""

    name: str


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = frozenset(
    {*("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"), *("BINSTRING", "SHORT_BINSTRING")}
)
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def places(pickle: bytes) -> dict[str, Place]:
    """The tensors of a pickled state dict by name. Raises PickleError for any other object, and a damaged one."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            machine.step(opcode.name, argument)
        (found,) = machine.stack
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, UnicodeError) as error:
        raise PickleError("it is damaged") from error
    if not isinstance(found, dict) or not all(isinstance(place, Place) for place in found.values()):
        raise PickleError("it holds something else than a dict of tensors")
    return found


class _Machine:
    """The stack and the memory of what has been on it."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _SHORT_TUPLES:
            self.stack[-_SHORT_TUPLES[name] :] = [tuple(self.stack[-_SHORT_TUPLES[name] :])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memory[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memory[len(self.memory)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memory[argument])
        elif name == "GLOBAL":
            self.stack.append(_Name(str(argument)))
        elif name in _STEPS:
            _STEPS[name](self)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise PickleError(f"it holds more than tensors (instruction {name})")

    def pop_to_mark(self) -> list[Any]:
        """What lies above the last mark."""
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def name(self) -> None:
        """STACK_GLOBAL: the name's two parts are on the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_Name(f"{module} {name}"))

    def persistent(self) -> None:
        """BINPERSID: a storage, which lies beside the pickle."""
        kind, storage, key, *_ = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Name) or not isinstance(key, str):
            raise PickleError("it holds something else than storages")
        if storage.name not in _STORAGES:
            raise PickleError(f"it holds numbers of a kind that is not read ({storage.name[:80]})")
        self.stack.append((key, _STORAGES[storage.name]))

    def reduce(self) -> None:
        """REDUCE: in place of a call, the record of what it would make."""
        arguments, function = self.stack.pop(), self.stack.pop()
        name = function.name if isinstance(function, _Name) else ""
        if name == "collections OrderedDict" and arguments == ():
            self.stack.append({})
        elif name == "torch._utils _rebuild_tensor_v2":
            (key, kind), offset, sizes, strides, *_ = arguments
            self.stack.append(Place(key, kind, offset, sizes, strides))
        elif name == "torch._utils _rebuild_parameter":
            self.stack.append(arguments[0])
        else:
            raise PickleError(f"it calls {name[:80] or 'what is no function'}")

    def set_items(self, items: list[Any]) -> None:
        """SETITEM and SETITEMS."""
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(target, dict) or not isinstance(key, str):
                raise PickleError("it holds something else than a dict of tensors")
            target[key] = value

    def build(self) -> None:
        """BUILD: what a state dict says of versions."""
        self.stack.pop()


_STEPS: dict[str, Callable[[_Machine], None]] = {
    "MARK": lambda machine: machine.stack.append(_MARK),
    "EMPTY_DICT": lambda machine: machine.stack.append({}),
    "TUPLE": lambda machine: machine.stack.append(tuple(machine.pop_to_mark())),
    "SETITEM": lambda machine: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine: machine.set_items(machine.pop_to_mark()),
    "STACK_GLOBAL": _Machine.name,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
