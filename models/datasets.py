"""Images to calibrate and to measure on: the drawn set, or the user's own files in one of four usual layouts.

A folder of folders named after classes (or after ImageNet's wnids), ImageNet's flat validation folder with its label
file, a list file, a plain folder without labels. Opening reads names only; images are read one at a time.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import drawn
from .preprocess import FORMATS, InputSpec, grey, load_image
from .read_file import LIST_BYTES, read_file

SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
WNID = re.compile(r"n\d{8}")
IMAGENET = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")

# Label files of ImageNet's validation images, looked for in the folder and above it. The first is Caffe's, "name
# index"; the second TensorFlow's, one wnid a line. Both
# count classes as every framework does, in the order of their wnids.
CAFFE_LABELS = "val.txt"
WNID_LABELS = "imagenet_2012_validation_synset_labels.txt"
DEVKIT_LABELS = "ILSVRC2012_validation_ground_truth.txt"


class DatasetError(ValueError):
    """Images that cannot be used. ``path`` is the file or folder at fault."""

    def __init__(self, message: str, path: str | Path) -> None:
        super().__init__(f"{path}: {message}")
        self.path = str(path)


@dataclass(frozen=True)
class Item:
    """One image: its name within the data set, its class index where known, and its file or (split, index) if drawn."""

    name: str
    label: int | None
    source: Path | tuple[str, int]


@dataclass(frozen=True)
class Dataset:
    """Images in a fixed order, in which the classes of a folder of folders take turns, so that a few do for many."""

    name: str
    items: tuple[Item, ...]

    def __len__(self) -> int:
        return len(self.items)

    def load(self, item: Item, spec: InputSpec) -> NDArray[np.uint8]:
        """Pixels (height, width, channels) for the network's input; drawn images are drawn at that size, not cropped.

        Raises ImageError for a damaged file, DatasetError for a drawn image that is not square.
        """
        if isinstance(item.source, Path):
            return load_image(item.source, spec)
        if spec.height != spec.width:
            raise DatasetError(f"drawn images are square, the network takes {spec.height}x{spec.width}", self.name)
        pixels = drawn.draw(*item.source, spec.height)[0]
        return grey(pixels) if spec.channels == 1 else pixels

    def sha256(self) -> str:
        """Hash over names, labels and contents (bytes of the files; pixels at the default size of drawn images)."""
        digest = hashlib.sha256()
        for item in self.items:
            source = item.source
            content = source.read_bytes() if isinstance(source, Path) else drawn.draw(*source)[0].tobytes()
            digest.update(f"{item.name}\0{item.label}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
            digest.update(content)
        return digest.hexdigest()


def open_dataset(source: str | Path, labels: Sequence[str] | None = None) -> Dataset:
    """``drawn:SPLIT[:COUNT]``, a folder or a list file.

    ``labels`` are the model's class names, in its order, which the classes found are matched with (in Unicode's NFC:
    names out of a Mac's archive have their accents apart); without them (calibration) no file is given a label. Raises
    DatasetError, with what is wrong, where, and what to do.
    """
    labels = None if labels is None else [_composed(label) for label in labels]
    if str(source).startswith("drawn:"):
        return _open_drawn(str(source), labels)
    path = Path(source)
    if not path.exists():
        raise DatasetError("no such folder or list file; or give drawn:calibration or drawn:val", path)
    items = _folder(path, labels) if path.is_dir() else _list_file(path, labels)
    if not items:
        raise DatasetError(f"holds no images; put some in ({', '.join(SUFFIXES)})", path)
    return Dataset(str(source), tuple(items))


def _open_drawn(source: str, labels: Sequence[str] | None) -> Dataset:
    split, _, count = source.removeprefix("drawn:").partition(":")
    if split not in drawn.SPLITS or not re.fullmatch(r"([1-9]\d*)?", count):
        raise DatasetError(
            f"write drawn:SPLIT or drawn:SPLIT:COUNT with SPLIT one of {', '.join(drawn.SPLITS)}", source
        )
    total = int(count or drawn.COUNTS[split])
    names = drawn.LABELS if labels is None else labels
    indices = [_index(name, names, source) for name in drawn.LABELS]
    items = (Item(f"{split}/{i}", indices[i % len(indices)], (split, i)) for i in range(total))
    return Dataset(source, tuple(items))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _are_numbers(labels: Sequence[str]) -> bool:
    """Whether they are the names of a model whose classes nobody named."""
    return list(labels) == list(map(str, range(len(labels))))


def _index(name: str, labels: Sequence[str], where: str | Path) -> int:
    """The class with this name or this number. Raises DatasetError."""
    name = _composed(name)
    if name in labels:
        return labels.index(name)
    if name.isdecimal() and int(name) < len(labels):
        return int(name)
    near = difflib.get_close_matches(name, labels, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(labels[:3])}, ..."
    if not name.isdecimal() and _are_numbers(labels):
        hint = "they have numbers for names; `compile --labels FILE` names them"
    raise DatasetError(f"{name!r} is none of the model's {len(labels)} classes; {hint}", where)


def _indexer(names: Iterable[str], labels: Sequence[str], where: Path) -> Callable[[str], int]:
    """How the class names of one data set become indices.

    ImageNet's wnids, all of them and unknown to the model, count in sorted order, as in every framework's models.
    """
    wnids = sorted(set(names))
    if all(WNID.fullmatch(name) for name in wnids) and not set(wnids) & set(labels):
        if len(wnids) == len(labels):
            return wnids.index
        raise DatasetError(
            f"names {len(wnids)} classes by wnid, the model has {len(labels)} without wnids; "
            "give all of the model's classes, or a model whose labels are wnids",
            where,
        )
    return lambda name: _index(name, labels, where)


def _refuse_either_order(names: Iterable[str], labels: Sequence[str], folder: Path) -> None:
    """Folders named by numbers, of a model whose classes nobody named: Keras and torchvision number a folder's classes
    in the order of their names as text, which is 0, 1, 10, 11, 2 ... Raises DatasetError where that is another order.
    """
    digits = len(str(len(labels) - 1))
    found = sorted(name for name in names if name.isdecimal())
    padded = all(len(name) == digits for name in found) and any(name.startswith("0") for name in found)
    if found and digits > 1 and not padded and _are_numbers(labels):
        raise DatasetError(
            f"has folders named by numbers, {found[0]!r} and others, which is either the model's class {int(found[0])} "
            "or the class whose folder came at that place when it was trained (0, 1, 10, 11, 2 ... in Keras and "
            "torchvision); name the classes in the model's order with `compile --labels FILE`, or give a list file "
            "with each image's class number",
            folder,
        )


def _images_under(folder: Path) -> list[Path]:
    """Images at any depth, through links, hidden files left out, sorted by path.

    Raises OSError, and DatasetError for a link to what is not there: such as a data set has that was not fetched whole.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        here = Path(place).resolve()
        above = (here, *here.parents)  # a link to one of these would be walked for ever
        folders[:] = [name for name in folders if Path(place, name).resolve() not in above]
        found += (Path(place, name) for name in names)
    shown = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if dangling := [path for path in shown if path.is_symlink() and not path.exists()]:
        raise DatasetError(
            f"is a link to a file that is not there, as {len(dangling)} of {len(shown)} files below {folder} are; "
            "fetch them, or remove the links",
            dangling[0],
        )
    return [path for path in shown if path.suffix.lower() in SUFFIXES and path.is_file()]


