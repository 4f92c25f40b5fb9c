"""What the verbs share: the consoles, the options that mean the same everywhere, and a progress bar."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from ...models.atomic_write import check_writable
from ...models.visible import visible


class _Terminal(Console):
    """The one way out to the user: text, alone or within a table, is shown and never obeyed."""

    def __init__(self, *, stderr: bool = False) -> None:
        # No markup, no emoji: names of files, classes and devices hold brackets, and adb:X: is no cross.
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich makes of every string before it lays it out."""
        return super().render_str(visible(text), **options)


out = _Terminal()
err = _Terminal(stderr=True)

BundleArgument = Annotated[Path, typer.Argument(help="A bundle directory.", metavar="BUNDLE")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="local, qemu, ssh://[USER@]HOST[:PORT] or adb:SERIAL; by default local where the target's code runs here, "
        "else qemu."
    ),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads; by default all processors.")]
PublicKeyOption = Annotated[
    Path | None, typer.Option(help="Refuse the bundle unless this Ed25519 key (PEM) vouches for it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
DataOption = Annotated[
    str,
    typer.Option(
        help="Labelled images: a folder with a directory per class, a list file, ImageNet's validation folder, or "
        "drawn:val[:COUNT]."
    ),
]
EnginesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine", help="native, litert, tflite-runtime or reference; repeatable; by default native and litert."
    ),
]
NO_FLOAT = "No float build ran there; on a device behind ssh or adb it is LiteRT's, if its python3 has that."
ImagesOption = Annotated[int | None, typer.Option("--images", min=1, help="Use only the first images.")]


def duration_s(text: str) -> float:
    """``30s``, ``10m`` or ``1h`` in seconds. Raises typer.BadParameter, one line for the user."""
    from ...runtime.benchmark import parse_duration_s

    try:
        return parse_duration_s(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextlib.contextmanager
def bar() -> Iterator[Any]:
    """A progress bar on standard error, or a line per phase where that is no terminal; yields report(what, share)."""
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, share: float) -> None:
            what = visible(what)  # the bar's column makes its text without the console
            if what not in tasks:
                for task in tasks.values():
                    progress.update(task, completed=1.0)
                tasks[what] = progress.add_task(what, total=1.0)
                if not err.is_terminal:
                    err.print(what, highlight=False, soft_wrap=True)
            progress.update(tasks[what], completed=share)

        yield report
        for task in tasks.values():
            progress.update(task, completed=1.0)


def print_json(value: Any) -> None:
    """For scripts; in printable ASCII, as JSON escapes all else but one control character."""
    print(json.dumps(value, indent=1, sort_keys=True).replace("\x7f", "\\u007f"))


def labelled(bundle: Any, data: str, images: int | None) -> Any:
    """The labelled images of a data set as the bundle's network takes them, lazily, and how many there are."""
    from ...models.datasets import open_dataset
    from ...runtime.accuracy import Labelled

    dataset = open_dataset(data, labels=bundle.manifest.labels)
    items = dataset.items[:images]
    spec = bundle.manifest.input_spec
    return (Labelled(item.name, item.label, dataset.load(item, spec)) for item in items), len(items)


def input_text(spec: Any) -> str:
    """What becomes of an image, and how much of that nobody has said, in one line."""
    facts = spec.described()
    return ", ".join([facts.pop("size"), *(f"{fact} {said}" for fact, said in facts.items())])


def table(*columns: Column | str, **options: Any) -> Table:
    """A table without a frame, for many columns in a narrow terminal; the title on the left."""
    return Table(*columns, box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", **options)


def figure(*lines: str) -> Column:
    """A column of figures: on the right, never cut; the title may take several lines."""
    return Column("\n".join(lines), justify="right", no_wrap=True)


def check_folder_of(output: Path) -> None:
    """Before minutes of work: refuses a file that could not be written after it."""
    try:
        check_writable(output)
    except OSError as error:
        raise typer.BadParameter(
            f"cannot write {output} ({error.strerror}); its folder must be there and writable"
        ) from error
