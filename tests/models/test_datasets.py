"""Data sets: each layout opened, labels matched with the model's, and every kind of bad input named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xceptile.models import drawn
from xceptile.models.datasets import DatasetError, open_dataset
from xceptile.models.preprocess import ImageError, InputSpec

SPEC = InputSpec(24, 24)
LABELS = ("cat", "dog", "grey whale")


def write_image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((24, 24, 3), value, np.uint8)).save(path)
    return path


def found(folder: Path, labels: tuple[str, ...] | None) -> list[tuple[str, int | None]]:
    return [(item.name, item.label) for item in open_dataset(folder, labels).items]


def test_folders_of_classes_take_turns_in_sorted_order(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/2.PNG", "cat/1.png", "grey whale/deep/x.png", "cat/.hidden.png", "cat/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("txt"):
            (tmp_path / name).write_text("x")
        else:
            write_image(tmp_path / name)
    expected = [("cat/1.png", 0), ("dog/b.png", 1), ("grey whale/deep/x.png", 2), ("cat/2.PNG", 0)]
    assert found(tmp_path, LABELS) == expected


def test_classes_may_be_links_to_folders_elsewhere(tmp_path: Path) -> None:
    write_image(tmp_path / "store" / "deep" / "a.png")
    write_image(tmp_path / "data" / "dog" / "b.png")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "again").symlink_to(tmp_path / "data" / "cat")
    assert found(tmp_path / "data", LABELS) == [("cat/deep/a.png", 0), ("dog/b.png", 1)]


def test_folders_may_be_numbered_by_class(tmp_path: Path) -> None:
    write_image(tmp_path / "2" / "a.png")
    assert found(tmp_path, LABELS) == [("2/a.png", 2)]


def test_a_plain_folder_has_no_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png")
    write_image(tmp_path / "a.png")
    assert found(tmp_path, LABELS) == [("a.png", None), ("b.png", None)]


def test_calibration_takes_images_wherever_they_lie(tmp_path: Path) -> None:
    write_image(tmp_path / "loose.png")
    write_image(tmp_path / "no such class" / "a.png")
    assert found(tmp_path, None) == [("loose.png", None), ("no such class/a.png", None)]


def test_a_list_file_names_images_beside_it(tmp_path: Path) -> None:
    write_image(tmp_path / "a b.png")
    write_image(tmp_path / "deep" / "c.png")
    (tmp_path / "list.txt").write_text("a b.png\tgrey whale\n\ndeep/c.png 1\n")
    assert found(tmp_path / "list.txt", LABELS) == [("a b.png", 2), ("deep/c.png", 1)]


def test_a_list_file_may_go_without_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n")
    assert found(tmp_path / "list.txt", LABELS) == [("a.png", None)]


def imagenet(folder: Path, *numbers: int) -> None:
    for number in numbers:
        write_image(folder / f"ILSVRC2012_val_{number:08d}.png").rename(folder / f"ILSVRC2012_val_{number:08d}.JPEG")


@pytest.mark.parametrize("place", [".", ".."])
def test_imagenet_validation_with_caffes_labels(tmp_path: Path, place: str) -> None:
    imagenet(tmp_path / "val", 1, 3)
    lines = "".join(f"ILSVRC2012_val_{n:08d}.JPEG {label}\n" for n, label in ((1, 2), (2, 0), (3, 1)))
    (tmp_path / "val" / place / "val.txt").write_text(lines)
    assert [label for _, label in found(tmp_path / "val", LABELS)] == [2, 1]


def test_imagenet_validation_with_wnids_counts_them_sorted(tmp_path: Path) -> None:
    imagenet(tmp_path, 1, 2, 4)
    wnids = "n00000009\nn00000001\nn00000005\nn00000009\n"
    (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text(wnids)
    assert [label for _, label in found(tmp_path, LABELS)] == [2, 0, 2]


def test_folders_of_wnids_count_sorted_or_by_the_models_own_wnids(tmp_path: Path) -> None:
    for wnid in ("n00000009", "n00000001", "n00000005"):
        write_image(tmp_path / wnid / "a.png")
    assert [label for _, label in found(tmp_path, LABELS)] == [0, 1, 2]
    assert [label for _, label in found(tmp_path, ("n00000009", "n00000005", "n00000001", "n00000002"))] == [2, 1, 0]


def test_drawn_images_come_at_the_inputs_size() -> None:
    dataset = open_dataset("drawn:val:30")
    assert len(dataset) == 30
    assert np.array_equal(dataset.load(dataset.items[25], SPEC), drawn.draw("val", 25, 24)[0])
    assert dataset.items[25].label == 1


def test_drawn_labels_follow_the_models_order() -> None:
    assert open_dataset("drawn:val:2", tuple(reversed(drawn.LABELS))).items[1].label == 22


def test_the_hash_is_over_contents_and_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "a.png")
    before = open_dataset(tmp_path, LABELS).sha256()
    assert open_dataset(tmp_path, LABELS).sha256() == before
    assert open_dataset(tmp_path).sha256() != before
    write_image(tmp_path / "cat" / "a.png", 1)
    assert open_dataset(tmp_path, LABELS).sha256() != before


def test_a_truncated_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = write_image(tmp_path / "cat" / "a.png")
    path.write_bytes(path.read_bytes()[:40])
    dataset = open_dataset(tmp_path, LABELS)
    with pytest.raises(ImageError, match=r"cat/a\.png"):
        dataset.load(dataset.items[0], SPEC)


def error_of(source: str | Path, labels: tuple[str, ...] | None = LABELS) -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(source, labels)
    return str(caught.value)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    assert "no such folder" in error_of(tmp_path / "photos")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path) in error_of(tmp_path)
    assert "holds no images" in error_of(tmp_path, None)


def test_an_unknown_class_is_told_its_nearest(tmp_path: Path) -> None:
    write_image(tmp_path / "gray whale" / "a.png")
    assert "did you mean 'grey whale'?" in error_of(tmp_path)


def test_a_class_number_beyond_the_models_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "3" / "a.png")
    assert "'3' is none of the model's 3 classes" in error_of(tmp_path)


def test_a_model_whose_classes_nobody_named_says_how_to(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "a.png")
    with pytest.raises(DatasetError, match=r"'cat' is none of the model's 3 classes; .*--labels"):
        open_dataset(tmp_path, ("0", "1", "2"))


def test_an_image_beside_the_folders_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "a.png")
    write_image(tmp_path / "b.png")
    assert "b.png: lies beside folders" in error_of(tmp_path)


def test_some_of_the_wnids_do_not_tell_their_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "n00000009" / "a.png")
    assert "names 1 classes by wnid, the model has 3" in error_of(tmp_path)


@pytest.mark.parametrize("lines", ["b.png 1\n", "a.png 1\nb.png 1\n"])
def test_a_list_with_missing_images_is_refused(tmp_path: Path, lines: str) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(lines)
    assert "lists b.png, which does not exist" in error_of(tmp_path / "list.txt")


def test_a_list_with_some_labels_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png 1\na.png\n")
    assert "gives no label for a.png" in error_of(tmp_path / "list.txt")


def test_an_image_is_no_list(tmp_path: Path) -> None:
    assert "is no text file" in error_of(write_image(tmp_path / "a.png"))


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n")
    assert "holds no images" in error_of(tmp_path / "list.txt")


def test_imagenet_validation_without_its_labels(tmp_path: Path) -> None:
    imagenet(tmp_path, 1)
    assert "need val.txt or" in error_of(tmp_path)
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n")
    assert "an order of its own" in error_of(tmp_path)


def test_imagenet_validation_with_too_few_labels(tmp_path: Path) -> None:
    imagenet(tmp_path, 1, 2)
    (tmp_path / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 2\n")
    assert "has no label for ILSVRC2012_val_00000002.JPEG" in error_of(tmp_path)


@pytest.mark.parametrize("source", ["drawn:test", "drawn:val:0", "drawn:val:many", "drawn:"])
def test_a_drawn_set_that_is_none(source: str) -> None:
    assert "write drawn:SPLIT" in error_of(source, None)


def test_a_model_that_does_not_know_the_drawn_classes() -> None:
    assert "'triangle' is none of the model's 3 classes" in error_of("drawn:val")


def test_drawn_images_are_square() -> None:
    dataset = open_dataset("drawn:val:1")
    with pytest.raises(DatasetError, match="square"):
        dataset.load(dataset.items[0], InputSpec(24, 32))


def numbers(count: int) -> tuple[str, ...]:
    """The labels of a model whose classes nobody named."""
    return tuple(map(str, range(count)))


@pytest.mark.parametrize("folders", [["0", "1", "10", "2"], ["2"], ["10"], ["1", "3"]])
def test_numbered_folders_of_unnamed_classes_have_two_orders(folders: list[str], tmp_path: Path) -> None:
    """Keras calls the folder 10 class 2; whether the model's class 2 is that one, nobody has said."""
    for name in folders:
        write_image(tmp_path / name / "a.png")
    with pytest.raises(
        DatasetError, match=r"has folders named by numbers, '\d+' and others, .*--labels FILE.* list file"
    ):
        open_dataset(tmp_path, numbers(11))
    as_keras_counts = tuple(sorted(numbers(11)))
    assert sorted(found(tmp_path, as_keras_counts)) == sorted(
        (f"{name}/a.png", as_keras_counts.index(name)) for name in folders
    )


