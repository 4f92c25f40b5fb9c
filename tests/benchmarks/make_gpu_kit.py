"""``make gpu-kit``: the kit for a borrowed GPU, of the graphs that the tests try every CUDA kernel with.

In build/gpu_kit, of less than 60 MiB: the operators for every Jetson architecture, the whole Xception at 299x299 in
int8, batch 1 and 8, and a narrow one in float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from support.emulated_bundle import merged
from support.int8_graphs import as_float, photo, random_input, random_xception
from support.operator_cases import all_cases

from xceptile.compile.gpu_kit.make_kit import BOARDS, Contents, make_kit, pack


def make(kit: Path, *, size: int = 299, width: float = 1.0, batches: tuple[int, ...] = (1, 8),
         boards: tuple[str, ...] = BOARDS) -> None:  # fmt: skip
    operators = merged(all_cases())
    network = random_xception(size, width, 1000 if width == 1.0 else 10, same_padding=False)
    narrow = random_xception(size, min(width, 0.25), 10, same_padding=False)
    photos = np.concatenate([photo(size, size, seed) for seed in range(max(2, *batches))])
    inputs = random_input(operators, 0)
    contents = Contents(operators, inputs, network, as_float(network), narrow, as_float(narrow), photos)
    make_kit(kit, contents, batches, boards)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/gpu_kit"))
    parser.add_argument("--quick", action="store_true", help="a small network for one board: to try the kit itself")
    options = parser.parse_args()
    if options.quick:
        make(options.output, size=75, width=0.125, batches=(1, 2), boards=("orin",))
    else:
        make(options.output)
    pack(options.output)
    print(f"{options.output}: copy it to the machine with the GPU and run `python borrowed_gpu.py` in it")
