"""`LookupTable`: the iteration-time prediction that controllers use, learnt from noisy iterations like an engine's log.

An extra-trees regression is fitted on sampled, noisy iterations of a `LatencyModel`, evaluated once over a grid of
(decodes, cached tokens, candidates, prefill tokens) and read by compiled interpolation. It differs from the simulated
truth; its held-out error is stored with it and printed by load.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engine import cache_home
from engine.compiled import kernel
from engine.latency.measured import MeasuredIterations
from engine.latency.measured_card import MEASURED_FOREST, observed, predictor_errors
from engine.latency.model import LatencyModel, iteration_time, prefill_attention_time
from engine.latency.predictors import DEFAULT_FOREST, Forest, Observed, Predictor
from engine.latency.table_file import MAX_CONTEXT_TOKENS

CACHE_VERSION = 2
USUAL_DECODES = 256
"""Largest number of decodes in the samples of every table, for any engine limit: most engines stay below."""
LOAD_EDGES = (0, 1, 9, 33, 65, 129, USUAL_DECODES + 1)
HELDOUT_SEED = 7919
_LARGE_SEED = 104729


class LookupGrid(NamedTuple):
    """Predicted seconds over a grid, for kernels.

    batch (nB,): decoding requests; kv_tokens (nK,): cached tokens summed over them; candidates (nC,): c;
    prefill_tokens (nN,): n, starting with 0; seconds (nB, nK, nC, nN), C-contiguous.
    """

    batch: NDArray[np.float64]
    kv_tokens: NDArray[np.float64]
    candidates: NDArray[np.int64]
    prefill_tokens: NDArray[np.int64]
    seconds: NDArray[np.float64]


@kernel
def _cell(axis, value):
    """Lower node and fraction of `value` on an ascending axis: clamped below, extrapolated above."""
    low = 0
    high = axis.shape[0] - 1
    if high == 0 or value <= axis[0]:
        return 0, 0.0
    while high - low > 1:
        middle = (low + high) >> 1
        if value >= axis[middle]:
            low = middle
        else:
            high = middle
    return low, (value - axis[low]) / (axis[low + 1] - axis[low])


@kernel
def lookup_slice(grid, num_decodes, kv_tokens, out):
    """Fill out[nC, nN] with the predicted seconds of every (c, n) at this many decodes and cached tokens.

    Bilinear over (decodes, cached tokens); constant below the first node, and past the last node the last cell's slope
    continues.
    """
    i, x = _cell(grid.batch, float(num_decodes))
    j, y = _cell(grid.kv_tokens, float(kv_tokens))
    i1 = min(i + 1, grid.batch.shape[0] - 1)
    j1 = min(j + 1, grid.kv_tokens.shape[0] - 1)
    w00 = (1.0 - x) * (1.0 - y)
    w01 = (1.0 - x) * y
    w10 = x * (1.0 - y)
    w11 = x * y
    seconds = grid.seconds
    a = seconds[i, j]
    b = seconds[i, j1]
    c = seconds[i1, j]
    d = seconds[i1, j1]
    for k in range(a.shape[0]):
        for m in range(a.shape[1]):
            out[k, m] = w00 * a[k, m] + w01 * b[k, m] + w10 * c[k, m] + w11 * d[k, m]


@kernel
def lookup_time(grid, num_decodes, kv_tokens, candidates, prefill_tokens):
    """Predicted seconds of one iteration; linear between the grid's c and n as well."""
    i, x = _cell(grid.batch, float(num_decodes))
    j, y = _cell(grid.kv_tokens, float(kv_tokens))
    k, z = _cell(grid.candidates, float(candidates))
    m, w = _cell(grid.prefill_tokens, float(prefill_tokens))
    i1 = min(i + 1, grid.batch.shape[0] - 1)
    j1 = min(j + 1, grid.kv_tokens.shape[0] - 1)
    k1 = min(k + 1, grid.candidates.shape[0] - 1)
    m1 = min(m + 1, grid.prefill_tokens.shape[0] - 1)
    w00 = (1.0 - x) * (1.0 - y)
    w01 = (1.0 - x) * y
    w10 = x * (1.0 - y)
    w11 = x * y
    total = 0.0
    for kk, wk in ((k, 1.0 - z), (k1, z)):
        for mm, wm in ((m, 1.0 - w), (m1, w)):
            s = grid.seconds[:, :, kk, mm]
            total += wk * wm * (w00 * s[i, j] + w01 * s[i, j1] + w10 * s[i1, j] + w11 * s[i1, j1])
    return total


