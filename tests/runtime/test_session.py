"""Where a bundle runs, also on machines without a row of their own; and a program that may not start."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.needs import requires
from support.small_bundle import write_small_bundle

from xceptile.compile import cli
from xceptile.runtime.bundle import Bundle, open_bundle
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.evaluate_engines import peak_rss_bytes
from xceptile.runtime.session import Placement, open_session, place
from xceptile.targets import catalog, host
from xceptile.targets.spec import TargetSpec


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_small_bundle(tmp_path_factory.mktemp("arm") / "bundle", "raspberry-pi-5", ("native",))


@pytest.fixture
def without_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as kvm64, which cheap virtual machines show."""

    def detect(*_: object) -> TargetSpec:
        raise host.UnsupportedHost("its x86-64 processor lacks avx2")

    monkeypatch.setattr(host, "detect", detect)


@requires("qemu-aarch64", package="qemu-user")
def test_a_processor_without_kernels_still_emulates_another(
    arm: Bundle, without_avx2: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place(arm.manifest.target, None) == Placement("qemu", "rehearsed")
    with open_session(arm) as session:
        x, expected = arm.golden()
        np.testing.assert_array_equal(session.engine.run(x), expected)
    assert cli._invoke(cli.app, ["verify", str(arm.path), "--data", "drawn:val:2"]) == 0
    assert "rehearsed" in capsys.readouterr().out


def test_a_processor_without_kernels_is_no_target_s_own(without_avx2: None) -> None:
    for name in ("avx2", "adreno-740", "raspberry-pi-5"):
        assert place(catalog.get(name), "local") == Placement("local", "rehearsed")


@requires("qemu-aarch64", package="qemu-user")
def test_a_program_that_lost_its_executable_bit_is_named(
    arm: Bundle, small_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As archives of CI's artefacts bring it."""
    for name, bundle in (("arm", arm), ("host", small_bundle)):
        shutil.copytree(bundle.path, tmp_path / name)
        (tmp_path / name / "native/xceptile-run").chmod(0o644)
    with pytest.raises(EngineError, match=r"xceptile-run: is not executable, .*: chmod \+x /"):
        open_session(open_bundle(tmp_path / "arm"))
    assert cli._invoke(cli.app, ["verify", str(tmp_path / "arm"), "--data", "drawn:val:1"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) <= 2
    host_bundle = open_bundle(tmp_path / "host")
    with open_session(host_bundle) as session:  # the library is loaded, not started
        assert session.engine.name == "native"
    with pytest.raises(EngineError, match="is not executable"):
        peak_rss_bytes(host_bundle)
