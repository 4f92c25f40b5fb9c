"""The command line: `xceptile VERB` and `compile`.

Exit status: 0 done, 1 a check found a regression or a mismatch, 2 the input or this machine will not do (one line says
what, where and what to do), 3 a check's figures do not decide, 130 interrupted.
"""

from __future__ import annotations

import io
import sys
import traceback
import warnings

from ..runtime.said import said

try:
    import typer
    from typer.exceptions import TyperException

    from .commands.common import err
except ImportError as _missing:
    print(f"error: {said(_missing).line}", file=sys.stderr)
    sys.exit(2)

from .. import __version__
from .commands import (
    bench,
    check,
    doctor,
    estimate,
    inspect,
    recipe,
    report,
    run,
    sensitivity,
    sign,
    targets,
    tune,
    verify,
)
from .commands import compile as compile_verb

INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Ship a trained Xception as INT8."
)
compile_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
compile_app.command()(compile_verb.compile_command)
app.command("compile")(compile_verb.compile_command)
for _verb in (
    run.run,
    verify.verify,
    bench.bench,
    estimate.estimate,
    check.baseline,
    check.check,
    sensitivity.sensitivity,
    recipe.recipe,
    report.report,
    targets.targets,
    tune.tune,
    inspect.inspect,
    sign.sign,
    doctor.doctor,
):
    app.command()(_verb)


def _invoke(command: typer.Typer, arguments: list[str]) -> int:
    """Runs a command line; what it raises becomes one line and an exit status."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if "--version" in arguments[:1]:
            print(__version__, flush=True)
            return 0
        # A verb's own status comes as a typer.Exit, whose number is returned.
        status = typer.main.get_command(command).main(args=arguments, standalone_mode=False)
        if status == INTERRUPTED:  # typer's answer to Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()  # a full disk is known now, not when Python ends
        return status if isinstance(status, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        err.print("interrupted; nothing was left half-written")
        return INTERRUPTED
    except TyperException as error:
        if error.format_message():  # none where a command line without a verb printed the help page
            err.print(f"error: {error.format_message()}", highlight=False, soft_wrap=True)
        return 2
    except BaseException as error:  # whatever it is: 1 is a regression, and a library that exits is none
        if debug:
            err.print(traceback.format_exc(), highlight=False, soft_wrap=True, end="")
        line, whole = said(error)
        err.print("error: ", style="bold red", end="")
        err.print(line, highlight=False, soft_wrap=True)
        if not whole and not debug:
            err.print("(run again with --debug for the traceback)")
        return 2


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    """In the place of Python's own, which names a line of the program."""
    err.print(f"warning: {message}", highlight=False, soft_wrap=True)


def _run(command: typer.Typer) -> None:
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):  # of a terminal or a pipe that has not every letter (LC_ALL=C)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_invoke(command, sys.argv[1:]))


def main() -> None:
    """Entry point of `xceptile`."""
    _run(app)


def compile_main() -> None:
    """Entry point of `compile`, the same as `xceptile compile`."""
    _run(compile_app)


if __name__ == "__main__":
    main()
