"""Which NVIDIA GPUs are here, asked of their driver's library as the native runtime does."""

from __future__ import annotations

import ctypes
import os

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...


def cuda_devices() -> dict[str, str]:
    """GPUs by name, each with its compute capability; none where the driver finds none.

    Raises OSError where the driver's library is not installed.
    """
    library = ctypes.CDLL(os.environ.get("XCEPTILE_CUDA") or "libcuda.so.1")
    count, device, found = ctypes.c_int(), ctypes.c_int(), {}
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return {}
    for ordinal in range(count.value):
        name, numbers = ctypes.create_string_buffer(128), (ctypes.c_int(), ctypes.c_int())
        if library.cuDeviceGet(ctypes.byref(device), ordinal) or library.cuDeviceGetName(name, len(name), device):
            continue
        for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
            library.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        title = name.value.decode("utf-8", "replace")
        found[f"{title} #{ordinal}" if title in found else title] = f"{numbers[0].value}.{numbers[1].value}"
    return found
