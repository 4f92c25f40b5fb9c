"""A device behind ssh: a real sshd on the loopback interface, a home folder with a hostile name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image
from support import int8_graphs
from support.needs import requires
from support.ssh_server import ssh_server, sshd

from xceptile.compile import cli
from xceptile.compile.tune import tune
from xceptile.models import drawn
from xceptile.models import graph as ir
from xceptile.runtime import bundle as bundles
from xceptile.runtime.baseline import load_baseline, save_baseline
from xceptile.runtime.bundle import Bundle
from xceptile.runtime.devices import link as links
from xceptile.runtime.devices import remote, ssh, store
from xceptile.runtime.devices.store import Scratch
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.engines.native_program import NativeProgramEngine
from xceptile.runtime.evaluate_engines import contenders, runnable
from xceptile.runtime.gate_run import Run, baseline_command, measure
from xceptile.runtime.plan import restate
from xceptile.runtime.session import open_engine, open_session, place, processors
from xceptile.runtime.shards import Job, verify_shards
from xceptile.runtime.verdict import Budget, judge
from xceptile.targets import catalog

HOSTILE = "a b; $(touch pwned) `touch pwned` 'single' \"double\" \\ \n *"
CORE = str(min(os.sched_getaffinity(0)))

pytestmark = [
    requires("ssh", package="openssh-client"),
    pytest.mark.skipif(sshd() is None, reason="needs sshd (apt install openssh-server)"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the device's commands start."""
    return tmp_path_factory.mktemp("ssh") / HOSTILE.replace("\n", " ")


