"""Recorded runs of a real vLLM beside the same requests in the simulator, with the same card's latency tables.

A run is a folder of LLMServingSim's measurements (`requests.jsonl`, `timeseries.csv`, `meta.json`): vLLM 0.19 serving
ShareGPT conversations without speculation. vLLM's scheduler is first come first served with chunked prefill under one
budget of tokens for decodes and prompts, so the simulator runs the Sarathi controller with that budget, no watermark
(vLLM admits a prompt when it fits) and vLLM's own number of KV blocks where it is known.

What vLLM did and the simulator does not: prefix caching was on (7.6 % of the prompt tokens were found in the cache on
the RTX PRO 6000; which ones is not recorded, so prompts are simulated whole, and a preempted request recomputes all of
its context), and steps were scheduled one ahead (`async_scheduling`), so that a request that arrives while a step runs
joins the step after the next.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from controllers.sarathi import total
from engine.config import EngineConfig
from engine.core.metrics import request_table
from engine.latency.model import LatencyModel
from engine.simulator.simulator import Simulator
from engine.workload.workload import Workload, offsets, run_lengths
from runs.reporting.calibration import PREDICTED, latencies, pair

TABLES = {"RTX4090_Llama-3.1-8B": "llama3_8b_rtx4090", "RTXPRO6000_Llama-3.1-8B": "llama3_8b_rtxpro6000"}
"""Folder -> shipped table of the same card and model. There is none for the run of Qwen3-32B on two cards: its profile
holds neither the all-reduce between them nor the split layers."""
EMPTY, WAITING, ALL = "queue empty", "requests waiting", "all requests"
TTFT_TARGET_S = 1.0


class VllmRunError(ValueError):
    """A folder does not hold a recorded vLLM run that can be simulated; the message says what is missing."""


@dataclass(frozen=True)
class VllmRun:
    """One recorded run; times in s after the first request's arrival.

    requests: `arrival_s`, `prompt_tokens`, `output_tokens`, `admitted_s`, `first_token_s`, `finish_s`, `waiting`
    (requests that vLLM counted as waiting at the end of the second in which this one arrived).
    """

    name: str
    table: str
    requests: pd.DataFrame
    max_num_seqs: int
    total_budget: int
    num_kv_blocks: int
    """0: not recorded."""

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """(R,) arrival to first token."""
        return (self.requests["first_token_s"] - self.requests["arrival_s"]).to_numpy()

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """(R,) s per token after the first."""
        gaps = self.requests["output_tokens"] - 1
        return ((self.requests["finish_s"] - self.requests["first_token_s"]) / gaps.where(gaps > 0)).to_numpy()


def read_runs(folder: Path) -> list[VllmRun]:
    """Every run under `folder` whose card has a table. Raises VllmRunError when there is none."""
    found = [read_run(folder / name) for name in TABLES if (folder / name).is_dir()]
    if not found:
        raise VllmRunError(f"vllm={folder}: no folder {' or '.join(TABLES)} with requests.jsonl and meta.json in it")
    return found


def read_run(folder: Path) -> VllmRun:
    """One run. Raises VllmRunError naming the file that is missing or not as expected."""
    try:
        records = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
        meta = json.loads((folder / "meta.json").read_text())
        ticks = pd.read_csv(folder / "timeseries.csv")
        frame = pd.DataFrame(records).sort_values("arrival_time", kind="stable").reset_index(drop=True)
        engine = meta["engine_kwargs"]
        # Arrivals are on the wall clock, the rest on the monotonic one. The least delay between the two, of a request
        # that finds the engine idle, is taken for none.
        offset = (frame["queued_ts"] - frame["arrival_time"]).min()
        start = frame["arrival_time"].iloc[0]
        arrival = frame["arrival_time"] - start
        requests = pd.DataFrame(
            {
                "arrival_s": arrival,
                "prompt_tokens": frame["input_toks"],
                "output_tokens": frame["output_toks"],
                "admitted_s": frame["scheduled_ts"] - offset - start,
                "first_token_s": frame["first_token_ts"] - offset - start,
                "finish_s": frame["last_token_ts"] - offset - start,
                "waiting": _at_tick(ticks, arrival.to_numpy(np.float64)),
            }
        )
        return VllmRun(
            name=folder.name,
            table=TABLES[folder.name],
            requests=requests,
            max_num_seqs=int(engine["max_num_seqs"]),
            total_budget=int(engine["max_num_batched_tokens"]),
            num_kv_blocks=int(meta.get("kv_cache", {}).get("num_gpu_blocks") or 0),
        )
    except (OSError, KeyError, ValueError) as error:
        raise VllmRunError(f"{folder}: not a recorded vLLM run ({type(error).__name__}: {error})") from error


def _at_tick(ticks: pd.DataFrame, arrival_s: NDArray[np.float64]) -> NDArray[np.int64]:
    place = np.searchsorted(ticks["t"].to_numpy(), arrival_s)
    return ticks["waiting"].to_numpy(np.int64)[np.minimum(place, len(ticks) - 1)]


def simulate(run: VllmRun, **overrides: float) -> dict[str, NDArray[Any]]:
    """The request table of the same requests in the simulator; `overrides` replace scalars of the latency tables."""
    config = EngineConfig(
        name=run.table,
        latency=run.table,
        max_num_seqs=run.max_num_seqs,
        max_model_len=int((run.requests["prompt_tokens"] + run.requests["output_tokens"]).max()),
        watermark=0.0,
        num_kv_blocks=run.num_kv_blocks,
    )
    latency = LatencyModel.load(run.table, **overrides)
    simulator = Simulator(config, [_workload(run)], latency=latency, ttft_target=TTFT_TARGET_S)
    simulator.run_to_end(simulator.loop(total(run.total_budget)))
    return request_table(simulator.requests())


def _workload(run: VllmRun) -> Workload:
    output = run.requests["output_tokens"].to_numpy(np.int32)
    offset = offsets(output)
    # Without candidates no agreement is ever looked at.
    rank = np.ones(offset[-1], dtype=np.uint8)
    return Workload(
        name=run.name,
        arrival=run.requests["arrival_s"].to_numpy(np.float64),
        prompt_tokens=run.requests["prompt_tokens"].to_numpy(np.int32),
        output_tokens=output,
        offset=offset,
        run_length=run_lengths(rank, offset),
        rank=rank,
        confidence=np.zeros(offset[-1], dtype=np.float32),
    )


def pairs(run: VllmRun) -> pd.DataFrame:
    """The run beside its simulation: over all requests, those that arrived to an empty queue, and the others."""
    simulated = simulate(run)
    waiting = (run.requests["waiting"] > 0).to_numpy()
    rows: list[dict[str, Any]] = []
    for level, mask in ((ALL, np.ones(len(waiting), dtype=bool)), (EMPTY, ~waiting), (WAITING, waiting)):
        real = latencies(run.ttft_s[mask], run.tpot_s[mask]) | {"requests": int(mask.sum())}
        rows += [
            {**row, "requests": int(mask.sum())}
            for row in pair(
                level, run.name, 0, PREDICTED, real, latencies(simulated["ttft_s"][mask], simulated["tpot_s"][mask])
            )
        ]
    return pd.DataFrame(rows)
