"""Accuracy control: the fewest layers go back to float so that a network loses no more than it is allowed to.

The layers that hurt most for what they cost on the target go first; how many are needed is found by bisection, then
those that turn out not to be needed come back to int8. Candidates are judged as TFLite files under LiteRT where that is
installed, else by the reference: both are the integer contract. The answer is judged again as the exported artefacts,
by the engines that will run them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..calibration.quantize import pixel_encoding, quantize
from ..calibration.recipe import Rule
from ..calibration.sensitivity import LayerSensitivity, measure_sensitivity
from ..models import graph as ir
from ..models.preprocess import normalize
from ..models.verify import verify
from ..runtime.accuracy import Accuracy, Labelled
from ..runtime.bundle import Manifest, write_bundle
from ..runtime.engines.engine import Engine, EngineError
from ..runtime.engines.litert import LiteRtEngine
from ..runtime.engines.reference import ReferenceEngine
from ..runtime.evaluate_engines import contenders, evaluate
from ..targets.spec import TargetSpec
from .backends import tflite
from .layer_cost import MODEL, lost_ms
from .pipeline import Quantized, one_blas_thread

TOP1 = "top-1"
CANDIDATE = "candidate"
RANKING_IMAGES = 32  # that sensitivity is measured on
NEGLIGIBLE = 1e-3  # of all noise at the logits: layers below are not candidates
TRANSPARENT = ir.Relu | ir.MaxPool2d  # exact in int8, so in float only where everything around them is

Progress = Callable[[str, float], None]


class ControlError(ValueError):
    """A bound that cannot be worked towards: no labelled images, a network of one output, or a target whose backends
    run no mixed networks.
    """


def check_judgeable(images: Sequence[Labelled], graph: ir.Graph) -> None:
    """Raises ControlError where top-1 says nothing, so that no bound of it can be kept."""
    outputs = graph.type_of(graph.outputs[0]).shape[-1]
    if outputs == 1:
        raise ControlError("--max-drop is a share of top-1, and this network has one output: nothing to judge by it")
    if not images or any(image.label is None for image in images):
        raise ControlError("--max-drop is judged by top-1: give --data whose images bear labels, such as class folders")


@dataclass(frozen=True)
class Trial:
    """One network that was judged. ``drop`` is the share of images that top-1 loses against float's. ``how``:
    "candidate", or the engine that ran the exported artefact.
    """

    float_layers: tuple[str, ...]
    how: str
    drop: float


@dataclass(frozen=True)
class Control:
    """What was asked, what was tried, and what came of it. ``lost_ms`` is estimated (``layer_cost.MODEL``)."""

    metric: str  # "top-1"
    images: int
    max_drop: float
    drop: float
    met: bool
    reason: str
    float_layers: tuple[str, ...]
    lost_ms: float
    cost_model: str
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_drop(text: str) -> float:
    """``0.1%`` as a share. The sign is demanded: 0.5 alone could be half of the images or half a point.

    Raises ControlError.
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else math.nan
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise ControlError(f"--max-drop {text!r}: give a share of the images in percent, as 0.1%")
    return value


def return_to_float(network: Quantized, layers: Sequence[str]) -> Quantized:
    """The network with the layers of these module paths in float; the weights of all others are as they were."""
    wanted = set(layers)
    graph = network.float_graph
    chosen = {node.name for node in graph.nodes if (node.path or node.name) in wanted}
    for node in graph.nodes:  # in between only, so that nothing is converted that need not be
        users = graph.users(node.name)
        around = {*node.inputs, *(user.name for user in users)}
        if isinstance(node.op, TRANSPARENT) and users and around <= chosen and node.name not in graph.outputs:
            chosen.add(node.name)
    paths = dict.fromkeys(node.path for node in graph.nodes if node.name in chosen)
    rules = tuple(Rule(_literally(path), keep_float=True) for path in paths)
    recipe = replace(network.recipe, rules=(*network.recipe.rules, *rules))
    mixed = quantize(graph, network.table, recipe)
    refined = {
        name: network.int8_graph.constants[name]
        for name, constant in mixed.constants.items()
        if name in network.int8_graph.constants and network.int8_graph.constants[name].type == constant.type
    }
    mixed = mixed.with_nodes(mixed.nodes, {**mixed.constants, **refined})
    verify(mixed)
    return replace(network, int8_graph=mixed, recipe=recipe)


