"""One way out to the terminal: whatever text a bundle, a file or a device holds, nothing of it is obeyed."""

from __future__ import annotations

import ast
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support.needs import requires_root
from support.small_bundle import litert_files, quantized

import xceptile
from xceptile.compile import cli
from xceptile.compile.commands.common import bar
from xceptile.models import drawn
from xceptile.models.visible import CONTROLS
from xceptile.runtime import pytest_plugin
from xceptile.runtime.bundle import write_bundle

ROOT = Path(xceptile.__file__).parent
HOSTILE = "\x1b]0;owned\x07\x9b2J\x7f"  # sets a title, clears the screen

# What prints by itself: the interpreter of a device, a training run, a folder's path for scripts, and before rich is
# there or where nothing but a number is said.
OWN_OUTPUT = {
    "compile/cli.py": 2,
    "compile/commands/common.py": 1,
    "compile/gpu_kit/borrowed_gpu.py": 5,  # which runs by itself, elsewhere, on a kit of ours
    "models/hdf5_child.py": 2,  # a process of ours whose standard output is a pipe to its parent
    "models/train.py": 2,
    "runtime/devices/qemu_root.py": 1,
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose every text is hostile."""
    manifest, files = litert_files(quantized())
    target = replace(manifest.target, name=f"x{HOSTILE}/y", description=HOSTILE)
    changed = replace(
        manifest,
        network=HOSTILE,
        target=target,
        labels=tuple(f"{i}{HOSTILE}" for i in range(len(manifest.labels))),
        recipe={"name": HOSTILE},
        provenance={HOSTILE: HOSTILE},
        float_layers=(HOSTILE,),
    )
    return write_bundle(tmp_path_factory.mktemp("out") / f"b{HOSTILE}", changed, files).path


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("inspect",), 0),
        (("inspect", "--json"), 0),
        (("run", "IMAGE"), 0),
        (("run", "IMAGE", "--json"), 0),
        (("run", "IMAGE", "--engine", "no such"), 2),
        (("run", "nothing" + HOSTILE), 2),
        (("verify", "--data", "LIST"), 0),
        (("verify", "--data", "nothing" + HOSTILE), 2),
        (("sensitivity", "--data", "LIST"), 0),
        (("bench", "--device", HOSTILE), 2),
        (("inspect", "--public-key", HOSTILE), 2),
        (("inspect", "--no-such" + HOSTILE), 2),
        (("estimate", "--debug"), 2),
    ],
    ids=lambda case: "_".join(case).encode("unicode_escape").decode() if isinstance(case, tuple) else str(case),
)
def test_nothing_of_a_bundle_is_obeyed(
    words: tuple[str, ...], status: int, hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, images = tmp_path / f"p{HOSTILE}.png", tmp_path / f"list{HOSTILE}.txt"
    Image.fromarray(drawn.draw("val", 0, 40)[0]).save(image)
    images.write_text(f"{image.name}\t3\n", encoding="utf-8")
    verb, *rest = ({"IMAGE": str(image), "LIST": str(images)}.get(word, word) for word in words)
    assert cli._invoke(cli.app, [verb, str(hostile), *rest]) == status
    seen = capsys.readouterr()
    assert set(CONTROLS.findall(seen.out + seen.err)) <= {"\n"}
    assert "owned" in seen.out + seen.err or verb in ("verify", "sensitivity")
    if "--json" in rest:  # scripts get the text as it is
        values = json.loads(seen.out)
        assert HOSTILE in (values["network"] if verb == "inspect" else values["results"][0]["image"])


def test_pytest_is_given_no_control_characters() -> None:
    with pytest.raises(pytest.fail.Exception) as caught, pytest_plugin._one_line():
        raise ValueError(HOSTILE)
    assert caught.value.msg == "ValueError: \\x1b]0;owned\\x07\\x9b2J\\x7f"


def test_phases_are_shown_likewise(capsys: pytest.CaptureFixture[str]) -> None:
    with bar() as progress:
        progress(f"read {HOSTILE}", 0.5)
    assert capsys.readouterr().err == "read \\x1b]0;owned\\x07\\x9b2J\\x7f\n"


@requires_root()
@pytest.mark.parametrize("words", ["--version", "recipe", "targets", "--help"])
def test_what_does_not_arrive_is_no_success(words: str, tmp_path: Path) -> None:
    os.mknod(tmp_path / "full", stat.S_IFCHR | 0o666, os.makedev(1, 7))
    with (tmp_path / "full").open("wb") as full:
        command = [sys.executable, "-m", "xceptile.compile.cli", words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: OSError: [Errno 28] No space left on device\n")


def test_there_is_no_other_way_out() -> None:
    """Calls that write to a terminal, by file; and rich's own texts, which the console does not look at, are ours."""
    calls: dict[str, int] = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.split("/")[0] not in ("compile", "models", "runtime", "calibration", "targets"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("print", "typer.echo", "typer.secho", "Console", "traceback.print_exc") or (
                called.endswith(("stdout.write", "stderr.write", "stdout.buffer.write"))
            ):
                calls[name] = calls.get(name, 0) + 1
            if called in ("Text", "Text.from_markup", "Text.assemble"):
                assert isinstance(node.args[0], ast.Constant), f"{name}:{node.lineno}"
    assert calls == OWN_OUTPUT
