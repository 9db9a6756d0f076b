"""Where the cache's tensors lie: at addresses that outlive the memory behind them, so that captured graphs do too.

A CUDA graph holds the addresses of the cache. Were the cache an ordinary tensor, giving its memory back between two
rollouts would spoil every graph, and the next rollout would capture its ladder again. So the addresses are reserved
once, and memory is put behind them for the length of a run: CUDA's virtual memory management (CUDA driver API, section
6.14: cuMemAddressReserve, cuMemCreate, cuMemMap, cuMemSetAccess). Reserving costs no memory, so each tensor reserves as
many addresses as the card has bytes, and a later run may hold more pages than the first.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

PINNED, ON_DEVICE, READ_WRITE = 1, 1, 3  # CUmemAllocationType, CUmemLocationType, CUmemAccess_flags
MINIMUM_GRANULARITY = 0
HAS_VIRTUAL_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED


class CacheMemory:
    """Ordinary tensors: on the CPU, and on a card without virtual memory. Their addresses change from run to run."""

    stable = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def held_bytes(self) -> int:
        """Bytes held that PyTorch's allocator does not count."""
        return 0

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of that name, all zero."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def give_back(self) -> None:
        """Returns the memory of every tensor. The device must be idle, and the caller drops the tensors."""

    def close(self) -> None:
        """As `give_back`, and the addresses too."""
        self.give_back()


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Flags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("gpu_direct_rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _Flags),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class _Bytes:
    """Device memory as what torch.as_tensor takes without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


class VirtualMemory(CacheMemory):
    """Memory at addresses that stay: a tensor of the same name begins where it did before."""

    stable = True

    def __init__(self, device: torch.device, driver: Any) -> None:
        super().__init__(device)
        self._driver = driver
        self._index = torch.cuda.current_device() if device.index is None else device.index
        with torch.cuda.device(self._index):
            torch.cuda.current_stream().synchronize()  # the driver's calls need a current context
        location = _Location(ON_DEVICE, self._index)
        self._properties = _Properties(type=PINNED, location=location)
        self._access = _Access(location, READ_WRITE)
        granularity = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(granularity), self._properties_at, MINIMUM_GRANULARITY)
        self._granularity = granularity.value
        self._reach = self._rounded(torch.cuda.get_device_properties(self._index).total_memory)
        self._addresses: dict[str, int] = {}
        self._mapped: dict[str, tuple[int, int]] = {}  # name to handle and bytes

    @property
    def _properties_at(self) -> Any:
        return ctypes.byref(self._properties)

    @property
    def held_bytes(self) -> int:
        return sum(size for _, size in self._mapped.values())

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Raises torch.OutOfMemoryError where the card has not that much."""
        assert name not in self._mapped, f"{name} is held already"
        num_bytes = math.prod(shape) * dtype.itemsize
        if name not in self._addresses:
            address = ctypes.c_uint64()
            self._call("cuMemAddressReserve", ctypes.byref(address), self._reach, 0, 0, 0)
            self._addresses[name] = address.value
        address_of, size = self._addresses[name], self._rounded(num_bytes)
        handle = ctypes.c_uint64()
        self._call("cuMemCreate", ctypes.byref(handle), size, self._properties_at, 0)
        try:
            self._call("cuMemMap", address_of, size, 0, handle.value, 0)
        except BaseException:
            self._call("cuMemRelease", handle.value)
            raise
        self._mapped[name] = handle.value, size
        self._call("cuMemSetAccess", address_of, size, ctypes.byref(self._access), 1)
        flat = torch.as_tensor(_Bytes(address_of, num_bytes), device=self.device)
        return flat.view(dtype).view(shape).zero_()

    def give_back(self) -> None:
        while self._mapped:
            name, (handle, size) = self._mapped.popitem()
            self._call("cuMemUnmap", self._addresses[name], size)
            self._call("cuMemRelease", handle)

    def close(self) -> None:
        self.give_back()
        while self._addresses:
            self._call("cuMemAddressFree", self._addresses.popitem()[1], self._reach)

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._granularity) * self._granularity

    def _call(self, name: str, *arguments: Any) -> None:
        """Calls the driver, whole numbers as 64 bits but for those it declares as int."""
        values = [ctypes.c_uint64(value) if isinstance(value, int) else value for value in arguments]
        status = getattr(self._driver, name)(*values)
        if status == 2:  # CUDA_ERROR_OUT_OF_MEMORY
            raise torch.OutOfMemoryError(f"the card has no memory left for the cache ({name})")
        if status:
            raise RuntimeError(f"{name} failed with CUDA error {status}")


def cache_memory(device: torch.device) -> CacheMemory:
    """The best there is on `device`."""
    if device.type != "cuda":
        return CacheMemory(device)
    torch.cuda.init()
    driver = ctypes.CDLL("libcuda.so.1")
    supported = ctypes.c_int()
    index = torch.cuda.current_device() if device.index is None else device.index
    status = driver.cuDeviceGetAttribute(ctypes.byref(supported), HAS_VIRTUAL_MEMORY, index)
    return VirtualMemory(device, driver) if status == 0 and supported.value else CacheMemory(device)
