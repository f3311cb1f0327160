"""Learned policies: what they are shown, what files are refused, and that they run as they were trained."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from controllers.analytic import Analytic
from controllers.controller import batched
from controllers.features import FARTHEST, LOAD, Layout, View, new_feature_memory, remember, show, unpredicted
from controllers.learned import Learned, distinct_choices
from controllers.network import ACTIVATIONS, Network
from controllers.policy import HEADS, Head, Header, Policy, PolicyError, Residual, input_names, spread
from engine.core.action import ActionGrid
from engine.core.metrics import request_table
from engine.core.telemetry import NO_DEADLINE_S
from engine.plant import Plant
from engine.simulator.simulator import Simulator
from runs.simulated import serve
from tests.controllers.observed import linear_plant, observation, verified
from tests.envs.traffic import conversations, tiny_engine

ENGINE = tiny_engine(4000)
GRID = ActionGrid(candidate_choices=(0, 1, 2, 4), budget_choices=(64, 256, 1024))


def policy(
    seed: int = 0,
    head: Head = "pair",
    residual: Residual | None = None,
    hidden: int = 0,
    masked: bool = False,
    layout: Layout | None = None,
    decide_every: int = 1,
    scale: float = 1.0,
    grid: ActionGrid = GRID,
) -> Policy:
    """A policy with random weights."""
    layout = layout or Layout(queue_rows=2)
    names = input_names(layout, grid, residual)
    header = Header(
        name="made",
        features=names,
        layout=layout,
        actions=grid,
        decide_every=decide_every,
        residual=residual,
        head=head,
        masked=masked,
        ttft_target=1.0,
        tpot_target=0.05,
        hidden=hidden,
    )
    rng = np.random.default_rng(seed)
    sizes = [hidden or len(names), 8, header.outputs]
    count = sum((ins + 1) * outs for ins, outs in itertools.pairwise(sizes))
    network = Network(
        mean=np.zeros(len(names), dtype=np.float32),
        scale=np.ones(len(names), dtype=np.float32),
        lstm=rng.normal(size=(len(names) + hidden + 1) * 4 * hidden).astype(np.float32),
        hidden=hidden,
        sizes=np.array(sizes, dtype=np.int64),
        weights=(scale * rng.normal(size=count)).astype(np.float32),
        activation=ACTIVATIONS.index("tanh"),
    )
    return Policy(header, network)


def unshifted(residual: Residual, decide_every: int = 1) -> Policy:
    """A residual policy that always leaves the base's choice alone."""
    made = policy(residual=residual, scale=0.0, decide_every=decide_every)
    many_c, many_n = spread(GRID, residual)
    bias = made.network.weights[-(many_c + many_n) :]
    bias[residual.candidates] = 1.0
    bias[many_c + residual.budgets] = 1.0
    return made


def simulated(controller: Any, compiled: bool = True) -> tuple[Any, Any]:
    workload = conversations(3.0, 60).draw(3)
    simulator = Simulator(ENGINE, [workload], ttft_target=1.0)
    plant = linear_plant(0.012, 2e-5, 1e-8, 1e-3, GRID)
    served = serve(simulator, workload, controller, plant, "constant" if compiled else "measured", recording=True)
    return request_table(served.requests), served.iterations


@given(
    load=st.fixed_dictionaries(
        {
            name: st.floats(0.0, 1e6)
            for name in (
                "num_decodes",
                "decode_kv_tokens",
                "waiting_tokens",
                "interval_s",
                "arrivals",
                "finished",
                "overdue",
            )
        }
    ),
    queue=st.lists(
        st.tuples(st.floats(0.0, 1e5), st.sampled_from([-1e6, -2.0, 0.0, 0.4, 3.0, NO_DEADLINE_S])), max_size=5
    ),
    predictions=st.booleans(),
    rows=st.integers(0, 8),
)
@settings(max_examples=60)
def test_features_are_finite_and_bounded_and_as_many_as_named(
    load: dict[str, float], queue: list[tuple[float, float]], predictions: bool, rows: int
) -> None:
    layout = Layout(queue_rows=rows, predictions=predictions)
    plant = linear_plant(0.01, 1e-5, 1e-8, 1e-3, GRID)
    table = plant.lookup.grid if predictions else unpredicted(GRID)
    view = View(table, 1.0, 0.05, rows, predictions)
    memory = new_feature_memory(1, GRID)
    out = np.full(200, np.nan, dtype=np.float32)
    seen = batched(observation(queue=tuple(queue), **load))
    for _ in range(2):
        remember(seen, 0, view, memory, 0)
        count = show(seen, 0, view, memory, 0, out)
    assert count == len(layout.names(GRID))
    assert np.isfinite(out[:count]).all()
    assert (np.abs(out[:count]) <= FARTHEST).all()
    assert np.isnan(out[count:]).all()


