"""Batches: every engine computes of each image what it computes of it alone, whatever number of images is at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.int8_graphs import Int8Builder, as_float, photo, random_input, random_operator_graph
from support.kernel_runner import KernelRunner
from support.needs import requires
from tvm import relax, runtime

from xceptile.compile.backends import cpu as backend
from xceptile.compile.backends import native_runtime, onnx_qdq, relax_vm, tflite
from xceptile.compile.kernels.batch import JOINED, Copy
from xceptile.compile.passes.set_batch import set_batch
from xceptile.models import graph as ir
from xceptile.models.verify import verify
from xceptile.runtime import reference
from xceptile.runtime.devices.qemu import QemuNativeEngine
from xceptile.runtime.engines.engine import fill_batches
from xceptile.runtime.engines.litert import LiteRtEngine
from xceptile.runtime.engines.native import NativeEngine
from xceptile.runtime.engines.reference import ReferenceEngine
from xceptile.targets import catalog, host
from xceptile.targets.spec import TargetSpec

HEIGHT, WIDTH = 19, 21  # an image's 1,197 bytes are no multiple of 64, nor are the 10 logits


@pytest.fixture(scope="module")
def network() -> ir.Graph:
    """A little of everything."""
    build = Int8Builder("small")
    x = build.conv(build.input(photo(HEIGHT, WIDTH)), 16, (3, 3), (2, 2), relu=True)
    y = build.max_pool(build.conv(build.depthwise(build.relu(x)), 24))
    y = build.add(y, build.conv(x, 24, strides=(2, 2)))
    build.fully_connected(build.average_pool(y), 10)
    return build.graph()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.concatenate([photo(HEIGHT, WIDTH, seed) for seed in range(7)])


@pytest.fixture(scope="module")
def expected(network: ir.Graph, images: np.ndarray) -> np.ndarray:
    return np.concatenate([reference.run(network, image[None])[0] for image in images])


def write_native(folder: Path, graph: ir.Graph, target: TargetSpec) -> Path:
    for name, data in (backend.build_files(graph, target) | native_runtime.build(target)).items():
        (folder / name).write_bytes(data)
    (folder / native_runtime.PROGRAM).chmod(0o755)
    return folder


def test_the_first_dimension_is_the_batch(network: ir.Graph) -> None:
    batched = set_batch(network, 3)
    verify(batched)
    assert {node.type.shape[0] for node in batched.nodes} == {3}
    assert set_batch(batched, 1).nodes == network.nodes
    assert [node.type.shape[0] for node in set_batch(as_float(network), 2).inputs] == [2]
    with pytest.raises(ValueError, match="a batch of 0 images"):
        set_batch(network, 0)


def test_what_is_missing_in_a_batch_is_the_last_image_again() -> None:
    x = np.arange(7)
    assert fill_batches(x, 3).tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6]
    assert fill_batches(x, 7) is x


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("kind", ["conv", "depthwise", "linear", "relu", "pool", "add", "requantize", "mean"])
def test_every_operator(kind: str, batch: int) -> None:
    shape = (1, 20) if kind == "linear" else (1, 7, 9, 20)
    graph = set_batch(random_operator_graph(kind, shape, padding=(1, 1, 1, 1)), batch)
    inputs = random_input(graph, seed=3)
    (got,) = KernelRunner(graph, host.detect()).run(*inputs)
    np.testing.assert_array_equal(got, reference.run(graph, *inputs)[0])


def test_more_images_than_a_step_has_operands() -> None:
    batch = 2 * JOINED + 3
    graph = set_batch(random_operator_graph("linear", (1, 20)), batch)
    calls = backend.lower(graph, host.detect())
    assert max(len(call.operands) for call in calls) == 16
    inputs = random_input(graph, seed=4)
    (got,) = KernelRunner(graph, host.detect()).run(*inputs)
    np.testing.assert_array_equal(got, reference.run(graph, *inputs)[0])


def test_symbols_say_all_that_a_copy_depends_on() -> None:
    copies = [
        Copy("int8", (6,), 0, 3),
        Copy("int8", (6,), 3, 3),
        Copy("int8", (3, 3), 0, 6),
        Copy("float32", (6,), 0, 3),
    ]
    assert len({copy.symbol for copy in copies}) == len(copies)


@pytest.mark.parametrize("batch", [2, 3])
def test_the_native_runtime(
    tmp_path: Path, network: ir.Graph, images: np.ndarray, expected: np.ndarray, batch: int
) -> None:
    folder = write_native(tmp_path, set_batch(network, batch), host.detect())
    with NativeEngine(folder, threads=2) as engine:
        assert engine.input.shape == (batch, HEIGHT, WIDTH, 3)
        for count in (7, batch, 1):
            np.testing.assert_array_equal(engine.run(images[:count]), expected[:count])
        assert len(engine.time_ms(images[:batch], 2, 0)) == 2


@requires("qemu-aarch64", package="qemu-user")
def test_the_program_under_qemu(tmp_path: Path, network: ir.Graph, images: np.ndarray, expected: np.ndarray) -> None:
    target = catalog.get("raspberry-pi-5")
    folder = write_native(tmp_path, set_batch(network, 2), target)
    np.testing.assert_array_equal(QemuNativeEngine(folder, target).run(images[:3]), expected[:3])


def test_a_wrong_image_is_noticed(monkeypatch: pytest.MonkeyPatch, network: ir.Graph, images: np.ndarray) -> None:
    """The planted fault: the second image's copy reads from the first."""
    graph, target = set_batch(network, 2), host.detect()
    calls = list(backend.lower(graph, target))
    first, second = (i for i, call in enumerate(calls) if call.operands[0].name == graph.inputs[0].name)
    calls[second] = replace(calls[second], symbol=calls[first].symbol, build=calls[first].build)
    monkeypatch.setattr(backend, "lower", lambda graph, target: calls)
    (got,) = KernelRunner(graph, target).run(images[:2])
    np.testing.assert_array_equal(got, reference.run(graph, images[[0, 0]])[0])


