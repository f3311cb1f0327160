"""Result files of `vllm bench serve` for a server whose GPU is known: the simulator under a latency table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controllers.total_budget import left_for_prompts
from engine.config import EngineConfig
from engine.core.metrics import request_table
from engine.core.telemetry import NUM_DECODES
from engine.latency.model import LatencyModel
from engine.simulator.simulator import Simulator
from engine.workload.agreement import IidAgreement
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import LognormalLengths
from engine.workload.source import SyntheticSource

TOTAL_BUDGET = 2048
NO_DRAFTER = {
    "idle_drafter_s": 0.0,
    "idle_drafter_request_s": 0.0,
    "draft_prefill_s": 0.0,
    "draft_prefill_token_s": 0.0,
}


def served(
    table: str, rate: float, *, candidates: int = 0, requests: int = 150, seed: int = 0, **overrides: float
) -> dict[str, Any]:
    """What the client would save with `--save-detailed` of Poisson arrivals; overrides replace scalars of the table."""
    source = SyntheticSource(
        arrivals=PoissonArrivals(rate=rate),
        lengths=LognormalLengths(
            prompt_median=400.0, prompt_sigma=0.7, output_median=120.0, output_sigma=0.5, max_output_tokens=400
        ),
        agreement=IidAgreement(alpha=0.7),
        num_requests=requests,
    )
    latency = LatencyModel.load(table, **({} if candidates else NO_DRAFTER) | overrides)
    workload = source.draw(seed)
    simulator = Simulator(EngineConfig(name="theirs", latency=table), [workload], latency=latency, ttft_target=1.0)
    reached = _serve(simulator, candidates)
    times = request_table(simulator.requests())
    document = {
        "date": "20260101-000000",
        "model_id": "their/model",
        "request_rate": rate,
        "burstiness": 1.0,
        "max_concurrency": None,
        "duration": float(simulator.state.instances[0]["now"]),
        "completed": requests,
        "failed": 0,
        "total_input_tokens": int(workload.prompt_tokens.sum()),
        "total_output_tokens": int(workload.output_tokens.sum()),
        "input_lens": workload.prompt_tokens.tolist(),
        "output_lens": workload.output_tokens.tolist(),
        "ttfts": times["ttft_s"].tolist(),
        "start_times": (100.0 + workload.arrival).tolist(),
    }
    for name in ("ttft", "tpot"):
        values = 1e3 * times[f"{name}_s"][~np.isnan(times[f"{name}_s"])]
        document |= {f"mean_{name}_ms": float(values.mean()), f"median_{name}_ms": float(np.median(values))}
        document[f"p99_{name}_ms"] = float(np.percentile(values, 99))
    return document | (_drafts(reached) if candidates else {})


def _serve(simulator: Simulator, candidates: int) -> NDArray[np.float64]:
    """Serve to the end; how many drafts there were, and how often their first 1, 2, ... tokens were accepted."""
    observation = simulator.new_observation()
    reached = np.zeros(candidates + 1)
    more = True
    while more:
        simulator.observe(0, observation)
        reached[0] += observation.drafted[0, 0]
        reached[1:] += observation.accepted[0, :candidates]
        decodes = int(observation.load[0, NUM_DECODES])
        more = simulator.step(0, candidates, left_for_prompts(TOTAL_BUDGET, decodes, candidates))
    return reached


def _drafts(reached: NDArray[np.float64]) -> dict[str, Any]:
    """The server's counters of drafts, as the client saves them."""
    candidates = reached.size - 1
    rates = reached[1:] / reached[0]
    return {
        "spec_decode_num_drafts": int(reached[0]),
        "spec_decode_draft_tokens": int(reached[0]) * candidates,
        "spec_decode_accepted_tokens": int(reached[1:].sum()),
        "spec_decode_acceptance_length": 1.0 + float(rates.sum()),
        "spec_decode_per_position_acceptance_rates": rates.tolist(),
    }


def plain(document: dict[str, Any]) -> dict[str, Any]:
    """The same without `--save-detailed`."""
    return {
        key: value
        for key, value in document.items()
        if key not in ("input_lens", "output_lens", "ttfts", "start_times")
    }


def write(folder: Path, name: str, document: dict[str, Any]) -> Path:
    """The file as the client writes it."""
    path = folder / f"{name}.json"
    rate = document.get("request_rate")
    content = document | ({"request_rate": "inf"} if isinstance(rate, float) and math.isinf(rate) else {})
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
