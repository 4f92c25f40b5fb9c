"""The OpenCL devices of this machine, asked of the same library as the native runtime asks."""

from __future__ import annotations

import ctypes
import os

_NAME = 0x102B  # CL_DEVICE_NAME
_GPU, _PROCESSOR = 4, 2  # CL_DEVICE_TYPE_...
_MOST = 16  # platforms, and devices of one platform

_Handles = ctypes.c_void_p * _MOST


def opencl_devices() -> dict[str, str]:
    """Name: what it is, ``GPU`` or ``processor``. Raises OSError where there is no OpenCL library."""
    library = ctypes.CDLL(os.environ.get("XCEPTILE_OPENCL") or "libOpenCL.so.1")
    platforms, devices, count = _Handles(), _Handles(), ctypes.c_uint32()
    found: dict[str, str] = {}
    if library.clGetPlatformIDs(_MOST, platforms, ctypes.byref(count)) != 0:
        return {}
    for platform in platforms[: count.value]:
        for kind, mask in (("GPU", _GPU), ("processor", _PROCESSOR)):
            handle, wanted = ctypes.c_void_p(platform), ctypes.c_uint64(mask)
            if library.clGetDeviceIDs(handle, wanted, _MOST, devices, ctypes.byref(count)) == 0:
                found |= {_name(library, device): kind for device in devices[: count.value]}
    return found


def _name(library: ctypes.CDLL, device: int | None) -> str:
    text = ctypes.create_string_buffer(256)
    library.clGetDeviceInfo(ctypes.c_void_p(device), _NAME, ctypes.c_size_t(len(text)), text, None)
    return text.value.decode("utf-8", "replace") or "a device without a name"
