"""Simulated speculation: candidates go where they are most probably right, and what is right is accepted."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from controllers.fixed import constant
from engine.config import EngineConfig
from engine.core.scheduler import plan
from engine.latency.model import LatencyModel
from engine.simulator.candidates import RANK_EXPONENT, accept_shared, share_candidates
from engine.simulator.simulator import Simulator
from engine.workload.agreement import IidAgreement, MarkovAgreement
from engine.workload.workload import Workload, offsets, run_lengths
from tests.engine.core.cases import Figures

LINEAR = LatencyModel.linear(0.01, 1e-4, per_draft_step_s=1e-3)
OUTPUT = 24


class Shared(NamedTuple):
    """What a planned batch got: tokens of each decode, accepted and reach, drafter passes."""

    candidates: list[int]
    accepted: list[int]
    reach: list[int]
    steps: int


def _workload(
    confidence: NDArray[np.float32], rank: NDArray[np.uint8] | None = None, output: int = OUTPUT, spacing_s: float = 0.0
) -> Workload:
    """Requests of 16 prompt tokens, whose output positions from 1 on have these confidences and ranks."""
    size = len(confidence)
    outputs = np.full(size, output, dtype=np.int32)
    flat = np.full((size, output), 0.5, dtype=np.float32)
    flat[:, 1 : 1 + confidence.shape[1]] = confidence
    ranks = np.zeros((size, output), dtype=np.uint8)
    if rank is not None:
        ranks[:, 1 : 1 + rank.shape[1]] = rank
    offset = offsets(outputs)
    return Workload(
        name="hand-made",
        arrival=np.arange(size) * spacing_s,
        prompt_tokens=np.full(size, 16, dtype=np.int32),
        output_tokens=outputs,
        offset=offset,
        run_length=run_lengths(ranks.ravel(), offset),
        rank=ranks.ravel(),
        confidence=flat.ravel(),
    )


def _decoding(workload: Workload, latency: LatencyModel = LINEAR, **settings: Any) -> Simulator:
    """An engine after the iteration that prefilled all requests at once."""
    config = EngineConfig(name="test", latency="vicuna_7b_a100", num_kv_blocks=4096, **settings)
    simulator = Simulator(config, [workload], ttft_target=1.0, latency=latency)
    simulator.step(0, 0, 16 * len(workload.arrival))
    return simulator


def _share(simulator: Simulator, candidates: int) -> Shared:
    state, sharing = simulator.state, simulator.system.sharing
    plan(state, 0, candidates, 0)
    share_candidates(state, 0, sharing, simulator.system.trace, simulator.latency.tables)
    accept_shared(state, 0, sharing)
    count = int(state.batches["num_decodes"][0])
    return Shared(
        (state.batch_tokens[0, :count] - 1).tolist(),
        state.accepted[0, :count].tolist(),
        state.reach[0, :count].tolist(),
        int(state.batches["candidate_steps"][0]),
    )


@cache
def _share_of(rank: int) -> float:
    """Of the probability that the first choice is wrong, what the choice of this rank is believed to hold."""
    total = sum(j**-RANK_EXPONENT for j in range(1, 200_000)) + 200_000 ** (1 - RANK_EXPONENT) / (RANK_EXPONENT - 1)
    return float(rank**-RANK_EXPONENT / total)


def _paths(confidence: NDArray[np.float32], branching: int, depth: int) -> dict[tuple[int, ...], float]:
    """Path probability of every node of a request's full tree; a node is the ranks on the way to it."""
    found: dict[tuple[int, ...], float] = {}
    for length in range(1, depth + 1):
        for path in itertools.product(range(branching), repeat=length):
            value = 1.0
            for at, rank in enumerate(path):
                first = float(confidence[at])
                value *= first if rank == 0 else min(first, (1.0 - first) * _share_of(rank))
            found[path] = value
    return found


