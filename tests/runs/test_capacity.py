"""Capacity search: against queues whose capacity is computed apart, and what it says when there is nothing to find."""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from numpy.typing import NDArray
from pydantic import ValidationError

from controllers.fixed import Fixed
from engine.config import EngineConfig
from engine.workload.agreement import IidAgreement
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import FixedLengths
from engine.workload.source import SyntheticSource
from runs import capacity, capacity_search
from runs.capacity_search import CAPACITY, PROBES, Capacity, CapacityError, Probe
from runs.evaluation import Evaluation, Targets
from runs.reporting.statistics import mean_interval

CONF = Path(__file__).resolve().parents[2] / "conf"
TTFT_TARGET_S = 0.2
PROMPT_TOKENS = 256


@contextmanager
def unseen(_what: str) -> Iterator[None]:
    yield None


def queue(num_requests: int = 400, **settings: Any) -> Capacity:
    """One token of output and one whole prompt an iteration: requests are served one by one, each in the same time."""
    workload = SyntheticSource(
        name="queue",
        arrivals=PoissonArrivals(rate=1.0),
        lengths=FixedLengths(prompt_tokens=PROMPT_TOKENS, output_tokens=1),
        agreement=IidAgreement(alpha=0.5),
        num_requests=num_requests,
    )
    given: dict[str, Any] = {"seeds": (0, 1, 2), "slo": Targets(ttft_target=TTFT_TARGET_S)}
    return Capacity(
        engine=EngineConfig(name="queue", latency="vicuna_7b_a100"),
        workload=workload,
        controller=Fixed(candidates=0, token_budget=PROMPT_TOKENS),
        **(given | settings),
    )


def service_s() -> float:
    """What the engine takes for one prompt that waits for nothing."""
    search = queue()
    source = search.workload.model_copy(update={"num_requests": 1})
    alone = Evaluation(engine=search.engine, workload=source, controller=search.controller, slo=search.slo)
    return float(alone.run().summary["ttft_mean_s"])


def attained(arrival_s: NDArray[np.float64], service: float) -> float:
    """Share of requests of a single-server queue with constant service whose wait and service are within the target."""
    wait, late = 0.0, 0
    for gap in np.diff(arrival_s, prepend=arrival_s[0]):
        wait = max(0.0, wait - gap)
        late += wait + service > TTFT_TARGET_S
        wait += service
    return 1.0 - late / arrival_s.size


def test_the_capacity_of_a_single_server_queue_is_found(tmp_path: Path) -> None:
    search = queue(tolerance=0.005)
    service = service_s()
    found = search.run(tmp_path, unseen)
    for bracket in found.brackets:
        arrival = search.workload.draw(bracket.passes.seed).arrival
        # The rates at which Lindley's recursion on the same arrivals says 90 % are close, and on the right sides.
        assert attained(arrival / bracket.passes.rate_scale, service) >= 0.9 - 1 / arrival.size
        assert attained(arrival / bracket.fails.rate_scale, service) < 0.9 + 1 / arrival.size
        assert 1.0 < bracket.fails.rate_scale / bracket.passes.rate_scale <= 1.005
    mean, low, high = found.rps
    rates = [bracket.passes.request_rate_rps for bracket in found.brackets]
    assert mean == pytest.approx(np.mean(rates))
    assert (low, high) == pytest.approx(mean_interval(rates))


def test_many_requests_come_to_the_load_that_queueing_theory_gives(tmp_path: Path) -> None:
    """M/D/1: the share that waits at most x is Erlang's series; 90 % wait within the slack at the load found."""
    service = service_s()
    found = queue(num_requests=20_000, seeds=(0, 1, 2, 3), tolerance=0.005).run(tmp_path, unseen)
    slack = TTFT_TARGET_S - service
    rates = np.linspace(0.1, 0.999, 900) / service
    share = np.array([_waits_at_most(slack, rate, service) for rate in rates])
    expected = rates[np.flatnonzero(share >= 0.9)[-1]]
    assert found.rps[0] == pytest.approx(expected, rel=0.02)


def _waits_at_most(x: float, rate: float, service: float) -> float:
    """P(W <= x) of an M/D/1 queue (Erlang 1909): (1 - rho) sum_k (rate (k D - x))^k / k! e^(rate (x - k D))."""
    terms = 0.0
    factorial = 1.0
    for k in range(int(x / service) + 1):
        factorial *= max(k, 1)
        behind = rate * (k * service - x)
        terms += behind**k / factorial * np.exp(-behind)
    return float((1.0 - rate * service) * terms)


def _stepped(threshold: float, asked: list[float]) -> Any:
    """A search whose requests all meet the targets up to a rate, and none above."""

    def probe(self: Capacity, seed: int, scale: float) -> Probe:
        asked.append(scale)
        share = 1.0 if scale <= threshold * (1 + seed / 10) else 0.0
        return Probe(seed, scale, 2.0 * scale, share, share, share)

    return probe


@pytest.mark.parametrize("threshold", [0.021, 0.5, 1.0, 3.7, 40.0])
@pytest.mark.parametrize("tolerance", [0.3, 0.01])
def test_the_bracket_closes_on_the_threshold_within_the_probes_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float, tolerance: float
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(Capacity, "_probe", _stepped(threshold, asked))
    search = queue(seeds=(0,), tolerance=tolerance)
    (bracket,) = search.run(tmp_path, unseen).brackets
    assert bracket.passes.rate_scale <= threshold < bracket.fails.rate_scale
    assert bracket.fails.rate_scale <= bracket.passes.rate_scale * (1 + tolerance)
    assert len(asked) == len(set(asked)) == search.most_probes


