"""Exported programs as torch saves them, and changed by hand."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._export.serde.serialize import serialize
from torch.export.pt2_archive import PT2ArchiveReader

GRAPH, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"


def small() -> nn.Module:
    """A convolution, its head and no more."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def exported(
    network: nn.Module, shape: tuple[int, ...], open_dimensions: tuple[int, ...] = (), **options: Any
) -> torch.export.ExportedProgram:
    """As it stands (``network`` is not put into evaluation mode)."""
    open_sizes = (dict.fromkeys(open_dimensions, torch.export.Dim.AUTO),) if open_dimensions else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(network, (torch.zeros(shape),), dynamic_shapes=open_sizes, **options)


def saved(path: Path, network: nn.Module, shape: tuple[int, ...], open_dimensions: tuple[int, ...] = ()) -> Path:
    torch.export.save(exported(network, shape, open_dimensions), path)
    return path


def records_of(path: Path) -> dict[str, bytes]:
    reader = PT2ArchiveReader(str(path))
    return {name: reader.read_bytes(name) for name in reader.get_file_names()}


def archive_of(records: dict[str, bytes]) -> bytes:
    """The file with these records, laid out as torch does it."""
    return _zip({f"archive/{name}": contents for name, contents in records.items()})


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)
    return file.getvalue()


def rewrite(path: Path, records: dict[str, bytes]) -> None:
    path.write_bytes(archive_of(records))


def doctor(path: Path, edit: Callable[[dict[str, Any]], None], record: str = GRAPH) -> None:
    """Rewrites the file with one of its JSON records changed, the program where not said."""
    records = records_of(path)
    contents = json.loads(records[record])
    edit(contents)
    rewrite(path, records | {record: json.dumps(contents).encode()})


def as_torch_2_7(program: torch.export.ExportedProgram) -> bytes:
    """The layout of torch 2.5 to 2.7: state dicts of ``torch.save`` beside the JSON."""
    parts = serialize(program)
    return _zip(
        {
            "serialized_exported_program.json": parts.exported_program,
            "serialized_state_dict.pt": parts.state_dict,
            "serialized_constants.pt": parts.constants,
            "serialized_example_inputs.pt": parts.example_inputs,
            "version": b"8.8",
        }
    )


def as_torch_2_8(program: torch.export.ExportedProgram) -> bytes:
    """The layout of torch 2.8: today's, with state dicts of ``torch.save``."""
    parts = serialize(program)
    return archive_of(
        {
            GRAPH: parts.exported_program,
            "data/weights/model.pt": parts.state_dict,
            "data/constants/model.pt": parts.constants,
            SAMPLES: parts.example_inputs,
            "archive_format": b"pt2",
            "byteorder": b"little",
        }
    )