def test_features_by_hand() -> None:
    plant = linear_plant(0.01, 0.0, 0.0, 0.0, GRID)
    view = View(plant.lookup.grid, 2.0, 0.05, 2, True)
    memory = new_feature_memory(1, GRID)
    seen = batched(
        observation(
            queue=((500.0, 1.0), (300.0, -2.0)),
            num_decodes=3.0,
            interval_s=2.0,
            arrivals=4.0,
            waiting_tokens=800.0,
            last_iteration_s=0.02,
            last_num_decodes=3.0,
            rates=(0.0, 3.0),
            ttft_target_s=2.0,
        )
    )
    out = np.zeros(200, dtype=np.float32)
    remember(seen, 0, view, memory, 0)
    count = show(seen, 0, view, memory, 0, out)
    value = dict(zip(Layout(queue_rows=2).names(GRID), out[:count].tolist(), strict=True))
    assert value["decodes"] == pytest.approx(np.log(4.0))
    # 2 requests/s, of which a moving average over 2 s has seen 1 - 1/e after 2 s.
    assert value["requests_fast"] == pytest.approx(np.log1p(2.0 * (1 - np.exp(-1.0)) * 2.0))
    assert value["queue_tokens_0"] == pytest.approx(np.log1p(1.0))
    assert value["queue_slack_1"] == pytest.approx(np.tanh(-1.0))
    assert value["least_slack"] == pytest.approx(np.tanh(-1.0))
    assert value["queue_tokens_rest"] == 0.0
    assert value["queue_slack_rest"] == 1.0
    assert value["rate_1"] == 1.0
    # Every iteration takes 10 ms: the last one took twice that, one in twenty counts, times four.
    assert value["timing_error"] == pytest.approx(4 * 0.05 * np.log(2.0), rel=1e-5)
    assert value["excess_c_4"] == pytest.approx(0.0, abs=1e-6)
    assert value["excess_c_0"] > 0.5
    assert value["slower_n_1024"] == pytest.approx(0.0, abs=1e-6)
    # 500 tokens within 1 s at 10 ms per 1024 tokens.
    assert value["required_rate"] == pytest.approx(np.log1p(500 * 0.01 / 1024 / 1.0 / 0.25), rel=1e-5)


def test_a_layout_without_queue_and_predictions_names_neither() -> None:
    names = Layout(queue_rows=0, predictions=False).names(GRID)
    assert names[: len(LOAD)] == LOAD
    assert not [name for name in names if name.startswith(("queue", "excess", "slower", "token_time"))]
    assert set(names) < set(Layout().names(GRID))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("hidden", [0, 4])
def test_a_policy_decides_the_same_compiled_and_from_python(head: Head, hidden: int) -> None:
    made = policy(seed=5, head=head, hidden=hidden, decide_every=3, scale=4.0)
    _, compiled = simulated(Learned.of(made))
    controller = Learned.of(made)
    plant = linear_plant(0.012, 2e-5, 1e-8, 1e-3, GRID)
    workload = conversations(3.0, 60).draw(3)
    simulator = Simulator(ENGINE, [workload], ttft_target=1.0)
    controller.reset(plant)
    seen = simulator.new_observation()
    view = {name: array[0] for name, array in seen._asdict().items()}
    chosen = []
    more = True
    while more:
        simulator.observe(0, seen)
        chosen.append(controller.choose(view))
        more = simulator.step(0, *chosen[-1], controller.decision_s)
    assert chosen == list(zip(compiled["candidates"].tolist(), compiled["token_budget"].tolist(), strict=True))
    assert hidden or len(set(chosen)) > 1