@pytest.fixture(scope="module")
def device(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("sshd")
    with pytest.MonkeyPatch.context() as patch, ssh_server(folder / "server", home, folder / "programs") as name:
        patch.setenv("PATH", f"{folder / 'programs'}{os.pathsep}{os.environ['PATH']}")
        yield name


@pytest.fixture
def link(home: Path, kept: ssh.SshLink) -> ssh.SshLink:
    """The link, with nothing on the device."""
    shutil.rmtree(home / ".cache", ignore_errors=True)
    return kept


@pytest.fixture
def kept(device: str, home: Path) -> Iterator[ssh.SshLink]:
    """The link, with whatever earlier tests left on the device."""
    yield ssh.connect(device)
    assert list(home.rglob("pwned")) == []
    assert not Path("pwned").exists()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were sent, in order."""
    names: list[str] = []
    send = ssh.SshLink.send

    def spy(self: ssh.SshLink, source: Path, target: PurePosixPath) -> None:
        names.append(source.relative_to(source.parents[1]).as_posix() if source.name != "input.bin" else "input")
        send(self, source, target)

    monkeypatch.setattr(ssh.SshLink, "send", spy)
    return names


def entry(path: Path, data: bytes) -> tuple[Path, str]:
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


def part_of(link: ssh.SshLink, home: Path, digest: str) -> Path:
    path = home / link.root / "files" / f"{digest}.{store._this_client()}.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_a_session_there_is_bit_exact_and_leaves_only_what_is_kept(
    link: ssh.SshLink, home: Path, small_bundle: Bundle, sent: list[str]
) -> None:
    x, expected = small_bundle.golden()
    for _ in range(2):
        with open_session(small_bundle, device=link.name) as session:
            np.testing.assert_array_equal(session.engine.run(x), expected)
            np.testing.assert_array_equal(session.engine.run(x[:1]), expected[:1])
            assert len(session.engine.time_ms(x[:1], 3, 1)) == 3
            assert session.placement == place(small_bundle.manifest.target, link.name)
            assert session.engine.self_test()
            assert session.engine.peak_rss_bytes() > 100_000
    files = [name for name in sent if name != "input"]
    assert sorted(files) == sorted(set(files))  # each once
    assert "native/weights.bin" in files
    assert "golden/output.bin" in files
    assert not any("litert" in name or "safetensors" in name for name in files)  # only what it needs
    assert {path.name for path in (home / link.root).iterdir()} == {"files", "programs"}
    assert not list((home / link.root).rglob("*.part"))


def test_a_mixed_network_s_tolerance_goes_along(kept: ssh.SshLink, small_bundle: Bundle, tmp_path: Path) -> None:
    files = {name: small_bundle.file(name).read_bytes() for name in small_bundle.manifest.files}
    outputs = np.frombuffer(files[bundles.GOLDEN_OUTPUT], np.int8).copy()
    outputs[0] += -1 if outputs[0] > 0 else 1
    files |= {bundles.GOLDEN_OUTPUT: outputs.tobytes(), "native/plan.bin": restate(files["native/plan.bin"], 1, b"")}
    mixed = bundles.write_bundle(tmp_path / "mixed", small_bundle.manifest, files)
    with open_session(mixed, device=kept.name) as session:
        assert session.engine.self_test()


def test_the_right_hardware_is_measured_another_rehearsed(kept: ssh.SshLink) -> None:
    target = catalog.get("host")
    assert place(target, kept.name).obtained == "measured"
    board = dataclasses.replace(target, name="some/board", device_tree_model="Some Board")
    assert place(board, kept.name).obtained == "rehearsed"
    facts = remote.facts(kept)
    assert facts.processors >= 1
    assert facts.architecture == target.architecture
    assert facts.detect().features == target.features
    other = "raspberry-pi-5" if target.architecture == "x86_64" else "avx2"
    with pytest.raises(EngineError, match="compile for a target of the device's kind"):
        place(catalog.get(other), kept.name)


def test_litert_runs_where_the_device_has_it(
    kept: ssh.SshLink, small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = place(small_bundle.manifest.target, kept.name)
    monkeypatch.setattr(remote, "has_litert", lambda _: False)
    with pytest.raises(EngineError, match="install them there"):
        open_engine(small_bundle, "litert", placement=placement)
    assert [a.engine for a in runnable(small_bundle, placement)] == ["native"]
    monkeypatch.setattr(remote, "has_litert", lambda _: True)
    assert len(runnable(small_bundle, placement)) == 3
    x, expected = small_bundle.golden()
    int8 = open_engine(small_bundle, "litert", placement=placement, threads=1, cores=CORE)
    # The device's python3 is this one, which has LiteRT.
    monkeypatch.setattr(int8, "_start", (*int8._start[:-1], sys.executable))
    np.testing.assert_array_equal(int8.run(x), expected)
    assert len(int8.time_ms(x[:1], 3, 1)) == 3
    int8.close()


@pytest.mark.parametrize("good", [True, False], ids=["a good beginning", "a spoilt beginning"])
def test_a_transfer_that_was_cut_off_goes_on(link: ssh.SshLink, home: Path, tmp_path: Path, good: bool) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    file, digest = entry(tmp_path / "weights.bin", data)
    part_of(link, home, digest).write_bytes(data[:100_000] if good else bytes(100_000))
    scratch = Scratch(link, {"native/weights.bin": (file, digest)})
    assert (home / scratch.folder / "native/weights.bin").read_bytes() == data
    assert not part_of(link, home, digest).exists()


def test_a_session_that_is_dropped_leaves_nothing_on_the_device(link: ssh.SshLink, home: Path) -> None:
    scratch = Scratch(link, {})
    folder = home / scratch.folder
    assert folder.is_dir()
    child = os.fork()
    if child == 0:  # whose session it is not
        del scratch
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()
    del scratch
    assert not folder.exists()


def test_only_the_rest_is_sent(link: ssh.SshLink, home: Path, tmp_path: Path) -> None:
    file, digest = entry(tmp_path / "f", b"0123456789")
    part = part_of(link, home, digest)
    part.write_bytes(b"abcd")
    link.send(file, link.root / "files" / part.name)
    assert part.read_bytes() == b"abcd456789"


def test_a_link_that_breaks_leaves_nothing_that_looks_whole(
    link: ssh.SshLink, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ssh that passes the first 1000 bytes of what it is to send, and then fails as ssh does."""
    data = np.random.default_rng(1).bytes(50_000)
    file, digest = entry(tmp_path / "weights.bin", data)
    programs = tmp_path / "programs"
    programs.mkdir()
    real = shutil.which("ssh")
    (programs / "ssh").write_text(
        f'#!/bin/sh\ncase "$*" in *"sh -c "*"cat >"*) head -c 1000 | {real} "$@"; echo "Broken pipe" >&2; exit 255;; '
        f'esac\nexec {real} "$@"\n'
    )
    (programs / "ssh").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        with pytest.raises(EngineError, match="cannot be reached: Broken pipe"):
            Scratch(link, {"native/weights.bin": (file, digest)})
    assert [path.name for path in (home / link.root).rglob("*") if path.is_file()] == [part_of(link, home, digest).name]
    assert part_of(link, home, digest).stat().st_size == 1000
    scratch = Scratch(link, {"native/weights.bin": (file, digest)})
    assert (home / scratch.folder / "native/weights.bin").read_bytes() == data


def test_a_file_spoilt_on_the_device_is_sent_again(
    link: ssh.SshLink, home: Path, tmp_path: Path, sent: list[str]
) -> None:
    file, digest = entry(tmp_path / "weights.bin", b"whole")
    Scratch(link, {"native/weights.bin": (file, digest)})
    (home / link.root / "files" / digest).write_bytes(b"spoil")
    again = Scratch(link, {"native/weights.bin": (file, digest)})
    assert Path(again.folder / "native/weights.bin").read_bytes() == b"whole"
    assert len(sent) == 2


def test_contents_unlike_the_manifest_are_refused(link: ssh.SshLink, home: Path, tmp_path: Path) -> None:
    file, _ = entry(tmp_path / "weights.bin", b"changed since")
    digest = hashlib.sha256(b"what the manifest says").hexdigest()
    with pytest.raises(EngineError, match="other contents, twice"):
        Scratch(link, {"native/weights.bin": (file, digest)})
    assert [path for path in (home / link.root).rglob("*") if path.is_file()] == []
    with pytest.raises(EngineError, match="no sha256"):
        Scratch(link, {"native/weights.bin": (file, "$(touch pwned)")})


def test_hostile_names_are_names(link: ssh.SshLink, home: Path, tmp_path: Path) -> None:
    file, digest = entry(tmp_path / HOSTILE.replace("/", "_"), b"data")
    scratch = Scratch(link, {f"native/{HOSTILE}/-rf": (file, digest)})
    assert Path(scratch.folder / "native" / HOSTILE / "-rf").read_bytes() == b"data"
    odd = dataclasses.replace(link, root=PurePosixPath("odd") / HOSTILE)
    scratch = Scratch(odd, {"native/x": (file, digest)})
    assert scratch.folder.parent == home / "odd" / HOSTILE
    assert Path(scratch.folder / "native/x").read_bytes() == b"data"
    target = PurePosixPath("odd") / HOSTILE / "sent"
    link.send(file, target)
    assert links.ask(link, links.quoted(["cat", target])) == b"data"


@pytest.mark.parametrize(
    "name",
    [
        "ssh://",
        "ssh://-oProxyCommand=touch pwned",
        "ssh://-oProxyCommand=x@host",
        "ssh://user@-host",
        "ssh://host name",
        "ssh://host;touch pwned",
        "ssh://$(touch pwned)",
        "ssh://host:0",
        "ssh://host:65536",
        "ssh://host:22:22",
        "ssh://host/path",
        "ssh://host\n",
        "ssh://a@b@c",
    ],
)
def test_addresses_that_are_none(name: str) -> None:
    with pytest.raises(EngineError, match="is ssh://"):
        links.connect(name)


def test_addresses_become_options() -> None:
    words = ssh.connect("ssh://pi@[fe80::1%eth0]:2222").command
    assert words[-2:] == ("--", "fe80::1%eth0")
    assert words[words.index("-l") + 1] == "pi"
    assert words[words.index("-p") + 1] == "2222"
    assert ssh.connect("ssh://raspberrypi.local").command[-2:] == ("--", "raspberrypi.local")


def test_an_unreachable_device_is_one_line(
    device: str, small_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"{device.rpartition(':')[0]}:1"
    assert cli._invoke(cli.app, ["verify", str(small_bundle.path), "--data", "drawn:val:1", "--device", address]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert f"{address}: cannot be reached" in lines[0]


def test_without_ssh_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="apt install openssh-client"):
        ssh.connect("ssh://nowhere").shell("true")


def test_two_sessions_at_once(link: ssh.SshLink, home: Path, small_bundle: Bundle) -> None:
    x, expected = small_bundle.golden()
    failures: list[str] = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(x))
        with open_session(small_bundle, device=link.name, threads=1) as session:
            for _ in range(3):
                if not np.array_equal(session.engine.run(x[order]), expected[order]):
                    failures.append(f"session {seed}")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert not list((home / link.root).glob("run.*"))
    assert not list((home / link.root).rglob("*.part"))


def test_what_nobody_uses_goes(link: ssh.SshLink, home: Path) -> None:
    for name, days in (("run.old", 3), ("run.new", 0), ("keep", 3), ("gone", 40), ("files/a", 40), ("files/b", 20)):
        path = home / link.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if name.startswith("files/") else path.mkdir()
        stamp = path.stat().st_mtime - days * 86400
        os.utime(path, (stamp, stamp))
    os.utime(home / link.root / "files", (stamp, stamp - 40 * 86400))
    scratch = Scratch(link, {})
    left = {path.relative_to(home / link.root).as_posix() for path in (home / link.root).rglob("*")}
    assert left == {"run.new", "keep", "files", "files/b", "programs", scratch.folder.name}


def test_a_program_that_a_signal_ends_is_not_a_device_that_is_gone(kept: ssh.SshLink) -> None:
    done = kept.shell("exec sh -c 'kill -4 $$'")
    assert done.returncode == 128 + signal.SIGILL
    assert b"Illegal instruction" in done.stderr


def test_a_device_that_hangs_does_not_hold_for_ever(kept: ssh.SshLink) -> None:
    with pytest.raises(EngineError, match="no answer after 1 s; the device hangs"):
        kept.shell("sleep 5", 1.0)
    assert kept.shell("echo here").stdout == b"here\n"


def test_the_limit_grows_with_what_is_asked(kept: ssh.SshLink, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    clock = iter((0.0, 20.0, 100.0, 101.0))

    def spy(self: ssh.SshLink, script: str, limit_s: float = 0.0) -> subprocess.CompletedProcess[bytes]:
        limits.append(limit_s)
        return subprocess.CompletedProcess([], 0, b"", b"")

    scratch = Scratch(kept, {})
    with monkeypatch.context() as patch:
        patch.setattr(ssh.SshLink, "shell", spy)
        patch.setattr(store.time, "monotonic", lambda: next(clock))
        scratch.execute(["x"], None, 0, 32)  # 20 s: 0.625 s an image
        scratch.execute(["x"], None, 0, 10_000)
    scratch.close()
    assert limits == [600 + 32 * 60, 600 + 10_000 * 6.25]


def test_a_temporary_folder_of_any_name(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a b%h'c"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert ssh.connect.__wrapped__(device).shell("echo here").stdout == b"here\n"


def test_a_device_without_sha256sum_is_told_so(
    link: ssh.SshLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = ssh.SshLink.shell

    def without(self: ssh.SshLink, script: str, *limits: float, **more: int) -> subprocess.CompletedProcess[bytes]:
        return shell(self, script.replace("sha256sum", "sha256-"), *limits, **more)

    monkeypatch.setattr(ssh.SshLink, "shell", without)
    with pytest.raises(EngineError, match="sha256-: not found"):
        Scratch(link, {"native/x": entry(tmp_path / "f", b"data")})


def test_a_failing_program_says_why(kept: ssh.SshLink, small_bundle: Bundle) -> None:
    with open_session(small_bundle, device=kept.name) as session:
        session.engine._directory = PurePosixPath("/nowhere")
        with pytest.raises(EngineError, match="/nowhere"):
            session.engine.self_test()
        session.engine.close()
        with pytest.raises(EngineError, match="closed"):
            session.engine.run(small_bundle.golden()[0])


@pytest.mark.parametrize(
    "answer",
    [
        "Welcome!",
        "[]",
        "{}",
        '{"inputs": [], "outputs": []}',
        '{"inputs": [{"shape": [1, 2], "dtype": "int8"}], "outputs": [{"shape": [1, -2], "dtype": "int8"}]}',
        '{"inputs": [{"shape": [1, 2], "dtype": "int8"}], "outputs": [{"shape": [1, 2], "dtype": "O"}]}',
        '{"inputs": [{"shape": "12", "dtype": "int8"}], "outputs": [{"shape": [null], "dtype": "int8"}]}',
    ],
)
def test_a_program_that_answers_anything_is_an_error(answer: str) -> None:
    done = subprocess.CompletedProcess([], 0, answer, "")
    with pytest.raises(EngineError, match="native: "):
        NativeProgramEngine(("x",), PurePosixPath("y"), 1, execute=lambda *_: (done, b""))


def test_what_a_program_says_is_measured_before_it_is_used() -> None:
    tensor = {"shape": [1, 2], "dtype": "int8"}
    text = json.dumps({"inputs": [tensor], "outputs": [tensor], "device": "cpu\x1b[2J", "samples_ms": ["x"]})
    done = subprocess.CompletedProcess([], 0, text, "")
    engine = NativeProgramEngine(("x",), PurePosixPath("y"), 1, execute=lambda *_: (done, b"abc"))
    assert engine.device == "cpu?[2J"
    with pytest.raises(EngineError, match="3 bytes"):
        engine.run(np.zeros((1, 2), np.int8))
    with pytest.raises(EngineError, match="no times"):
        engine.time_ms(np.zeros((1, 2), np.int8), 1, 1)


@dataclasses.dataclass(frozen=True)
class Canned:
    """A device that gives one answer."""

    answer: bytes
    root: PurePosixPath = PurePosixPath("x")  # noqa: RUF009  # a path cannot change
    name: str = "ssh://canned"

    trusted_folder: PurePosixPath = PurePosixPath("/")  # noqa: RUF009  # a path cannot change
    system_accounts: int = 1

    def shell(self, script: str, limit_s: float = 0, *, reply_bytes: int = 0) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(["sh", "-c", script], 0, self.answer, b"")

    def send(self, source: Path, target: PurePosixPath) -> None: ...


def test_clocks_and_temperatures_of_a_device(tmp_path: Path) -> None:
    cpu, zone = "/sys/devices/system/cpu/cpu0/cpufreq", "/sys/class/thermal/thermal_zone0"
    files = {
        f"{cpu}/scaling_governor": "performance",
        f"{cpu}/scaling_cur_freq": "2400000",
        f"{zone}/type": "cpu-thermal",
        f"{zone}/temp": "61250",
        f"/sys/../..{tmp_path}/planted": "outside",  # a device's answer does not choose where files go here
        str(tmp_path / "planted"): "outside",
        "/sys/devices/system/cpu/cpu0x/cpufreq/scaling_cur_freq": "9" * 5000,
        f"{cpu}/scaling_governor/below": "a file is no folder",
        f"/sys/{'x' * 300}": "too long",
    }
    answer = "".join(f"{path}\0{text}\0" for path, text in files.items()).encode()
    state = remote.state(Canned(answer))
    assert state.governors == {"cpu0": "performance"}
    assert state.cpu_khz == {"cpu0": 2400000}
    assert state.temperatures_c == {"cpu-thermal": 61.25}
    assert not (tmp_path / "planted").exists()


def test_the_script_that_reads_clocks_runs(kept: ssh.SshLink) -> None:
    remote.state(kept)  # what it finds is the machine's business


def test_a_machine_of_many_processors_gets_the_threads_that_the_runtime_takes(
    kept: ssh.SshLink, small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = dataclasses.replace(remote.facts(kept), processors=200)
    monkeypatch.setattr(remote, "facts", lambda link: there)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(200)))
    x, expected = small_bundle.golden()
    for device in (kept.name, "local"):
        assert processors(place(small_bundle.manifest.target, device)) == 64
        with open_session(small_bundle, device=device) as session:
            np.testing.assert_array_equal(session.engine.run(x), expected)


def test_a_chatty_login_is_explained() -> None:
    for answer in (
        "Welcome!\nx86_64\n2\nLinux\n\ncpu",
        "x86_64\n\xb2\nLinux\n\ncpu",
        f"x86_64\n{'9' * 5000}\nLinux\n\n",
    ):
        with pytest.raises(EngineError, match="login script"):
            remote.facts(Canned(answer.encode()))
    assert remote.facts(Canned(b"x86_64\n2\nLinux\nboard \x1b[2J\ncpu")).model == "board ?[2J"


@pytest.mark.slow
def test_workers_leave_nothing_there(link: ssh.SshLink, home: Path, small_bundle: Bundle) -> None:
    job = Job(str(small_bundle.path), small_bundle.sha256(), "drawn:val:3", ("native",), device=link.name)
    ((accuracy,), _) = verify_shards(job)
    assert accuracy.bit_exact
    assert not list((home / link.root).glob("run.*"))


def test_an_engine_that_opened_is_closed_where_the_next_does_not(
    link: ssh.SshLink, home: Path, small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "has_litert", lambda _: False)
    with pytest.raises(EngineError, match="install them there"):
        contenders(small_bundle, device=link.name, engines=("native", "litert"))
    assert not list((home / link.root).glob("run.*"))


def test_verify_and_run_take_the_device(
    kept: ssh.SshLink, small_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(small_bundle.path), "--data", "drawn:val:3", "--device", kept.name, "--json"]
    assert cli._invoke(cli.app, arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["engine"], row["device"], row["obtained"]) == ("native", kept.name, "measured")
    assert row["bit_exact"]
    image = tmp_path / "an image.png"
    Image.fromarray(drawn.draw("val", 0, 40)[0]).save(image)
    answers = []
    for device in (kept.name, "local"):
        assert cli._invoke(cli.app, ["run", str(small_bundle.path), str(image), "--device", device, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["results"])
    assert answers[0] == answers[1]


def test_bench_check_and_layers_take_the_device(
    kept: ssh.SshLink, small_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, brief = ["--device", kept.name], ["--duration", "0.001s", "--rounds", "2"]
    assert cli._invoke(cli.app, ["bench", str(small_bundle.path), *where, *brief, "--cores", CORE, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {(x["device"], x["obtained"], x["threads"]) for x in data["latencies"]} == {(kept.name, "measured", 1)}
    assert data["machine"]["cores"] == str(remote.facts(kept).processors)
    assert {moment["when"] for moment in data["moments"]} >= {"before", "after"}
    assert cli._invoke(cli.app, ["bench", str(small_bundle.path), *where, "--layers", "--json"]) == 0
    profile = json.loads(capsys.readouterr().out)
    assert len(profile["layers"]) >= 3
    assert profile["roof"]["gmac_per_s"] > 0
    assert cli._invoke(cli.app, ["bench", str(small_bundle.path), *where, "--sustained", "2s", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["windows"]) == 10


def test_a_gate_over_ssh(kept: ssh.SshLink, small_bundle: Bundle, tmp_path: Path) -> None:
    run = Run("drawn:val:3", device=kept.name, rounds=2, min_duration_s=0.0)
    report = measure(small_bundle, run)
    assert report.device == kept.name
    assert (report.memory_bytes["native/int8"] or 0) > 500_000
    save_baseline(report, tmp_path / "b.json")
    command = baseline_command(small_bundle.path, run, tmp_path / "b.json")
    assert f"--device {kept.name}" in command
    before = load_baseline(tmp_path / "b.json", report.target, kept.name, command)
    findings = {f.what: f.outcome for f in judge(report, before, Budget()).findings}
    assert findings[f"bit-exactness, native on {kept.name}"] == "pass"
    assert "latency against the baseline's, native" in findings
    assert findings["memory, native/int8"] == "pass"
    if not remote.has_litert(kept):  # no float build ran there, then as now: that is said
        reasons = {f.what: f.reason for f in judge(report, before, Budget()).findings}
        assert reasons["latency int8 / float, native"].startswith("not judged: no float build ran")


@pytest.mark.slow
def test_tuning_on_the_device(kept: ssh.SshLink, tmp_path: Path) -> None:
    graph = single_convolution()
    images = int8_graphs.random_input(graph, 0)[0]
    path = tmp_path / "tuning.json"
    result = tune(graph, images, catalog.get("host"), path, device=kept.name, rounds=2, candidates=1, threads=1)
    assert result.obtained == "measured"
    trials = [trial for each in result.trials.values() for trial in each]
    assert trials
    assert all(trial.time_ms for trial in trials)


def single_convolution() -> ir.Graph:
    build = int8_graphs.Int8Builder("small", 0)
    x = build.conv(build.input(int8_graphs.photo(17, 15)), 16, (3, 3), (1, 1), relu=True)
    return build.graph(build.fully_connected(build.average_pool(x), 5))
