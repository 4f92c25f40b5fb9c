"""The command line: `xceptile VERB` and `compile`.

Exit status: 0 done, 1 a check found a regression or a mismatch, 2 the input or this machine will not do (one line says
what, where and what to do), 3 a check's figures do not decide, 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
import warnings

try:
    import typer
    from typer.exceptions import TyperException
except ModuleNotFoundError as _missing:
    print(f"error: the command line needs the package {_missing.name}: pip install 'xceptile[cli]'", file=sys.stderr)
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
from .commands.common import err

INTERRUPTED = 130

# What an extra other than `compile` brings, by the name it is imported by.
_EXTRAS = {
    "PIL": "images",
    "ai_edge_litert": "litert",
    "cryptography": "sign",
    "nvidia": "cuda",
    "ray": "ray",
    "timm": "timm",
}

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
        status = typer.main.get_command(command).main(args=arguments, standalone_mode=False)
        if status == INTERRUPTED:  # typer's answer to Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()  # a full disk is known now, not when Python ends
        return status if isinstance(status, int) else 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except (typer.Abort, KeyboardInterrupt):
        err.print("interrupted; nothing was left half-written")
        return INTERRUPTED
    except TyperException as error:
        if error.format_message():  # none where a command line without a verb printed the help page
            err.print(f"error: {error.format_message()}", highlight=False, soft_wrap=True)
        return 2
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if debug or package == __package__.partition(".")[0]:
            raise
        extra = _EXTRAS.get(package, "compile")
        err.print(f"error: this needs the package {package}: pip install 'xceptile[{extra}]'", soft_wrap=True)
        return 2
    except (ValueError, LookupError, RuntimeError, OSError, MemoryError) as error:
        if debug:
            err.print(traceback.format_exc(), highlight=False, soft_wrap=True, end="")
        # Our errors carry whole sentences, the system's a file; any other is named by its type.
        own = type(error).__module__.startswith(__package__.partition(".")[0])
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if not own and isinstance(error, OSError) and error.filename and error.strerror:
            own, text = True, f"{error.filename}: {error.strerror}"
        line = " ".join((text if own else f"{type(error).__name__}: {text}").split())
        err.print("error: ", style="bold red", end="")
        err.print(line, highlight=False, soft_wrap=True)
        if not own and not debug:
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


def main() -> None:
    """Entry point of `xceptile`."""
    warnings.showwarning = _show_warning
    sys.exit(_invoke(app, sys.argv[1:]))


def compile_main() -> None:
    """Entry point of `compile`, the same as `xceptile compile`."""
    warnings.showwarning = _show_warning
    sys.exit(_invoke(compile_app, sys.argv[1:]))


if __name__ == "__main__":
    main()