def _best_by_trying(confidence: NDArray[np.float32], branching: int, depth: int, budget: int) -> float:
    """The greatest sum of path probabilities of prefix-closed sets of `budget` nodes, request by request."""
    best_of: list[list[float]] = []
    for row in confidence:
        paths = _paths(row, branching, depth)
        best = [0.0] * (budget + 1)
        for count in range(1, min(budget, len(paths)) + 1):
            for chosen in itertools.combinations(paths, count):
                if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
                    best[count] = max(best[count], sum(paths[path] for path in chosen))
        best_of.append(best)
    shares = itertools.product(range(budget + 1), repeat=len(confidence))
    return max(
        sum(best[share] for best, share in zip(best_of, split, strict=True)) for split in shares if sum(split) == budget
    )


def _expected(simulator: Simulator, confidence: NDArray[np.float32], branching: int, depth: int) -> float:
    """Sum of the path probabilities of what was kept: the best so many nodes of each request, as they were taken."""
    total = 0.0
    for i, row in enumerate(confidence):
        best = sorted(_paths(row, branching, depth).values(), reverse=True)
        total += sum(best[: simulator.state.batch_tokens[0, i] - 1])
    return total


confidences = st.lists(
    st.lists(st.sampled_from([0.9, 0.5, 0.25]) | st.floats(0.02, 0.98), min_size=3, max_size=3), min_size=1, max_size=3
).map(lambda rows: np.array(rows, dtype=np.float32))


@settings(max_examples=40, deadline=None)
@given(confidences, st.integers(1, 2), st.sampled_from([1, 2]))
def test_global_is_the_best_prefix_closed_choice(confidence: NDArray[np.float32], c: int, branching: int) -> None:
    depth = 2 if branching > 1 else 3
    simulator = _decoding(_workload(confidence), allocation="global", branching=branching, draft_depth=depth)
    shared = _share(simulator, c)
    budget = c * len(confidence)
    assert sum(shared.candidates) == min(budget, len(confidence) * len(_paths(confidence[0], branching, depth)))
    by_trying = _best_by_trying(confidence, branching, depth, sum(shared.candidates))
    assert _expected(simulator, confidence, branching, depth) == pytest.approx(by_trying, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(confidences, st.integers(0, 3), st.integers(1, 3))
def test_global_expects_no_less_than_local_and_local_no_less_than_uniform(
    confidence: NDArray[np.float32], c: int, branching: int
) -> None:
    expected = []
    for allocation in ("uniform", "local", "global"):
        simulator = _decoding(_workload(confidence), allocation=allocation, branching=branching, draft_depth=3)
        _share(simulator, c)
        if allocation == "uniform":
            expected.append(_expected_of_shape(simulator, confidence))
        else:
            expected.append(_expected(simulator, confidence, branching, 3))
    assert expected[0] <= expected[1] + 1e-9
    assert expected[1] <= expected[2] + 1e-9


def _expected_of_shape(simulator: Simulator, confidence: NDArray[np.float32]) -> float:
    """Sum of the path probabilities of the fixed shape's nodes, as many as each request got."""
    sharing = simulator.system.sharing
    total = 0.0
    for i, row in enumerate(confidence):
        paths: list[tuple[int, ...]] = []
        for node in range(simulator.state.batch_tokens[0, i] - 1):
            parent = int(sharing.shape_parents[node])
            paths.append((*(paths[parent] if parent >= 0 else ()), int(sharing.shape_ranks[node])))
        values = _paths(row, sharing.branching, 3)
        total += sum(values[path] for path in paths)
    return total


def test_a_global_chain_of_one_request_takes_what_another_does_without() -> None:
    confidence = np.array([[0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1]], dtype=np.float32)
    shared = _share(_decoding(_workload(confidence), allocation="global"), 2)
    # .9, .81, .729, .656 are all above the other's .1.
    assert shared.candidates == [4, 0]
    assert shared.accepted == [4, 0]
    assert shared.steps == 4


def test_drafting_stops_behind_the_deepest_candidate_that_is_kept() -> None:
    confidence = np.array([[0.9, 0.2, 0.2, 0.2], [0.8, 0.2, 0.2, 0.2]], dtype=np.float32)
    assert _share(_decoding(_workload(confidence), allocation="global"), 1).steps == 2
    deep = _share(_decoding(_workload(confidence), allocation="global", draft_depth=1), 1)
    assert (deep.candidates, deep.steps) == ([1, 1], 1)
    assert _share(_decoding(_workload(confidence), allocation="global"), 0).steps == 0


def test_a_tree_is_accepted_along_the_ranks_of_the_workload_as_far_as_it_goes() -> None:
    # .5 first, then .5 x rank share: the best five nodes are worked out below.
    confidence = np.array([[0.5, 0.9, 0.9, 0.9]], dtype=np.float32)
    paths = sorted(_paths(confidence[0], 2, 4).items(), key=lambda item: -item[1])
    kept = [path for path, _ in paths[:5]]
    assert (1,) in kept
    assert (1, 0) not in kept
    for rank, accepted, reach in ([0, 0, 0, 0], 4, 4), ([1, 0, 0, 0], 1, 1), ([2, 0, 0, 0], 0, 1), ([0, 1, 0, 0], 1, 2):
        workload = _workload(confidence, np.array([rank], dtype=np.uint8))
        shared = _share(_decoding(workload, allocation="local", branching=2, draft_depth=4), 5)
        assert shared.candidates == [5]
        assert (shared.accepted, shared.reach) == ([accepted], [reach]), rank


def test_a_fixed_tree_is_accepted_along_the_ranks_of_the_workload() -> None:
    confidence = np.full((1, 4), 0.5, dtype=np.float32)
    # A chain of three, then a second child of the root, by the assumed rates.
    for rank, accepted in ([0, 0, 0], 3), ([0, 1, 0], 1), ([1, 0, 0], 1), ([2, 0, 0], 0):
        workload = _workload(confidence, np.array([rank], dtype=np.uint8))
        shared = _share(_decoding(workload, branching=2), 4)
        assert (shared.candidates, shared.accepted, shared.steps) == ([4], [accepted], 3), rank


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 6), st.sampled_from([60, 4000]))
def test_local_chains_are_the_chains_of_c_each(seed: int, c: int, blocks: int) -> None:
    workload = _random(seed, 30)
    tables = []
    for more in ({}, {"allocation": "local", "draft_depth": 8}, {"allocation": "uniform", "draft_depth": 8}):
        simulator = _run(workload, c, num_kv_blocks=blocks, **more)
        tables.append(simulator.state.requests.tobytes())
    # The drafter passes that a chain of its own choice needs are those of c: nothing is dropped.
    assert tables[0] == tables[1] == tables[2]


