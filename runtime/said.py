"""What an exception says to a user, in one line: for the command line and for pytest."""

from __future__ import annotations

from typing import NamedTuple

# Which extra brings a package, by the name it is imported by; `compile` brings the rest.
_EXTRAS = {
    "typer": "device",
    "rich": "device",
    "PIL": "device",
    "ai_edge_litert": "device",
    "safetensors": "gate",
    "jinja2": "gate",
    "pytest": "gate",
    "cryptography": "sign",
    "nvidia": "cuda",
    "ray": "ray",
    "timm": "timm",
}
_OWN = __name__.partition(".")[0]
# What the loader says where the process has no room for a library's thread-local variables (Jetson's libgomp).
_STATIC_TLS = "cannot allocate memory in static TLS block"


class Said(NamedTuple):
    """``whole``: the line says what to do; else only a traceback says more."""

    line: str
    whole: bool


def said(error: BaseException) -> Said:
    """Our errors carry whole sentences, the system's name a file, a missing package has a name; any other exception is
    named by its type.
    """
    text, whole = str(error), type(error).__module__.partition(".")[0] == _OWN
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    if isinstance(error, ImportError):
        text, whole = _of_import(error)
    elif isinstance(error, OSError) and not whole and error.filename and error.strerror:
        text, whole = f"{error.filename}: {error.strerror}", True
    elif not whole:
        text = f"{type(error).__name__}: {text}"
    return Said(" ".join(text.split()), whole)


def _of_import(error: ImportError) -> tuple[str, bool]:
    package = str(error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package != _OWN:
        return f"this needs the package {package}: pip install 'xceptile[{_EXTRAS.get(package, 'compile')}]'", True
    if _STATIC_TLS in str(error):
        library = str(error).partition(":")[0]
        return f"{error}; start again with LD_PRELOAD={library}", True
    what = f"the package {package}" if package else "a package"
    return f"{what} is installed, but importing it fails: {error}", package != _OWN