def _literally(path: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


@one_blas_thread()
def control(
    network: Quantized,
    target: TargetSpec,
    images: Sequence[Labelled],
    max_drop: float,
    recheck: Callable[[Quantized], Sequence[Accuracy]],
    progress: Progress = lambda stage, share: None,
) -> tuple[Quantized, Control]:
    """Returns layers to float until no more than ``max_drop`` (a share of ``images``) is lost.

    ``recheck`` builds the artefacts of a network, runs the images through their engines, and says how they did. Raises
    ControlError where there is nothing to judge by. Where the bound cannot be met, the best network found comes back,
    and the reason.
    """
    check_judgeable(images, network.float_graph)
    if target.engine != "cpu":
        raise ControlError(f"{target.name}: only processors run mixed networks, not {target.engine}")
    judge = _Judge(network, images, recheck, progress)
    order = _ranked(network, target, images, progress)
    count, built = _fewest(judge, order, max_drop)
    layers: Sequence[str] = order[:count]
    if built <= max_drop:
        layers, built = _pruned(judge, layers, max_drop, built, target)
    else:
        best = min(judge.trials, key=lambda trial: (trial.drop, len(trial.float_layers)))
        if best.float_layers != tuple(layers):
            layers, built = best.float_layers, judge.artefacts(best.float_layers)
    met = built <= max_drop
    chosen = judge.network(layers)
    cost = sum(lost_ms(network.float_graph, n, target) for n in network.float_graph.nodes if _key(n) in set(layers))
    return chosen, Control(
        metric=TOP1,
        images=len(images),
        max_drop=max_drop,
        drop=built,
        met=met,
        reason=_reason(layers, order, met, built, max_drop, len(images)),
        float_layers=tuple(layers),
        lost_ms=cost,
        cost_model=MODEL,
        trials=tuple(judge.trials),
    )


def _reason(layers: Sequence[str], order: Sequence[str], met: bool, drop: float, max_drop: float, images: int) -> str:
    if met and not layers:
        return "the int8 network keeps the bound as it is"
    if met:
        return f"{len(layers)} of {len(order)} candidate layers in float keep the bound"
    if max_drop * images < 1:
        return f"{images} images cannot show a drop of {max_drop:.3%}: one image is {1 / images:.3%}; give more"
    return (
        f"{drop:.3%} is lost at best, with up to all {len(order)} layers in float that make a noticeable error: what "
        "remains is the rounding of the network's ends, or chance on so few images"
    )


def _key(node: ir.Node) -> str:
    return node.path or node.name


def _ranked(network: Quantized, target: TargetSpec, images: Sequence[Labelled], progress: Progress) -> list[str]:
    """Module paths, most noise (and, among equals, flips) at the logits regained per millisecond lost first."""
    spec = None if network.pixels.folded else network.model.input_spec
    some = [image.pixels for image in images[:RANKING_IMAGES]]
    rows = measure_sensitivity(
        network.float_graph,
        network.int8_graph,
        some,
        spec,
        lambda done: progress("rank layers", done / len(some)),
    )
    harm: dict[str, float] = {}
    for row in rows:
        harm[row.path or row.name] = harm.get(row.path or row.name, 0.0) + noise(row)
    total, cost = sum(harm.values()), dict.fromkeys(harm, 0.0)
    for node in network.float_graph.nodes:
        if _key(node) in cost:
            cost[_key(node)] += lost_ms(network.float_graph, node, target)
    candidates = [key for key, value in harm.items() if value > NEGLIGIBLE * total]
    return sorted(candidates, key=lambda key: -harm[key] / max(cost[key], 1e-9))


def noise(row: LayerSensitivity) -> float:
    """What a layer alone does to the logits: noise over signal power, and the share of classes it flips."""
    return (0.0 if math.isinf(row.sqnr_db) else 10 ** (-row.sqnr_db / 10)) + row.flips / max(row.images, 1)


class _Judge:
    """Networks by their float layers: made, judged as candidates and as artefacts; every trial is kept."""

    def __init__(
        self,
        network: Quantized,
        images: Sequence[Labelled],
        recheck: Callable[[Quantized], Sequence[Accuracy]],
        progress: Progress,
    ) -> None:
        self.start, self.images, self.recheck, self.progress = network, images, recheck, progress
        self.labels = np.array([image.label for image in images])
        self.trials: list[Trial] = []
        self._known: dict[tuple[str, ...], float] = {}
        self.expected = self._classes(network.float_graph)

    def network(self, layers: Sequence[str]) -> Quantized:
        return return_to_float(self.start, layers) if layers else self.start

    def candidate(self, layers: Sequence[str]) -> float:
        """The drop by the contract, without building anything."""
        key = tuple(layers)
        if key not in self._known:
            self.progress(f"try {len(layers)} layers in float", 0.0)
            self._known[key] = self._drop(self._classes(self.network(layers).int8_graph))
            self.trials.append(Trial(key, CANDIDATE, self._known[key]))
        return self._known[key]

    def artefacts(self, layers: Sequence[str]) -> float:
        """The worst drop of the exported artefacts, on all images, by the code that `verify` counts with."""
        self.progress(f"check the artefacts with {len(layers)} layers in float", 0.0)
        worst = -math.inf
        for accuracy in self.recheck(self.network(layers)):
            assert accuracy.images == len(self.images)
            drop = accuracy.float_top1 - accuracy.top1
            self.trials.append(Trial(tuple(layers), accuracy.engine, drop))
            worst = max(worst, drop)
        return worst

    def _drop(self, classes: NDArray[np.int64]) -> float:
        right, right_float = (seen == self.labels for seen in (classes, self.expected))
        return float(right_float.mean() - right.mean())

    def _classes(self, graph: ir.Graph) -> NDArray[np.int64]:
        engine = _fast_engine(graph)
        classes = []
        for image in self.images:
            output = engine.run(_as_input(self.start, graph, image.pixels))
            classes.append(int(output[0].argmax()))
        engine.close()
        return np.array(classes)


def _as_input(network: Quantized, graph: ir.Graph, pixels: NDArray[np.uint8]) -> NDArray[Any]:
    spec = None if network.pixels.folded else network.model.input_spec
    source = graph.inputs[0]
    if source.type.dtype == "float32":
        return (pixels.astype(np.float32) if spec is None else normalize(pixels, spec))[None]
    return pixel_encoding(spec, source.type.per_tensor).encode(pixels)[None]


def _fast_engine(graph: ir.Graph) -> Engine:
    try:
        return LiteRtEngine(tflite.serialize(graph))
    except EngineError:
        return ReferenceEngine(graph)


def _fewest(judge: _Judge, order: Sequence[str], max_drop: float) -> tuple[int, float]:
    """How many of the ranked layers, and the drop of the artefacts with so many in float."""
    count = 0
    while True:
        high = count
        while high < len(order) and judge.candidate(order[:high]) > max_drop:
            count, high = high + 1, min(max(2 * high, high + 1), len(order))
        low = count
        while low < high:
            middle = (low + high) // 2
            if judge.candidate(order[:middle]) > max_drop:
                low = middle + 1
            else:
                high = middle
        built = judge.artefacts(order[:high])
        if built <= max_drop or high >= len(order):
            return high, built
        count = high + 1  # the engines lose a little more than the contract: one layer more


def _pruned(
    judge: _Judge, layers: Sequence[str], max_drop: float, built: float, target: TargetSpec
) -> tuple[Sequence[str], float]:
    """Takes back to int8 what is not needed, the costliest first; the artefacts are judged again if anything was."""
    graph = judge.start.float_graph
    cost = {_key(node): lost_ms(graph, node, target) for node in graph.nodes}
    kept = list(layers)
    for layer in sorted(layers, key=lambda key: -cost[key]):
        fewer = [each for each in kept if each != layer]
        if judge.candidate(fewer) <= max_drop:
            kept = fewer
    if len(kept) == len(layers):
        return layers, built
    again = judge.artefacts(kept)
    return (kept, again) if again <= max_drop else (layers, built)


def check_artefacts(
    build: Callable[[Quantized], tuple[Manifest, dict[str, bytes]]],
    images: Sequence[Labelled],
    device: str | None = None,
) -> Callable[[Quantized], Sequence[Accuracy]]:
    """What ``control`` rechecks with: writes the bundle that ``build`` makes, runs its int8 engines on ``device``."""

    def recheck(network: Quantized) -> Sequence[Accuracy]:
        with tempfile.TemporaryDirectory(prefix="xceptile-") as folder:
            bundle = write_bundle(Path(folder) / "bundle", *build(network))
            judged = contenders(bundle, device=device, rehearsed_images=None)
            try:
                return evaluate(judged, images)[0]
            finally:
                for contender in judged:
                    contender.engine.close()

    return recheck