@pytest.mark.parametrize("base", [{}, {"guard": 0.5, "prefill_price": 0.3}])
def test_a_residual_policy_that_shifts_nothing_is_its_base(base: dict[str, float]) -> None:
    ours, _ = simulated(Learned.of(unshifted(Residual(base=base))))
    analytic = Analytic(ttft_target=1.0, **base)  # type: ignore[arg-type]
    type(analytic).decision_s, kept = Learned.decision_s, Analytic.decision_s
    try:
        theirs, _ = simulated(analytic)
    finally:
        type(analytic).decision_s = kept
    for name, column in theirs.items():
        np.testing.assert_array_equal(ours[name], column, err_msg=name)


def test_a_choice_holds_for_as_many_iterations_as_trained() -> None:
    _, iterations = simulated(Learned.of(policy(seed=8, decide_every=4)))
    whole = len(iterations) // 4 * 4
    groups = iterations["token_budget"][:whole].reshape(-1, 4)
    assert (groups == groups[:, :1]).all()


@given(work=st.floats(0.0, 3000.0), decodes=st.sampled_from([0.0, 5.0]))
def test_a_masked_choice_differs_in_effect_from_every_smaller_one(work: float, decodes: float) -> None:
    queue = ((round(work), 1.0),) if round(work) > 0 else ()
    seen = batched(observation(queue=queue, num_decodes=decodes, free_kv_tokens=1e6, free_seqs=9.0))
    c, n = distinct_choices(seen, 0, GRID.candidates, GRID.budgets)
    assert c == (1 if decodes == 0.0 else len(GRID.candidate_choices))
    effects = [min(budget, round(work)) for budget in GRID.budget_choices]
    assert n == max(1, len(set(effects)) if effects[0] else 1)


def test_a_file_holds_the_policy_and_the_same_policy_gives_the_same_bytes(tmp_path: Path) -> None:
    made = policy(residual=Residual(), hidden=3)
    made.save(tmp_path / "a.npz")
    made.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = Policy.load(tmp_path / "a.npz")
    assert loaded.header == made.header
    for name, array in made.network._asdict().items():
        np.testing.assert_array_equal(getattr(loaded.network, name), array)
    assert not list(tmp_path.glob("*.partial"))


def _rewritten(path: Path, **changes: Any) -> Path:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    header = json.loads(str(arrays["header"])) | changes
    arrays["header"] = np.array(json.dumps(header))
    np.savez(path, **arrays)
    return path


def test_a_policy_is_refused_for_other_choices_naming_the_key() -> None:
    controller = Learned.of(policy())
    with pytest.raises(PolicyError, match=re.escape("actions.budget_choices=[64, 256, 1024], not [64, 512]")):
        controller.reset(
            linear_plant(0.01, 0, 0, 0, ActionGrid(candidate_choices=(0, 1, 2, 4), budget_choices=(64, 512)))
        )


def test_files_that_cannot_be_used_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "policy.npz"
    with pytest.raises(PolicyError, match="no policy 'nowhere'"):
        Policy.load("nowhere")
    policy().save(path)
    old = [*Policy.load(path).header.features[:-1], "forgotten"]
    with pytest.raises(PolicyError, match=r"no longer observed: forgotten; observed now: slower_n_1024"):
        Policy.load(_rewritten(path, features=old))
    with pytest.raises(PolicyError, match="has schema 0, this version reads 1: make it anew"):
        Policy.load(_rewritten(path, schema_version=0))
    policy().save(path)
    with pytest.raises(PolicyError, match="do not fit"):
        Policy.load(_rewritten(path, head="joint"))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(PolicyError, match="is no policy that"):
        Policy.load(path)


def test_predictions_need_an_engine_whose_times_are_known_and_other_layouts_do_not() -> None:
    def unknown() -> Any:
        raise ValueError("nobody has measured this engine")

    plant = Plant(GRID, unknown)
    with pytest.raises(ValueError, match="nobody has measured"):
        Learned.of(policy()).reset(plant)
    blind = Learned.of(policy(layout=Layout(predictions=False)))
    blind.reset(plant)
    assert blind.choose(verified(3, 1, 2))[0] in GRID.candidate_choices


def test_a_residual_base_is_checked_when_it_is_configured() -> None:
    with pytest.raises(ValidationError, match="guard"):
        Residual(base={"guard": 3.0})
    with pytest.raises(ValidationError, match="ttft_target"):
        Residual(base={"ttft_target": 1.0})
