"""Sensor readings of a GPU (clocks, temperature, power draw), read through NVML and never set.

NVML comes with NVIDIA's driver and is called through its C interface ("NVML API Reference Guide"). A reading takes well
under a millisecond, and no package has to be installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

LIBRARY = "libnvidia-ml.so.1"

SM_CLOCK, MEMORY_CLOCK = 1, 2
"""`nvmlClockType_t`."""

GPU_TEMPERATURE = 0
"""`nvmlTemperatureSensors_t`."""

TEXT_BYTES = 96
MILLIWATTS = 1000.0


class GpuClocks:
    """The sensors of one GPU.

    Args:
        library: NVML, initialised.
        handle: NVML's handle of the GPU.
    """

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle

    @classmethod
    def at(cls, pci: str) -> GpuClocks | None:
        """The GPU at a PCI address such as `0000:19:00.0`; None where there is no driver or no such GPU."""
        try:
            library = ctypes.CDLL(LIBRARY)
            handle = ctypes.c_void_p()
            if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByPciBusId_v2(pci.encode(), ctypes.byref(handle)):
                return None
        except (OSError, AttributeError):
            # No library, or one without these functions.
            return None
        return cls(library, handle)

    def read(self) -> dict[str, float]:
        """Current sm_mhz, memory_mhz, temperature_c and power_w; readings that the GPU lacks are left out."""
        found = {
            "sm_mhz": self._number("nvmlDeviceGetClockInfo", SM_CLOCK),
            "memory_mhz": self._number("nvmlDeviceGetClockInfo", MEMORY_CLOCK),
            "temperature_c": self._number("nvmlDeviceGetTemperature", GPU_TEMPERATURE),
            "power_w": self._number("nvmlDeviceGetPowerUsage"),
        }
        if found["power_w"] is not None:
            found["power_w"] /= MILLIWATTS
        return {name: value for name, value in found.items() if value is not None}

    def about(self) -> dict[str, str]:
        """The GPU's name and the driver's version; values that cannot be read are left out."""
        found = {
            "gpu": self._text("nvmlDeviceGetName", self._handle),
            "driver": self._text("nvmlSystemGetDriverVersion"),
        }
        return {name: text for name, text in found.items() if text}

    def _number(self, function: str, *which: int) -> float | None:
        value = ctypes.c_uint()
        failed = self._call(function, self._handle, *which, ctypes.byref(value))
        return None if failed else float(value.value)

    def _text(self, function: str, *of: Any) -> str:
        buffer = ctypes.create_string_buffer(TEXT_BYTES)
        return "" if self._call(function, *of, buffer, TEXT_BYTES) else buffer.value.decode(errors="replace")

    def _call(self, function: str, *arguments: Any) -> int:
        """Call an NVML function and return its status, 0 for success. A driver without the function is a failure."""
        try:
            return int(getattr(self._library, function)(*arguments))
        except AttributeError:
            return 1


def clocks_of(device: str) -> GpuClocks | None:
    """The sensors of a torch device; None on a processor, and where they cannot be read."""
    if not device.startswith("cuda"):
        return None
    import torch

    found: Any = torch.cuda.get_device_properties(torch.device(device))
    # NVML also counts GPUs that are hidden from this process, so its indices differ.
    if not all(hasattr(found, f"pci_{part}_id") for part in ("domain", "bus", "device")):
        return None
    return GpuClocks.at(f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0")


def summarise(readings: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, lowest and highest of each figure that was read."""
    names = dict.fromkeys(name for reading in readings for name in reading)
    figures: dict[str, dict[str, float]] = {}
    for name in names:
        values = np.array([reading[name] for reading in readings if name in reading])
        figures[name] = {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}
    return figures
