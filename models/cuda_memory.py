"""Memory of a GPU that another process can map: the few calls of the CUDA runtime that torch does not offer.

Memory of torch's own allocator is no good for that: a handle opens the whole block that an address lies in, with
whatever else torch has put there. What `allocate` gives is a whole number of pages of its own, so nothing else travels.

CUDA maps writable and knows no other way: who opens a handle may change what it opens, for everybody.
Free of torch. Sources: CUDA runtime API, device management; CUDA programming guide, 4.15.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

PAGE_BYTES = 2 << 20
"""Less than that, cudaMalloc takes from a page that it also gives to others."""
HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1
"""The only flag that cudaIpcOpenMemHandle takes."""


class CudaError(Exception):
    """A call of the CUDA runtime failed; the text names the call, the reason and the number."""


class DeviceType(IntEnum):
    """Where memory lies, in DLPack's numbers."""

    CPU = 1
    CUDA = 2


class CudaRuntime:
    """One device through the CUDA runtime. It belongs to the thread that made it: that is how CUDA chooses devices."""

    def __init__(
        self, library: ctypes.CDLL, device: int = 0, *, device_type: DeviceType = DeviceType.CUDA
    ) -> None:
        """`device_type` is what its memory is to torch. Raises `CudaError` where there is no such device."""
        self._device, self._device_type = device, device_type
        self._library = library
        pointer, pointer_at = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
        for name, arguments in (
            ("cudaSetDevice", (ctypes.c_int,)),
            ("cudaMalloc", (pointer_at, ctypes.c_size_t)),
            ("cudaIpcGetMemHandle", (ctypes.POINTER(_Handle), pointer)),
            ("cudaIpcOpenMemHandle", (pointer_at, _Handle, ctypes.c_uint)),
            ("cudaGetErrorString", (ctypes.c_int,)),
            ("cudaGetLastError", ()),
        ):
            getattr(library, name).argtypes = arguments
        library.cudaGetErrorString.restype = ctypes.c_char_p
        self._views: list[_Managed] = []
        self._call("cudaSetDevice", device)

    @classmethod
    def of_torch(cls, cuda_version: str | None, device: int) -> CudaRuntime:
        """The runtime that torch has loaded; `cuda_version` is `torch.version.cuda`. Raises `CudaError`."""
        if cuda_version is None:
            raise CudaError("torch was built without CUDA")
        name = f"libcudart.so.{cuda_version.partition('.')[0]}"
        try:
            return cls(ctypes.CDLL(name), device)  # by its soname: the one that is there already
        except (OSError, AttributeError) as exc:
            raise CudaError(f"{name} cannot be used") from exc

    def allocate(self, size_bytes: int) -> int:
        """The address of new memory that shares no page with any other; it is freed with the process.

        `size_bytes` is a multiple of `PAGE_BYTES`. Raises `CudaError`.
        """
        if size_bytes < 1 or size_bytes % PAGE_BYTES:
            raise ValueError(f"{size_bytes} bytes are not a whole number of pages")
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), size_bytes)
        if address.value is None or address.value % PAGE_BYTES:
            raise CudaError("cudaMalloc: the memory does not begin with a page of its own")
        return address.value

    def export(self, address: int) -> bytes:
        """A handle by which another process can open the allocation at `address`, as long as this one lives.

        Raises `CudaError`: under MIG, in some virtual machines, and on integrated GPUs.
        """
        handle = _Handle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """The address at which this process sees what another one has exported. Raises `CudaError`."""
        address = ctypes.c_void_p()
        self._call(
            "cudaIpcOpenMemHandle", ctypes.byref(address), _Handle.from_buffer_copy(handle), LAZY_PEER_ACCESS
        )
        if address.value is None:
            raise CudaError("cudaIpcOpenMemHandle: it opened nothing")
        return address.value

    def view(self, address: int, size_bytes: int) -> object:
        """The memory as a DLPack capsule of bytes, for `torch.from_dlpack`. It stays mapped as long as the process lives."""
        managed = _Managed(
            data=address,
            device_type=self._device_type,
            device=0 if self._device_type is DeviceType.CPU else self._device,
            dimensions=1,
            code=_UNSIGNED,
            bits=8,
            lanes=1,
            shape=(ctypes.c_int64 * 1)(size_bytes),
        )
        self._views.append(managed)  # the tensor points to it, and there is no deleter
        return _new_capsule(ctypes.addressof(managed), _CAPSULE_NAME, None)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.cudaGetLastError()  # or torch would take it for an error of its own next kernel
            text = (self._library.cudaGetErrorString(code) or b"").decode(errors="replace")
            raise CudaError(f"{name}: {text} ({code})")


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t; it travels by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class _Managed(ctypes.Structure):
    """DLManagedTensor of DLPack 0.x, which every torch takes."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # none: it is compact
        ("byte_offset", ctypes.c_uint64),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_UNSIGNED = 1
_CAPSULE_NAME = b"dltensor"  # a capsule keeps the address of its name, not a copy
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
