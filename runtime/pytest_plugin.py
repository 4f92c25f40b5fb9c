"""Accuracy and latency of a bundle as tests of pytest, for the repositories of those who ship one.

    @pytest.mark.accuracy
    def test_accuracy(xceptile_verdict):
        assert xceptile_verdict.outcome == "pass", str(xceptile_verdict)

Which bundle, images and baseline these are is set in pytest's configuration (``xceptile_bundle``, ``xceptile_data``,
``xceptile_baseline``), or by a fixture of the same name; for which target, on the command line. pytest loads this file
in every environment that has xceptile, so it imports nothing of weight before a test asks for a fixture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .bundle import Bundle
    from .gate_run import Run
    from .session import Session
    from .verdict import Budget, Report, Verdict

_ACCURACY = "accuracy(max_drop=0.5): judge top-1 (in points, image by image) and bit-exactness against the baseline"
_LATENCY = (
    "latency(max_ratio=1.05, max_slowdown=1.1, max_size=1.02, max_memory=1.05): judge int8's share of float's latency, "
    "its latency, size and memory against the baseline, each as a ratio to it"
)
_BUDGET = {
    "accuracy": {"max_drop": "top1_drop_points"},
    "latency": {
        "max_ratio": "latency_ratio",
        "max_slowdown": "slowdown_ratio",
        "max_size": "size_ratio",
        "max_memory": "memory_ratio",
    },
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options and settings."""
    group = parser.getgroup("xceptile")
    group.addoption("--xceptile-target", metavar="TARGET", help="the target whose bundle is tested (default: host)")
    group.addoption("--xceptile-device", metavar="DEVICE", help="local, qemu, ssh://[USER@]HOST[:PORT] or adb:SERIAL")
    parser.addini(
        "xceptile_bundle", "directory of the bundle; {target} stands for the target", default="build/{target}"
    )
    parser.addini("xceptile_data", "labelled images: a folder, a list file or drawn:val[:COUNT]", default="")
    parser.addini("xceptile_baseline", "file that `xceptile baseline` wrote", default="xceptile-baseline.json")


def pytest_configure(config: pytest.Config) -> None:
    """The markers."""
    for line in (_ACCURACY, _LATENCY):
        config.addinivalue_line("markers", line)


@contextmanager
def _one_line() -> Iterator[None]:
    """What is missing or wrong fails the test with its message, as the command line has it."""
    try:
        yield
    except Exception as error:
        from ..models.visible import visible
        from .said import said

        raise pytest.fail.Exception(visible(said(error).line), pytrace=False) from None


def _path(config: pytest.Config, setting: str) -> Path:
    return config.rootpath / str(config.getini(setting))


@pytest.fixture(scope="session")
@_one_line()
def xceptile_bundle(pytestconfig: pytest.Config) -> Bundle:
    """The bundle of ``--xceptile-target``, opened and its hashes checked."""
    from ..targets import catalog
    from .bundle import open_bundle

    name = pytestconfig.getoption("xceptile_target") or "host"
    target = catalog.get(name)
    path = pytestconfig.rootpath / pytestconfig.getini("xceptile_bundle").format(target=name)
    bundle = open_bundle(path)
    if bundle.manifest.target.name != target.name:
        raise ValueError(f"{path}: is a bundle for {bundle.manifest.target.name}, not for {target.name}")
    return bundle


@pytest.fixture(scope="session")
def xceptile_session(pytestconfig: pytest.Config, xceptile_bundle: Bundle) -> Iterator[Session]:
    """The bundle's first int8 engine on ``--xceptile-device``, ready to classify images."""
    with _one_line():
        from .session import open_session

        session = open_session(xceptile_bundle, device=pytestconfig.getoption("xceptile_device"))
    with session:
        yield session


@pytest.fixture(scope="session")
def xceptile_data(pytestconfig: pytest.Config) -> str:
    """The images that the bundle is judged on, as `xceptile verify --data` takes them."""
    source: str = pytestconfig.getini("xceptile_data")
    if not source:
        pytest.fail("no images to judge on: set xceptile_data in pytest's configuration", pytrace=False)
    return source if source.startswith("drawn:") else str(pytestconfig.rootpath / source)


@pytest.fixture(scope="session")
@_one_line()
def _xceptile_run(pytestconfig: pytest.Config, xceptile_data: str) -> Run:
    from .gate_run import Run

    return Run(xceptile_data, pytestconfig.getoption("xceptile_device"))


@pytest.fixture(scope="session")
@_one_line()
def xceptile_baseline(pytestconfig: pytest.Config, xceptile_bundle: Bundle, _xceptile_run: Run) -> Report:
    """What the bundle's target on the device is compared with."""
    from .baseline import load_baseline
    from .gate_run import baseline_command
    from .session import place

    path = _path(pytestconfig, "xceptile_baseline")
    target = xceptile_bundle.manifest.target
    command = baseline_command(xceptile_bundle.path, _xceptile_run, path)
    return load_baseline(path, target.name, place(target, _xceptile_run.device).device, command)


@pytest.fixture(scope="session")
@_one_line()
def _xceptile_measure(xceptile_bundle: Bundle, _xceptile_run: Run) -> Callable[[str], Report]:
    """Measures accuracy or latency, each once."""
    from .gate_run import measure

    @functools.cache
    def once(what: str) -> Report:
        return measure(xceptile_bundle, _xceptile_run, accuracy=what == "accuracy", latency=what == "latency")

    return once


def _budget(markers: dict[str, pytest.Mark]) -> Budget:
    from .verdict import Budget

    allowed: dict[str, Any] = {}
    for name, marker in markers.items():
        unknown = set(marker.kwargs) - set(_BUDGET[name])
        if marker.args or unknown:
            known = ", ".join(f"{each}=..." for each in _BUDGET[name])
            pytest.fail(f"the marker {name} takes {known}, nothing else", pytrace=False)
        allowed |= {_BUDGET[name][key]: value for key, value in marker.kwargs.items()}
    return Budget(**allowed)


@pytest.fixture
@_one_line()
def xceptile_verdict(
    request: pytest.FixtureRequest, xceptile_bundle: Bundle, _xceptile_run: Run, xceptile_baseline: Report
) -> Verdict:
    """The verdict on what the test's markers name, ``accuracy`` and ``latency``: ``outcome`` and reasons."""
    from .obtained import MEASURED
    from .session import place
    from .verdict import Verdict, judge_accuracy, judge_bytes, judge_latency

    markers = {name: mark for name in _BUDGET if (mark := request.node.get_closest_marker(name)) is not None}
    if not markers:
        pytest.fail("mark the test with pytest.mark.accuracy or pytest.mark.latency", pytrace=False)
    budget = _budget(markers)
    obtained = place(xceptile_bundle.manifest.target, _xceptile_run.device).obtained
    if "latency" in markers and obtained != MEASURED:
        pytest.skip(f"{obtained} here, where time does not count: latency is judged on the target's own hardware")
    measure: Callable[[str], Report] = request.getfixturevalue("_xceptile_measure")
    findings = []
    if "accuracy" in markers:
        findings += judge_accuracy(measure("accuracy"), xceptile_baseline, budget)
    if "latency" in markers:
        report = measure("latency")
        findings += judge_latency(report, xceptile_baseline, budget)
        findings += judge_bytes(report, xceptile_baseline, budget)
    return Verdict(tuple(findings))
