"""Work-group shapes by family of GPU: pure functions of what is known of a GPU and of a kernel's shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ....targets.spec import GpuSpec
from .channelwise import Channelwise, patch
from .convolution import Convolution, Tile
from .element import Element
from .tir import VECTOR_BYTES

# Of the last-level cache in the count of memory traffic, where a target's row has none. Makers publish little: half a
# megabyte is what the smallest configurations of the listed Adreno and Mali parts are said to have, and a PowerVR of
# the GE series has less.
CACHE_BYTES = {"adreno": 512 << 10, "mali": 512 << 10, "powervr": 128 << 10}


@dataclass(frozen=True)
class Family:
    """``across`` by ``down`` work-items of a convolution's group, ``channelwise_items`` of a depthwise one's or
    pooling's.

    ``staged``: whether local memory is worth being used for products; on Mali it is ordinary memory. (Arm, "Mali GPU
    OpenCL Developer Guide", "Local and private memory": "Mali GPUs implement OpenCL local memory in global memory".)
    """

    across: int
    down: int
    channelwise_items: int
    staged: bool


FAMILIES = {
    "adreno": Family(across=32, down=4, channelwise_items=256, staged=True),
    "mali": Family(across=16, down=4, channelwise_items=128, staged=False),
    "powervr": Family(across=32, down=2, channelwise_items=128, staged=True),
}


def family_of(gpu: GpuSpec) -> str:
    """``adreno``, ``mali`` or ``powervr``; what is unknown is treated like an Adreno, whose rules are common."""
    name = gpu.arch.partition("-")[0]
    return name if name in FAMILIES else "adreno"


def cache_bytes(gpu: GpuSpec) -> int:
    """What the count of traffic takes the last-level cache to hold."""
    return gpu.cache_bytes or CACHE_BYTES[family_of(gpu)]


def tile_of(gpu: GpuSpec, shape: Convolution) -> Convolution:
    """The same convolution with a tile for this GPU, and its channels in the chunks that move the fewest bytes."""
    family, e = FAMILIES[family_of(gpu)], shape.element
    down = min(family.down, shape.out_blocks)
    across = family.across
    while across > 8 and across >= 2 * shape.geometry.out_pixels:
        across //= 2
    # 32 sums a work-item: what leaves registers for enough work-items to hide latency on all three families.
    pixels = max(1, min(8 // e.quads, shape.geometry.out_pixels // across))
    pixels = 1 << (pixels.bit_length() - 1)
    rows = [r for r in (1, 2, 4, 8, 16, 32) if across * pixels % r == 0 and (r == 1 or not shape.flat)]
    tiles = [Tile(across, down, pixels, r, family.staged or shape.plain) for r in rows]
    drafts = [replace(shape, tile=tile) for tile in tiles]
    fitting = [d for d in drafts if d.local_bytes <= gpu.local_memory_bytes // 2]
    unstaged = replace(shape, tile=replace(tiles[0], staged=False))
    best = min(fitting, key=lambda d: d.pixel_tiles * d.patch_size, default=unstaged)
    chunked = [replace(best, chunk=chunk) for chunk in range(1, best.channel_tiles + 1)]
    # Of equals: the fewest tiles that do not exist, then the smallest chunk.
    return min(chunked, key=lambda d: (d.traffic_bytes(cache_bytes(gpu)), d.groups[1] * d.chunk, d.chunk))


def channelwise_tile(gpu: GpuSpec, shape: Channelwise) -> Channelwise:
    """The same kernel with the tile, of those that fit half the local memory, that loads the fewest bytes."""
    items = FAMILIES[family_of(gpu)].channelwise_items
    out = (shape.geometry.out_height, shape.geometry.out_width)
    most = gpu.local_memory_bytes // 2
    drafts = []
    # As many tiles down as may be; across the fewest that then fit.
    for rows in range(1, out[0] + 1):
        for columns in range(1, out[1] + 1):
            tile = (-(-out[0] // rows), -(-out[1] // columns))
            if math.prod(patch(tile, shape.geometry.kernel, shape.geometry.strides)) * VECTOR_BYTES <= most:
                drafts.append(replace(shape, tile=tile, items=items))
                break
    if not drafts:
        drafts = [replace(shape, tile=(1, 1), items=items)]
    best = min(drafts, key=lambda d: (d.requested_bytes, d.patch_size))
    needed = -(-math.prod(best.tile) * 4 // 32) * 32  # whole subgroups, no more than there is work for
    return replace(best, items=min(items, needed))


def check_local_memory(gpu: GpuSpec, element: Element, local_bytes: int, name: str) -> None:
    """Raises ValueError where a kernel wants more local memory than a group may have."""
    if local_bytes > gpu.local_memory_bytes:
        raise ValueError(
            f"{name}: the {element.name} kernel wants {local_bytes} bytes of local memory, a group on {gpu.arch} may "
            f"have {gpu.local_memory_bytes}"
        )
