"""What a profile leaves: every file of its folder that follows from what was measured, made without the engine.

`machine.json` holds what only the measuring machine can say, and is there before the first iteration is measured. With
the timings (`visits.jsonl`) and what speculation got it makes the rest, on that machine or on any other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from engine.backends.clocks import GpuClocks, summarise
from engine.backends.measure import collect, loads, sensed
from engine.backends.real import RealEngine
from engine.files import FileFaultError, read_json, reading, write_whole
from engine.latency.measured import MeasuredIterations
from engine.latency.measured_card import card
from engine.latency.measured_fit import MemoryFigures, fit_table
from engine.latency.predictors import Forest
from engine.latency.table_file import dump
from engine.speculation.allocation import CHAINS

MACHINE = "machine.json"
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


class UnfinishedError(ValueError):
    """A folder lacks what only its measuring machine can add; the message names the file and the command."""


@dataclass(frozen=True)
class Result:
    """A finished profile: its iterations, held-out errors by prediction and group, tokens per iteration by c.

    missing: files that could not be written here for want of a package.
    """

    measured: MeasuredIterations
    card: dict[str, dict[str, float]]
    tokens_per_iteration: dict[int, float]
    missing: tuple[str, ...] = ()


MACHINE_KEYS = {
    "engine", "limits", "memory", "predictor", "seed", "begun", "processor", "cores", "torch_threads", "device", "gpu",
    "python", "software",
}  # fmt: skip
"""Keys of `machine.json`."""


def write_machine(
    folder: Path, settings: dict[str, Any], engine: RealEngine, clocks: GpuClocks | None, predictor: Forest, seed: int
) -> None:
    """Keep what only this machine and the loaded engine can say; when it began stays as it was."""
    about = engine.about()
    path = folder / MACHINE
    begun = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if path.exists():
        begun = read_machine(folder)["begun"]
    content = {
        "engine": dict(sorted(settings.items())),
        "limits": asdict(engine.limits),
        "memory": asdict(engine.memory()),
        "predictor": asdict(predictor),
        "seed": seed,
        "begun": begun,
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": "cpu" if about["device"] == "cpu" else about["device_name"],
        "gpu": {} if clocks is None else clocks.about(),
        "python": platform.python_version(),
        "software": {
            **{package: found for package, found in about.items() if package in SOFTWARE},
            **{package: version(package) for package in ("numpy", "scikit-learn")},
        },
    }
    write_json(path, content)


def read_machine(folder: Path) -> dict[str, Any]:
    """What `write_machine` kept. Raises UnfinishedError when there is nothing."""
    content: dict[str, Any] = _read(folder, MACHINE)
    missing = MACHINE_KEYS - content.keys() if isinstance(content, dict) else MACHINE_KEYS
    if missing:
        raise FileFaultError(
            f"{folder / MACHINE}: no {', '.join(sorted(missing))}; remove it and measure again with the same command"
        )
    return content


def finish(folder: Path) -> Result:
    """Make of what was measured everything that follows from it, and write it into the folder.

    The machine that measured stays the one that the files speak of. Without pyarrow `iterations.parquet` is left out,
    and with it `engine.yaml`, which names it.

    Raises:
        UnfinishedError: the engine's measurements are not all in the folder.
        ValueError: no measured iteration decodes.
    """
    machine = read_machine(folder)
    with reading(folder / TOKENS_PER_ITERATION, "remove it and measure again with the same command"):
        gains = _read(folder, TOKENS_PER_ITERATION)["tokens_per_iteration"]
    if not (folder / VISITS).is_file():
        raise _unfinished(folder, VISITS)
    measured = collect(folder / VISITS)
    provenance = _provenance(machine, folder, measured)
    name = f"{machine['engine']['name']}_measured"
    document = fit_table(measured, name, MemoryFigures(**machine["memory"]), provenance)
    scores = card(measured, Forest(**machine["predictor"]), machine["seed"])
    write_json(folder / CARD, scores)
    write_json(folder / PROVENANCE, provenance)
    write_whole(folder / TABLE, dump(document).encode())
    missing: tuple[str, ...] = (ITERATIONS, ENGINE)
    if importlib.util.find_spec("pyarrow") is not None:
        measured.write(folder / ITERATIONS, provenance)
        # The engine file comes last: where there is one, everything that it names is there.
        write_whole(folder / ENGINE, _engine_yaml(machine, name, folder).encode())
        missing = ()
    return Result(measured, scores, {int(c): gain for c, gain in gains.items()}, missing)


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


def _engine_yaml(machine: dict[str, Any], name: str, folder: Path) -> str:
    """Every setting of a simulated engine, so that each can be given on a command line."""
    limits = machine["limits"]
    settings = {
        "name": name,
        "latency": str((folder / TABLE).resolve()),
        "max_num_seqs": limits["max_num_seqs"],
        "max_model_len": limits["max_model_len"],
        "block_size": limits["block_size"],
        "watermark": machine["engine"]["watermark"],
        "gpu_memory_utilization": 0.9,
        "num_kv_blocks": limits["total_blocks"],
        "prefill": limits["prefill"],
        "measured": str((folder / ITERATIONS).resolve()),
        "timing_error": 0.0,
        "timing_seed": 0,
        **asdict(CHAINS),
    }
    return yaml.safe_dump({"_target_": SIMULATED, **settings}, sort_keys=False)


def _provenance(machine: dict[str, Any], folder: Path, measured: MeasuredIterations) -> dict[str, Any]:
    load = loads(folder / VISITS)
    sensors = summarise(sensed(folder / VISITS))
    return {
        "source": "whole iterations measured by python -m runs.profile",
        "engine": machine["engine"],
        "points": len(measured),
        "repeats_median": float(np.median(measured.repeats)),
        **{key: machine[key] for key in ("seed", "begun", "processor", "cores", "torch_threads", "device")},
        **machine["gpu"],
        **({"sensors": sensors} if sensors else {}),
        "load_average_median": round(float(np.median(load)), 2),
        "load_average_max": round(max(load), 2),
        "python": machine["python"],
        **machine["software"],
    }


def _read(folder: Path, name: str) -> Any:
    if not (folder / name).is_file():
        raise _unfinished(folder, name)
    return read_json(folder / name)


def _unfinished(folder: Path, name: str) -> UnfinishedError:
    return UnfinishedError(
        f"{folder / name}: no such file; measuring did not come to its end there: go on with it by the same command on "
        f"the machine that measures (hydra.run.dir={folder}), or copy the whole folder"
    )
