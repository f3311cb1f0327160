"""Claims about reading a GPU's clocks: a library with NVML's interface is compiled and asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from engine.backends import clocks
from engine.backends.clocks import GpuClocks, clocks_of, summarise

NVML = r"""
#include <string.h>
static int device = 7;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *pci, void **handle) {
    if (strcmp(pci, "00000000:19:00.0") != 0) return 6;
    *handle = &device;
    return 0;
}
int nvmlDeviceGetClockInfo(void *handle, int which, unsigned *mhz) {
    if (handle != &device) return 2;
    *mhz = which == 1 ? 1980 : which == 2 ? 3201 : 0;
    return 0;
}
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *degrees) { *degrees = 61 + sensor; return 0; }
#ifndef OLD
int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) { *milliwatts = 512345; return 0; }
#endif
int nvmlDeviceGetName(void *handle, char *text, unsigned size) { strncpy(text, "NVIDIA H200", size); return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { return 3; }
"""


def library(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, made = folder / "nvml.c", folder / "libnvml.so"
    source.write_text(NVML)
    subprocess.run([compiler, "-shared", "-fPIC", *options, "-o", made, source], check=True)
    monkeypatch.setattr(clocks, "LIBRARY", str(made))


def test_clocks_temperature_and_power_are_read_with_their_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path, monkeypatch)
    found = GpuClocks.at("00000000:19:00.0")
    assert found is not None
    assert found.read() == {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "temperature_c": 61.0, "power_w": 512.345}
    assert found.about() == {"gpu": "NVIDIA H200"}, "a driver that does not tell its version has none"


def test_what_a_driver_cannot_tell_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(tmp_path, monkeypatch, "-DOLD")
    found = GpuClocks.at("00000000:19:00.0")
    assert found is not None
    assert found.read().keys() == {"sm_mhz", "memory_mhz", "temperature_c"}


def test_without_the_gpu_the_library_or_a_gpu_there_is_nothing_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clocks_of("cpu") is None
    monkeypatch.setattr(clocks, "LIBRARY", str(tmp_path / "none.so"))
    assert GpuClocks.at("00000000:19:00.0") is None
    library(tmp_path, monkeypatch)
    assert GpuClocks.at("00000000:20:00.0") is None


def test_readings_are_summarised_figure_by_figure() -> None:
    readings = [{"sm_mhz": 1980.0, "power_w": 600.0}, {"sm_mhz": 1200.0}, {"sm_mhz": 1830.0}]
    assert summarise(readings) == {
        "sm_mhz": {"median": 1830.0, "min": 1200.0, "max": 1980.0},
        "power_w": {"median": 600.0, "min": 600.0, "max": 600.0},
    }
    assert summarise([]) == {}
