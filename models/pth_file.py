"""What a file of ``torch.save`` holds: tensors, numbers and texts in dicts and lists. Nothing in it is executed.

No code can come of it: the file is a pickle, which names the functions and classes that it is made of, and any other
name than those of ``_HARMLESS`` is refused before torch sees the file. torch then reads it with ``weights_only``,
which calls nothing but what it has allowed by itself. What is allowed here allocates no more than the file's own size.
"""

from __future__ import annotations

import json
import pickletools
import re
import shlex
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from .read_file import check_file
from .weights import CheckpointError, first_line

# Of what tensors and plain values are made. Left out of what ``weights_only`` allows: ``bytearray`` and the old classes
# of tensors, which take a size and allocate it, and tensors that are sparse, nested, quantized or without data.
_HARMLESS = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)|_codecs encode|argparse Namespace"
    r"|torch (Size|device|u?int\d+|float\w*|bfloat16|double|half|bool|complex\d+)"
    r"|torch (storage )?\w*Storage|torch\.storage \w*Storage|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
)
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, the storages' keys: torch.serialization._legacy_save
_MODULE = "torch.nn.modules."


def read_pth(path: str | Path) -> Any:
    """The object that was saved. Raises CheckpointError for any other, damaged or dangerous file."""
    try:
        check_file(path)
        _refuse_code(Path(path))
        # timm's training script keeps its arguments, a class of plain values.
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError("no such file", path) from error
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", path) from error
    except UnpicklingError as error:
        raise CheckpointError(_holds_objects(path), path) from error
    except Exception as error:  # torch and pickletools raise RuntimeError, EOFError, ValueError, KeyError ...
        if "TorchScript" in str(error):
            raise CheckpointError(_is_torchscript(path), path) from error
        raise CheckpointError(f"is truncated or damaged ({first_line(error)}); copy it again", path) from error


def _refuse_code(path: Path) -> None:
    """Raises CheckpointError where the file names another function or class, or would unfold to more than its size."""
    names: list[str] = []
    if zipfile.is_zipfile(path):
        reader = torch._C.PyTorchFileReader(str(path))  # the parser that torch.load will use
        records = reader.get_all_records()
        if "constants.pkl" in records:
            raise CheckpointError(_is_torchscript(path), path)
        if sum(reader.get_record_size(record) for record in records) > path.stat().st_size:
            raise CheckpointError("holds compressed or overlapping parts, which torch.save never writes", path)
        names += _names(reader.get_record("data.pkl"))
    else:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                names += _names(file)
    foreign = [name for name in names if not _HARMLESS.fullmatch(name)]
    if any(name.startswith(_MODULE) for name in foreign):
        raise CheckpointError(
            "is a pickled module, which only its own code could rebuild, and code in a file is never executed; "
            + _rewrite(path, "torch.load(FILE, weights_only=False).state_dict()"),
            path,
        )
    if foreign:
        raise CheckpointError(_holds_objects(path, foreign[0].replace(" ", ".")), path)


def _names(pickle: Any) -> Iterator[str]:
    """Module and name of each function and class that a pickle is made of; of instructions that put names together
    while they are read, which torch's own protocol has not, their own name.
    """
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL":
            yield str(argument)
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            yield opcode.name


def _holds_objects(path: str | Path, name: str = "") -> str:
    dicts = "{k: v for k, v in torch.load(FILE, weights_only=False).items() if isinstance(v, dict)}"
    return (
        f"holds pickled objects besides tensors{name and f' ({name[:80]})'}, which are never executed; "
        f"save module.state_dict() alone, or as safetensors; {_rewrite(path, dicts)}"
    )


def _is_torchscript(path: str | Path) -> str:
    line = _rewrite(path, "torch.jit.load(FILE).state_dict()")
    return f"is a TorchScript program, which is code and is not executed; {line}"


def _rewrite(path: str | Path, expression: str) -> str:
    """The line that turns a file into one that is read; the file's name is quoted for Python and for the shell."""
    program = f'import torch; torch.save({expression.replace("FILE", json.dumps(Path(path).name))}, "weights.pth")'
    return f"if you trust it, where it can be loaded: python -c {shlex.quote(program)}"
