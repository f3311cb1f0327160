"""Claims about measuring a torch engine: what is repeated, what is kept, what a kill costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.backends.measure import AnotherProfileError, collect, measure, sensed
from engine.backends.torch.acceptance import agreement, speculate
from engine.backends.torch.rehearsal import Rehearsal
from engine.latency.design import Point, Space, design
from engine.workload.acceptance_log import read_acceptance_log
from engine.workload.workload import run_lengths
from tests.engine.backends.torch.models import VOCABULARY, engine, limits

BOUNDS = limits(total_blocks=200, max_num_seqs=6)
TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 3000).astype(np.int32)
POINT = Point((30, 50, 41), 3, chunks=(20, 9), context=12, left=5, fresh=1)


@pytest.mark.parametrize("drafter", ["model", "none", "ngram"])
def test_an_arranged_iteration_is_the_one_asked_for_every_time(drafter: str) -> None:
    served = engine("llama", drafter, BOUNDS)
    rehearsal = Rehearsal(served, TEXT)
    rehearsal.arrange(POINT, np.random.default_rng(0))
    emitted = []
    for _ in range(3):
        timing = rehearsal.run()
        assert 0.0 < timing.forward_s < timing.seconds
        assert 0.0 <= timing.draft_s < timing.seconds - timing.forward_s
        planned = rehearsal.planned()
        expected = {"num_decodes": 3, "decode_kv_tokens": 121, "num_prefills": 2, "prefill_tokens": 29}
        assert expected.items() <= planned.items()
        assert planned["prompts_completed"] == 1
        assert planned["unread_tokens"] == 41
        if drafter == "model":
            assert planned["decode_tokens"] == 12
            assert planned["candidate_steps"] == 3
        emitted.append(served.emitted)
    assert emitted[0] == emitted[1] == emitted[2]
    rehearsal.clear()
    assert served.table.free_blocks == BOUNDS.total_blocks


def test_the_drafter_reads_what_is_fresh_and_nothing_else() -> None:
    served = engine("llama", "model", BOUNDS)
    read = []
    drafter = served.drafter._runner  # type: ignore[attr-defined]
    own = drafter.forward

    def noted(table, seats, starts, counts, keep, *rest):
        read.append(sorted(counts.tolist()))
        return own(table, seats, starts, counts, keep, *rest)

    drafter.forward = noted
    rehearsal = Rehearsal(served, TEXT)
    rehearsal.arrange(POINT, np.random.default_rng(0))
    for _ in range(2):
        read.clear()
        rehearsal.run()
        assert read == [[1, 1, 42], [1, 1, 1], [1, 1, 1]]


_CHILD = """
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.engine.backends.torch.test_profile import measured_here
measured_here(Path({visits!r}), lambda done, total: print(done, flush=True))
"""


def measured_here(visits: Path, on_progress=None) -> None:
    served = engine("llama", "model", BOUNDS)
    points = design(Space(BOUNDS, (0, 2), 64), 40, 0)
    measure(served, TEXT, points, visits, seconds=0.0, seed=1, on_progress=on_progress)


def test_a_killed_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    visits = tmp_path / "visits.jsonl"
    code = _CHILD.format(visits=str(visits))
    repository = Path(__file__).resolve().parents[4]
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=repository)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 12:
            break
    child.kill()
    child.wait()
    kept = visits.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    count = kept.count(b"\n") - 1
    assert 12 <= count < 40
    with visits.open("ab") as file:
        file.write(b'{"round": 0, "point": 3, "tim')
    measured_here(visits)
    assert visits.read_bytes().startswith(kept)
    rows = [json.loads(line) for line in visits.read_text().splitlines()[1:]]
    assert sorted(row["point"] for row in rows) == list(range(40))
    again = visits.read_bytes()
    measured_here(visits)
    assert visits.read_bytes() == again
    measured = collect(visits)
    assert len(measured) == 40
    for row in rows:
        assert measured.seconds[row["point"]] == np.median([timing[0] for timing in row["timings"]])


def test_measurements_of_other_points_are_not_mixed(tmp_path: Path) -> None:
    visits = tmp_path / "visits.jsonl"
    served = engine("llama", "none", BOUNDS)
    measure(served, TEXT, [Point((9,), 0)], visits, seconds=0.0, seed=0)
    with pytest.raises(AnotherProfileError, match="another folder"):
        measure(served, TEXT, [Point((8,), 0)], visits, seconds=0.0, seed=0)
    with pytest.raises(AnotherProfileError, match="another folder"):
        measure(served, TEXT, [Point((9,), 0)], visits, seconds=0.0, seed=0, identity="another engine")


def test_what_sensors_say_is_noted_with_each_visit(tmp_path: Path) -> None:
    visits = tmp_path / "visits.jsonl"
    served = engine("llama", "none", BOUNDS)
    clock = iter(({"sm_mhz": 1980.0}, {"sm_mhz": 1755.0}))
    points = [Point((9,), 0), Point((8,), 0)]
    measure(served, TEXT, points, visits, seconds=0.0, seed=0, sensors=lambda: next(clock))
    assert sensed(visits) == [{"sm_mhz": 1980.0}, {"sm_mhz": 1755.0}]
    measure(served, TEXT, [Point((9,), 0)], tmp_path / "without", seconds=0.0, seed=0)
    assert sensed(tmp_path / "without") == []


@pytest.mark.parametrize("drafter", ["copy", "model", "ngram"])
def test_the_acceptance_log_is_read_back_as_it_happened(drafter: str, tmp_path: Path) -> None:
    served = engine("llama", drafter, BOUNDS)
    prompts = [np.resize(TEXT[i : i + 5], 20 + i) for i in range(8)]
    run = speculate(served, prompts, 12, 3, 64)
    path = tmp_path / "acceptance.jsonl"
    path.write_text("".join(json.dumps(turn) + "\n" for turn in run.turns))
    turns = read_acceptance_log(path).turns
    assert [turn.observed().size for turn in turns] == [len(output) for output in run.outputs] == [12] * 8
    emitted = sum(int((turn.accepted + 1).sum()) for turn in turns)
    assert run.tokens_per_iteration == emitted / sum(turn.accepted.size for turn in turns)
    assert speculate(served, prompts, 12, 0, 64).tokens_per_iteration == 1.0
    if drafter == "copy":
        assert run.tokens_per_iteration > 3.0


@pytest.mark.parametrize("drafter", ["copy", "model"])
def test_recorded_agreement_gives_the_acceptances_of_the_real_run(drafter: str) -> None:
    served = engine("llama", drafter, BOUNDS)
    prompts = [np.resize(TEXT[i : i + 5], 20 + i) for i in range(8)]
    run = speculate(served, prompts, 12, 3, 64)
    found = agreement(served, prompts, run.outputs)
    runs = run_lengths(found["rank"], found["offset"])
    assert ((found["confidence"] > 0) & (found["confidence"] <= 1)).all()
    for i, turn in enumerate(run.turns):
        position = 1
        for drafted, accepted in zip(turn["k_drafted"], turn["n_accepted"], strict=True):
            assert min(drafted, int(runs[found["offset"][i] + position])) == accepted
            position += accepted + 1


def test_prompt_lookup_is_sure_or_silent() -> None:
    served = engine("llama", "ngram", BOUNDS)
    prompts = [np.resize(TEXT[:5], 25)]
    found = agreement(served, prompts, [[int(token) for token in np.resize(TEXT[:5], 10)]])
    assert (found["rank"] == 0).all()
    assert (found["confidence"] == 1.0).all()
    silent = agreement(served, [np.array([1], dtype=np.int32)], [[2]])
    assert silent["confidence"].tolist() == [0.0]
    assert silent["rank"].tolist() == [255]
