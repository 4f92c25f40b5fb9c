"""Text of strangers: what a terminal would obey is escaped, what a language needs is not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from support.small_bundle import compiled_model

from xceptile.models.visible import CONTROLS, visible
from xceptile.models.zoo import ModelError, with_labels


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("\x9b2J\x7f\r", "\\x9b2J\\x7f\\x0d"),
        ("gnp\u202etac", "gnp\\u202etac"),
        ("a\u2028b\u2069", "a\\u2028b\\u2069"),
        (os.fsdecode(b"caf\xe9.jpg"), "caf\\xe9.jpg"),
        ("two\tcolumns\nlines", "two\tcolumns\nlines"),
        ("Straße 猫\u3000犬 می\u200cروم 👩\u200d🔬", "Straße 猫\u3000犬 می\u200cروم 👩\u200d🔬"),
    ],
)
def test_controls_are_escaped_and_letters_are_not(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert not CONTROLS.search(visible(text).replace("\n", "").replace("\t", ""))


@pytest.mark.parametrize("name", ["cat\x1b[2J", "dog\n", "a\tb", "\u202ecat"])
def test_no_model_has_a_class_whose_name_holds_a_control_character(name: str, tmp_path: Path) -> None:
    """Every loader makes a Model; a file of labels says which line is at fault."""
    model = compiled_model()
    with pytest.raises(ModelError, match=r"^net\.pth: class 1 is named '.*\\[xnut].*', with a control character"):
        replace(model, labels=("first", name, *model.labels[2:]), provenance={"source": "net.pth"})
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join([*model.labels[:-1], "cat\x1b[2J"]), encoding="utf-8")
    with pytest.raises(ModelError, match=r"labels\.txt: class 23 is named 'cat\\x1b\[2J'"):
        with_labels(model, labels)
