"""The files of a profile's folder that follow from what was measured."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from engine.backends.clocks import GpuClocks, summarise
from engine.backends.measure import begun, collect, loads, sensed
from engine.backends.real import RealEngine
from engine.files import write_whole
from engine.latency.measured import MeasuredIterations
from engine.latency.measured_card import card
from engine.latency.measured_fit import fit_table
from engine.latency.predictors import Forest
from engine.latency.table_file import dump
from engine.limits import EngineLimits
from engine.speculation.allocation import CHAINS

VISITS = "visits.jsonl"
ITERATIONS = "iterations.parquet"
TABLE = "table.json"
CARD = "card.json"
ACCEPTANCE = "acceptance.jsonl"
AGREEMENT = "agreement.npz"
TOKENS_PER_ITERATION = "tokens_per_iteration.json"
PROVENANCE = "provenance.json"
ENGINE = "engine.yaml"

SOFTWARE = ("torch", "transformers", "vllm")
SIMULATED = "engine.config.EngineConfig"
"""What an engine.yaml is made into."""


@dataclass(frozen=True)
class Result:
    """A finished profile: its iterations, held-out errors by prediction and group, tokens per iteration by c.

    missing: files that could not be written here for want of a package.
    """

    measured: MeasuredIterations
    card: dict[str, dict[str, float]]
    tokens_per_iteration: dict[int, float]
    missing: tuple[str, ...] = ()


def finish(
    folder: Path,
    settings: dict[str, Any],
    engine: RealEngine,
    clocks: GpuClocks | None,
    predictor: Forest,
    seed: int,
    gains: dict[int, float],
) -> Result:
    """Make of the timings in the folder everything that follows from them, and write it there.

    Without pyarrow `iterations.parquet` is left out, and with it `engine.yaml`, which names it.

    Args:
        settings: the engine's, JSON-able, without the profile that it may have.
        clocks: of the GPU that the engine runs on; None: on a processor.
        gains: tokens per iteration by c.

    Raises:
        ValueError: no measured iteration decodes.
    """
    measured = collect(folder / VISITS)
    provenance = _provenance(folder, measured, settings, engine, clocks, seed)
    name = f"{settings['name']}_measured"
    document = fit_table(measured, name, engine.memory(), provenance)
    scores = card(measured, predictor, seed)
    write_json(folder / CARD, scores)
    write_json(folder / PROVENANCE, provenance)
    write_whole(folder / TABLE, dump(document).encode())
    missing: tuple[str, ...] = (ITERATIONS, ENGINE)
    if importlib.util.find_spec("pyarrow") is not None:
        measured.write(folder / ITERATIONS, provenance)
        # The engine file comes last: where there is one, everything that it names is there.
        write_whole(folder / ENGINE, _engine_yaml(name, engine.limits, settings["watermark"], folder).encode())
        missing = ()
    return Result(measured, scores, gains, missing)


def processor() -> str:
    """What this machine's processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, the file whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _engine_yaml(name: str, limits: EngineLimits, watermark: float, folder: Path) -> str:
    """Every setting of a simulated engine, so that each can be given on a command line."""
    settings = {
        "name": name,
        "latency": str((folder / TABLE).resolve()),
        "max_num_seqs": limits.max_num_seqs,
        "max_model_len": limits.max_model_len,
        "block_size": limits.block_size,
        "watermark": watermark,
        "gpu_memory_utilization": 0.9,
        "num_kv_blocks": limits.total_blocks,
        "prefill": limits.prefill,
        "measured": str((folder / ITERATIONS).resolve()),
        "timing_error": 0.0,
        "timing_seed": 0,
        **asdict(CHAINS),
    }
    return yaml.safe_dump({"_target_": SIMULATED, **settings}, sort_keys=False)


def _provenance(
    folder: Path,
    measured: MeasuredIterations,
    settings: dict[str, Any],
    engine: RealEngine,
    clocks: GpuClocks | None,
    seed: int,
) -> dict[str, Any]:
    about, visits = engine.about(), folder / VISITS
    load, sensors = loads(visits), summarise(sensed(visits))
    return {
        "source": "whole iterations measured by python -m runs.profile",
        "engine": dict(sorted(settings.items())),
        "points": len(measured),
        "repeats_median": float(np.median(measured.repeats)),
        "seed": seed,
        "begun": begun(visits),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": "cpu" if about["device"] == "cpu" else about["device_name"],
        **({} if clocks is None else clocks.about()),
        **({"sensors": sensors} if sensors else {}),
        "load_average_median": round(float(np.median(load)), 2),
        "load_average_max": round(max(load), 2),
        "python": platform.python_version(),
        **{package: found for package, found in about.items() if package in SOFTWARE},
        **{package: version(package) for package in ("numpy", "scikit-learn")},
    }
