"""Measures the points of a design on a real engine, in rounds, so that it can be killed and go on.

Every round visits all points in another random order, so that a machine that slows down slows no part of the design in
particular, and a burst of load meets a few repeats of many points instead of all of a few. Each visit is one line of a
file and never written twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.real import RealEngine, Rehearsing, Timing
from engine.files import reading
from engine.latency.design import Point, digest
from engine.latency.measured import MeasuredIterations

VISIT_S = 0.1
"""Seconds of iterations that a visit times, at most `MOST_REPEATS` of them and at least one."""

MOST_REPEATS = 5


VISIT_KEYS = {"round", "point", "planned", "timings", "load", "wall_s"}
"""Keys of a row of the visits."""


BEGUN = "begun"
"""Key of the file's first line beside what names the design."""


class AnotherProfileError(ValueError):
    """The file of visits belongs to another design."""


def measure(
    engine: RealEngine,
    text: NDArray[np.int32],
    points: Sequence[Point],
    visits: Path,
    *,
    seconds: float,
    seed: int,
    identity: str = "",
    sensors: Callable[[], dict[str, float]] | None = None,
    on_progress: Callable[[int, int], Any] | None = None,
) -> None:
    """Add visits to the file until every point has one and they took `seconds` together.

    What the file holds already is not measured again; a last line that was cut off by a kill is dropped.
    `identity` names what else the measurement depends on. What `sensors` gives is noted with each visit, right behind
    its iterations. `on_progress` gets (done, total) in points for the first round, then in seconds.

    Raises:
        AnotherProfileError: the file holds visits of other points, or of another engine.
    """
    known = begin(visits, points, identity)
    done = {(visit["round"], visit["point"]) for visit in known}
    spent = sum(visit["wall_s"] for visit in known)
    rehearsal = engine.rehearsal(text)
    with visits.open("a", encoding="utf-8") as file:
        for turn in count():
            order = np.random.default_rng([seed, turn]).permutation(len(points)).tolist()
            for index in order:
                if turn > 0 and spent >= seconds:
                    rehearsal.clear()
                    return
                if (turn, index) in done:
                    continue
                visit = _visit(rehearsal, points[index], np.random.default_rng([seed, index, turn]), sensors)
                file.write(json.dumps({"round": turn, "point": index, **visit}) + "\n")
                file.flush()
                os.fsync(file.fileno())
                done.add((turn, index))
                spent += visit["wall_s"]
                if on_progress is not None:
                    on_progress(*((len(done), len(points)) if turn == 0 else (int(spent), int(seconds))))


def begin(visits: Path, points: Sequence[Point], identity: str) -> list[dict[str, Any]]:
    """The visits made so far; a new file gets its first line, which names the design.

    Raises AnotherProfileError as `measure` does.
    """
    title = {"design": digest(points), "identity": identity}
    whole = visits.read_bytes().rpartition(b"\n")[0] if visits.exists() else b""
    if not whole:
        visits.parent.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        visits.write_text(json.dumps(title | {BEGUN: now}) + "\n", encoding="utf-8")
        return []
    with visits.open("r+b") as file:
        file.truncate(len(whole) + 1)
    with reading(visits, "remove it to measure anew"):
        found = json.loads(whole.partition(b"\n")[0])
    if not isinstance(found, dict) or found | title != found:
        raise AnotherProfileError(
            f"{visits} holds measurements of other points or of another engine; give another folder "
            "(hydra.run.dir=...), or remove this one to measure anew"
        )
    return list(_lines(visits))


def collect(visits: Path) -> MeasuredIterations:
    """One row for each visited point, in the design's order: the median over all its timings.

    Each line is one visit, so points whose last round was cut short have one timing less, not a worse one.
    """
    rows: dict[int, dict[str, Any]] = {}
    timings: dict[int, list[list[float]]] = {}
    for visit in _lines(visits):
        rows.setdefault(visit["point"], visit)
        timings.setdefault(visit["point"], []).extend(visit["timings"])
    columns: dict[str, list[Any]] = {}
    for point in sorted(rows):
        times = np.array(timings[point])
        middle = np.median(times, axis=0)
        quarters = np.percentile(times[:, 0], (25, 75))
        figures = {
            "seconds": middle[0],
            "draft_s": middle[1],
            "forward_s": middle[2],
            "seconds_min": times[:, 0].min(),
            "seconds_iqr": quarters[1] - quarters[0],
            "repeats": len(times),
        }
        for key, value in (rows[point]["planned"] | figures).items():
            columns.setdefault(key, []).append(value)
    return MeasuredIterations.from_columns(columns)


def begun(visits: Path) -> str | None:
    """When the first measurement of the file began, in the machine's local time; None where it does not say."""
    with reading(visits), visits.open(encoding="utf-8") as file:
        found: str | None = json.loads(file.readline()).get(BEGUN)
    return found


def loads(visits: Path) -> list[float]:
    """The machine's load average at each visit."""
    return [visit["load"] for visit in _lines(visits)]


def sensed(visits: Path) -> list[dict[str, float]]:
    """What the machine's sensors said at each visit that asked them."""
    return [visit["sensors"] for visit in _lines(visits) if "sensors" in visit]


def _visit(
    rehearsal: Rehearsing, point: Point, rng: np.random.Generator, sensors: Callable[[], dict[str, float]] | None
) -> dict[str, Any]:
    start = time.perf_counter()
    rehearsal.arrange(point, rng)
    first = rehearsal.run().seconds
    repeats = int(np.clip(VISIT_S / first, 1, MOST_REPEATS))
    timings: list[Timing] = [rehearsal.run() for _ in range(repeats)]
    noted = {} if sensors is None else {"sensors": sensors()}
    return {
        "planned": rehearsal.planned() | {"chunks": list(point.chunks)},
        "timings": [[timing.seconds, timing.draft_s, timing.forward_s] for timing in timings],
        "load": os.getloadavg()[0],
        **noted,
        "wall_s": time.perf_counter() - start,
    }


def _lines(visits: Path) -> Iterator[dict[str, Any]]:
    with reading(visits):
        lines = visits.read_text(encoding="utf-8").splitlines()[1:]
    for row, line in enumerate(lines, 2):
        with reading(f"{visits}, row {row}", "remove the row to measure it anew"):
            visit = json.loads(line)
            missing = VISIT_KEYS - visit.keys()
            if missing or not np.isfinite(np.array(visit["timings"], dtype=np.float64)).all():
                raise ValueError(f"no {', '.join(sorted(missing)) or 'times'}")
        yield visit
