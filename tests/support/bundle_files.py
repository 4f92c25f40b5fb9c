"""A bundle's manifest and files for tests that look into none of them: a network of four pixels, two classes."""

from __future__ import annotations

import dataclasses

from xceptile.models.preprocess import InputSpec
from xceptile.runtime import bundle as bundles
from xceptile.runtime.bundle import Artefact, Manifest, NetworkTensor
from xceptile.targets import catalog


def manifest(**changes: object) -> Manifest:
    whole = Manifest(
        format=bundles.FORMAT_VERSION,
        xceptile="0",
        network="tiny",
        target=catalog.get("raspberry-pi-5"),
        input=NetworkTensor("x", (1, 2, 2, 3), 1.0, -128),
        output=NetworkTensor("y", (1, 2), 0.25, 3),
        input_spec=InputSpec(2, 2),
        labels=("a", "b"),
        recipe={"name": "default"},
        calibration={"images": 1},
        provenance={"source": "test"},
        golden_count=1,
        artefacts=(Artefact("litert", "int8", (bundles.LITERT_INT8,)),),
        files={},
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]  # the keys are the caller's


FILES = {
    bundles.LITERT_INT8: b"network",
    bundles.GOLDEN_INPUT: bytes(range(12)),
    bundles.GOLDEN_OUTPUT: b"\x01\xff",
}
