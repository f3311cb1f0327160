"""One real run of a calibration: served and recorded, kept on disk, read back, replayed, and simulated."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from controllers.controller import Controller
from engine.backends.torch.acceptance import agreement
from engine.backends.torch.engine import TorchEngine
from engine.config import EngineConfig
from engine.core.metrics import request_table, summarize
from engine.core.state import State
from engine.files import read_arrays, read_json, read_table, write_arrays
from engine.latency.table_file import LatencyTables
from engine.limits import EngineLimits
from engine.plant import Plant
from engine.simulator.replay import Recording, replay
from engine.simulator.simulator import Simulator
from engine.simulator.timing import batch_time, reading_time
from engine.workload.markov import Agreement
from engine.workload.prompts import Prompts
from engine.workload.workload import Workload, offsets, run_lengths
from runs import folder, live, simulated
from runs.evaluation import Targets, load_latency
from runs.reporting.calibration import METRICS
from runs.serving import Progress
from runs.simulated import Charge

RECORDING = "recording.npz"
AGREEMENT = "agreement.npz"


@dataclass(frozen=True)
class Cell:
    """What one real run is of: a level of load, a controller by its name in the configuration, and the repeat."""

    level: str
    name: str
    repeat: int

    @property
    def folder(self) -> str:
        """The run's folder."""
        return f"{self.level}-{self.name}-{self.repeat}"


@dataclass(frozen=True)
class RealRun:
    """A finished real run as it is on disk: request columns, summary, recording, and where its drafter agreed."""

    requests: dict[str, NDArray[Any]]
    summary: dict[str, Any]
    recording: Recording
    agreement: Agreement


def is_finished(out: Path) -> bool:
    """Whether the folder holds a whole run: its summary is written last."""
    return (out / folder.SUMMARY).is_file()


def serve(
    engine: TorchEngine,
    prompts: Prompts,
    tokenizer: Any,
    controller: Controller,
    plant: Plant,
    targets: Targets,
    identity: Mapping[str, Any],
    settings: str,
    out: Path,
    on_progress: Progress | None = None,
) -> None:
    """Serve the prompts and leave a run folder with the recording beside it; nothing half-written.

    `engine` records. The load average is noted before and after, because another program's work is in the times.
    """
    before = load_average()
    served = live.serve(engine, prompts, controller, plant, recording=True, on_progress=on_progress)
    summary: dict[str, Any] = summarize(
        served.state, served.requests, ttft_target=targets.ttft_target, prices=targets.prices
    )
    summary["run"] = {
        **identity,
        "label": controller.label(),
        "workload_digest": prompts.digest,
        "load_average_before": before,
        "load_average_after": load_average(),
        "decision_time_mean_s": float(served.decision_s.mean()),
    }
    outputs = live.outputs(engine, prompts, tokenizer)
    found = agreement(engine, prompts.tokens, [output.tokens for output in outputs])
    out.mkdir(parents=True, exist_ok=True)
    assert engine.recording is not None
    engine.recording.save(out / RECORDING)
    write_arrays(out / AGREEMENT, {name: found[name] for name in ("rank", "confidence")})
    requests = request_table(served.requests)
    folder.write_run(out, settings, summary, requests, served.iterations, [asdict(output) for output in outputs])


def read(out: Path) -> RealRun:
    """What `serve` left."""
    summary = read_json(out / folder.SUMMARY)
    table = read_table(out / folder.REQUESTS, sha256=summary.get(folder.REQUESTS_SHA256))
    requests = {name: table[name].to_numpy() for name in table.column_names}
    rank, confidence = read_arrays(out / AGREEMENT, ("rank", "confidence")).values()
    return RealRun(
        requests=requests,
        summary=summary,
        recording=Recording.load(out / RECORDING),
        agreement=Agreement(run_lengths(rank, offsets(requests["output_tokens"])), rank, confidence),
    )


def load_average() -> float:
    """Programs that wanted a core in the last minute; NaN where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


@dataclass(frozen=True)
class Replayed:
    """A recording run again.

    identical: every column of the request table is the real run's, to the bit · iterations: one row an iteration with
    the time it took and the time the tables give its batch (see `reporting.calibration.by_batch`) · between_share: of
    the time from an iteration with work left to the end of the next, the share before that began.
    """

    identical: bool
    iterations: pd.DataFrame
    between_share: float


def replayed(run: RealRun, limits: EngineLimits, ttft_target: float, tables: LatencyTables) -> Replayed:
    """Replay a real run, asking the latency tables about every batch on the way.

    Raises ReplayError when the scheduler plans other batches than those recorded.
    """
    planned: list[tuple[int, int, int, float]] = []

    def on_plan(state: State) -> None:
        batch = state.batches[0]
        seconds = float(batch_time(state, 0, tables) + reading_time(state, 0, tables))
        counts = (int(batch[key]) for key in ("num_decodes", "candidate_steps", "prefill_tokens"))
        planned.append((*counts, seconds))  # type: ignore[arg-type]

    again = request_table(replay(run.recording, limits, ttft_target, on_plan).requests)
    identical = set(again) == set(run.requests) and all(
        np.array_equal(again[name], run.requests[name], equal_nan=again[name].dtype.kind == "f") for name in again
    )
    frame = pd.DataFrame(planned, columns=["num_decodes", "candidate_steps", "prefill_tokens", "predicted_s"])
    start, elapsed = (np.array([row[place] for row in run.recording.iterations]) for place in (0, 1))
    frame["measured_s"] = elapsed
    # Decoding requests were there before the iteration, so the engine was not waiting for an arrival.
    busy = frame["num_decodes"].to_numpy()[1:] > 0
    gaps = (start[1:] - start[:-1] - elapsed[:-1])[busy]
    total = gaps.sum() + elapsed[1:][busy].sum()
    return Replayed(identical, frame, float(gaps.sum() / total) if total > 0 else math.nan)


def simulated_workload(run: RealRun, agreement: Agreement) -> Workload:
    """The run's workload for the simulator: its arrivals and lengths, with the given agreements."""
    output = run.requests["output_tokens"].astype(np.int32)
    return Workload(
        name=str(run.summary["run"]["level"]),
        arrival=run.requests["arrival_s"],
        prompt_tokens=run.requests["prompt_tokens"].astype(np.int32),
        output_tokens=output,
        offset=offsets(output),
        run_length=agreement.run_length,
        rank=agreement.rank,
        confidence=agreement.confidence,
    )


def simulate(
    config: EngineConfig, workload: Workload, controller: Controller, plant: Plant, targets: Targets, charge: Charge
) -> dict[str, float]:
    """The summary of the workload served by the simulator."""
    latency = load_latency(config.latency)
    simulator = Simulator(config, [workload], latency=latency, ttft_target=targets.ttft_target)
    served = simulated.serve(simulator, workload, controller, plant, charge)
    return summarize(served.state, served.requests, ttft_target=targets.ttft_target, prices=targets.prices)


def mean_of(summaries: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every compared figure."""
    return {name: float(np.mean([summary[name] for summary in summaries])) for name in METRICS}