def _random(seed: int, requests: int) -> Workload:
    rng = np.random.default_rng(seed)
    return Workload.build(
        "random",
        np.cumsum(rng.exponential(0.05, requests)),
        rng.integers(1, 200, requests),
        rng.integers(1, 60, requests),
        MarkovAgreement(base_mean=0.6, base_concentration=3.0, momentum=0.5),
        seed,
    )


def _run(workload: Workload, c: int, **settings: Any) -> Simulator:
    config = EngineConfig(name="test", latency="vicuna_7b_a100", **settings)
    simulator = Simulator(config, [workload], ttft_target=1.0, latency=LINEAR)
    simulator.run_to_end(simulator.loop(constant(c, 128)))
    return simulator


WAYS: list[dict[str, Any]] = [
    {"branching": 3},
    {"allocation": "local", "branching": 3},
    {"allocation": "global"},
    {"allocation": "global", "branching": 3, "draft_depth": 5},
    {"allocation": "global", "cost_aware": True},
    {"allocation": "global", "score": "acceptance"},
    {"allocation": "slo", "tpot_target": 0.01},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), c=st.integers(0, 8), blocks=st.sampled_from([30, 200, 4000]))
def test_every_request_gets_its_tokens_whoever_gets_the_candidates(
    way: dict[str, Any], seed: int, c: int, blocks: int
) -> None:
    workload = _random(seed, 25)
    simulator = _run(workload, c, num_kv_blocks=blocks, **way)
    rows, engine = simulator.state.requests, Figures(simulator.state)
    assert (rows["generated"] == workload.output_tokens).all()
    assert (rows["accepted"] <= rows["drafted"]).all()
    assert engine["free_blocks"] == engine["total_blocks"]
    assert engine["kv_tokens"] == 0
    assert engine["lowest_free_blocks"] >= 0
    again = _run(workload, c, num_kv_blocks=blocks, **way)
    assert again.state.requests.tobytes() == simulator.state.requests.tobytes()


