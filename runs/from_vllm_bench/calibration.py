"""One calibration: results of `vllm bench serve` become a simulated engine that serves as fast. No Hydra."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.optimize import brentq

from engine.config import EngineConfig
from engine.core.choices import MAX_TOKEN_BUDGET
from engine.files import read_json, write_whole
from engine.latency.model import TABLES_FOLDER, LatencyModel
from engine.latency.table_file import dump
from engine.workload.agreement import IidAgreement
from runs.from_vllm_bench.factors import Factors, factor_table, fit_factors, predicted, scaled_document
from runs.from_vllm_bench.replay import Replay
from runs.from_vllm_bench.results import BenchRun, read_bench_runs

log = logging.getLogger(__name__)

TABLE = "table.json"
ENGINE = "engine.yaml"
CARD = "card.json"
AGREEMENT = "agreement.yaml"

MOST_FOLDS = 5


@dataclass(frozen=True)
class Calibrated:
    """A finished calibration. base, fitted, left_out: relative errors (simulated / reported - 1) of each run's figures
    under the base table, under the fitted one, and under one that was fitted without the run; the last is empty where
    there was one run only."""

    runs: list[BenchRun]
    factors: Factors
    base: list[dict[str, float]]
    fitted: list[dict[str, float]]
    left_out: list[dict[str, float]]


class BenchCalibration(BaseModel):
    """What is calibrated, and what the result files do not say of the server.

    Args:
        files: JSON that `vllm bench serve --save-result` wrote, best at several rates or limits of requests in flight,
            with `--save-detailed` (else all requests count as equally long, and Poisson arrivals are drawn).
        base: the shipped table nearest to the server's model and GPU, or the path of a table.
        name: how reports call the engine.
        max_num_seqs, max_num_batched_tokens, max_model_len: as the server was started.
        kv_cache_tokens: what vLLM logged as "GPU KV cache size"; None: as on the base's GPU.
        seed: draws arrivals that the files do not hold, and agreements.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    base: str
    name: Annotated[str, Field(min_length=1)] = "calibrated"
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 256
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] = 2048
    max_model_len: Annotated[int, Field(ge=2)] = 16384
    kv_cache_tokens: Annotated[int, Field(ge=16)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _readable(self) -> Self:
        LatencyModel.load(self.base)
        return self

    def run(self, out: Path, progress: Callable[[str], Any]) -> Calibrated:
        """Read, fit, score on runs left out, and write the folder `out`.

        `progress` makes, from a description, a context manager of a function of (done, total), or of None.

        Raises:
            BenchFileError: a file cannot be used; the message names file and key.
            ValueError: a request does not fit the engine.
        """
        runs = read_bench_runs(self.files)
        base = read_json(_table_path(self.base))
        acceptances = [acceptance_of(run) for run in runs]
        replays = [self._replay(run, alpha) for run, alpha in zip(runs, acceptances, strict=True)]
        folds = min(len(runs), MOST_FOLDS) if len(runs) > 1 else 0
        with progress("Fitting") as on_progress:
            factors = fit_factors(base, replays, self.max_num_batched_tokens)
            left_out: list[dict[str, float]] = [{} for _ in replays] if folds else []
            for fold in range(folds):
                if on_progress is not None:
                    on_progress(fold + 1, folds + 1)
                kept = [replay for i, replay in enumerate(replays) if i % folds != fold]
                others = fit_factors(base, kept, self.max_num_batched_tokens, start=_ready(factors, kept))
                for i in range(fold, len(replays), folds):
                    left_out[i] = self._errors(base, others, replays[i : i + 1])[0]
        calibrated = Calibrated(
            runs, factors, self._errors(base, Factors(), replays), self._errors(base, factors, replays), left_out
        )
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / TABLE, dump(self._table(base, factors, runs)).encode())
        drafted = [alpha for alpha in acceptances if alpha is not None]
        if drafted:
            write_whole(out / AGREEMENT, _yaml(IidAgreement, {"alpha": round(float(np.mean(drafted)), 4)}))
        write_whole(out / CARD, (json.dumps(self._card(calibrated), indent=1, allow_nan=False) + "\n").encode())
        engine = self._engine(str((out / TABLE).resolve()))
        # The engine file comes last: where there is one, everything that it names is there.
        write_whole(out / ENGINE, _yaml(EngineConfig, engine.model_dump(mode="json")))
        return calibrated

    def _engine(self, latency: str) -> EngineConfig:
        block_size = 16
        return EngineConfig(
            name=self.name,
            latency=latency,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
            block_size=block_size,
            num_kv_blocks=0 if self.kv_cache_tokens is None else self.kv_cache_tokens // block_size,
        )

    def _replay(self, run: BenchRun, alpha: float | None) -> Replay:
        return Replay(run, self._engine(self.base), IidAgreement(alpha=alpha or 0.0), self.seed)

    def _errors(self, base: dict[str, Any], factors: Factors, replays: Sequence[Replay]) -> list[dict[str, float]]:
        simulated = predicted(base, factors, replays, self.max_num_batched_tokens)
        return [
            {key: figures[key] / value - 1.0 for key, value in replay.run.observed.items()}
            for figures, replay in zip(simulated, replays, strict=True)
        ]

    def _table(self, base: dict[str, Any], factors: Factors, runs: Sequence[BenchRun]) -> dict[str, Any]:
        document = scaled_document(base, factors)
        document["name"] = self.name
        document["provenance"] = {
            "source": "python -m runs.profile --from-vllm-bench: factors on a base table, fitted to reported latencies",
            "base": base["name"],
            "base_provenance": base["provenance"],
            "factors": factor_table(factors),
            "runs": [f"{run.name} {run.digest}" for run in runs],
            "served_models": sorted({run.model for run in runs}),
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        return document

    def _card(self, calibrated: Calibrated) -> dict[str, Any]:
        rows = []
        for i, run in enumerate(calibrated.runs):
            rows.append(
                {
                    "run": run.name,
                    "load": run.load,
                    "requests": int(run.output_tokens.size),
                    "candidates": run.candidates,
                    "reported_s": run.observed,
                    "error_of_base": calibrated.base[i],
                    "error_fitted": calibrated.fitted[i],
                    "error_left_out": calibrated.left_out[i] if calibrated.left_out else None,
                }
            )
        return {
            "base": self.base,
            "factors": factor_table(calibrated.factors),
            "not_fitted": [] if any(run.candidates for run in calibrated.runs) else ["drafter: no run speculated"],
            "runs": rows,
        }


def acceptance_of(run: BenchRun) -> float | None:
    """The chance that any one candidate agrees, independent of all others, that gives the run's mean accepted tokens.

    None where nothing was drafted. A run's shares by position are the chances that the first 1, 2, ... all agree, so
    they sum to the accepted tokens a draft: a + a^2 + ... + a^c.
    """
    if not run.acceptance:
        return None
    powers = np.arange(1, len(run.acceptance) + 1)
    accepted = sum(run.acceptance)
    return float(brentq(lambda alpha: float((alpha**powers).sum()) - accepted, 0.0, 1.0))


def _ready(factors: Factors, replays: Sequence[Replay]) -> Factors:
    """Where a fit on some of the runs begins; a drafter that none of them has is the base's."""
    return factors if any(replay.run.candidates for replay in replays) else replace(factors, drafter=1.0)


def _table_path(name: str) -> Path:
    path = Path(name)
    return path if path.suffix == ".json" else TABLES_FOLDER / f"{name}.json"


def _yaml(kind: type, settings: dict[str, Any]) -> bytes:
    return yaml.safe_dump({"_target_": f"{kind.__module__}.{kind.__qualname__}", **settings}, sort_keys=False).encode()
