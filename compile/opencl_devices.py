"""The OpenCL devices of this machine, asked of the same library as the native runtime asks."""

from __future__ import annotations

import ctypes
import os

# Where the runtime looks, in its order: open_library in runtime/native/opencl.c.
LIBRARIES = (
    "libOpenCL.so.1",
    "libOpenCL.so",
    "/usr/lib/aarch64-linux-gnu/libOpenCL.so.1",
    "/usr/lib64/libOpenCL.so.1",
    "libmali.so.1",
    "libmali.so",
    "/usr/lib/aarch64-linux-gnu/libmali.so.1",
)
_FUNCTIONS = ("clGetPlatformIDs", "clGetDeviceIDs", "clGetDeviceInfo")

_NAME = 0x102B  # CL_DEVICE_NAME
_GPU, _PROCESSOR = 4, 2  # CL_DEVICE_TYPE_...
_MOST = 16  # platforms, and devices of one platform

_Handles = ctypes.c_void_p * _MOST


def find_library() -> tuple[str, ctypes.CDLL]:
    """The first of ``LIBRARIES``, or the one of XCEPTILE_OPENCL, that is there and one of OpenCL, with its name.

    Raises OSError where there is none.
    """
    chosen = os.environ.get("XCEPTILE_OPENCL")
    for name in (chosen,) if chosen else LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if all(hasattr(library, function) for function in _FUNCTIONS):
            return name, library
    raise OSError(f"no OpenCL library: {chosen or ', '.join(LIBRARIES)}")


def opencl_devices(library: ctypes.CDLL) -> dict[str, str]:
    """Name: what it is, ``GPU`` or ``processor``."""
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
