"""A live engine: sampling, stop tokens, cancellation, storms; and its replay through the shared scheduler."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from engine.backends.real import RequestError
from engine.backends.torch.engine import TorchEngine
from engine.core.metrics import request_table
from engine.core.state import CANCELLED, FINISHED, State
from engine.limits import Prefill
from engine.simulator.replay import Recording, ReplayError, replay
from engine.speculation.allocation import CHAINS, Speculation
from engine.speculation.sampling import Sampling
from tests.engine.backends.torch.models import ManualClock, drafter, engine, generated, limits, model, paged, prompts
from tests.engine.core.cases import Figures

TTFT_TARGET_S = 1.0


def _storm(served: TorchEngine, requests: int, seed: int, *, check: bool = True) -> dict[int, tuple[list[int], int]]:
    """Requests come faster than they are served and some are cancelled, in every phase; all that was asked for."""
    random = np.random.default_rng(seed)
    asked: dict[int, tuple[list[int], int]] = {}
    emitted: dict[int, list[int]] = {}
    pool = prompts(random.integers(1, 50, 12).tolist(), seed)
    turn = 0
    while True:
        for _ in range(int(random.integers(0, 4))):
            if len(asked) < requests:
                prompt, most = pool[int(random.integers(len(pool)))], int(random.integers(1, 25))
                stop = [int(random.integers(40))] if random.random() < 0.3 else []
                asked[served.submit(prompt, most, stop=stop)] = (prompt, most)
        if asked and random.random() < 0.15:
            served.cancel(int(random.integers(len(asked))))
        if not served.step(int(random.integers(0, 6)), int(random.integers(1, 60))) and len(asked) == requests:
            break
        for number, tokens in served.emitted:
            emitted.setdefault(number, []).extend(tokens)
        held = int(served.table.held.sum())
        assert held + served.table.free_blocks == served.limits.total_blocks
        named = np.concatenate([served.table.blocks[s, : served.table.held[s]] for s in range(len(served.table.held))])
        assert len(np.unique(named)) == held, "no block is held twice"
        turn += 1
        assert turn < 100 * requests, "the engine makes no progress"
    for number, (prompt, most) in asked.items():
        output = served.output(number)
        assert output == emitted.get(number, []), "what was emitted is what was stored, once and in order"
        if check:
            assert output == generated("llama", prompt, 24)[: len(output)]
        row = served.state.requests[number]
        assert row["generated"] == len(output) <= most
        if row["phase"] == FINISHED:
            assert row["output"] == len(output)
    return asked


TREES = [(name, how) for name in ("near", "ngram") for how in (Speculation("uniform", 3), Speculation("global", 2))]


@pytest.mark.parametrize(
    ("draft_with", "how"), [*((name, CHAINS) for name in ("none", "ngram", "copy", "model")), *TREES]
)
def test_a_storm_of_preemptions_and_cancellations_loses_and_duplicates_nothing(
    draft_with: str, how: Speculation
) -> None:
    served = engine("llama", draft_with, limits(total_blocks=26, max_num_seqs=6), how)
    asked = _storm(served, 60, seed=3)
    state = Figures(served.state)
    phases = served.state.requests["phase"][: len(asked)]
    assert np.isin(phases, (FINISHED, CANCELLED)).all()
    assert state["finished"] + state["cancelled"] == len(asked)
    assert state["preemptions"] > 3
    assert (phases == CANCELLED).sum() > 3
    assert state["free_blocks"] == served.limits.total_blocks
    assert state["waiting_tokens"] == state["kv_tokens"] == state["overdue"] == 0
    assert state["tpot_weight"] == pytest.approx(0, abs=1e-9)


def _assert_same_rows(again: State, served: TorchEngine, count: int) -> None:
    for name in again.requests.dtype.names:
        rows = (state.requests[name][:count] for state in (again, served.state))
        np.testing.assert_array_equal(*rows, err_msg=name)


@pytest.mark.parametrize("prefill", ["whole", "first", "turns"])
def test_however_prompts_are_scheduled_a_storm_loses_nothing_and_replays(prefill: Prefill) -> None:
    bounds = replace(limits(total_blocks=26, max_num_seqs=6), prefill=prefill)
    served = engine("llama", "near", bounds, record=True, clock=ManualClock(), ttft_target=TTFT_TARGET_S)
    asked = _storm(served, 30, seed=5)
    assert served.recording is not None
    assert served.state.totals["preemptions"][0] > 0
    _assert_same_rows(replay(served.recording, bounds, TTFT_TARGET_S), served, len(asked))


@pytest.mark.parametrize(("draft_with", "how"), [*((name, CHAINS) for name in ("none", "ngram", "copy")), *TREES])
def test_replay_gives_the_recorded_runs_timeline(draft_with: str, how: Speculation, tmp_path: Path) -> None:
    """Exactly: every time and count of every request, the ITL histogram, and the engine's totals."""
    bounds = limits(total_blocks=26, max_num_seqs=6)
    served = engine("llama", draft_with, bounds, how, record=True, clock=ManualClock(), ttft_target=TTFT_TARGET_S)
    asked = _storm(served, 60, seed=4, check=False)
    assert served.recording is not None
    served.recording.save(tmp_path / "run.npz")
    again = replay(Recording.load(tmp_path / "run.npz"), bounds, TTFT_TARGET_S)
    recorded = request_table(served.requests)
    assert served.state.totals["preemptions"][0] > 0
    assert served.state.totals["cancelled"][0] > 0
    for name, column in request_table(again.requests).items():
        np.testing.assert_array_equal(column, recorded[name], err_msg=name)
    _assert_same_rows(again, served, len(asked))
    for name in ("itl", "stopped", "exhausted"):
        np.testing.assert_array_equal(getattr(again, name), getattr(served.state, name), err_msg=name)
    for name in again.totals.dtype.names or ():
        assert again.totals[name][0] == served.state.totals[name][0], name
    assert again.instances["last_end"][0] == served.state.instances["last_end"][0]


