"""The plan parser and the session under libFuzzer, with AddressSanitizer and UBSan."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from support import fuzzing
from support.needs import requires
from support.plan_files import PACKED, PACKED_GPU
from support.tree import SOURCES, TEST_SOURCES

pytestmark = requires("clang", package="clang")

# Checks of plan.c, and what is put in their place.
FAULTS = {
    "the kernel's index": ("step->kernel >= header->kernel_count", "false"),
    "the end of a slice": ("count <= (room - offset) / item_bytes", "count <= room / item_bytes"),
    "the place of a name": ("names[i] >= plan->header->strings_bytes || ", ""),
}


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzzing.build(tmp_path_factory.mktemp("fuzzer"))


def test_the_corpus_is_handled(fuzzer: Path, tmp_path: Path) -> None:
    """Every input that ever reached new code, once."""
    assert len(list(fuzzing.CORPUS.iterdir())) > 30
    done = fuzzing.run(fuzzer, "-runs=0", fuzzing.write_seeds(tmp_path / "seeds"), fuzzing.CORPUS)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_twenty_seconds_of_new_inputs_are_handled(fuzzer: Path, tmp_path: Path) -> None:
    seeds = fuzzing.write_seeds(tmp_path / "seeds")
    done = fuzzing.run(fuzzer, "-max_total_time=20", "-print_final_stats=1", seeds, fuzzing.CORPUS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "stat::number_of_executed_units" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    """From sound plans alone, without the corpus."""
    check, instead = FAULTS[fault]
    sources = shutil.copytree(SOURCES, tmp_path / "sources")
    text = (sources / "plan.c").read_text()
    assert text.count(check) >= 1
    (sources / "plan.c").write_text(text.replace(check, instead))
    done = fuzzing.run(fuzzing.build(tmp_path, sources), "-runs=500000", fuzzing.write_seeds(tmp_path / "seeds"))
    assert done.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("packed", [PACKED, PACKED_GPU], ids=["cpu", "gpu"])
def test_every_value_of_every_byte_of_a_plan_is_refused_or_harmless(packed: bytes, tmp_path: Path) -> None:
    """As it is: refused, all of them. With the hash made right: refused, or a plan that is as sound as the first, in
    which only a name, a path, a count of multiply-accumulates or a bounded number, such as the tolerance or a pixel's
    value, is another."""
    program = tmp_path / "bytes"
    sources = [str(TEST_SOURCES / "plan_bytes.c"), *(str(SOURCES / name) for name in fuzzing.LIBRARY_SOURCES)]
    flags = ["-std=c11", "-g", "-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}"]
    subprocess.run(["clang", *flags, *sources, "-ldl", "-lpthread", "-lm", "-o", program], check=True)
    done = subprocess.run([program], input=packed, capture_output=True, check=True)
    accepted = [struct.unpack_from("<II", done.stdout, 8 * i) for i in range(len(done.stdout) // 8)]
    assert [as_it_is for as_it_is, _ in accepted] == [0] * len(packed)
    harmless = Counter({position: sealed for position, (_, sealed) in enumerate(accepted) if sealed})
    # The header's own fields, but for the tolerance: any value of its lowest byte is one.
    assert not any(position < 48 or (136 <= position < 176 and position != 168) for position in harmless)
    assert all(harmless[position] == 255 for position in range(72, 136))  # hashes of the other files: checked on open
    assert 0 < len(harmless) < len(packed)
