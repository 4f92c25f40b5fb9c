"""`xceptile compile` and `compile`: calibrate, quantize and compile into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import JsonOption, bar, input_text, out, print_json


def recipe_named(name: str) -> Any:
    """A preset, or what a recipe file holds."""
    from ...calibration.recipe import PRESETS, RecipeError, recipe_from_text
    from ...models.read_file import read_file

    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise typer.BadParameter(f"no such recipe {name!r}: neither a file nor one of {', '.join(sorted(PRESETS))}")
    try:
        return recipe_from_text(read_file(path).decode())
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is no text in UTF-8 ({error})") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}", error.rule) from error


def compile_command(
    target: Annotated[str, typer.Option(help="The board to compile for; `xceptile targets` lists them.")],
    model: Annotated[
        str,
        typer.Option(
            help="A network (.keras, .h5, .hdf5, .weights.h5, .safetensors, .pth, .onnx, .pt2), or demo or xception."
        ),
    ],
    calibration: Annotated[
        str, typer.Option(help="Images to calibrate on: a folder, a list file, or drawn:calibration[:COUNT].")
    ],
    output: Annotated[Path, typer.Option(help="The bundle directory to write; a bundle there is replaced.")],
    images: Annotated[int, typer.Option(min=1, help="Use at most this many calibration images.")] = 512,
    recipe: Annotated[str, typer.Option(help="A preset's name or a recipe file.")] = "default",
    engine: Annotated[list[str] | None, typer.Option(help="native or litert; repeatable; by default both.")] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="relax-vm (a standard TVM library) or onnx-qdq; repeatable.")
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(min=1, help="Input height and width, where the file has none.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Of a state dict of another of timm's networks: timm/xception65 (needs timm).")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The classes' names, one a line, in order.")
    ] = None,
    preprocessing: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JSON with mean, std, resize, interpolation of the images."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images that an inference takes at once.")] = 1,
    tuning: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="What `xceptile tune` measured for the target.")
    ] = None,
    sign: Annotated[Path | None, typer.Option(help="Sign the bundle with this Ed25519 key (PEM).")] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(help="Return layers to float until no more is lost on --data than this share, as 0.1%."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled images that --max-drop is judged on, by top-1."),
    ] = None,
    data_images: Annotated[int, typer.Option(min=1, help="Use at most this many images of --data.")] = 2000,
    dump: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Write the network after every stage, its units, plan and kernels as text."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Calibrate, quantize and compile a trained Xception for one target into a bundle."""
    from ...models import zoo
    from ...models.datasets import open_dataset
    from ...runtime.accuracy import images_sha256
    from ...runtime.bundle import check_output, write_bundle
    from ...runtime.signature import load_signer
    from ...targets import catalog
    from ..accuracy_control import check_artefacts, check_judgeable, control, parse_drop
    from ..dump import keep_artefacts, keep_graphs
    from ..pipeline import ALSO, ENGINES, build_bundle_files, quantize_model
    from ..tuning import load as load_tuning

    for names, known in ((engine or (), ENGINES), (also or (), ALSO)):
        for name in names:
            if name not in known:
                raise typer.BadParameter(f"no such choice {name!r}; known: {', '.join(known)}")
    spec = catalog.get(target)
    check_output(output)
    signer = None if sign is None else load_signer(sign)
    bound = None if max_drop is None else parse_drop(max_drop)
    if (bound is None) != (data is None):
        raise typer.BadParameter("--max-drop and --data go together: a bound, and the images it is judged on")
    settings = recipe_named(recipe)
    measured = None if tuning is None else load_tuning(tuning)
    if measured is not None:
        measured.check_target(spec)
    with bar() as progress:
        progress("load", 0.0)
        loaded = zoo.load(model, size=input_size, architecture=architecture)
        loaded = loaded if labels is None else zoo.with_labels(loaded, labels)
        loaded = loaded if preprocessing is None else zoo.with_preprocessing(loaded, preprocessing)
        dataset = open_dataset(calibration)
        if "native" in (engine or ENGINES):
            progress(f"compile the runtime for {spec.name}", 0.0)
            _check_tools(spec)
        count = min(images, len(dataset))
        judged_on = None if data is None else _judged_on(data, loaded, data_images)
        if judged_on is not None:
            check_judgeable(judged_on, loaded.graph)
        # All before the first is used: a damaged one at the end must not show after minutes of calibration.
        pixels: list[Any] = []
        for item in dataset.items[:count]:
            progress("read images", len(pixels) / count)
            pixels.append(dataset.load(item, loaded.input_spec))
        kept = {} if dump is None else {"keep": keep_graphs(dump)}
        network = quantize_model(loaded, pixels, settings, image_count=count, progress=progress, **kept)

        def build(chosen: Any, notes: dict[str, str] | None = None) -> Any:
            return build_bundle_files(
                chosen, spec, tuple(engine or ENGINES), tuple(also or ()), progress, measured, batch, notes or {}
            )

        found, notes = None, None
        if bound is not None and judged_on is not None:
            network, found = control(network, spec, judged_on, bound, check_artefacts(build, judged_on), progress)
        if found is not None:
            on = f"{found.images} images of sha256 {images_sha256(judged_on or ())}"
            said = f"{found.metric} on {on}: {found.drop:.3%} lost, {bound:.3%} allowed"
            notes = {"accuracy control": f"{said}; {found.reason}"}
        manifest, files = build(network, notes)
        if dump is not None:
            keep_artefacts(dump, files, network.int8_graph, spec, batch)
        bundle = write_bundle(output, manifest, files, signer)
    sizes = {f"{a.engine} {a.dtype}": bundle.size_bytes(a) for a in bundle.manifest.artefacts}
    if as_json:
        facts = {"bundle": str(output), "sha256": bundle.sha256(), "target": spec.name, "size_bytes": sizes}
        print_json(facts | ({} if found is None else {"accuracy_control": found.to_json()}))
    else:
        _print_result(output, manifest, network.table.image_count, sizes, found)
    if found is not None and not found.met:
        raise typer.Exit(1)


