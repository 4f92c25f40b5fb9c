"""Getting onto a device: login shells of all kinds, ssh's refusals with what to do, folders for its sockets."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from support.needs import requires
from support.ssh_server import sshd

from xceptile.models.locked import locked
from xceptile.runtime.devices import ssh
from xceptile.runtime.devices.ssh import for_any_shell
from xceptile.runtime.engines.engine import EngineError, times_ms
from xceptile.runtime.engines.native_program import NativeProgramEngine

ODD = "echo 'a b!' \"$HOME\" `echo x` \\\\ 100% \u00fc\n[ 1 = 1 ] && echo {a,b} *$$#~ ; exit 3"
SHELLS = {"sh": "dash", "tcsh": "tcsh", "fish": "fish", "busybox": "busybox", "mksh": "mksh"}


@pytest.mark.parametrize("shell", [pytest.param(s, marks=requires(s, package=p)) for s, p in SHELLS.items()])
def test_a_script_means_the_same_to_every_login_shell(shell: str, tmp_path: Path) -> None:
    """sshd runs SHELL -c COMMAND."""
    words = ["busybox", "sh"] if shell == "busybox" else [shell]
    there = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done, expected = (
        subprocess.run([*w, "-c", text], capture_output=True, check=False, env=there, cwd=tmp_path)
        for w, text in ((words, for_any_shell(ODD)), (["sh"], ODD))
    )
    pid = (expected.stdout.splitlines()[-1].split(b"*")[-1], done.stdout.splitlines()[-1].split(b"*")[-1])
    assert done.stdout.replace(pid[1], b"") == expected.stdout.replace(pid[0], b"")
    assert (done.returncode, done.stderr) == (3, b"")


def test_standard_input_reaches_the_script(tmp_path: Path) -> None:
    done = subprocess.run(["sh", "-c", for_any_shell("cat\nexit $?")], input=b"data", capture_output=True, check=False)
    assert done.stdout == b"data"


needs_server = [
    requires("ssh", package="openssh-client"),
    pytest.mark.skipif(sshd() is None, reason="needs sshd (apt install openssh-server)"),
]


def refused(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """What is said of a device whose ssh gets these options first."""
    real = shutil.which("ssh")
    (tmp_path / "ssh").write_text(f'#!/bin/sh\nexec {real} {" ".join(options)} "$@"\n')
    (tmp_path / "ssh").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        with pytest.raises(EngineError) as caught:
            ssh.connect.__wrapped__(server[0]).shell("true")
    return str(caught.value)


@pytest.mark.parametrize("case", ["unknown", "changed", "no key"])
class TestAdvice:
    pytestmark = needs_server

    def test_a_refusal_says_what_to_do(
        self, case: str, server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known = tmp_path / "known_hosts"
        key = subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
        assert key.returncode == 0
        port = server[0].rpartition(":")[2]
        known.write_text("" if case == "unknown" else f"[127.0.0.1]:{port} {(tmp_path / 'key.pub').read_text()}")
        options = ["-o", f"UserKnownHostsFile={known}"]
        if case == "no key":
            options = ["-o", "IdentityFile=none", "-o", "PubkeyAuthentication=no"]
        text = refused(server, tmp_path, monkeypatch, *options)
        assert "cannot be reached" in text
        user = server[0].removeprefix("ssh://").partition("@")[0]
        assert {
            "unknown": f"unknown here: log in once by hand and compare it: ssh -p {port} -l {user} 127.0.0.1",
            "changed": "is not the one that was known",
            "no key": f"no key of yours is accepted there: `ssh-copy-id -p {port} -l {user} 127.0.0.1`",
        }[case] in text


@pytest.mark.parametrize("mark", [pytest.param("x", marks=needs_server)])
def test_a_remote_command_in_the_settings_does_not_take_ours_place(
    mark: str, server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("Host *\n  RemoteCommand tmux\n")
    real = shutil.which("ssh")
    assert real is not None
    settings = Path(real).read_text().split("-F ")[1].split(" ")[0]
    (tmp_path / "config").write_text(f"Host *\n  RemoteCommand tmux\nInclude {settings}\n")
    (tmp_path / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {tmp_path / "config"} "$@"\n')
    (tmp_path / "ssh").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert ssh.connect.__wrapped__(server[0]).shell("echo here").stdout == b"here\n"


def test_sockets_lie_in_the_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    for folder, used in ((short, short), (tmp_path / "a b", Path("/tmp")), (short / ("x" * 99), Path("/tmp"))):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        words = ssh.connect.__wrapped__("ssh://nowhere").command
        (place,) = (word for word in words if word.startswith("ControlPath="))
        assert Path(place.partition("=")[2]).parent.parent == used
    monkeypatch.setattr(tempfile, "mkdtemp", no_folder)  # then every command connects anew
    assert not any("Control" in word for word in ssh.connect.__wrapped__("ssh://nowhere").command)
    shutil.rmtree(short)


def no_folder(**_: object) -> str:
    raise OSError("read-only")


def test_a_system_without_locks_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def enosys(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", enosys)
    with locked(tmp_path):
        pass


# ---- times that a device answers with ----


@pytest.mark.parametrize(
    "samples",
    [
        *([0.0, 1.0], [-1.0, 1.0], [1.0], [1.0, 1.0, 1.0], [float("inf"), 1.0], [float("nan"), 1.0], ["1", 1.0]),
        *([True, 1.0], None, "12", {"0": 1.0, "1": 2.0}, [[1.0], [1.0]]),
    ],
)
def test_what_is_no_time_is_refused(samples: object) -> None:
    with pytest.raises(ValueError, match=r"no time|not 2 times"):
        times_ms(samples, 2)
    assert times_ms([1, 0.5], 2) == [1.0, 0.5]
    assert times_ms([0.0, 0.5], 2, zero=True) == [0.0, 0.5]


TENSOR = {"shape": [1, 2], "dtype": "int8"}
STEP = {"name": "a", "kernel": "k", "path": "p\x1b[2J", "macs": 1, "bytes": 2, "samples_ms": [0.0]}
ROOF = {"peak": {"gmac_per_s": 1.0}, "stream": {"gb_per_s": 2.0}}


def engine_that_answers(answer: dict[str, object]) -> NativeProgramEngine:
    text = json.dumps({"inputs": [TENSOR], "outputs": [TENSOR], **answer})
    done = subprocess.CompletedProcess([], 0, text, "")
    return NativeProgramEngine(("x",), PurePosixPath("y"), 1, execute=lambda *_: (done, b""))


@pytest.mark.parametrize(
    "answer",
    [{"samples_ms": [0.0]}, {"samples_ms": []}, {"samples_ms": [1e999]}, {}, {"samples_ms": [1.0, 1.0]}],
    ids=str,
)
def test_a_program_whose_times_are_none_is_an_error(answer: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="gave no times"):
        engine_that_answers(answer).time_ms(np.zeros((1, 2), np.int8), 1, 1)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"steps": []},
        {"steps": [{**STEP, "samples_ms": []}]},
        {"steps": [{**STEP, "samples_ms": [-1.0]}]},
        {"steps": [{**STEP, "macs": -1}]},
        {"steps": [{**STEP, "bytes": 0}]},
        {"steps": [{**STEP, "bytes": 1e999}]},
        {"steps": [None]},
        {"steps": [STEP], "roof": {**ROOF, "peak": {"gmac_per_s": 0.0}}},
        {"steps": [STEP], "roof": {"peak": {}}},
        {"steps": [STEP], "roof": "high"},
    ],
    ids=str,
)
def test_a_program_whose_steps_are_none_is_an_error(answer: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="gave no times of its steps"):
        engine_that_answers(answer).profile(np.zeros((1, 2), np.int8), 1, 1)


def test_a_program_s_steps() -> None:
    profile = engine_that_answers({"steps": [STEP], "roof": ROOF}).profile(np.zeros((1, 2), np.int8), 1, 1)
    assert (profile.gmac_per_s, profile.gb_per_s) == (1.0, 2.0)
    assert profile.steps[0].path == "p?[2J"
    assert engine_that_answers({"steps": [STEP]}).profile(np.zeros((1, 2), np.int8), 1, 1).gb_per_s is None


@pytest.mark.parametrize("held", [-1, "much", 1 << 70, [1], 1.5])
def test_memory_that_is_none_is_an_error(held: object) -> None:
    with pytest.raises(EngineError, match="says that it held"):
        engine_that_answers({"peak_rss_bytes": held}).peak_rss_bytes()


def test_a_network_of_no_size_that_a_device_can_have_is_refused() -> None:
    with pytest.raises(EngineError, match="describes outputs"):
        engine_that_answers({"outputs": [{"shape": [1, 1 << 40], "dtype": "int8"}]})


def test_an_answer_nested_without_end_is_an_error() -> None:
    done = subprocess.CompletedProcess([], 0, "[" * 100_000, "")
    with pytest.raises(EngineError, match="did not answer in JSON"):
        NativeProgramEngine(("x",), PurePosixPath("y"), 1, execute=lambda *_: (done, b""))
