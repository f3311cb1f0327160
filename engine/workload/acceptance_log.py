"""Acceptance logs: accepted tokens of each verify step of a real run, read and replayed as a workload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from engine.workload.agreement import AgreementModel
from engine.workload.markov import confidence_at
from engine.workload.records import read_json, stem
from engine.workload.workload import Workload, WorkloadError, offsets, run_lengths

UNOBSERVED = -1
_QUALITIES = 64
_MOST = 1024
"""Tokens that a step may draft: a log with more is damaged."""


@dataclass(frozen=True)
class LoggedTurn:
    """One answer: tokens generated, and drafted tokens accepted and offered in each verify step."""

    row: int
    question_id: int
    task: str
    turn: int
    new_tokens: int
    accepted: NDArray[np.int64]
    drafted: NDArray[np.int64]

    def observed(self) -> NDArray[np.int8]:
        """(new_tokens,) per output position: 1 agreed, 0 disagreed, -1 unobserved.

        Steps start after the token of the prefill (position 0, never drafted, unobserved). A step that starts with g
        tokens generated and accepts n of k agreed at g ... g + n - 1. If n < k it disagreed at g + n. If n = k,
        position g + n was not drafted, and agreement there is unobserved. Logs of engines that also draft the very
        first token are shifted by it: the last step's bonus token then falls off the end.
        """
        seen = np.full(int((self.accepted + 1).sum()) + 1, UNOBSERVED, dtype=np.int8)
        position = 1
        for accepted, drafted in zip(self.accepted, self.drafted, strict=True):
            seen[position : position + accepted] = 1
            if accepted < drafted:
                seen[position + accepted] = 0
            position += accepted + 1
        return seen[: self.new_tokens]


@dataclass(frozen=True)
class AcceptanceLog:
    """The turns of one log file, in file order."""

    path: Path
    turns: list[LoggedTurn]

    def subset(self, keep: ArrayLike) -> AcceptanceLog:
        """The turns picked by a boolean mask."""
        return AcceptanceLog(self.path, [turn for turn, kept in zip(self.turns, np.asarray(keep), strict=True) if kept])

    def observed(self) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
        """All turns' observations, flat, and their (T+1,) offsets."""
        seen = [turn.observed() for turn in self.turns]
        return np.concatenate(seen), offsets([one.size for one in seen])


def read_acceptance_log(path: str | Path, depth: int | None = None) -> AcceptanceLog:
    """Read JSON lines with question_id, turn, new_tokens, n_accepted[] and, if lengths varied, k_drafted[].

    Without `k_drafted` every step is taken to have drafted `depth` tokens, or the most any step of the file accepted:
    right for a drafter of fixed depth (a tree's depth, for one). Raises `WorkloadError` naming file and row.
    """
    file = Path(path)
    if not file.is_file():
        raise WorkloadError(f"{file}: no such acceptance log; set workload.path to a JSONL file")
    records = read_json(file)
    if not records:
        raise WorkloadError(f"{file}: the log has no turns")
    checked = [(row, record, _accepted(file, row, record)) for row, record in records]
    deepest = max(int(accepted.max()) for _, _, accepted in checked)
    return AcceptanceLog(file, [_turn(file, *entry, depth or deepest) for entry in checked])