def _raise(error: OSError) -> None:
    raise error


def _folder(folder: Path, labels: Sequence[str] | None) -> list[Item]:
    by_class: dict[str, list[Path]] = defaultdict(list)
    for path in _images_under(folder):
        parts = path.relative_to(folder).parts
        by_class[parts[0] if len(parts) > 1 else ""].append(path)
    loose = by_class.get("", [])
    if labels is not None and not by_class.keys() - {""}:
        index = _imagenet_labels(folder, loose, labels)
        return [Item(p.name, index(p) if index else None, p) for p in loose]
    if labels is not None and loose:
        raise DatasetError("lies beside folders of classes; move it into its class's folder, or away", loose[0])
    if labels is not None:
        _refuse_either_order(by_class, labels, folder)
    of = _indexer(by_class, labels, folder) if labels is not None else None
    ranked = sorted((rank, name, path) for name, paths in by_class.items() for rank, path in enumerate(paths))
    return [Item(str(path.relative_to(folder)), of(name) if of else None, path) for _, name, path in ranked]


def _imagenet_labels(folder: Path, images: list[Path], labels: Sequence[str]) -> Callable[[Path], int] | None:
    """The label of each image of ImageNet's flat validation folder; None for a folder of other images."""
    if not images or not all(IMAGENET.fullmatch(p.name) for p in images):
        return None
    for place in (folder, folder.parent):
        if (path := place / CAFFE_LABELS).is_file():
            caffe = dict(_pairs(path))
            return lambda image: _index(_of_image(caffe.get(image.name), image, path), labels, path)
        if (path := place / WNID_LABELS).is_file():
            wnids = _lines(path)
            index = _indexer(wnids, labels, path)
            return lambda image: index(_of_image(_nth(wnids, image), image, path))
    found = [DEVKIT_LABELS] if any((p / DEVKIT_LABELS).is_file() for p in (folder, folder.parent)) else []
    also = f"; {found[0]} alone does not do, it counts classes in an order of its own" if found else ""
    raise DatasetError(f"ImageNet's validation images need {CAFFE_LABELS} or {WNID_LABELS} beside them{also}", folder)


