"""The fuzzer of the plan parser and the session: building it, its seeds and its corpus.

To look for new inputs and keep those that reach new code::

    cd tests && python -m support.fuzzing SECONDS
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from support import fake_network, plan_files
from support.tree import SOURCES, TEST_SOURCES

from xceptile.compile.backends import native_runtime
from xceptile.runtime.plan import pack

CORPUS = TEST_SOURCES / "corpus"
LIBRARY_SOURCES = native_runtime.LIBRARY_SOURCES
REPLACED = ("dlopen", "dlsym", "dlclose", "dlerror")
FLAGS = (
    "-std=c11", "-g", "-O1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", "-pthread",
    "-Wl,--export-dynamic",
    *(f"-D{name}=fuzz_{name}" for name in REPLACED),
)  # fmt: skip
LIMITS = ("-max_len=4096", "-timeout=20", "-rss_limit_mb=4096", "-seed=1")


def build(folder: Path, sources: Path = SOURCES) -> Path:
    """The fuzzer of the runtime in ``sources``."""
    program = folder / "fuzz_plan"
    files = [
        TEST_SOURCES / "fuzz_plan.c",
        TEST_SOURCES / "fake_cuda.c",
        *(sources / name for name in LIBRARY_SOURCES),
    ]
    subprocess.run(["clang", *FLAGS, f"-I{sources}", *files, "-ldl", "-lm", "-o", program], check=True)
    return program


def write_seeds(folder: Path) -> Path:
    """Sound plans, to begin with; made anew, so that they follow the format."""
    folder.mkdir(parents=True, exist_ok=True)
    zeros = "0" * 64
    small = replace(plan_files.small_plan(), features=())
    plans = {
        "small": small,
        "network": fake_network.plan(),
        "opencl": plan_files.gpu_plan("opencl"),
        "cuda": plan_files.gpu_plan("cuda"),
    }
    for name, plan in plans.items():
        (folder / name).write_bytes(pack(plan, zeros, zeros))
    return folder


def run(program: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """libFuzzer with our limits; what crashes is written to the working directory, the program's folder."""
    command = [program, *LIMITS, *words]
    return subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=False)


def main(seconds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build(folder)
        found = write_seeds(folder / "found")
        done = run(program, f"-max_total_time={seconds}", "-print_final_stats=1", found, CORPUS)
        print(done.stderr[-3000:])
        if done.returncode:
            for crash in (
                path for path in folder.iterdir() if path.name.startswith(("crash-", "timeout-", "oom-", "leak-"))
            ):
                (Path.cwd() / crash.name).write_bytes(crash.read_bytes())
            raise SystemExit("a fault: its input was copied here")
        print(run(program, "-merge=1", "-use_counters=0", CORPUS, found).stderr[-600:])


if __name__ == "__main__":
    main(int(sys.argv[1]))
