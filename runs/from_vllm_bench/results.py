"""The result files of `vllm bench serve --save-result`, checked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_FAILED = 0.1
"""Share of failed requests above which a run says nothing about the engine."""


class BenchFileError(ValueError):
    """A file is no result of `vllm bench serve` that can be calibrated with; the message names file and key."""


STRATEGIES = ("linear", "exponential")


@dataclass(frozen=True)
class Ramp:
    """A request rate that rises from the first request to the last, by one of `STRATEGIES`; requests/s."""

    strategy: str
    start: float
    end: float

    def rates(self, requests: int) -> NDArray[np.float64]:
        """(R,) the rate at which each request is sent, as `--ramp-up-strategy` has it."""
        progress = np.arange(requests) / max(requests - 1, 1)
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * progress
        return self.start * (self.end / self.start) ** progress


@dataclass(frozen=True)
class BenchRun:
    """One run of `vllm bench serve`; times in s, every request finished.

    rate: requests/s, infinite: all at once · ramp: in place of the rate, where the run had one · max_concurrency: most
    requests in flight, None: no limit · prompt_tokens, output_tokens: (R,) · sent_s: (R,) when each was sent, where
    the file says · observed: what the client measured (`OBSERVED`) · candidates: draft length, 0 where the file speaks
    of no drafts · acceptance: (c,) share of drafts whose first 1, 2, ... tokens were accepted.
    """

    name: str
    rate: float
    ramp: Ramp | None
    burstiness: float
    max_concurrency: int | None
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    sent_s: NDArray[np.float64] | None
    observed: dict[str, float]
    candidates: int
    acceptance: tuple[float, ...]
    model: str
    digest: str

    @property
    def load(self) -> str:
        """How much was asked of the server, for tables."""
        rate = "all at once" if math.isinf(self.rate) else f"{self.rate:g}/s"
        if self.ramp is not None:
            rate = f"{self.ramp.start:g} to {self.ramp.end:g}/s, {self.ramp.strategy}"
        return rate if self.max_concurrency is None else f"{rate}, at most {self.max_concurrency}"


OBSERVED = {
    "mean_ttft_ms": "ttft_mean_s",
    "median_ttft_ms": "ttft_p50_s",
    "mean_tpot_ms": "tpot_mean_s",
    "median_tpot_ms": "tpot_p50_s",
    "p99_ttft_ms": "ttft_p99_s",
    "p99_tpot_ms": "tpot_p99_s",
}
"""Keys of the file and what they are called here, in s."""
NEEDED = ("mean_ttft_ms", "mean_tpot_ms")
"""Those of them that every file must have."""


def read_bench_runs(paths: Sequence[Path]) -> list[BenchRun]:
    """Every run in the files; one written with `--append-result` holds a run a line.

    Raises:
        BenchFileError: naming the file, and the key that is missing or impossible.
    """
    return [run for path in paths for run in _read(path)]


def _read(path: Path) -> list[BenchRun]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchFileError(f"{path}: cannot be read: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        documents = [json.loads(text)]
    except json.JSONDecodeError as error:
        try:
            documents = [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            documents = []
        if not documents:
            raise BenchFileError(f"{path}: not JSON ({error}); give what --save-result wrote") from error
    many = len(documents) > 1
    return [
        _run(document, f"{path}:{line}" if many else str(path), path.stem + (f":{line}" if many else ""))
        for line, document in enumerate(documents, start=1)
    ]


def _run(document: Any, source: str, name: str) -> BenchRun:
    if not isinstance(document, dict):
        raise BenchFileError(f"{source}: must hold a JSON object, as vllm bench serve --save-result writes it")
    completed = int(_number(document, "completed", source, above=0.0))
    failed = _number(document, "failed", source) if document.get("failed") is not None else 0.0
    if failed > MOST_FAILED * (completed + failed):
        raise BenchFileError(
            f"{source}: key 'failed' is {failed:.0f} of {completed + failed:.0f} requests; run it again"
        )
    prompt, output, sent = _requests(document, completed, source)
    observed = {
        ours: _number(document, key, source, above=0.0) / 1e3
        for key, ours in OBSERVED.items()
        if key in document or key in NEEDED
    }
    candidates, acceptance = _speculation(document, source)
    limit = document.get("max_concurrency")
    return BenchRun(
        name=name,
        rate=_rate(document, source),
        ramp=_ramp(document, source),
        burstiness=_number(document, "burstiness", source, above=0.0) if "burstiness" in document else 1.0,
        max_concurrency=None if limit is None else int(_number(document, "max_concurrency", source, above=0.0)),
        prompt_tokens=prompt,
        output_tokens=output,
        sent_s=sent,
        observed=observed,
        candidates=candidates,
        acceptance=acceptance,
        model=str(document.get("model_id", "unknown")),
        digest=hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16],
    )


def _requests(
    document: dict[str, Any], completed: int, source: str
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float64] | None]:
    """Lengths and send times, request by request with `--save-detailed`, else the mean lengths for all."""
    if "input_lens" not in document or "output_lens" not in document:
        totals = [_number(document, f"total_{what}_tokens", source, above=0.0) for what in ("input", "output")]
        prompt, output = (np.full(completed, max(1, round(total / completed)), dtype=np.int32) for total in totals)
        return prompt, output, None
    given, got = (_numbers(document, key, source) for key in ("input_lens", "output_lens"))
    sent = _numbers(document, "start_times", source) if document.get("start_times") else None
    if given.size != got.size or (sent is not None and sent.size != given.size):
        raise BenchFileError(f"{source}: keys 'input_lens', 'output_lens' and 'start_times' differ in length")
    order = np.arange(given.size) if sent is None else np.argsort(sent, kind="stable")
    done = order[got[order] > 0]
    if not done.size:
        raise BenchFileError(f"{source}: key 'output_lens' holds no request that got a token")
    prompt, output = np.maximum(given[done], 1).astype(np.int32), got[done].astype(np.int32)
    return prompt, output, None if sent is None else sent[done] - sent[done[0]]


def _speculation(document: dict[str, Any], source: str) -> tuple[int, tuple[float, ...]]:
    """The draft length and the acceptance by position; (0, ()) where the file speaks of no drafts."""
    if "spec_decode_num_drafts" not in document:
        return 0, ()
    drafts = _number(document, "spec_decode_num_drafts", source, above=0.0)
    drafted = _number(document, "spec_decode_draft_tokens", source)
    rates = _numbers(document, "spec_decode_per_position_acceptance_rates", source)
    if rates.size == 0 or (rates > 1.0).any() or (np.diff(rates) > 1e-9).any():
        raise BenchFileError(
            f"{source}: key 'spec_decode_per_position_acceptance_rates' must hold shares that do not rise, one a "
            f"position, got {rates.tolist()}"
        )
    candidates = round(drafted / drafts)
    # A server that drafted fewer than it is set up for reports the positions that it never reached as well.
    if abs(drafted / drafts - candidates) > 0.1 or candidates > rates.size or rates[candidates:].any():
        raise BenchFileError(
            f"{source}: key 'spec_decode_draft_tokens' says {drafted / drafts:.2f} candidates a draft, and "
            f"{rates.size} positions were drafted: only runs with one draft length can be calibrated with"
        )
    return candidates, tuple(rates[:candidates].tolist())


def _rate(document: dict[str, Any], source: str) -> float:
    value = document.get("request_rate", "inf")
    if value == "inf":
        return math.inf
    return _number(document, "request_rate", source, above=0.0)


def _ramp(document: dict[str, Any], source: str) -> Ramp | None:
    """The ramp of a run with `--ramp-up-strategy`."""
    strategy = document.get("ramp_up_strategy")
    if strategy is None:
        return None
    if strategy not in STRATEGIES:
        raise BenchFileError(f"{source}: key 'ramp_up_strategy' must be {' or '.join(STRATEGIES)}, got {strategy!r}")
    start, end = (_number(document, f"ramp_up_{which}_rps", source, above=0.0) for which in ("start", "end"))
    return Ramp(strategy, start, end)


def _number(document: dict[str, Any], key: str, source: str, above: float | None = None) -> float:
    if key not in document:
        raise BenchFileError(f"{source}: key {key!r} is missing; give what vllm bench serve --save-result wrote")
    value = document[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise BenchFileError(f"{source}: key {key!r} must be a finite number >= 0, got {value!r}")
    if above is not None and not value > above:
        raise BenchFileError(f"{source}: key {key!r} must be more than {above:g}, got {value!r}")
    return float(value)


def _numbers(document: dict[str, Any], key: str, source: str) -> NDArray[np.float64]:
    try:
        values = np.array(document[key], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        values = np.array(math.nan)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise BenchFileError(f"{source}: key {key!r} must be a list of finite numbers >= 0")
    return values