def _nth(wnids: list[str], image: Path) -> str | None:
    """The wnid on the line that the image's number says, counted from 1."""
    match = IMAGENET.fullmatch(image.name)
    number = int(match[1]) if match else 0
    return wnids[number - 1] if 0 < number <= len(wnids) else None


def _of_image(name: str | None, image: Path, labels: Path) -> str:
    if name is None:
        raise DatasetError(f"has no label for {image.name}; use the label file of these images", labels)
    return name


def _list_file(path: Path, labels: Sequence[str] | None) -> list[Item]:
    """``path label`` a line, paths relative to the file; without a label on any line, all go without."""
    pairs = _pairs(path)
    missing = [name for name, _ in pairs if not (path.parent / name).is_file()]
    if missing and pairs[0][0].lstrip().startswith(("{", "[")):
        raise DatasetError("is JSON, not a list of images; write a line for each, `path label`", path)
    if missing:
        raise DatasetError(
            f"lists {missing[0]}, which does not exist ({len(missing)} of {len(pairs)} are missing)", path
        )
    unlabelled = [name for name, label in pairs if not label]
    if labels is None or len(unlabelled) == len(pairs):
        return [Item(name, None, path.parent / name) for name, _ in pairs]
    if unlabelled:
        raise DatasetError(f"gives no label for {unlabelled[0]}; label every image or none", path)
    of = _indexer((label for _, label in pairs), labels, path)
    return [Item(name, of(label), path.parent / name) for name, label in pairs]


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Names and labels, split at the tab; where there is none at a comma behind a file that is there, or at the last
    space. Labels may be empty.
    """
    pairs = []
    for line in _lines(path):
        name, _, label = line.partition("\t") if "\t" in line else _at_comma(path.parent, line) or line.rpartition(" ")
        pairs.append((name, label.strip()) if name else (label, ""))
    return pairs


def _at_comma(folder: Path, line: str) -> tuple[str, str, str] | None:
    """As spreadsheets write two columns."""
    if "," not in line or (folder / line).is_file():
        return None
    name, comma, label = line.rpartition(",")
    if '"' in line and len(fields := next(csv.reader([line], skipinitialspace=True))) == 2:
        name, label = fields
    return (name, comma, label) if (folder / name).is_file() else None


def _lines(path: Path) -> list[str]:
    """Without a byte order mark; a file's name may be other than UTF-8, as the file system has it."""
    data = read_file(path, LIST_BYTES).removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise DatasetError("is no text file; give a folder of images, or a text file of paths and labels", path)
    return [line.strip() for line in data.decode("utf-8", "surrogateescape").splitlines() if line.strip()]
