"""Finds run folders, checks them, and reads them into two tidy frames: one row a run, one row a time window."""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from engine.files import FileFaultError, read_json, read_table, reading
from runs.folder import CONFIG, REQUESTS, REQUESTS_SHA256, SUMMARY

LOG = "evaluate.log"

IDENTITY_TEXT = ("engine", "workload", "scenario", "workload_digest", "controller", "label")
IDENTITY_NUMBERS = ("seed", "request_rate_rps", "ttft_target_s", "tpot_target_s")
IDENTITY_OPTIONAL = ("candidates", "token_budget", "total_budget", "rate_scale")
METRICS = (
    "tpot_mean_s",
    "tpot_p50_s",
    "tpot_p90_s",
    "tpot_p99_s",
    "ttft_mean_s",
    "ttft_p99_s",
    "ttft_attainment",
    "tpot_attainment",
    "slo_attainment",
    "objective",
    "goodput_rps",
    "token_goodput_tps",
    "requests_finished",
    "requests_total",
    "duration_s",
)
BOUND_SUFFIX = " (bound)"
"""Ends the label of a run that no controller could have made, wherever it is shown."""
REQUEST_COLUMNS = ("arrival_s", "finish_s", "ttft_s", "tpot_s")
WINDOW_IDENTITY = (
    "engine",
    "family",
    "scenario",
    "label",
    "controller",
    "role",
    "candidates",
    "budget",
    "seed",
    "workload_digest",
)
_LOAD_SUFFIX = re.compile(
    r"\s+(?:(?:x|×|@|rate=)\s*\d+(?:\.\d+)?(?:\s*(?:/s|rps|req/s))?|\d+(?:\.\d+)?\s*(?:/s|rps|req/s))$"
)


class ReportError(ValueError):
    """What was found cannot be reported; the message names the folder or the key, and the fix."""


@dataclass(frozen=True)
class Collation:
    """The runs of one report.

    `runs` has one row a run: what was run (`engine`, `family`, `scenario`, `label`, `controller`, `role`, `candidates`,
    `token_budget`, `total_budget`, `budget`, `seed`, `workload_digest`, `config_digest`, `code`, `speculation`,
    targets, `request_rate_rps`,
    whether the engine was `real`) and every number of its summary. `windows` has one row a run and time window:
    `window`, `start_s`, `request_rate_rps`, `arrivals`, `measured` (finished requests with a TPOT), `tpot_s` (their
    mean), `ttft_attainment`. `skipped` says which folders were left out, and why.
    """

    runs: pd.DataFrame
    windows: pd.DataFrame
    skipped: tuple[str, ...]


def family_of(scenario: str) -> str:
    """The scenario without its load: `azure2023_conv x0.5` and `azure2023_conv x1.0` are one family."""
    return _LOAD_SUFFIX.sub("", scenario)


def role_of(static: bool, peeks: bool) -> str:
    """What a controller is in the comparison: a `static` setting, or an `optimizer`, which is everything that decides.

    One that sees what no controller can see is none: a `bound`.
    """
    return "bound" if peeks else "static" if static else "optimizer"


def budget_of(token_budget: float | None, total_budget: float | None) -> str | None:
    """A run's budget for people: `n=512` beside the decodes, `total=768` with them; None where it is no constant."""
    if token_budget is not None:
        return f"n={token_budget:g}"
    return None if total_budget is None else f"total={total_budget:g}"