@kernel
def lookup_choice(grid, num_decodes, kv_tokens, choice, prefill_tokens):
    """`lookup_time` of the grid's c with index `choice`, in half the time."""
    i, x = _cell(grid.batch, float(num_decodes))
    j, y = _cell(grid.kv_tokens, float(kv_tokens))
    m, w = _cell(grid.prefill_tokens, float(prefill_tokens))
    i1 = min(i + 1, grid.batch.shape[0] - 1)
    j1 = min(j + 1, grid.kv_tokens.shape[0] - 1)
    m1 = min(m + 1, grid.prefill_tokens.shape[0] - 1)
    seconds = grid.seconds
    fewer = seconds[i, j, choice, m] + w * (seconds[i, j, choice, m1] - seconds[i, j, choice, m])
    more = seconds[i1, j, choice, m] + w * (seconds[i1, j, choice, m1] - seconds[i1, j, choice, m])
    low = fewer + x * (more - fewer)
    fewer = seconds[i, j1, choice, m] + w * (seconds[i, j1, choice, m1] - seconds[i, j1, choice, m])
    more = seconds[i1, j1, choice, m] + w * (seconds[i1, j1, choice, m1] - seconds[i1, j1, choice, m])
    high = fewer + x * (more - fewer)
    return low + y * (high - low)


@njit(cache=True, error_model="numpy")
def _true_times(tables, decodes, kv, candidates, chunks, contexts):
    """Noise-free seconds of sampled iterations: decodes, kv, candidates (S,); chunks, contexts (S, P)."""
    out = np.empty(decodes.shape[0])
    for s in range(decodes.shape[0]):
        attention = 0.0
        prefills = 0
        tokens = 0
        for p in range(chunks.shape[1]):
            if chunks[s, p] > 0:
                attention += prefill_attention_time(tables, chunks[s, p], contexts[s, p])
                prefills += 1
                tokens += chunks[s, p]
        rows = decodes[s] * (1 + candidates[s])
        steps = candidates[s] if decodes[s] > 0 else 0
        # A chunk completes its prompt about every second time; one sampled row is far below the noise.
        completed = (prefills + 1) // 2
        out[s] = iteration_time(tables, decodes[s], rows, steps, kv[s], prefills, tokens, attention, rows + completed)
    return out


@dataclass(frozen=True)
class Iterations:
    """Sampled iterations: decodes, kv, candidates, prefill (S,), and their noise-free seconds (S,)."""

    decodes: NDArray[np.int64]
    kv: NDArray[np.int64]
    candidates: NDArray[np.int64]
    prefill: NDArray[np.int64]
    seconds: NDArray[np.float64]


def batch_axis(max_num_seqs: int) -> NDArray[np.float64]:
    """Decodes on the grid: every one to 16, then ever wider steps that stay under a tenth of the value."""
    nodes = [*range(17), *range(18, 32, 2), *range(32, 64, 4), *range(64, 128, 8), *range(128, 1 << 14, 16)]
    axis = [node for node in nodes if node < max_num_seqs]
    return np.array([*axis, max_num_seqs], dtype=np.float64)


def kv_axis(kv_capacity_tokens: int) -> NDArray[np.float64]:
    """Cached tokens on the grid: 0, then geometric from 1,024 to the capacity (attention is linear in them)."""
    first = min(1024.0, kv_capacity_tokens / 4.0)
    return np.concatenate([[0.0], np.round(np.geomspace(first, kv_capacity_tokens, 11))])


