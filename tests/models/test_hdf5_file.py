"""HDF5 files and Keras archives of strangers: what lies outside the file is never read, nor more than it holds."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from xceptile.models import hdf5_file, zoo
from xceptile.models.hdf5_child import Refused, read
from xceptile.models.hdf5_file import Hdf5Error, read_hdf5
from xceptile.models.keras_file import read_keras
from xceptile.models.weights import CheckpointError

SECRET = np.arange(40, dtype=np.float32)


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A file that only its owner should read."""
    path = tmp_path / "id_ed25519"
    path.write_bytes(SECRET.tobytes())
    return path


def external_storage(file: h5py.File, private: Path) -> None:
    file.create_dataset("dense/bias", (40,), np.float32, external=[(str(private), 0, h5py.h5f.UNLIMITED)])


def external_link(file: h5py.File, private: Path) -> None:
    with h5py.File(private.with_suffix(".h5"), "w") as other:
        other["bias"] = SECRET
    file["dense/bias"] = h5py.ExternalLink(str(private.with_suffix(".h5")), "bias")


def external_link_to_a_group(file: h5py.File, private: Path) -> None:
    with h5py.File(private.with_suffix(".h5"), "w") as other:
        other["dense/bias"] = SECRET
    file["dense"] = h5py.ExternalLink(str(private.with_suffix(".h5")), "dense")


def soft_link(file: h5py.File, private: Path) -> None:
    file["kernel"] = SECRET
    file["dense/bias"] = h5py.SoftLink("/kernel")


def virtual(file: h5py.File, private: Path) -> None:
    with h5py.File(private.with_suffix(".h5"), "w") as other:
        other["bias"] = SECRET
    layout = h5py.VirtualLayout((40,), np.float32)
    layout[:] = h5py.VirtualSource(str(private.with_suffix(".h5")), "bias", (40,))
    file.create_virtual_dataset("dense/bias", layout)


Plant = Callable[[h5py.File, Path], None]
PLANTS = [external_storage, external_link, external_link_to_a_group, soft_link, virtual]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", ["a.h5", "a.hdf5", "a.weights.h5", "a.keras"])
def test_what_lies_outside_the_file_is_not_read(plant: Plant, name: str, private: Path, tmp_path: Path) -> None:
    path, inner = tmp_path / name, tmp_path / "inner.h5"
    with h5py.File(inner, "w") as file:
        plant(file, private)
    with h5py.File(inner) as file:  # h5py itself reads through it: the trap works
        assert np.array_equal(np.asarray(file["dense/bias"]), SECRET)
    if name == "a.keras":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", "{}")
            archive.write(inner, "model.weights.h5")
    else:
        inner.rename(path)
    with pytest.raises(CheckpointError, match=r"which (is|are) not (read|followed)") as caught:
        zoo.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def compressed(file: h5py.File) -> None:
    file.create_dataset("dense/kernel", (2**20,), np.float32, compression="gzip")[:] = 0


def never_written(file: h5py.File) -> None:
    file.create_dataset("dense/kernel", (2**31, 4), np.float32)