def test_expected_tokens_come_true_on_average() -> None:
    """Confidence is calibrated, so what global allocation expects of its first candidates is what it gets."""
    rng = np.random.default_rng(0)
    size = 4000
    workload = Workload.build(
        "calibrated", np.zeros(size), np.full(size, 16), np.full(size, OUTPUT), IidAgreement(alpha=0.6), 1
    )
    config = EngineConfig(
        name="test", latency="vicuna_7b_a100", num_kv_blocks=40_000, max_num_seqs=size, allocation="global"
    )
    simulator = Simulator(config, [workload], ttft_target=1.0, latency=LINEAR)
    simulator.step(0, 0, 16 * size)
    shared = _share(simulator, 2)
    expected = simulator.system.sharing.gains[2 * size - 1] / size - 1.0
    accepted = np.array(shared.accepted)
    error = accepted.std() / np.sqrt(size)
    assert accepted.mean() == pytest.approx(expected, abs=4 * error + 0.02)
    chains = np.minimum(workload.run_length[workload.offset[:-1] + 1], 2)
    resampled = rng.integers(0, size, (200, size))
    assert np.quantile((accepted - chains)[resampled].mean(axis=1), 0.025) > 0.0


def test_cost_awareness_keeps_what_gives_the_most_tokens_a_second() -> None:
    confidence = np.array([[0.9, 0.5, 0.5], [0.3, 0.3, 0.3]], dtype=np.float32)
    token_s, base_s = 4e-3, 0.01
    latency = LatencyModel.linear(base_s, token_s)
    simulator = _decoding(_workload(confidence), latency, allocation="global", cost_aware=True)
    shared = _share(simulator, 2)
    values = sorted([0.9, 0.45, 0.225, 0.1125, 0.3, 0.09], reverse=True)
    rates = [(2 + sum(values[:k])) / (base_s + token_s * (2 + k)) for k in range(5)]
    best = int(np.argmax(rates))
    assert 0 < best < 4
    assert sum(shared.candidates) == best
    # Drafting was over by then: behind the third of the first chain, which would have been kept, a fourth was drafted.
    assert shared.steps == 4
    dear = _decoding(_workload(confidence), LatencyModel.linear(1e-5, 1.0), allocation="global", cost_aware=True)
    assert _share(dear, 2).candidates == [0, 0]


def test_those_behind_their_tpot_target_are_served_first() -> None:
    confidence = np.array([[0.9] * 6, [0.6] * 6], dtype=np.float32)
    workload = _workload(confidence, output=OUTPUT)
    behind = _decoding(workload, allocation="slo", tpot_target=0.05)
    rows = behind.state.requests
    now = float(behind.state.instances["now"][0])
    # One token each so far. The second request's first came long ago: it needs .12 / .05 = 2.4 expected tokens.
    rows["first_token"][:2] = [now, now - 0.12 + float(behind.state.batches["elapsed"][0])]
    shared = _share(behind, 2)
    # 1 + .6 + .36 + .216 + .13 + ... reaches 2.4 never within the draft depth of 4: it gets all four.
    assert shared.candidates == [0, 4]
    rows["first_token"][:2] = now
    on_time = _share(_decoding(workload, allocation="slo", tpot_target=10.0), 2)
    everyone = _share(_decoding(workload, allocation="global"), 2)
    assert on_time == everyone


def test_a_requests_own_acceptance_can_stand_for_confidence() -> None:
    confidence = np.array([[0.1] * 6, [0.9] * 6], dtype=np.float32)
    simulator = _decoding(_workload(confidence), allocation="global", score="acceptance")
    rows = simulator.state.requests
    rows["drafted"][:2], rows["accepted"][:2] = [100, 100], [95, 5]
    assert _share(simulator, 2).candidates == [4, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allocation": "everyone"}, "allocation"),
        ({"branching": 0}, "branching"),
        ({"draft_depth": 0}, "draft_depth"),
        ({"cost_aware": True}, "cost_aware=true needs allocation=global"),
        ({"score": "luck"}, "score"),
        ({"tpot_target": 0.0}, "tpot_target"),
    ],
)
def test_impossible_speculation_is_refused_by_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(name="test", latency="vicuna_7b_a100", **settings)
