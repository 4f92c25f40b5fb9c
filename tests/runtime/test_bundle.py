"""Bundles: written whole or not at all, every file checked on open, pixels quantized as the manifest says."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundle_files import FILES, manifest

from xceptile.models.preprocess import PixelEncoding
from xceptile.runtime import bundle as bundles
from xceptile.runtime.bundle import Artefact, BundleError, open_bundle, write_bundle


def test_a_bundle_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "b", manifest(), FILES)
    opened = open_bundle(tmp_path / "b")
    assert opened.manifest == written.manifest
    assert opened.size_bytes(opened.manifest.artefacts[0]) == len(b"network")
    inputs, outputs = opened.golden()
    assert inputs.shape == (1, 2, 2, 3)
    assert outputs.tolist() == [[1, -1]]


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    first = write_bundle(tmp_path / "a", manifest(), FILES)
    second = write_bundle(tmp_path / "b", manifest(), dict(reversed(FILES.items())))
    assert first.sha256() == second.sha256()


def test_a_bundle_is_replaced_whole(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", manifest(), FILES)
    write_bundle(tmp_path / "b", manifest(network="other"), FILES)
    assert open_bundle(tmp_path / "b").manifest.network == "other"
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("name", [*FILES])
def test_every_damaged_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path / "b", manifest(), FILES)
    file = tmp_path / "b" / name
    whole = file.read_bytes()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(BundleError, match=r"sha256") as caught:
        open_bundle(tmp_path / "b")
    assert caught.value.path == file
    file.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="bytes, the manifest says"):
        open_bundle(tmp_path / "b")
    file.unlink()
    with pytest.raises(BundleError, match="missing"):
        open_bundle(tmp_path / "b")


def resealed(data: dict[str, Any]) -> str:
    """A manifest with the right sha256 for its contents, as an attacker can make it."""
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return json.dumps({**rest, "sha256": bundles._contents_sha256(rest)})


@pytest.mark.parametrize(
    ("version", "advice"),
    [(bundles.FORMAT_VERSION + 1, "upgrade xceptile"), (1, "compile it again"), ("3", "compile it again")],
)
def test_another_format_says_what_to_do(tmp_path: Path, version: object, advice: str) -> None:
    write_bundle(tmp_path / "b", manifest(), FILES)
    file = tmp_path / "b" / bundles.MANIFEST
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "format": version}))
    with pytest.raises(BundleError, match=f"has bundle format {version}, .*; {advice}") as caught:
        open_bundle(tmp_path / "b")
    assert "\n" not in str(caught.value)


def test_every_changed_byte_of_a_manifest_is_refused_or_harmless(tmp_path: Path) -> None:
    """Harmless: spaces between tokens, and digits of a number beyond what a float64 holds."""
    whole = write_bundle(tmp_path / "b", manifest(), FILES).manifest
    data = (tmp_path / "b" / bundles.MANIFEST).read_bytes()
    harmless = 0
    for position, byte in enumerate(data):
        for value in {byte ^ 1, byte ^ 0x80, ord(" ")} - {byte}:
            changed = data[:position] + bytes([value]) + data[position + 1 :]
            try:
                opened = bundles.manifest_from_json(changed.decode(), tmp_path)
            except UnicodeDecodeError:
                assert value >= 0x80
                continue
            except BundleError:
                continue
            assert opened == whole
            assert data[position : position + 1].isspace()
            harmless += 1
    assert harmless


WRONG = (None, True, -1, 1.5, "", "x", [], [[]], {}, {"x": 1})


def _paths(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    # Of a long list the first few: its items are alike.
    keys = value.keys() if isinstance(value, dict) else range(min(4, len(value))) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _paths(value[key])


def test_a_value_of_a_wrong_type_is_refused_whatever_the_hash_says(tmp_path: Path) -> None:
    """Every value of a manifest in place of every other kind: refused, or a manifest whose every field has its type."""
    write_bundle(tmp_path / "b", manifest(pixels=PixelEncoding(((1, 2, 3),) * 256)), FILES)
    data = json.loads((tmp_path / "b" / bundles.MANIFEST).read_text())
    refused = 0
    for container, key in _paths(data):
        kept = container[key]
        if key in ("format", "sha256"):
            continue
        for value in WRONG:
            container[key] = value
            try:
                read = bundles.manifest_from_json(resealed(data), tmp_path)
            except BundleError:
                refused += 1
            else:
                assert json.loads(bundles.manifest_to_json(read)) == json.loads(resealed(data))
        container[key] = kept
    assert refused > 300


def test_an_artefact_of_files_that_nobody_checked_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", manifest(artefacts=(Artefact("litert", "int8", ("elsewhere",)),)), FILES)
    with pytest.raises(BundleError, match="does not list, 'elsewhere'"):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", '{"format": "2"}', '{"format": 2}', '{"format": 2, "target": 3}', "[" * 100_000, "\xff"],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / bundles.MANIFEST).write_text(text)
    with pytest.raises(BundleError):
        open_bundle(tmp_path)


def _entry(name: str, **changes: object) -> Callable[[Any], None]:
    return lambda data: data["files"][name].update(changes)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.update(artefacts=[]),
        lambda data: data["artefacts"][0].update(engine="relax-vm"),
        lambda data: data["artefacts"][0].update(dtype="float32"),
        lambda data: data["artefacts"][0].update(files=[]),
        lambda data: data["input"].update(scale=float("inf")),
        lambda data: data["output"].update(scale=0),
        lambda data: data["output"].update(scale=-1.0),
        lambda data: data["output"].update(zero_point=128),
        lambda data: data["output"].update(shape=[1, 0]),
        lambda data: data["output"].update(shape=[1, -2]),
        lambda data: data["output"].update(shape=[1 << 40, 2]),
        lambda data: data["output"].update(shape=[]),
        lambda data: data.update(golden_count=0),
        lambda data: data.update(golden_count=-1),
        lambda data: data.update(golden_count=2),
        lambda data: data["files"].pop(bundles.GOLDEN_OUTPUT),
        _entry(bundles.GOLDEN_INPUT, size_bytes=13),
        _entry(bundles.LITERT_INT8, size_bytes=-1),
        _entry(bundles.LITERT_INT8, sha256="0"),
        lambda data: data["files"].update({"a\x1b[2J": data["files"][bundles.LITERT_INT8]}),
        lambda data: data["files"].update({"a//b": data["files"][bundles.LITERT_INT8]}),
        lambda data: data["files"].update({"./a": data["files"][bundles.LITERT_INT8]}),
        lambda data: data["files"].update({"": data["files"][bundles.LITERT_INT8]}),
    ],
)
def test_values_that_cannot_be_are_refused_whatever_the_hash_says(tmp_path: Path, spoil: Callable[[Any], None]) -> None:
    write_bundle(tmp_path / "b", manifest(), FILES)
    file = tmp_path / "b" / bundles.MANIFEST
    data = json.loads(file.read_text())
    spoil(data)
    file.write_text(resealed(data))
    with pytest.raises(BundleError, match="is a damaged manifest") as caught:
        open_bundle(tmp_path / "b")
    assert "\n" not in str(caught.value)


def test_a_file_outside_the_bundle_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", manifest(), FILES)
    file = tmp_path / "b" / bundles.MANIFEST
    file.write_text(resealed(json.loads(file.read_text().replace("litert/int8.tflite", "../int8.tflite"))))
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(tmp_path / "b")


def test_a_directory_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(BundleError, match="not empty"):
        write_bundle(tmp_path / "photos", manifest(), FILES)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "b", manifest(), FILES | {"litert/int8.tflite/impossible": b""})
    assert os.listdir(tmp_path) == []


def test_what_is_no_bundle_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file.tflite").write_bytes(b"data")
    (tmp_path / "folder").mkdir()
    for name, what in (
        ("file.tflite", "is a file, and a bundle is a directory"),
        ("folder", f"holds no {bundles.MANIFEST}"),
        ("nothing", "no such bundle directory"),
        ("file.tflite/below", "no such bundle directory"),
    ):
        with pytest.raises(BundleError, match=f"{name}: {what}"):
            open_bundle(tmp_path / name)


def test_pixels_are_flipped_or_looked_up(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    plain = write_bundle(tmp_path / "a", manifest(), FILES)
    assert np.array_equal(plain.quantize_pixels(pixels), pixels.astype(np.int16) - 128)
    table = tuple((v % 7, v % 5, -(v % 3)) for v in range(256))
    mapped = write_bundle(tmp_path / "b", manifest(pixels=PixelEncoding(table)), FILES)
    expected = [[table[p][c] for c, p in enumerate(row)] for row in pixels.reshape(-1, 3)]
    assert open_bundle(mapped.path).quantize_pixels(pixels).reshape(-1, 3).tolist() == expected
    for bundle in (plain, mapped):
        for other in (np.float32, np.int8, np.int64, bool):
            with pytest.raises(TypeError, match=rf"pixels are uint8, .* got {np.dtype(other)}"):
                bundle.quantize_pixels(pixels.astype(other))  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="takes pixels of 3 channels"):
        mapped.quantize_pixels(pixels.reshape(1, 2, 1, 6))