def never_written_in_chunks(file: h5py.File) -> None:
    file.create_dataset("dense/kernel", (2**31, 4), np.float32, chunks=(1024, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (compressed, "has dense/kernel compressed, which is not unpacked; `h5repack"),
        (never_written, "holds less than dense/kernel claims"),
        (never_written_in_chunks, "holds less than dense/kernel claims"),
    ],
)
def test_more_than_the_file_holds_is_not_read(make: Callable[[h5py.File], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        make(file)
    with path.open("rb") as file, pytest.raises(Hdf5Error, match=message):
        read_hdf5(file)


def test_many_arrays_over_the_same_bytes_are_not_read(tmp_path: Path) -> None:
    """Each name of an array counts, so a small file cannot fill the memory with one array under many names."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["kernel"] = np.ones(1000, np.float32)
    assert list(read(io.BytesIO(path.read_bytes()), [])[0]) == ["kernel"]
    with h5py.File(path, "a") as file:
        file["twin"] = file["kernel"]
    with pytest.raises(Refused, match=r"holds less than \w+ claims \(1000 numbers\)"):
        read(io.BytesIO(path.read_bytes()), [])


def test_arrays_that_nobody_wants_may_be_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["layers/dense/vars/0"] = SECRET
        never_written(file)
    with path.open("rb") as opened:
        assert list(read_hdf5(opened, ("dense",)).arrays) == ["layers/dense/vars/0"]


def archive_of(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("member", ["config.json", "model.weights.h5"])
def test_archives_that_unpack_to_far_more_are_refused(member: str, tmp_path: Path) -> None:
    members = {"config.json": b"{}", "model.weights.h5": b"", member: bytes(2**26)}
    path = archive_of(tmp_path / "a.keras", members)
    assert path.stat().st_size < 2**17
    with pytest.raises(CheckpointError, match=f"has {member} of 64 MB packed into .* kB; give a file that Keras saved"):
        read_keras(path)


def test_an_archive_that_lies_about_its_size_unpacks_no_more_than_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size in the directory is what is looked at, so no more than that may come out."""
    path = archive_of(tmp_path / "a.keras", {"config.json": bytes(2**24), "model.weights.h5": b""})
    data = path.read_bytes()
    true, told = (2**24).to_bytes(4, "little"), (100).to_bytes(4, "little")
    path.write_bytes(data.replace(true, told))
    unpacked = 0
    real = zlib.decompressobj

    class Counted:
        def __init__(self, *arguments: int) -> None:
            self.real = real(*arguments)

        def decompress(self, piece: bytes, most: int = 0) -> bytes:
            nonlocal unpacked
            out = self.real.decompress(piece, most)
            unpacked += len(out)
            return out

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

    monkeypatch.setattr(zlib, "decompressobj", Counted)
    with pytest.raises(CheckpointError):
        read_keras(path)
    assert 0 < unpacked < 2**20


def test_members_packed_otherwise_are_refused(tmp_path: Path) -> None:
    """bz2 and lzma unpack a block at once, whatever its size."""
    path = archive_of(tmp_path / "a.keras", {"config.json": b"{}", "model.weights.h5": b""}, zipfile.ZIP_LZMA)
    with pytest.raises(CheckpointError, match=r"has config\.json packed in a way that is not unpacked here"):
        read_keras(path)


def test_archives_that_are_no_model(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "a.keras", {"config.json": b"{}", "model.weights.npz": b""})
    with pytest.raises(
        CheckpointError, match=r"is not a Keras model: .*model\.weights\.h5.*; save it again with model"
    ):
        read_keras(path)


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="it is a pipe"):
        read_keras(path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A sound file with a text in the heap that HDF5 has for texts of any length."""
    path = tmp_path / "small.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = "{}"
        file["model_weights/dense/dense/kernel:0"] = np.ones((3, 2), np.float32)
    return path


def test_cut_files_raise_one_error(small: Path) -> None:
    whole = small.read_bytes()
    assert list(read(io.BytesIO(whole), [])[0]) == ["model_weights/dense/dense/kernel:0"]
    for length in range(0, len(whole), 97):
        with pytest.raises(Refused, match="truncated or damaged"):
            read(io.BytesIO(whole[:length]), [])


def test_a_file_that_the_library_never_ends_with_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size of zero in the heap of texts: HDF5 2.0.0 goes round in it for ever."""
    monkeypatch.setattr(hdf5_file, "_SECONDS", 3)
    data = bytearray(small.read_bytes())
    heap = data.index(b"GCOL")
    data[heap + 24 : heap + 32] = bytes(8)  # the first object's size
    small.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read in 3 seconds: damaged; copy it again"):
        read_keras(small)


def test_a_crash_of_the_library_is_an_error(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(hdf5_file, "_CHILD", child)
    with pytest.raises(CheckpointError, match=r"cannot be read by the HDF5 library \(status -11\): damaged"):
        read_keras(small)


def test_an_attribute_that_is_no_text_is_no_config(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = np.array([b"{}"] * 3)
        file["kernel"] = SECRET
    assert read_keras(path).config is None
