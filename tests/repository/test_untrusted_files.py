"""What is named may be a pipe that never ends or a device without end: every reader looks at a file's kind first."""

from __future__ import annotations

import contextlib
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.bundle_files import FILES, manifest

from xceptile.calibration.recipe import RecipeError
from xceptile.compile import tuning
from xceptile.compile.commands.compile import recipe_named
from xceptile.models import serialize, zoo
from xceptile.models.datasets import open_dataset
from xceptile.models.from_onnx import load_onnx
from xceptile.models.preprocess import ImageError, InputSpec, load_image
from xceptile.models.pth_file import read_pth
from xceptile.models.read_file import BASELINE_BYTES, LIST_BYTES, MODEL_BYTES, TEXT_BYTES, check_file, read_file
from xceptile.models.weights import CheckpointError, load_checkpoint
from xceptile.runtime import baseline
from xceptile.runtime.bundle import MANIFEST, open_bundle, write_bundle
from xceptile.runtime.shards import _kept
from xceptile.runtime.signature import SIGNATURE, check_signature, load_signer


def _open_signed(path: Path) -> None:
    key = path.parent / "public.pem"
    if not key.exists():
        key.write_bytes(
            Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
    open_bundle(path.parent, key)


def _begin(path: Path) -> None:
    with _kept(path, {}):
        pass


def _model() -> Any:
    return zoo.Model(None, None, ("a", "b"), {})  # type: ignore[arg-type]  # the file is looked at first


# How each kind of file is called, who reads it, and the most that it may hold.
READERS: dict[str, tuple[str, Callable[[Path], Any], int]] = {
    "manifest": (MANIFEST, lambda path: open_bundle(path.parent), TEXT_BYTES),
    "signature": (SIGNATURE, _open_signed, TEXT_BYTES),
    "public key": ("public.pem", lambda path: check_signature(b"", bytes(64), path), TEXT_BYTES),
    "private key": ("key.pem", load_signer, TEXT_BYTES),
    "baseline": ("baselines.json", lambda path: baseline.load_baseline(path, "t", "d", "make one"), BASELINE_BYTES),
    "tuning": ("tuning.json", tuning.load, TEXT_BYTES),
    "labels": ("labels.txt", lambda path: zoo.with_labels(_model(), path), TEXT_BYTES),
    "list": ("list.txt", open_dataset, LIST_BYTES),
    "results": ("results.jsonl", _begin, LIST_BYTES),
    "image": ("photo.png", lambda path: load_image(path, InputSpec(2, 2)), MODEL_BYTES),
    "graph": ("int8.safetensors", serialize.load, MODEL_BYTES),
    "checkpoint": ("net.safetensors", load_checkpoint, MODEL_BYTES),
    "pickle": ("net.pth", read_pth, MODEL_BYTES),
    "ONNX": ("net.onnx", load_onnx, MODEL_BYTES),
    **{f"model{suffix}": (f"net{suffix}", zoo.load, MODEL_BYTES) for suffix in zoo.SUFFIXES},
}


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """A read that blocks ends the test instead of the run."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits for a file")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", READERS)
def test_no_reader_waits_for_a_pipe_or_reads_a_device_or_a_file_without_end(kind: str, tmp_path: Path) -> None:
    name, read, limit_bytes = READERS[kind]
    folder = tmp_path / "b"
    write_bundle(folder, manifest(), FILES)
    path = folder / name

    def huge() -> None:
        path.touch()
        os.truncate(path, limit_bytes + 1)  # takes no room: there is nothing in it

    for make, said in (
        (lambda: os.mkfifo(path), "it is a pipe; give a regular file|is no plain file"),
        (lambda: path.symlink_to("/dev/zero"), "it is a device; give a regular file|is no plain file"),
        (huge, f"it holds more than {limit_bytes >> 20} MiB"),
    ):
        path.unlink(missing_ok=True)
        make()
        with pytest.raises((ValueError, OSError), match=said) as caught:
            read(path)
        assert str(folder) in str(caught.value)


def test_a_recipe_is_named_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.touch()
    os.truncate(path, TEXT_BYTES + 1)
    with pytest.raises(OSError, match="it holds more than 16 MiB"):
        recipe_named(str(path))
    for text in ("[" * 100_000, "1" * 5000):
        path.write_text(text)
        with pytest.raises(RecipeError, match="recipe"):
            recipe_named(str(path))


def test_a_file_that_is_longer_than_it_says_is_cut_off(tmp_path: Path) -> None:
    """Those of /proc say 0 bytes."""
    assert read_file("/proc/self/status").startswith(b"Name:")
    with pytest.raises(OSError, match="it holds more than 0 MiB"):
        read_file("/proc/self/status", 10)
    with pytest.raises(IsADirectoryError, match="it is a directory; give a file"):
        check_file(tmp_path)


def test_a_list_may_name_any_file_but_nothing_is_shown_that_is_no_image(tmp_path: Path) -> None:
    """A list is the user's own selection, so it may name files elsewhere; of these only images are decoded."""
    (tmp_path / "secret").write_text("-----BEGIN KEY-----")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "list.txt").write_text("../secret\n/etc/hostname\n")
    dataset = open_dataset(tmp_path / "data" / "list.txt")
    for item in dataset.items:
        with pytest.raises(ImageError, match="it holds none of BMP") as caught:
            dataset.load(item, InputSpec(2, 2))
        assert "BEGIN" not in str(caught.value)


def test_no_archive_is_unpacked(tmp_path: Path) -> None:
    """Whatever its entries are called."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    outside = tmp_path / "evil"
    for name in ("../../evil", str(outside), "net/../../../evil"):
        torch.save({"x": torch.zeros(1)}, folder / "net.pth")
        with zipfile.ZipFile(folder / "net.pth", "a") as archive:
            archive.writestr(name, "x")
        with contextlib.suppress(CheckpointError):  # of torch, for entries that do not begin with the file's name
            assert read_pth(folder / "net.pth")["x"].shape == (1,)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "net.pth"]