def test_numbered_folders_whose_two_orders_agree(tmp_path: Path) -> None:
    """Up to ten classes, or padded names; a list file says the class's number itself."""
    write_image(tmp_path / "few" / "9" / "a.png")
    assert found(tmp_path / "few", numbers(10)) == [("9/a.png", 9)]
    for name in ("02", "10"):
        write_image(tmp_path / "padded" / name / "a.png")
    assert found(tmp_path / "padded", numbers(11)) == [("02/a.png", 2), ("10/a.png", 10)]
    (tmp_path / "list.txt").write_text("few/9/a.png 10\n")
    assert found(tmp_path / "list.txt", numbers(11)) == [("few/9/a.png", 10)]


def test_class_names_are_compared_composed(tmp_path: Path) -> None:
    """A folder out of a Mac's archive has the e and its accent apart."""
    write_image(tmp_path / "cafe\u0301" / "a.png")
    (tmp_path / "list.txt").write_text("cafe\u0301/a.png\tcafe\u0301\n")
    for label in ("caf\u00e9", "cafe\u0301"):
        assert [label for _, label in found(tmp_path, ("bar", label))] == [1]
        assert [label for _, label in found(tmp_path / "list.txt", ("bar", label))] == [1]


@pytest.mark.parametrize("link", ["cat/b.png", "dog"])
def test_a_link_to_what_is_not_there_is_refused(link: str, tmp_path: Path) -> None:
    """Images, or a class's folder, of a data set that was not fetched whole."""
    write_image(tmp_path / "cat" / "a.png")
    (tmp_path / link).symlink_to(tmp_path / "store" / "nowhere")
    for labels in (LABELS, None):
        with pytest.raises(DatasetError, match="is a link to a file that is not there, as 1 of 2 files below"):
            open_dataset(tmp_path, labels)
    (tmp_path / link).unlink()
    (tmp_path / "cat" / ".cache").symlink_to(tmp_path / "nowhere")  # hidden files are nobody's images
    assert found(tmp_path, LABELS) == [("cat/a.png", 0)]