def replay(
    log: AcceptanceLog,
    turn: NDArray[np.int64],
    arrival: ArrayLike,
    prompt_tokens: ArrayLike,
    fill: AgreementModel,
    rng: np.random.Generator | int,
    provenance: Mapping[str, Any] | None = None,
) -> Workload:
    """A workload whose request r repeats logged turn `turn[r]`: its output length and its agreements.

    Under the logged draft lengths its steps accept exactly as logged. Unobserved values are drawn from `fill`
    conditioned on the turn's observations: the turn's quality from its posterior, hidden states and agreements by
    forward filtering and backward sampling, then rank and confidence by agreement.
    """
    seed = int(rng) if isinstance(rng, int | np.integer) else int(rng.integers(2**63))
    observed = [log.turns[index].observed() for index in range(len(log.turns))]
    seen = np.concatenate([observed[index] for index in turn])
    output_tokens = np.array([observed[index].size for index in turn], dtype=np.int32)
    offset = offsets(output_tokens)
    chain = fill.chain
    agree = chain.agree((np.arange(_QUALITIES) + 0.5) / _QUALITIES)
    uniform = np.random.default_rng(seed).random((seen.size, 2))
    quality = np.random.default_rng([seed, 1]).random(output_tokens.size)
    rank, confidence = _complete(
        seen, offset, chain.easy_share, chain.persistence, agree, quality, uniform,
        chain.rank_quantiles, chain.confidence_quantiles,
    )  # fmt: skip
    return Workload(
        name=f"{stem(log.path)} replay",
        arrival=np.asarray(arrival, dtype=np.float64),
        prompt_tokens=np.asarray(prompt_tokens),
        output_tokens=output_tokens,
        offset=offset,
        run_length=run_lengths(rank, offset),
        rank=rank,
        confidence=confidence,
        provenance={
            **(provenance or {}),
            "observed_share": float((seen != UNOBSERVED).mean()),
            "fill": fill.describe(),
        },
        source_row=np.array([log.turns[index].row for index in turn], dtype=np.int64),
    )


@njit(cache=True, error_model="numpy")
def forward(seen, easy_share, persistence, agree, filtered):
    """Log-likelihood of one turn's observations (P,) given its `agree` (state, agreed before).

    Fills `filtered` (P, 2, 2), the law of (state, agreed) at each position given the observations up to it.
    """
    total = 0.0
    hard0, hard1, easy0, easy1 = 1.0 - easy_share, 0.0, easy_share, 0.0
    for position in range(seen.size):
        fresh0 = (1.0 - persistence) * (hard0 + easy0)
        fresh1 = (1.0 - persistence) * (hard1 + easy1)
        hard0 = persistence * hard0 + fresh0 * (1.0 - easy_share)
        hard1 = persistence * hard1 + fresh1 * (1.0 - easy_share)
        easy0 = persistence * easy0 + fresh0 * easy_share
        easy1 = persistence * easy1 + fresh1 * easy_share
        hard, easy = hard0 + hard1, easy0 + easy1
        hard1 = hard0 * agree[0, 0] + hard1 * agree[0, 1]
        easy1 = easy0 * agree[1, 0] + easy1 * agree[1, 1]
        hard0, easy0 = hard - hard1, easy - easy1
        if seen[position] == 1:
            hard0, easy0 = 0.0, 0.0
        elif seen[position] == 0:
            hard1, easy1 = 0.0, 0.0
        scale = max(hard0 + hard1 + easy0 + easy1, 1e-300)
        total += np.log(scale)
        hard0, hard1, easy0, easy1 = hard0 / scale, hard1 / scale, easy0 / scale, easy1 / scale
        filtered[position, 0, 0], filtered[position, 0, 1] = hard0, hard1
        filtered[position, 1, 0], filtered[position, 1, 1] = easy0, easy1
    return total


@njit(cache=True, error_model="numpy")
def _complete(seen, offset, easy_share, persistence, agree, quality, uniform, ranks, confidences):
    """Sample unobserved values given the observed ones; returns rank (P,) and confidence (P,)."""
    rank = np.empty(seen.size, dtype=np.uint8)
    confidence = np.empty(seen.size, dtype=np.float32)
    filtered = np.empty((seen.size, 2, 2))
    weight = np.empty(agree.shape[0])
    for request in range(offset.size - 1):
        begin, end = offset[request], offset[request + 1]
        turn, law = seen[begin:end], filtered[begin:end]
        for node in range(weight.size):
            weight[node] = forward(turn, easy_share, persistence, agree[node], law)
        weight = np.exp(weight - weight.max())
        left = quality[request] * weight.sum()
        node = 0
        while node < weight.size - 1 and left >= weight[node]:
            left -= weight[node]
            node += 1
        forward(turn, easy_share, persistence, agree[node], law)
        _sample_back(law, easy_share, persistence, agree[node], uniform[begin:end], confidences, ranks,
                     rank[begin:end], confidence[begin:end])  # fmt: skip
    return rank, confidence