def test_the_interval_is_students_t_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Capacity, "_probe", _stepped(1.0, []))
    found = queue(seeds=(0, 5), tolerance=0.001).run(tmp_path / "two", unseen)
    # Two seeds half a unit apart, and t at 97.5 % with one degree of freedom is 12.706: 1.25 +- 12.706 / 4.
    assert found.rate_scale == pytest.approx((1.25, 1.25 - 12.706 / 4, 1.25 + 12.706 / 4), rel=5e-3)
    assert found.rps == pytest.approx((2.5, 2.5 - 12.706 / 2, 2.5 + 12.706 / 2), rel=5e-3)
    alone = queue(seeds=(0,)).run(tmp_path / "one", unseen)
    assert np.isnan(alone.rps[1:]).all()
    assert json.loads((tmp_path / "one" / CAPACITY).read_text())["capacity_rps_low"] is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slo": Targets(ttft_target=1e-4)}, ["lowest=0.02", "0.0 % of requests meet both", "slo.ttft_target"]),
        ({"highest": 0.05}, ["highest=0.05", "100.0 % of requests meet both", "set a higher one"]),
    ],
    ids=["the lowest fails", "the highest passes"],
)
def test_a_capacity_outside_the_bounds_is_refused_with_the_bound(
    tmp_path: Path, settings: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(CapacityError) as error:
        queue(num_requests=20, **settings).run(tmp_path, unseen)
    for part in said:
        assert part in str(error.value)
    assert not (tmp_path / CAPACITY).exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lowest": 2.0, "highest": 1.0}, "lowest=2 must be below highest=1"),
        ({"seeds": (0, 0)}, "names a seed twice"),
        ({"seeds": ()}, "seeds"),
        ({"share": 1.5}, "share"),
        ({"tolerence": 0.1}, "tolerence"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        queue(**settings)


def test_a_killed_search_goes_on_without_a_finished_probe_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    probe = _stepped(1.0, asked)

    def killed(self: Capacity, seed: int, scale: float) -> Probe:
        if len(asked) == 15:
            raise KeyboardInterrupt
        return probe(self, seed, scale)

    monkeypatch.setattr(Capacity, "_probe", killed)
    search = queue(seeds=(0, 1))
    with pytest.raises(KeyboardInterrupt):
        search.run(tmp_path, unseen)
    # The kill came while a line was written.
    with (tmp_path / PROBES).open("a") as file:
        file.write('{"seed": 1, "rate_sc')
    monkeypatch.setattr(Capacity, "_probe", probe)
    found = search.run(tmp_path, unseen)
    whole: list[float] = []
    monkeypatch.setattr(Capacity, "_probe", _stepped(1.0, whole))
    assert queue(seeds=(0, 1)).run(tmp_path / "other", unseen) == found
    assert sorted(asked) == sorted(whole)
    # A closer look or a further seed uses what is there.
    search.model_copy(update={"seeds": (0,)}).run(tmp_path, unseen)
    assert sorted(asked) == sorted(whole)


def test_probes_of_other_settings_files_or_code_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(Capacity, "_probe", _stepped(1.0, asked))
    queue(seeds=(0,)).run(tmp_path, unseen)
    first = len(asked)
    queue(seeds=(0,), slo=Targets(ttft_target=0.3)).run(tmp_path, unseen)
    assert len(asked) == 2 * first
    monkeypatch.setattr(capacity_search, "code_digest", lambda: "another")
    queue(seeds=(0,), slo=Targets(ttft_target=0.3)).run(tmp_path, unseen)
    assert len(asked) == 3 * first
    monkeypatch.setattr(capacity_search, "file_digests", lambda _: {"trace.csv": "edited"})
    queue(seeds=(0,), slo=Targets(ttft_target=0.3)).run(tmp_path, unseen)
    assert len(asked) == 4 * first


@pytest.fixture
def run(call_app: Callable[..., int]) -> Callable[..., int]:
    """Calls the app as the command line would; returns its exit status."""
    return functools.partial(call_app, capacity.main, "capacity")


TINY = ("workload.num_requests=30", "controller=fixed", "seeds=[0,1]", "tolerance=0.1")


def test_the_command_writes_its_figures_and_says_them(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*TINY, "slo.tpot_target=0.011", f"hydra.run.dir={tmp_path}") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [CAPACITY, "capacity.log", PROBES]
    written = json.loads((tmp_path / CAPACITY).read_text())
    assert written["controller"] == "fixed c=3 n=512"
    assert written["capacity_rps_low"] <= written["capacity_rps"] <= written["capacity_rps_high"]
    assert [bracket["passes"]["seed"] for bracket in written["seeds"]] == [0, 1]
    assert all(bracket["passes"]["slo_attainment"] >= 0.9 for bracket in written["seeds"])
    assert all(bracket["fails"]["slo_attainment"] < 0.9 for bracket in written["seeds"])
    captured = capsys.readouterr()
    assert "90 % of requests meet TTFT 1 s, TPOT 11 ms" in " ".join(captured.out.split())
    assert f"capacity {written['capacity_rps']:.3f}" in captured.err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["slo.ttft_target=0.0001"], "lowest=0.02"),
        (["highest=0.03"], "highest=0.03"),
        (["workload.rate_scale=2"], "workload.rate_scale=2"),
        (["seeds=[]"], "seeds"),
        (["+tolerence=1"], "did you mean tolerance?"),
    ],
)
def test_a_mistake_ends_the_command_with_its_name(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert run(*TINY, *overrides, f"hydra.run.dir={tmp_path}") == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert not (tmp_path / CAPACITY).exists()


def test_the_configuration_lists_every_setting_with_its_default() -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        made = instantiate(compose("capacity", ["controller=fixed"]), _convert_="all")
    assert isinstance(made, Capacity)
    assert made == Capacity(engine=made.engine, workload=made.workload, controller=made.controller)