def find_run_folders(roots: Sequence[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Run folders at or under the given ones, and the half-written ones with what they lack.

    Raises ReportError when a root does not exist or when nothing at all is found.
    """
    complete: set[Path] = set()
    broken: dict[Path, str] = {}
    for root in roots:
        if not root.is_dir():
            raise ReportError(f"{root}: no such folder; give folders that `python -m runs.evaluate` wrote")
        for where, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "wandb")
            folder, held = Path(where).resolve(), set(files)
            if {SUMMARY, REQUESTS} <= held:
                complete.add(folder)
            elif SUMMARY in held or REQUESTS in held:
                broken[folder] = f"{REQUESTS if SUMMARY in held else SUMMARY} is missing (interrupted run?)"
            elif {CONFIG, LOG} <= held:
                broken[folder] = f"{SUMMARY} and {REQUESTS} are missing (unfinished run?)"
    if not complete and not broken:
        listed = ", ".join(str(root) for root in roots)
        raise ReportError(f"{listed}: no run folders here (a run folder holds {SUMMARY} and {REQUESTS})")
    return sorted(complete), sorted(broken.items())


def collate(
    roots: Sequence[Path],
    window_s: float = 60.0,
    ttft_target_s: float | None = None,
    skip_broken: bool = False,
    latest: bool = False,
    track: Callable[[Sequence[Path]], Iterable[Path]] = lambda folders: folders,
) -> Collation:
    """Reads every run folder under `roots` from its files alone.

    `ttft_target_s` replaces the runs' own target: attainment and goodput are then recounted from the requests. `track`
    may wrap the list of folders with a progress bar. Raises ReportError for a broken folder (unless `skip_broken`),
    for two runs of the same thing (unless `latest`, which keeps the newer), for runs that differ in their requests
    where they should be equal, and for mixed targets.
    """
    if not window_s > 0:
        raise ReportError(f"--window-s {window_s:g}: the window must be longer than 0 s")
    if ttft_target_s is not None and not ttft_target_s > 0:
        raise ReportError(f"--ttft-target {ttft_target_s:g}: the target must be longer than 0 s")
    folders, half_written = find_run_folders(roots)
    broken = [f"{folder}: {reason}" for folder, reason in half_written]
    rows: list[dict[str, Any]] = []
    windows: list[dict[str, NDArray[Any]]] = []
    for folder in track(folders):
        try:
            row, reduced = read_run(folder, window_s, ttft_target_s)
        except ReportError as error:
            broken.append(str(error))
            continue
        rows.append(row)
        windows.append(reduced)
    if broken and not skip_broken:
        raise ReportError("\n".join([*broken, "Run these again, or leave them out with --skip-broken."]))
    if not rows:
        raise ReportError("\n".join([*broken, "No complete run is left to report."]))
    types = {"candidates": "Int64", "token_budget": "Int64", "total_budget": "Int64", "seed": "int64"}
    # Plain objects: picking rows, which is most of a report's work, is slow in Arrow's strings.
    types |= dict.fromkeys(
        (*IDENTITY_TEXT, "family", "role", "budget", "config_digest", "code", "speculation", "folder"), "object"
    )
    runs = pd.DataFrame(rows).astype(types)
    runs = _without_duplicates(runs, latest)
    _check_equal_requests(runs)
    _check_equal_targets(runs)
    kept = [windows[index] for index in runs.index]
    columns = pd.DataFrame({name: np.concatenate([reduced[name] for reduced in kept]) for name in kept[0]})
    runs = runs.reset_index(drop=True)
    whose = np.repeat(np.arange(len(runs)), [len(reduced["window"]) for reduced in kept])
    identity = runs[list(WINDOW_IDENTITY)].iloc[whose].reset_index(drop=True)
    return Collation(runs, pd.concat([columns, identity], axis=1), tuple(broken))


def read_run(
    folder: Path, window_s: float, ttft_target_s: float | None
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """One run folder as a row of the runs frame and its columns of the windows frame. Raises ReportError if broken."""
    row = _read_summary(folder / SUMMARY)
    config = folder / CONFIG
    row["config_digest"] = hashlib.sha256(config.read_bytes()).hexdigest()[:12] if config.is_file() else ""
    row["folder"] = str(folder)
    row["written"] = (folder / SUMMARY).stat().st_mtime
    requests = _read_requests(folder / REQUESTS, row.pop(REQUESTS_SHA256))
    if len(requests["arrival_s"]) != row["requests_total"]:
        raise ReportError(
            f"{folder / REQUESTS}: {len(requests['arrival_s'])} rows where {SUMMARY} says requests_total = "
            f"{row['requests_total']:g} (half-written?)"
        )
    if ttft_target_s is not None:
        row.update(_recount(requests, row, ttft_target_s))
    return row, time_windows(requests, window_s, row["ttft_target_s"])


def time_windows(
    requests: dict[str, NDArray[np.float64]], window_s: float, ttft_target_s: float
) -> dict[str, NDArray[Any]]:
    """Mean TPOT (s) and TTFT attainment of the requests that arrive in each window of `window_s` seconds.

    A request belongs to the window it arrives in, so that every controller is judged on the same requests in the same
    window. The last window ends at the last arrival, and is left out when that is less than half a window.
    """
    arrival = requests["arrival_s"]
    index = np.floor(arrival / window_s).astype(np.int64)
    count = int(index.max()) + 1
    arrivals = np.bincount(index, minlength=count)
    measured = np.isfinite(requests["tpot_s"]) & np.isfinite(requests["finish_s"])
    number = np.bincount(index[measured], minlength=count)
    total = np.bincount(index[measured], weights=requests["tpot_s"][measured], minlength=count)
    attained = np.bincount(index, weights=_attained(requests, ttft_target_s), minlength=count)
    length = np.full(count, window_s)
    last = float(arrival.max()) - (count - 1) * window_s
    kept = arrivals > 0
    if last >= window_s / 2:
        length[-1] = last
    elif count > 1:
        kept[-1] = False
    with np.errstate(invalid="ignore", divide="ignore"):
        columns = {
            "window": np.arange(count),
            "start_s": np.arange(count) * window_s,
            "request_rate_rps": arrivals / length,
            "arrivals": arrivals,
            "measured": number,
            "tpot_s": total / number,
            "ttft_attainment": attained / arrivals,
        }
    return {name: column[kept] for name, column in columns.items()}


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = read_json(path)
    except FileFaultError as error:
        raise ReportError(str(error)) from error
    run = summary.get("run") if isinstance(summary, dict) else None
    if not isinstance(run, dict):
        raise ReportError(f"{path}: key 'run' is missing, so what was run is not known")
    row: dict[str, Any] = {}
    for key in IDENTITY_TEXT:
        if not isinstance(run.get(key), str) or not run[key]:
            raise ReportError(f"{path}: key 'run.{key}' should be a text, found {run.get(key)!r}")
        row[key] = run[key]
    for key in IDENTITY_NUMBERS + IDENTITY_OPTIONAL:
        value = run.get(key)
        if not _is_number(value) and not (value is None and key in IDENTITY_OPTIONAL):
            raise ReportError(f"{path}: key 'run.{key}' should be a number, found {value!r}")
        row[key] = value
    row["budget"] = budget_of(row["token_budget"], row["total_budget"])
    # A run of a real engine says on what it ran.
    row["real"] = isinstance(run.get("backend"), dict)
    row["family"] = family_of(row["scenario"])
    # Runs from before the keys were written: nothing peeked, and what was static was called `fixed`.
    said = {"peeks": run.get("peeks", False), "static": run.get("static", row["controller"] == "fixed")}
    for key, value in said.items():
        if not isinstance(value, bool):
            raise ReportError(f"{path}: key 'run.{key}' should be true or false, found {value!r}")
    peeks = said["peeks"]
    row["role"] = role_of(said["static"], peeks)
    if row["role"] == "static" and (row["candidates"] is None or row["budget"] is None):
        raise ReportError(
            f"{path}: keys 'run.candidates' and 'run.token_budget' or 'run.total_budget' must be set for a static "
            "setting"
        )
    if peeks:
        row["label"] += BOUND_SUFFIX
    row["code"] = str(run.get("code") or "")
    row["speculation"] = str(run.get("speculation") or "")
    # Runs from before the key was written have none.
    row[REQUESTS_SHA256] = summary.get(REQUESTS_SHA256)
    for key in METRICS:
        if key not in summary:
            raise ReportError(f"{path}: key '{key}' is missing")
    for key, value in summary.items():
        # A mean over no requests is written as null or NaN: that is a result, not damage.
        if key in METRICS and value is not None and not _is_number(value):
            raise ReportError(f"{path}: key '{key}' should be a number, found {value!r}")
        if key not in row and (value is None or _is_number(value)):
            row[key] = math.nan if value is None else float(value)
    return row


def _read_requests(path: Path, sha256: str | None) -> dict[str, NDArray[np.float64]]:
    try:
        columns = read_table(path, REQUEST_COLUMNS, sha256=sha256)
        with reading(path):
            requests = {name: columns[name].to_numpy().astype(np.float64) for name in REQUEST_COLUMNS}
    except FileFaultError as error:
        raise ReportError(str(error)) from error
    if not len(requests["arrival_s"]):
        raise ReportError(f"{path}: holds no requests")
    if not np.isfinite(requests["arrival_s"]).all() or (requests["arrival_s"] < 0).any():
        raise ReportError(f"{path}: column 'arrival_s' holds a negative time or NaN")
    return requests


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _attained(requests: dict[str, NDArray[np.float64]], ttft_target_s: float) -> NDArray[np.bool_]:
    return np.asarray(requests["ttft_s"] <= ttft_target_s)


def _recount(requests: dict[str, NDArray[np.float64]], row: dict[str, Any], ttft_target_s: float) -> dict[str, float]:
    attained = _attained(requests, ttft_target_s)
    # A request with one output token has no TPOT and so cannot miss that target.
    quick = ~(requests["tpot_s"] > row["tpot_target_s"])
    good = attained & quick & np.isfinite(requests["finish_s"])
    return {
        "ttft_target_s": ttft_target_s,
        "ttft_attainment": float(attained.mean()),
        "slo_attainment": float(good.mean()),
        "goodput_rps": float(good.sum()) / row["duration_s"] if row["duration_s"] > 0 else math.nan,
    }


def _without_duplicates(runs: pd.DataFrame, latest: bool) -> pd.DataFrame:
    key = ["engine", "scenario", "label", "seed"]
    runs = runs.sort_values("written", kind="stable")
    again = runs.duplicated(key, keep="last")
    if again.any() and not latest:
        first = runs[again].iloc[0]
        same = runs[(runs[key] == first[key]).all(axis=1)]["folder"].tolist()
        raise ReportError(
            f"{same[0]} and {same[1]} are the same run ({first['engine']}, {first['scenario']}, {first['label']}, "
            f"seed {first['seed']}): leave one out, or keep the newer with --latest"
        )
    order = ["engine", "family", "request_rate_rps", "scenario", "label", "seed"]
    return runs[~again].sort_values(order, key=_natural)


def _natural(column: pd.Series) -> pd.Series:
    """Sorts texts by the numbers in them, so that `7b` comes before `13b`."""
    if pd.api.types.is_numeric_dtype(column):
        return column
    return column.map(lambda text: re.sub(r"\d+", lambda digits: digits.group().zfill(8), text))


def _check_equal_requests(runs: pd.DataFrame) -> None:
    for (engine, scenario, seed), group in runs.groupby(["engine", "scenario", "seed"]):
        if group["workload_digest"].nunique() > 1:
            one = group.iloc[0]
            other = group[group["workload_digest"] != one["workload_digest"]].iloc[0]
            raise ReportError(
                f"{one['folder']} and {other['folder']} say they ran {engine}, {scenario}, seed {seed}, but on "
                f"different requests (workload_digest {one['workload_digest'][:12]} and "
                f"{other['workload_digest'][:12]}): run one of them again, or report them apart"
            )


def _check_equal_targets(runs: pd.DataFrame) -> None:
    for (engine, scenario), group in runs.groupby(["engine", "scenario"]):
        for key, name, mend in (
            ("ttft_target_s", "TTFT", "recount all of them with --ttft-target S"),
            ("tpot_target_s", "TPOT", "run one of them again with the other's slo.tpot_target"),
        ):
            if group[key].nunique() > 1:
                one = group.iloc[0]
                other = group[group[key] != one[key]].iloc[0]
                raise ReportError(
                    f"{one['folder']} and {other['folder']} ({engine}, {scenario}) count attainment against different "
                    f"{name} targets ({one[key]:g} s and {other[key]:g} s): {mend}"
                )