def test_replay_in_real_time_with_arrivals_known_before() -> None:
    """A wall clock this time, and requests submitted ahead of their arrival."""
    bounds = limits()
    served = engine("llama", "copy", bounds, record=True)
    for i, prompt in enumerate(prompts((20, 5, 31, 9))):
        served.submit(prompt, 6, arrival=served.clock.now() + 0.004 * i)
    served.run(2, 16)
    assert served.recording is not None
    again = replay(served.recording, bounds, 1.0)
    _assert_same_rows(again, served, 4)
    assert (again.requests["phase"][:4] == FINISHED).all()


def test_replay_on_other_limits_is_refused() -> None:
    served = engine("llama", "none", limits(), record=True, clock=ManualClock())
    for prompt in prompts((20, 5, 31, 9)):
        served.submit(prompt, 6)
    served.run(0, 64)
    assert served.recording is not None
    with pytest.raises(ReplayError, match="recorded engine decoded 3 requests, the replay plans 1"):
        replay(served.recording, limits(max_num_seqs=1), 1.0)


def test_output_ends_with_the_stop_token_wherever_it_falls_in_a_chain() -> None:
    prompt = prompts((9,))[0]
    whole = generated("llama", prompt, 24)
    for stop in sorted(set(whole)):
        served = engine("llama", "copy", limits())
        number = served.submit(prompt, 24, stop=[stop])
        served.run(5, 64)
        assert served.output(number) == whole[: whole.index(stop) + 1]
        row = served.state.requests[number]
        assert (row["phase"], row["output"]) == (FINISHED, whole.index(stop) + 1)


def test_a_seed_repeats_its_output_whatever_else_is_served() -> None:
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.95, seed=11)
    prompt = prompts((9,))[0]
    alone = engine("llama", "none", limits())
    number = alone.submit(prompt, 20, sampling)
    alone.run(0, 64)
    crowded = engine("llama", "none", limits(total_blocks=30))
    others = [crowded.submit(p, 20, Sampling(temperature=1.0, seed=i)) for i, p in enumerate(prompts((20, 5, 31, 9)))]
    again, other_seed = crowded.submit(prompt, 20, sampling), crowded.submit(prompt, 20, Sampling(1.5, 20, 0.95, 12))
    crowded.run(0, 7)
    assert crowded.output(again) == alone.output(number)
    assert crowded.output(other_seed) != alone.output(number)
    assert all(len(crowded.output(other)) == 20 for other in others)


def test_greedy_requests_are_unmoved_by_sampled_neighbours() -> None:
    asked = prompts((20, 5, 31, 9))
    served = engine("llama", "model", limits())
    numbers = [served.submit(prompt, 12, Sampling(temperature=float(i % 2), seed=i)) for i, prompt in enumerate(asked)]
    served.run(3, 64)
    for i in (0, 2):
        assert served.output(numbers[i]) == generated("llama", asked[i], 12)


def test_the_observation_is_the_simulators() -> None:
    served = engine("llama", "none", limits(), clock=ManualClock())
    served.submit([1, 2, 3], 4)
    served.step(0, 2)
    observation = served.new_observation()
    served.observe(observation)
    assert observation.queue[0, 0, 0] == 1, "one prompt token of three is left"


@pytest.mark.parametrize(
    ("prompt", "most", "message"),
    [
        ([], 4, "at least one token"),
        ([1], 0, "max_tokens=0"),
        ([40], 4, "ids are 0 to 39"),
        ([-1], 4, "ids are 0 to 39"),
        ([1] * 200, 57, "exceed 256 tokens"),
    ],
)
def test_impossible_requests_are_refused(prompt: list[int], most: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine("llama", "none", limits()).submit(prompt, most)


def test_arrivals_in_the_past_are_refused() -> None:
    served = engine("llama", "none", limits(), clock=ManualClock())
    served.submit([1, 2], 2, arrival=5.0)
    with pytest.raises(RequestError, match=r"arrival=4.0 s is in the past"):
        served.submit([1, 2], 2, arrival=4.0)


def test_a_cache_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="these limits need"):
        TorchEngine(paged(model("llama"), limits()), limits(total_blocks=9), drafter("none", "llama", limits()))


def test_actions_may_change_in_every_iteration_of_a_sampled_run() -> None:
    served = engine("llama", "model", limits(total_blocks=26))
    numbers = [served.submit(p, 16, Sampling(temperature=0.8, seed=i)) for i, p in enumerate(prompts((20, 5, 31, 9)))]
    turns = cycle([(0, 5), (4, 9), (2, 64), (7, 1)])
    while served.step(*next(turns)):
        pass
    assert all(len(served.output(number)) == 16 for number in numbers)
    assert served.state.totals["accepted"][0] > 0


def test_a_candidate_that_was_not_proposed_counts_as_not_accepted() -> None:
    """Prompt lookup finds nothing in a text without repetition: controllers must not see its rare hits alone."""
    served = engine("llama", "ngram", limits())
    served.submit([1, 2, 3, 4, 5, 6, 7, 8], 6)
    served.step(4, 64)
    observation = served.new_observation()
    served.observe(observation)
    request = served.state.requests[0]
    while (left := int(request["output"] - request["generated"])) > 0:
        served.step(4, 64)
        served.observe(observation)
        assert observation.drafted[0, 0] == (1 if left > 1 else 0), "a candidate was asked for wherever one fits"
    assert served.state.totals["drafted"][0] < served.state.totals["decode_steps"][0]
