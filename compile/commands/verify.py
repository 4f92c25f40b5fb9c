"""`xceptile verify`: accuracy against float, bit-exactness against the reference."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from .common import (
    BundleArgument,
    DataOption,
    DeviceOption,
    EnginesOption,
    ImagesOption,
    JsonOption,
    PublicKeyOption,
    ThreadsOption,
    bar,
    figure,
    labelled,
    out,
    print_json,
    table,
)


def _differences(accuracy: Any) -> str:
    """How an engine's outputs differ from the reference's, in words."""
    verdict = "within the bound" if accuracy.keeps_contract else "MORE THAN ALLOWED"
    return (
        f"{accuracy.engine}: {accuracy.differing_values} of {accuracy.compared_values} outputs differ from the "
        f"reference's, by up to {accuracy.largest_difference_steps} steps; {accuracy.allowed_steps} allowed: {verdict}"
    )


def _accuracy_table(accuracies: Any) -> Table:
    from ...runtime.accuracy import TOP
    from ...runtime.statistics import mcnemar_exact

    first = accuracies[0]
    shares = (("top-1", "int8"), ("top-1", "float"), ("top-5", "int8"), ("top-5", "float"), ("same", "class"))
    columns = [figure(*lines) for lines in (*shares, ("SQNR", "dB"), ("p",))]
    rows = table("engine", *columns, "bit-exact", title=f"{first.device}, {first.images} images, {first.obtained}")
    for a in accuracies:
        name = a.engine if a.device == first.device else f"{a.engine} ({a.device})"
        tops, five, same, p = ("-", "-"), ("-", "-"), "-", "-"
        if a.labelled:
            tops, same = (f"{a.top1:.2%}", f"{a.float_top1:.2%}"), f"{a.agreement:.2%}"
            p = f"{mcnemar_exact(a.float_only_correct, a.int8_only_correct):.2f}"
        if a.labelled and a.outputs > TOP:  # of fewer classes every one is among the first five
            five = (f"{a.int8_correct_top5 / a.labelled:.2%}", f"{a.float_correct_top5 / a.labelled:.2%}")
        rows.add_row(name, *tops, *five, same, f"{a.sqnr_db:.1f}", p, "yes" if a.bit_exact else "NO")
    if first.outputs == 1:
        rows.caption = "The network has one output, so there are no classes to compare: SQNR says how far it is off."
    elif not first.labelled:
        rows.caption = "The images bear no labels, so no classes are compared: SQNR says how far the outputs are off."
    return rows


def verify(
    bundle: BundleArgument,
    data: DataOption,
    engine: EnginesOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    images: ImagesOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the images; the figures do not depend on it.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="A file for each image's results; an interrupted run is taken up from it.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Share the images over a Ray cluster: its address, auto, or local to start one.")
    ] = None,
    flips: Annotated[
        bool, typer.Option("--flips", help="List the images whose class changed, least margin first.")
    ] = False,
    diverges: Annotated[
        bool, typer.Option("--first-difference", help="Where an output differs: find the layer it begins at.")
    ] = False,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy against float and bit-exactness against the reference, and whether plan and weights are those of the
    int8 network; exit status 1 where an output differs, or a byte of these.
    """
    from ...runtime.bundle import open_bundle
    from ...runtime.evaluate_engines import contenders, evaluate, runnable
    from ...runtime.session import place
    from ...runtime.shards import Job, verify_shards
    from ...runtime.statistics import mcnemar_exact
    from ..repack import repack

    opened = open_bundle(bundle, public_key)
    if workers or results or ray:
        where = place(opened.manifest.target, device)
        names = tuple(engine or (a.engine for a in runnable(opened, where) if a.dtype == "int8"))
        job = Job(
            bundle=str(bundle.absolute()),
            bundle_sha256=opened.sha256(),
            data=_absolute(data),
            engines=names,
            images=images,
            device=device,
            threads=threads,
            rehearsed_images=images,
            signed=public_key is not None,
        )
        with bar() as progress:
            accuracies, _ = verify_shards(
                job,
                workers=workers or 1,
                results=results,
                ray_address=ray,
                progress=lambda done, total: progress("verify", done / total),
            )
    else:
        items, count = labelled(opened, data, images)
        judged = contenders(
            opened, device=device, threads=threads, engines=tuple(engine or ()), rehearsed_images=images
        )
        try:
            with bar() as progress:
                accuracies, _ = evaluate(judged, items, progress=lambda done: progress("verify", done / count))
        finally:
            for contender in judged:
                contender.engine.close()
    found = _first_differences(opened, accuracies, data, images, device) if diverges else {}
    repacked = repack(opened)
    if as_json:
        print_json(
            [
                asdict(a)
                | {
                    "bit_exact": a.bit_exact,
                    "keeps_contract": a.keeps_contract,
                    "mcnemar_p": mcnemar_exact(a.float_only_correct, a.int8_only_correct) if a.labelled else None,
                    "first_difference": found.get(a.engine),
                    "packed_anew": asdict(repacked),
                }
                for a in accuracies
            ]
        )
    else:
        out.print(_accuracy_table(accuracies))
        if any(a.labelled for a in accuracies):
            out.print(
                "p: how often chance alone parts int8 from float at least so far (McNemar's exact test on the images "
                "that one of them gets right)."
            )
        for a in accuracies:
            if not a.bit_exact:
                out.print(_differences(a))
        out.print(f"Packed anew: {repacked}", soft_wrap=True)
        if opened.manifest.float_layers:
            layers = ", ".join(opened.manifest.float_layers)
            out.print(f"mixed: {layers} compute in float; int8 layers are exact given the same inputs.")
        for name, text in found.items():
            out.print(f"{name}: {text}")
        if flips and any(a.flips for a in accuracies):
            out.print(_flips_table(accuracies))
        elif flips and any(a.labelled for a in accuracies):
            out.print("No image's class changed.")
    if repacked.differing or not all(a.keeps_contract for a in accuracies):
        raise typer.Exit(1)


def _absolute(data: str) -> str:
    """A data set as processes in other directories find it."""
    return data if data.startswith("drawn:") else str(Path(data).absolute())


def _flips_table(accuracies: Any) -> Table:
    rows = table("engine", Column("image", overflow="fold"), "label", "float", "int8", figure("margin"))
    for a in accuracies:
        for flip in sorted(a.flips, key=lambda flip: flip.margin):
            label = flip.label or "-"
            rows.add_row(a.engine, flip.image, label, flip.float_class, flip.int8_class, f"{flip.margin:.3f}")
    return rows


def _first_differences(
    bundle: Any, accuracies: Any, data: str, images: int | None, device: str | None
) -> dict[str, str]:
    """For each engine that does not keep the contract, the layer where its outputs part from the reference's."""
    found = {}
    for accuracy in accuracies:
        if not accuracy.keeps_contract:
            items, _ = labelled(bundle, data, images)
            try:  # the figures are there all the same
                from ..divergence import first_difference

                found[accuracy.engine] = first_difference(bundle, accuracy.engine, items, device=device)
            except ModuleNotFoundError as error:
                found[accuracy.engine] = (
                    f"the first layer that differs was not found: that needs the package {error.name}: "
                    "pip install 'xceptile[compile]'"
                )
            except (RuntimeError, ValueError, OSError) as error:
                found[accuracy.engine] = f"the first layer that differs was not found: {error}"
    return found