@njit(cache=True, error_model="numpy")
def _sample_back(law, easy_share, persistence, agree, uniform, confidences, ranks, rank, confidence):
    """Draw one turn's states and agreements from the filtered `law` (P, 2, 2), last position first."""
    state_after, agrees_after = -1, -1
    for position in range(law.shape[0] - 1, -1, -1):
        joint = law[position].copy()
        if state_after >= 0:
            fresh = (1.0 - persistence) * (easy_share if state_after == 1 else 1.0 - easy_share)
            for state in range(2):
                moves = fresh + (persistence if state == state_after else 0.0)
                for agrees in range(2):
                    then = agree[state_after, agrees]
                    joint[state, agrees] *= moves * (then if agrees_after == 1 else 1.0 - then)
        left = uniform[position, 0] * joint.sum()
        pick = 0
        while pick < 3 and left >= joint[pick // 2, pick % 2]:
            left -= joint[pick // 2, pick % 2]
            pick += 1
        state, agrees = pick // 2, pick % 2
        if agrees_after >= 0:
            _mark(position + 1, agree[state_after, agrees], agrees_after, uniform, confidences, ranks, rank, confidence)
        state_after, agrees_after = state, agrees
    _mark(0, agree[state_after, 0], agrees_after, uniform, confidences, ranks, rank, confidence)


@njit(cache=True, error_model="numpy")
def _mark(position, probability, agrees, uniform, confidences, ranks, rank, confidence):
    """Set rank and confidence of a position whose agreement is settled."""
    quantile = int(uniform[position, 1] * 2.0**20)
    confidence[position] = confidence_at(confidences, probability, agrees, quantile % 256)
    rank[position] = 0 if agrees == 1 else ranks[quantile // 256]


def _accepted(file: Path, row: int, record: Any) -> NDArray[np.int64]:
    needed = ("question_id", "turn", "new_tokens", "n_accepted")
    missing = [key for key in needed if key not in record]
    if missing:
        raise WorkloadError(f"{file}, row {row}: no field {', '.join(missing)}; needed: {', '.join(needed)}")
    return _counts(file, row, "n_accepted", record["n_accepted"])


def _counts(file: Path, row: int, key: str, values: Any) -> NDArray[np.int64]:
    whole = isinstance(values, list) and all(type(value) is int and 0 <= value <= _MOST for value in values)
    if not whole or not values:
        raise WorkloadError(f"{file}, row {row}: {key} must be a non-empty list of whole numbers from 0 to {_MOST}")
    return np.array(values, dtype=np.int64)


def _turn(file: Path, row: int, record: dict[str, Any], accepted: NDArray[np.int64], depth: int) -> LoggedTurn:
    if "k_drafted" in record:
        drafted = _counts(file, row, "k_drafted", record["k_drafted"])
    else:
        drafted = np.full(accepted.size, depth, dtype=np.int64)
    if drafted.size != accepted.size:
        raise WorkloadError(f"{file}, row {row}: {drafted.size} entries in k_drafted, {accepted.size} in n_accepted")
    over = np.flatnonzero(accepted > drafted)
    if over.size:
        raise WorkloadError(
            f"{file}, row {row}: step {over[0]} accepted {accepted[over[0]]} of {drafted[over[0]]} drafted tokens"
        )
    new_tokens = record["new_tokens"]
    emitted = int((accepted + 1).sum())
    # The last step may have been cut by a stop token or the output limit; the token of the prefill may be counted.
    if type(new_tokens) is not int or not emitted - accepted[-1] - 1 < new_tokens <= emitted + 1:
        raise WorkloadError(
            f"{file}, row {row}: new_tokens = {new_tokens!r} does not match the steps, which emit {emitted} tokens"
        )
    return LoggedTurn(
        row, record["question_id"], str(record.get("task", "")), record["turn"], new_tokens, accepted, drafted
    )