def sample_iterations(
    model: LatencyModel,
    candidate_choices: Sequence[int],
    budget_choices: Sequence[int],
    max_num_seqs: int,
    kv_capacity_tokens: int,
    samples: int,
    rng: np.random.Generator,
    min_num_seqs: int = 1,
) -> Iterations:
    """Draw iterations over a range of batch sizes, as profiling runs of an engine do.

    Decodes are log-uniform from `min_num_seqs` to `max_num_seqs` (one in 20 none). Cached tokens per request are
    lognormal (median 600) for most, and uniform in total for the rest so that the grid's corners are covered. A third
    of the batches have no prefill. The rest have a budget choice (or anything below it), split over one to three
    prompts. Their cached part is exponential (mean 600 tokens), as for chunked prompts of about a thousand tokens.
    """
    decodes = np.round(np.exp(rng.uniform(np.log(min_num_seqs), np.log(max_num_seqs), samples))).astype(np.int64)
    decodes[rng.random(samples) < 0.05] = 0
    each = np.exp(rng.normal(np.log(600.0), 0.9, samples))
    kv = decodes * each
    spread = rng.random(samples) < 0.25
    kv[spread] = rng.uniform(0.0, kv_capacity_tokens, spread.sum())
    kv = np.where(decodes == 0, 0, np.clip(kv, 1, kv_capacity_tokens)).astype(np.int64)
    candidates = rng.choice(np.asarray(candidate_choices, dtype=np.int64), samples)
    budgets = rng.choice(np.array([n for n in budget_choices if n > 0] or [0], dtype=np.int64), samples)
    below = rng.random(samples) < 0.4
    budgets[below] = (budgets[below] * rng.random(below.sum())).astype(np.int64)
    budgets[rng.random(samples) < 1.0 / 3.0] = 0
    idle = (decodes == 0) & (budgets == 0)
    decodes[idle], kv[idle] = 1, 600
    prompts = rng.choice([1, 2, 3], samples, p=[0.7, 0.2, 0.1])
    first = np.where(prompts == 1, budgets, (budgets * rng.uniform(0.3, 0.7, samples)).astype(np.int64))
    second = np.where(prompts == 3, (budgets - first) // 2, budgets - first)
    chunks = np.stack([first, second, budgets - first - second], axis=1)
    # Only the first prompt in line can have been cut by an earlier budget.
    contexts = np.zeros_like(chunks)
    cut = rng.random(samples) < 0.5
    contexts[:, 0] = np.where(cut, np.minimum(rng.exponential(600.0, samples), MAX_CONTEXT_TOKENS), 0)
    seconds = _true_times(model.tables, decodes, kv, candidates, chunks, contexts)
    return Iterations(decodes, kv, candidates, budgets, seconds)


@dataclass(frozen=True)
class LookupTable:
    """A baked grid and its errors on held-out iterations.

    `heldout_mape` maps "overall", "mixed" (decodes and prefill), "decode only", "prefill only" and buckets of decodes
    ("1-8 decodes") to the mean absolute relative error against noise-free iterations. All but the bucket above
    `USUAL_DECODES` are over batches up to that many decodes.
    """

    grid: LookupGrid
    heldout_mape: dict[str, float]

    @classmethod
    def fit(
        cls,
        model: LatencyModel,
        candidate_choices: Sequence[int],
        budget_choices: Sequence[int],
        max_num_seqs: int,
        kv_capacity_tokens: int,
        samples: int = 16000,
        noise: float = 0.03,
        seed: int = 0,
        forest: Forest = DEFAULT_FOREST,
    ) -> "LookupTable":
        """Fit on `samples` iterations with multiplicative noise (standard deviation `noise`) and bake the grid.

        The iterations have up to `USUAL_DECODES` decodes, whatever `max_num_seqs` is, so that predictions of usual
        batches do not depend on rare ones. An engine with room for more gets a second fit, on as many iterations, for
        the grid above.

        Raises:
            ValueError: empty or unsorted choices, or a limit below 1.
        """
        candidates = _checked_choices("candidate_choices", candidate_choices)
        budgets = _checked_choices("budget_choices", budget_choices)
        _checked_limit("max_num_seqs", max_num_seqs)
        _checked_limit("kv_capacity_tokens", kv_capacity_tokens)
        if samples < 100 or not 0.0 <= noise < 1.0:
            raise ValueError(f"samples must be >= 100 and noise in [0, 1), got samples={samples}, noise={noise}")

        def sampled(most: int, count: int, rng: np.random.Generator, least: int = 1) -> Iterations:
            return sample_iterations(model, candidates, budgets, most, kv_capacity_tokens, count, rng, least)

        def learnt(seen: Iterations, rng: np.random.Generator) -> Predictor:
            noisy = seen.seconds * np.maximum(0.1, 1.0 + noise * rng.standard_normal(samples))
            return Predictor.fit(Observed(seen.decodes, seen.kv, seen.candidates, seen.prefill), noisy, forest, seed)

        limits = (candidates, budgets, max_num_seqs, kv_capacity_tokens)
        rng = np.random.default_rng(seed)
        grid = _bake(learnt(sampled(USUAL_DECODES, samples, rng), rng), *limits)
        unseen = sampled(min(max_num_seqs, USUAL_DECODES), 4000, np.random.default_rng([seed, HELDOUT_SEED]))
        errors = heldout_errors(grid, unseen)
        if max_num_seqs > USUAL_DECODES:
            rng = np.random.default_rng([seed, _LARGE_SEED])
            large = _bake(learnt(sampled(max_num_seqs, samples, rng, USUAL_DECODES), rng), *limits)
            above = grid.batch > USUAL_DECODES
            grid.seconds[above] = large.seconds[above]
            unseen = sampled(max_num_seqs, 4000, np.random.default_rng([seed, HELDOUT_SEED, 1]), USUAL_DECODES)
            errors |= {name: error for name, error in heldout_errors(grid, unseen).items() if name not in errors}
        return cls(grid, errors)

    @classmethod
    def load_or_fit(
        cls,
        model: LatencyModel,
        candidate_choices: Sequence[int],
        budget_choices: Sequence[int],
        max_num_seqs: int,
        kv_capacity_tokens: int,
        samples: int = 16000,
        noise: float = 0.03,
        seed: int = 0,
        cache_dir: Path | None = None,
        forest: Forest = DEFAULT_FOREST,
    ) -> "LookupTable":
        """`fit`, or its result from the disk cache (`$XDG_CACHE_HOME/governor`, by default `~/.cache/governor`).

        The file's name is a digest of everything the grid depends on. It is written under a temporary name and renamed,
        so that concurrent jobs see a complete file or none. A cache that cannot be read or written is ignored.
        """
        arguments = {
            "candidate_choices": [int(c) for c in candidate_choices],
            "budget_choices": [int(n) for n in budget_choices],
            "max_num_seqs": int(max_num_seqs),
            "kv_capacity_tokens": int(kv_capacity_tokens),
            "samples": int(samples),
            "noise": float(noise),
            "seed": int(seed),
        }
        tables = zip(model.tables._fields, model.tables, strict=True)
        return _cached(
            cache_dir,
            _digest({field: np.asarray(value) for field, value in tables}, arguments | asdict(forest)),
            lambda: cls.fit(model, **arguments, forest=forest),  # type: ignore[arg-type]
        )

    @classmethod
    def of_measured(
        cls,
        measured: MeasuredIterations,
        candidate_choices: Sequence[int],
        budget_choices: Sequence[int],
        max_num_seqs: int,
        kv_capacity_tokens: int,
        forest: Forest = MEASURED_FOREST,
        seed: int = 0,
        cache_dir: Path | None = None,
    ) -> "LookupTable":
        """Fit on a real engine's measured iterations and bake the grid, or take it from the disk cache.

        The grid assumes a steady state: with candidates, the drafter reads as many prompt tokens as are prefilled.
        `heldout_mape` is against measured times that were held out (`engine.latency.measured_card.predictor_errors`).

        Raises:
            ValueError: empty or unsorted choices, or a limit below 1.
        """
        limits = (
            _checked_choices("candidate_choices", candidate_choices),
            _checked_choices("budget_choices", budget_choices),
            _checked_limit("max_num_seqs", max_num_seqs),
            _checked_limit("kv_capacity_tokens", kv_capacity_tokens),
        )

        def fit() -> LookupTable:
            predictor = Predictor.fit(observed(measured), measured.seconds, forest, seed)
            return cls(_bake(predictor, *limits), predictor_errors(measured, forest, seed))

        columns = {name: value for name, value in vars(measured).items() if name != "chunks"}
        return _cached(cache_dir, _digest(columns, {"limits": limits, "seed": seed} | asdict(forest)), fit)


def _checked_choices(key: str, choices: Sequence[int]) -> list[int]:
    values = [int(value) for value in choices]
    if not values or values[0] < 0 or any(b <= a for a, b in pairwise(values)):
        raise ValueError(f"{key} must be non-empty, >= 0 and strictly increasing, got {list(choices)}")
    return values


def _checked_limit(key: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{key} must be at least 1, got {value}")
    return int(value)


def _bake(
    predictor: Predictor, candidates: list[int], budgets: list[int], max_num_seqs: int, kv_capacity_tokens: int
) -> LookupGrid:
    """Evaluate a prediction over the grid."""
    axes = (
        batch_axis(max_num_seqs),
        kv_axis(kv_capacity_tokens),
        np.array(candidates, dtype=np.int64),
        np.array([0, *[n for n in budgets if n > 0]], dtype=np.int64),
    )
    decodes, kv, c, n = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
    unread = np.where((c > 0) & (decodes > 0), n, 0) if "unread" in predictor.forest.features else None
    seconds = predictor(Observed(decodes, kv, c, n, unread))
    shape = tuple(len(axis) for axis in axes)
    return LookupGrid(*axes, np.ascontiguousarray(seconds.reshape(shape)))


@njit(cache=True, error_model="numpy")
def _grid_times(grid, decodes, kv, candidates, prefill):
    out = np.empty(decodes.shape[0])
    for s in range(decodes.shape[0]):
        out[s] = lookup_time(grid, decodes[s], kv[s], candidates[s], prefill[s])
    return out


def heldout_errors(grid: LookupGrid, unseen: Iterations) -> dict[str, float]:
    """Mean absolute relative error of the grid against noise-free iterations: overall, by kind, by decodes."""
    predicted = _grid_times(grid, unseen.decodes, unseen.kv, unseen.candidates, unseen.prefill)
    error = np.abs(predicted / unseen.seconds - 1.0)
    decoding, filling = unseen.decodes > 0, unseen.prefill > 0
    groups: dict[str, Any] = {
        "overall": np.ones(len(error), dtype=bool),
        "decode only": decoding & ~filling,
        "prefill only": ~decoding & filling,
        "mixed": decoding & filling,
    }
    largest = int(grid.batch[-1]) + 1
    edges = (*(edge for edge in LOAD_EDGES if edge < largest), largest)
    for low, high in pairwise(edges):
        if high > max(low, 1):
            groups[f"{low}-{high - 1} decodes"] = (unseen.decodes >= low) & (unseen.decodes < high)
    return {name: float(error[mask].mean()) for name, mask in groups.items() if mask.any()}


def _digest(arrays: dict[str, NDArray[Any]], arguments: dict[str, Any]) -> str:
    versions = [CACHE_VERSION, version("scikit-learn"), np.__version__]
    digest = hashlib.sha256()
    digest.update(json.dumps([versions, arguments], sort_keys=True).encode())
    for field, value in arrays.items():
        digest.update(field.encode())
        digest.update(np.ascontiguousarray(value, dtype=np.float64).tobytes())
    return digest.hexdigest()[:32]


def _cached(cache_dir: Path | None, digest: str, fit: Callable[[], LookupTable]) -> LookupTable:
    path = (cache_dir if cache_dir is not None else cache_home()) / f"lookup-{digest}.npz"
    cached = _read_cache(path)
    if cached is not None:
        return cached
    table = fit()
    _write_cache(path, table)
    return table


def _read_cache(path: Path) -> LookupTable | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            grid = LookupGrid(*(stored[field] for field in LookupGrid._fields))
            return LookupTable(grid, json.loads(str(stored["heldout_mape"])))
    except (OSError, KeyError, ValueError, EOFError, BadZipFile):
        return None


def _write_cache(path: Path, table: LookupTable) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **table.grid._asdict(), heldout_mape=json.dumps(table.heldout_mape))
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