@pytest.mark.parametrize("batch", [2, 3])
def test_litert(network: ir.Graph, images: np.ndarray, expected: np.ndarray, batch: int) -> None:
    engine = LiteRtEngine(tflite.serialize(set_batch(network, batch)))
    assert all(placement.delegated for placement in engine.placements())
    np.testing.assert_array_equal(engine.run(images), expected)


def test_litert_float(network: ir.Graph, images: np.ndarray) -> None:
    graph = as_float(network)
    x = images[:3].astype(np.float32)
    alone = LiteRtEngine(tflite.serialize(graph)).run(x)
    np.testing.assert_allclose(LiteRtEngine(tflite.serialize(set_batch(graph, 2))).run(x), alone, rtol=1e-4, atol=1e-3)


def test_the_relax_vm(tmp_path: Path, network: ir.Graph, images: np.ndarray, expected: np.ndarray) -> None:
    path = tmp_path / "network.so"
    path.write_bytes(relax_vm.build(set_batch(network, 2), host.detect()))
    machine = relax.VirtualMachine(runtime.load_module(str(path)), runtime.cpu())
    got = machine["main"](runtime.tensor(images[:2])).numpy()
    np.testing.assert_array_equal(got, expected[:2])


def test_the_reference(network: ir.Graph, images: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(ReferenceEngine(set_batch(network, 3)).run(images), expected)


def test_onnx(network: ir.Graph, images: np.ndarray, expected: np.ndarray) -> None:
    alone = onnx_qdq.departure(network, images[:4], expected[:4])
    assert onnx_qdq.departure(set_batch(network, 2), images[:4], expected[:4]) == alone
    assert onnx_qdq.serialize(set_batch(network, 2)) != onnx_qdq.serialize(network)
