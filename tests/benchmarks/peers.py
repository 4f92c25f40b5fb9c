"""One peer's int8 Xception against ours on this machine, in turns: ONNX Runtime, OpenVINO or ExecuTorch.

    PYTHONPATH=tests python tests/benchmarks/peers.py {onnxruntime,openvino,executorch} FOLDER [--rounds 20]

table.py writes FOLDER and calls this: ``float.onnx`` (pixel values in, NCHW), ``photos.npy`` (int8, N H W 3), of which
the first is run and all calibrate, and our compiled network in ``native``. A peer quantizes the float network by its
own tools, at the settings that its documentation recommends for x86-64. The packages are the extra [peers]; they want
another numpy than TVM, so give them an environment of their own. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.interleaved import Samples, interleave, ratio

from xceptile.runtime.engines.native import NativeEngine

Runner = Callable[[], np.ndarray]
THREADS = (1, 2)


@dataclass(frozen=True)
class Measured:
    """Medians in ms; ``cpu_ratio`` is of processor time, ``correlation`` is of the peer's outputs and ours."""

    threads: int
    ours_ms: float
    theirs_ms: float
    ratio: float
    cpu_ratio: float
    correlation: float


def real(photos: np.ndarray) -> np.ndarray:
    """Pixel values as float32 (N, 3, H, W), which the float network takes."""
    return np.ascontiguousarray((photos.astype(np.float32) + 128).transpose(0, 3, 1, 2))


def onnxruntime(folder: Path, photos: np.ndarray) -> Callable[[int], Runner]:
    """Static quantization, unsigned activations and signed weights by channel. Source:
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#method-selection."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no annotations
        def __init__(self) -> None:
            self.rest = iter(real(photos))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.rest, None)
            return None if image is None else {name: image[np.newaxis]}

    name = ort.InferenceSession(folder / "float.onnx").get_inputs()[0].name
    quantize_static(
        folder / "float.onnx",
        folder / "onnxruntime.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )

    def session(threads: int) -> Runner:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # between inferences, for our turn's sake
        opened = ort.InferenceSession(folder / "onnxruntime.onnx", options, providers=["CPUExecutionProvider"])
        feeds = {name: real(photos[:1])}
        return lambda: np.asarray(opened.run(None, feeds)[0])

    return session


def openvino(folder: Path, photos: np.ndarray) -> Callable[[int], Runner]:
    """NNCF's post-training quantization with its defaults."""
    import nncf
    import openvino as ov

    core = ov.Core()
    images = [image[np.newaxis] for image in real(photos)]
    network = nncf.quantize(core.read_model(folder / "float.onnx"), nncf.Dataset(images), subset_size=len(images))

    def compiled(threads: int) -> Runner:
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        request = core.compile_model(network, "CPU", settings).create_infer_request()
        return lambda: np.asarray(request.infer({0: images[0]})[0])

    return compiled


def executorch(folder: Path, photos: np.ndarray) -> Callable[[int], Runner]:
    """PT2E with the XNNPACK quantizer, by channel, lowered to the XNNPACK delegate. Source:
    https://docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-quantization.html."""
    import torch
    from benchmarks.torch_network import TorchNetwork
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from xceptile.models.from_onnx import load_onnx

    images = [image[None] for image in torch.from_numpy(real(photos))]
    network = TorchNetwork(load_onnx(folder / "float.onnx").graph).eval()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(network, (images[0],)).module(), quantizer)
        for image in images:
            prepared(image)
        exported = torch.export.export(convert_pt2e(prepared), (images[0],))
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer

    def loaded(threads: int) -> Runner:
        portable_lib._unsafe_reset_threadpool(threads)
        module: Any = portable_lib._load_for_executorch_from_buffer(program)
        return lambda: np.asarray(module.forward([images[0]])[0])

    return loaded


PEERS = {"onnxruntime": onnxruntime, "openvino": openvino, "executorch": executorch}
PACKAGES = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino", "nncf"),
    "executorch": ("executorch", "torch"),
}


def measure(peer: Callable[[int], Runner], folder: Path, photo: np.ndarray, threads: int, rounds: int) -> Measured:
    theirs = peer(threads)
    with NativeEngine(folder / "native", threads) as engine:
        ours = partial(engine.run, photo)
        correlation = float(np.corrcoef(ours().ravel(), theirs().ravel())[0, 1])
        wall: Samples = interleave(ours, theirs, rounds, time.perf_counter_ns, pause_s=0.005)
        cpu: Samples = interleave(ours, theirs, rounds, time.process_time_ns, pause_s=0.005)
    medians = [float(np.median(samples)) for samples in wall]
    return Measured(threads, medians[0], medians[1], ratio(wall), ratio(cpu), correlation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    photos = np.load(options.folder / "photos.npy")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES[options.peer]}
    peer = PEERS[options.peer](options.folder, photos)
    measured = [measure(peer, options.folder, photos[:1], threads, options.rounds) for threads in THREADS]
    print(json.dumps({"versions": versions, "measured": [asdict(m) for m in measured]}))


if __name__ == "__main__":
    main()
