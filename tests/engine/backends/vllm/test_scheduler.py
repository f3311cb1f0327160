"""vLLM's own schedulers under a controller: what it says is done, within vLLM's limits, and its faults do no harm."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs this in an environment of its own")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from engine.backends.vllm import GovernedAsyncScheduler, GovernedScheduler
from engine.backends.vllm.config import GovernorConfig, GovernorError
from engine.core.state import MAX_CANDIDATES
from engine.core.telemetry import LOAD_FIELDS
from engine.latency.model import LatencyModel
from engine.workload.agreement import DrafterAgreement
from engine.workload.workload import Workload
from tests.engine.backends.vllm import made_controllers
from tests.engine.backends.vllm.fake_engine import FakeEngine, Setup, controller_file, scheduler

LATENCY = LatencyModel.linear(0.01, 1e-4, per_draft_step_s=1e-3)
CONF = Path(__file__).resolve().parents[4] / "conf"
MADE = made_controllers.__name__
BOTH = pytest.mark.parametrize("cls", [GovernedScheduler, GovernedAsyncScheduler])


def _workload(seed: int = 0, requests: int = 20, span_s: float = 1.0, longest: int = 300) -> Workload:
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.uniform(0.0, span_s, requests))
    prompt, output = rng.integers(1, longest, requests), rng.integers(1, 40, requests)
    return Workload.build("made", arrival, prompt, output, DrafterAgreement(), seed)


def _governed(tmp_path: Path, cls: Any, actions: list[Any], **setup: Any) -> Any:
    """A governed scheduler that plays these actions and waits for none of its decisions in vain."""
    controller = str(controller_file(tmp_path, f"{MADE}.Scripted", actions=actions))
    return scheduler(cls, Setup(governor={"controller": controller, "time_limit_s": 60.0}, **setup))


def _served(scheduler: Any, workload: Workload) -> FakeEngine:
    """A fake engine after its last request, each answered once and in full, and all memory given back."""
    engine = FakeEngine(scheduler, workload, LATENCY)
    engine.run()
    _assert_each_answered_once(engine)
    return engine


def _assert_each_answered_once(engine: FakeEngine, but: set[str] = frozenset()) -> None:
    workload = engine.workload
    answered = {str(number) for number in range(workload.num_requests)} - but
    assert {request: count for request, count in engine.finished.items() if request not in but} == dict.fromkeys(
        answered, 1
    )
    tokens = {request: sum(count for _, count in emitted) for request, emitted in engine.emitted.items()}
    for request in answered:
        assert tokens[request] == workload.output_tokens[int(request)]
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not engine.scheduler.requests


def test_c_and_n_are_what_the_controller_says(tmp_path: Path) -> None:
    actions = [(0, 32), (4, 128), (1, 64), (3, 300), (2, 32)]
    governed = _governed(tmp_path, GovernedScheduler, actions)
    engine = _served(governed, _workload())
    for i, step in enumerate(engine.steps):
        assert step.prefill_tokens <= actions[i % 5][1]
        assert step.scheduled_tokens == step.decode_tokens + step.prefill_tokens
        # Drafted at the end of the step before: the c of a decision is verified one step later.
        assert step.drafted == (actions[(i - 1) % 5][0] if i else 0)
        if step.num_decodes:
            assert step.candidates == step.drafted
            assert step.decode_tokens == step.num_decodes * (1 + step.drafted)
    assert {step.candidates for step in engine.steps} == {0, 1, 2, 3, 4}
    assert {step.prefill_tokens for step in engine.steps} >= {32, 64, 128, 300}


def test_vllms_own_statistics_report_the_candidates_that_were_chosen(tmp_path: Path) -> None:
    engine = _served(_governed(tmp_path, GovernedScheduler, [(0, 64), (3, 64), (1, 64), (4, 64)]), _workload())
    reported = [
        stats.spec_decoding_stats.num_draft_tokens / stats.spec_decoding_stats.num_drafts
        for stats in engine.stats
        if stats.spec_decoding_stats is not None
    ]
    assert reported == [step.candidates for step in engine.steps if step.candidates]
    assert set(reported) == {1, 3, 4}


@BOTH
def test_nothing_goes_above_vllms_maxima(tmp_path: Path, cls: Any) -> None:
    engine = _served(
        _governed(tmp_path, cls, [(MAX_CANDIDATES, 65536)], most_candidates=2, most_tokens=96), _workload()
    )
    assert max(step.candidates for step in engine.steps) == 2
    assert max(step.scheduled_tokens for step in engine.steps) <= 96
    assert engine.scheduler.max_num_scheduled_tokens == engine.scheduler.scheduler_config.max_num_scheduled_tokens


def test_without_a_drafter_only_n_is_steered(tmp_path: Path) -> None:
    engine = _served(_governed(tmp_path, GovernedScheduler, [(3, 40)], most_candidates=0), _workload())
    assert {step.candidates for step in engine.steps} == {0}
    assert max(step.prefill_tokens for step in engine.steps) == 40


def test_the_controller_may_choose_within_vllms_maxima_only(tmp_path: Path) -> None:
    controller = str(controller_file(tmp_path, f"{MADE}.Scripted", actions=[[0, 64]]))
    plant = GovernorConfig(controller=Path(controller)).plant(3, 300, 8, 1000)
    assert plant.grid.candidate_choices == (0, 1, 2, 3)
    assert plant.grid.budget_choices == (32, 64, 96, 128, 192, 256)


@pytest.fixture
def _freed() -> Iterator[None]:
    made_controllers.FREE.clear()
    yield
    made_controllers.FREE.set()


@BOTH
@pytest.mark.usefixtures("_freed")
@pytest.mark.parametrize(
    ("fault", "nonsense"),
    [
        ("raises", None),
        ("hangs", None),
        *[("answers", nonsense) for nonsense in (None, "no", [1.5, 64], [-1, 64], [2, -5], [999, 64], [1])],
    ],
)
def test_a_faulty_controller_costs_no_request(tmp_path: Path, cls: Any, fault: str, nonsense: Any) -> None:
    controller = controller_file(tmp_path, f"{MADE}.Faulty", fault=fault, good_every=5, nonsense=nonsense)
    limit = 1e-3 if fault == "hangs" else 60.0
    governor = {"controller": str(controller), "time_limit_s": limit, "most_failures": 10**9}
    governed = scheduler(cls, Setup(governor=governor))
    engine = _served(governed, _workload())
    tally = governed.governor.guard.tally
    kind = {"raises": tally.raised, "hangs": tally.overran, "answers": tally.nonsense}[fault]
    assert kind == tally.failed > 0
    if fault == "hangs":
        # It never comes back from its first fault.
        assert tally.asked == tally.failed
    else:
        assert {step.drafted for step in engine.steps[1:]} == {1, 4}


@pytest.mark.usefixtures("_freed")
@pytest.mark.parametrize("fault", ["raises", "hangs", "answers"])
def test_after_repeated_failures_vllm_runs_as_if_there_were_no_governor(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    controller = controller_file(tmp_path, f"{MADE}.Faulty", fault=fault, good_every=10**9)
    governor = {"controller": str(controller), "time_limit_s": 60.0 if fault != "hangs" else 1e-3, "most_failures": 3}
    governed = scheduler(GovernedScheduler, Setup(governor=governor))
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    engine = _served(governed, _workload())
    logger.removeHandler(caplog.handler)
    own = _served(scheduler(Scheduler, Setup()), _workload())
    guard = governed.governor.guard
    assert engine.steps == own.steps
    lines = [record for record in caplog.records if "switched off" in record.getMessage()]
    if fault == "hangs":
        # It is asked once, and from then on still busy.
        assert guard.tally.overran == guard.tally.asked == guard.tally.failed > 3
        assert not lines
    else:
        assert guard.tally.asked == guard.tally.failed == 3
        assert len(lines) == 1


def test_a_controller_that_is_off_leaves_vllms_own_schedule_of_candidates(tmp_path: Path) -> None:
    governed = _governed(tmp_path, GovernedScheduler, [None])
    governed.dynamic_sd_lookup = [3] * (governed.max_num_running_reqs + 1)
    engine = _served(governed, _workload())
    assert {step.candidates for step in engine.steps} == {0, 3}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    asynchronous=st.booleans(),
    span_s=st.sampled_from([0.0, 0.5, 20.0]),
    num_blocks=st.sampled_from([24, 40, 4096]),
    actions=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 600)) | st.sampled_from([None, (1,), ("a", 3), (1, -1)]),
        min_size=1,
        max_size=12,
    ),
)
def test_no_request_is_lost_and_none_answered_twice(
    tmp_path: Path, seed: int, asynchronous: bool, span_s: float, num_blocks: int, actions: list[Any]
) -> None:
    cls = GovernedAsyncScheduler if asynchronous else GovernedScheduler
    listed = [list(action) if isinstance(action, tuple) else action for action in actions]
    path = controller_file(tmp_path, f"{MADE}.Scripted", actions=listed)
    governed = scheduler(
        cls,
        Setup(
            governor={"controller": str(path), "time_limit_s": 60.0, "most_failures": 50},
            num_blocks=num_blocks,
        ),
    )
    _served(governed, _workload(seed, requests=12, span_s=span_s))
    observer = governed.governor.observer
    assert not observer._seen
    assert not observer._preempted
    assert not observer._steps
    assert observer._unstarted_tokens == observer._overdue == 0


@BOTH
def test_requests_whose_clients_leave_are_forgotten(tmp_path: Path, cls: Any) -> None:
    governed = _governed(tmp_path, cls, [(2, 48)])
    engine = FakeEngine(governed, _workload(span_s=0.0), LATENCY)
    left = {"0", "3", "19"}
    schedule = governed.schedule
    calls = []

    def schedule_after_leaving() -> Any:
        calls.append(1)
        if len(calls) == 4:
            governed.finish_requests(left, RequestStatus.FINISHED_ABORTED)
        return schedule()

    governed.schedule = schedule_after_leaving
    engine.run()
    _assert_each_answered_once(engine, but=left)
    assert not governed.governor.observer._seen
    last = governed.governor.observer.observe(0)
    assert last.load[0, LOAD_FIELDS.index("num_waiting")] == last.load[0, LOAD_FIELDS.index("waiting_tokens")] == 0


def test_a_learned_times_controller_runs_on_an_engines_yaml(tmp_path: Path) -> None:
    governor = {
        "controller": str(CONF / "controller" / "analytic.yaml"),
        "engine": str(CONF / "engine" / "vicuna_7b_a100.yaml"),
        "time_limit_s": 60.0,
    }
    governed = scheduler(GovernedScheduler, Setup(governor=governor))
    _served(governed, _workload())
    assert governed.governor.guard.tally.failed == 0
    assert governed.governor.guard.tally.asked > 0


@pytest.mark.parametrize("name", ["oracle", "oracle_grid"])
def test_a_bound_that_peeks_is_refused(name: str) -> None:
    with pytest.raises(GovernorError, match="can see"):
        scheduler(GovernedScheduler, Setup(governor={"controller": str(CONF / "controller" / f"{name}.yaml")}))


def test_a_controller_that_predicts_needs_an_engine() -> None:
    with pytest.raises(GovernorError, match=r"governor\.engine"):
        scheduler(GovernedScheduler, Setup(governor={"controller": str(CONF / "controller" / "analytic.yaml")}))


def test_a_scheduler_that_does_not_go_with_vllms_loop_is_refused(tmp_path: Path) -> None:
    governed = _governed(tmp_path, GovernedScheduler, [[1, 64]])
    config = governed.vllm_config
    config.scheduler_config.async_scheduling = True
    with pytest.raises(GovernorError, match=r"async_scheduling=True: give .*GovernedAsyncScheduler"):
        GovernedScheduler(
            config, governed.kv_cache_config, governed.structured_output_manager, block_size=governed.block_size
        )


def test_both_are_vllms_own_schedulers() -> None:
    assert issubclass(GovernedScheduler, Scheduler)
    assert not issubclass(GovernedScheduler, AsyncScheduler)
    assert issubclass(GovernedAsyncScheduler, AsyncScheduler)