def _check_tools(spec: Any) -> None:
    """Before minutes of calibration: what is needed after it and may be missing. The runtime's build is kept."""
    from ..backends import native_runtime, nvrtc

    native_runtime.build(spec)
    if spec.engine == "cuda":
        nvrtc.library_for(spec.gpu.arch)


def _judged_on(data: str, model: Any, count: int) -> Any:
    """The images of accuracy control, in memory: every candidate sees them all."""
    from ...models.datasets import open_dataset
    from ...runtime.accuracy import Labelled

    dataset = open_dataset(data, labels=model.labels)
    return [Labelled(i.name, i.label, dataset.load(i, model.input_spec)) for i in dataset.items[:count]]


# Where fewer images no longer say what a range is; docs/accuracy.md recommends 256 to 512.
FEW_IMAGES = 64


def _print_result(output: Path, manifest: Any, images: int, sizes: dict[str, int], found: Any) -> None:
    from ...models.provenance import NOTES

    out.print(f"{output}: {manifest.network} for {manifest.target.name}, calibrated on {images} images", soft_wrap=True)
    if images < FEW_IMAGES:
        out.print(
            "  few images make ranges that others leave, and accuracy suffers: 256 to 512 are enough", soft_wrap=True
        )
    out.print(f"  input: {input_text(manifest.input_spec)}", highlight=False, soft_wrap=True)
    for note in NOTES:
        if note in manifest.provenance:
            out.print(f"  {note}: {manifest.provenance[note]}", highlight=False, soft_wrap=True)
    for name, size in sizes.items():
        out.print(f"  {name}: {size / 1e6:.2f} MB")
    if found is not None:
        verdict = "kept" if found.met else "NOT kept"
        out.print(
            f"  bound {verdict}: {found.drop:.3%} of {found.metric} lost on {found.images} images; {found.reason}",
            soft_wrap=True,
        )
        if found.float_layers:
            out.print(
                f"  in float: {', '.join(found.float_layers)} (about {found.lost_ms:.3f} ms more, estimated)",
                soft_wrap=True,
            )
