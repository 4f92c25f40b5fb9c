"""The floors of the house: no file imports from a floor above its own, and a heavy library only where it may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tree import ROOT

# What each folder may import of ours, itself apart.
BELOW: dict[str, set[str]] = {
    "targets": set(),
    "models": set(),
    "runtime": {"models", "targets"},
    "calibration": {"runtime", "models"},
    "compile": {"calibration", "runtime", "models", "targets"},
}

# The third-party packages a folder may import when it is imported itself, and those its functions may when called.
AT_IMPORT: dict[str, set[str]] = {
    "targets": set(),
    "models": {"numpy", "h5py", "onnx", "safetensors"},
    "runtime": {"numpy"},
    "calibration": {"numpy"},
}
WHEN_CALLED: dict[str, set[str]] = {
    "targets": set(),
    "models": {"numpy", "torch", "PIL", "safetensors", "h5py", "onnx", "timm"},
    "runtime": {"numpy", "PIL", "ai_edge_litert", "cryptography", "tflite_runtime", "jinja2", "ray"},
    "calibration": {"numpy", "torch", "PIL", "safetensors"},
}

# The files of models/ that travel to devices, and the files that are about torch.
NUMPY_FILES = {
    f"models/{name}.py"
    for name in ("atomic_write", "graph", "preprocess", "read_file", "serialize", "graph_text", "verify")
}
ABOUT_TORCH = "xception, from_torch, keras_weights, pth_file, timm_architecture, timm_weights, train, weights"
TORCH_FILES = {f"models/{name}.py" for name in ABOUT_TORCH.split(", ")}
PYTEST_FILE = "runtime/pytest_plugin.py"  # which pytest alone imports
TVM_FOLDERS = ("compile/kernels/", "compile/backends/")


def sources() -> list[Path]:
    """Every Python file of the package, relative to the root."""
    return sorted(path.relative_to(ROOT) for folder in BELOW for path in (ROOT / folder).rglob("*.py"))


def imports(text: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Each module that ``text``, the file at ``path`` of the package, imports, and whether it does so when imported."""
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    deferred = {id(inner) for function in functions for inner in ast.walk(function)}
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    deferred |= {id(inner) for block in typing_only for inner in ast.walk(block)}
    here = ("xceptile", *path.parent.parts)
    for node in ast.walk(tree):
        at_import = id(node) not in deferred
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) + 1 - node.level]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from .. import targets` names a folder as an attribute.
            yield from ((f"{module}.{alias.name}", at_import) for alias in node.names)


def faults(text: str, path: Path) -> list[str]:
    """What ``text``, the file at ``path``, imports that it may not."""
    folder = path.parts[0]
    found = []
    for module, at_import in imports(text, path):
        top, *rest = module.split(".")
        if top == "xceptile":
            if rest and rest[0] in BELOW and rest[0] != folder and rest[0] not in BELOW[folder]:
                found.append(f"{path} imports {module}: {rest[0]}/ is not below {folder}/")
        elif top in ("tvm", "tvm_ffi"):
            if not path.as_posix().startswith(TVM_FOLDERS):
                found.append(f"{path} imports {module}: TVM is for {' and '.join(TVM_FOLDERS)} alone")
        elif top not in sys.stdlib_module_names and folder in AT_IMPORT and top not in allowed(path, at_import):
            when = "when imported" if at_import else "in a function"
            found.append(f"{path} imports {module} {when}: {folder}/ may not")
    return found


def allowed(path: Path, at_import: bool) -> set[str]:
    """The third-party packages that the file at ``path`` may import."""
    if not at_import:
        return WHEN_CALLED[path.parts[0]]
    if path.as_posix() in NUMPY_FILES:
        return {"numpy"}
    if path.as_posix() == PYTEST_FILE:
        return {"pytest"}
    return AT_IMPORT[path.parts[0]] | ({"torch"} if path.as_posix() in TORCH_FILES else set())


@pytest.mark.parametrize("path", sources(), ids=str)
def test_no_import_climbs(path: Path) -> None:
    assert not faults((ROOT / path).read_text(), path)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("targets/catalog.py", "from ..runtime.plan import Plan", "not below targets"),
        ("targets/catalog.py", "import numpy", "targets/ may not"),
        ("models/graph.py", "from .. import runtime", "not below models"),
        ("models/graph.py", "from ..targets.spec import TargetSpec", "not below models"),
        ("models/graph.py", "import torch", "models/ may not"),
        ("models/graph.py", "import safetensors.numpy", "models/ may not"),
        ("models/zoo.py", "from torch import nn", "models/ may not"),
        ("runtime/engines/litert.py", "import ai_edge_litert", "when imported"),
        ("runtime/engines/litert.py", "from ...compile.pipeline import build", "not below runtime"),
        ("runtime/session.py", "def f():\n    import torch", "in a function"),
        ("runtime/session.py", "def f():\n    import tvm", "TVM is for"),
        ("calibration/collect.py", "import xceptile.compile.passes.pipeline", "not below calibration"),
        ("compile/pipeline.py", "import tvm", "TVM is for"),
    ],
)
def test_a_planted_import_is_seen(path: str, text: str, message: str) -> None:
    found = faults(text, Path(path))
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("runtime/engines/litert.py", "def f():\n    from ai_edge_litert.interpreter import Interpreter"),
        ("runtime/engines/litert.py", "from ...models.graph import Graph\nfrom ..plan import Plan\nimport json"),
        ("models/from_torch.py", "import torch"),
        ("compile/kernels/arm/lower.py", "import tvm\nfrom ....targets.spec import TargetSpec"),
    ],
)
def test_a_lawful_import_is_not(path: str, text: str) -> None:
    assert not faults(text, Path(path))


DEVICE_MODULES = [
    "xceptile",
    *(
        f"xceptile.{'.'.join(path.with_suffix('').parts)}"
        for path in sources()
        if path.parts[0] in ("runtime", "targets")
    ),
    "xceptile.models.graph",
]


def test_what_a_device_imports_brings_no_heavy_library() -> None:
    heavy = {"torch", "tvm", "tvm_ffi", "ai_edge_litert", "tflite_runtime", "tflite", "PIL", "typer", "onnx", "h5py"}
    modules = [name.removesuffix(".__init__") for name in DEVICE_MODULES]
    program = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
