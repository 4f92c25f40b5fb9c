"""Each extra brings what those need who install it: tried in an environment that holds nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from PIL import Image
from support.environments import build_wheel, make_environment
from support.tree import ROOT

from xceptile.models import drawn
from xceptile.runtime.bundle import Bundle, sign_bundle
from xceptile.runtime.signature import load_signer

pytestmark = pytest.mark.slow

Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def in_environment(wheel: Path, tmp_path: Path) -> Callable[[str], Run]:
    """For an extra: what runs a program of its environment, in an empty folder, and returns what it printed."""

    def of(extra: str) -> Run:
        python = make_environment(tmp_path / "environment", wheel, (extra,))
        (tmp_path / "work").mkdir()

        def run(program: str, *words: object, status: int | None = 0) -> str:
            command = [python.parent / program, *map(str, words)]
            done = subprocess.run(command, cwd=tmp_path / "work", capture_output=True, text=True, check=False)
            assert status in (None, done.returncode), done.stdout + done.stderr
            assert "Traceback" not in done.stderr
            return done.stdout

        return run

    return of


def test_device(in_environment: Callable[[str], Run], small_bundle: Bundle, tmp_path: Path) -> None:
    """A board: its images, by both engines, from a bundle that is signed; and how long that takes."""
    run = in_environment("device")
    image = tmp_path / "image.png"
    Image.fromarray(drawn.draw("val", 0, 64)[0]).save(image)
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key.pem").write_bytes(pem)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public.pem").write_bytes(public)
    shutil.copytree(small_bundle.path, tmp_path / "bundle")
    sign_bundle(tmp_path / "bundle", load_signer(tmp_path / "key.pem"))
    signed = (tmp_path / "bundle", "--public-key", tmp_path / "public.pem")
    answers = [
        json.loads(run("xceptile", "run", signed[0], image, *signed[1:], "--engine", engine, "--json"))["results"]
        for engine in ("native", "litert")
    ]
    assert answers[0] == answers[1]
    assert "sha256" in run("xceptile", "inspect", *signed)
    assert "p50" in run("xceptile", "bench", *signed, "--duration", "0.001s", "--rounds", 1, "--repeats", 1)
    assert "raspberry-pi-5" in run("xceptile", "targets")
    assert "ai-edge-litert" in run("xceptile", "doctor")
    missing = run("xceptile", "verify", *signed, "--data", "drawn:val:1", status=2)
    assert missing == ""


def code_blocks(text: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in blocks if name == language]


def test_gate_as_its_page_has_it(in_environment: Callable[[str], Run], small_bundle: Bundle, tmp_path: Path) -> None:
    """docs/testing.md: what it installs, its five lines, its settings and its commands, on this machine."""
    page = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    (extra,) = re.findall(r"`pip install 'xceptile\[(\w+)\]'`", page)
    run = in_environment(extra)
    repository = tmp_path / "work"
    (repository / "test_accuracy.py").write_text(code_blocks(page, "python")[0])
    settings = code_blocks(page, "toml")[0].replace("photos/val", "drawn:val:8")
    assert set(tomllib.loads(settings)["tool"]["pytest"]["ini_options"]) == {
        "xceptile_bundle", "xceptile_data", "xceptile_baseline"
    }  # fmt: skip
    (repository / "pyproject.toml").write_text(settings)
    shutil.copytree(small_bundle.path, repository / "build/host")
    baseline, test = (line.split() for line in code_blocks(page, "")[0].strip().splitlines())
    where = {"build/raspberry-pi-5": "build/host", "raspberry-pi-5": "host", "photos/val": "drawn:val:8"}
    where["ssh://pi@board"] = "local"
    run(*(where.get(word, word) for word in baseline), "--rounds", 6)
    assert "1 passed" in run("python", "-m", *(where.get(word, word) for word in test))
    data = ("--data", "drawn:val:8")
    run("xceptile", "verify", "build/host", *data)
    words = ("--baseline", "baseline.json", "--rounds", 6, "--json")
    findings = json.loads(run("xceptile", "check", "build/host", *data, *words, status=None))["findings"]
    judged = {f["what"]: f["outcome"] for f in findings if "latency" not in f["what"] and "faster" not in f["what"]}
    assert set(judged.values()) == {"pass"}  # but time, which no test of ours is about
    run("xceptile", "sensitivity", "build/host", *data)
    run("xceptile", "report", "build/host", *data, "--output", "report.html", "--rounds", 1)
    run("xceptile", "compile", "--target", "host", "--model", "demo", "--calibration", "x", "--output", "b", status=2)


def test_compile(in_environment: Callable[[str], Run], tmp_path: Path) -> None:
    run = in_environment("compile")
    words = ("--target", "host", "--model", "demo", "--calibration", "drawn:calibration:4", "--recipe", "min-max")
    run("compile", *words, "--output", "bundle", "--also", "onnx-qdq", "--also", "relax-vm")
    assert "are what the bundle's graphs make" in run("xceptile", "verify", "bundle", "--data", "drawn:val:8")


def test_every_extra_that_is_named_is_there(wheel: Path) -> None:
    """In messages and pages."""
    metadata = (wheel.parent / "source/pyproject.toml").read_text()
    known = set(tomllib.loads(metadata)["project"]["optional-dependencies"])
    assert {"device", "gate", "compile"} < known
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *ROOT.glob("[cmr]*/**/*.py")]:
        for names in re.findall(r"xceptile\[([\w,]+)\]", path.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= known, path
    assert importlib.metadata.version("xceptile")
