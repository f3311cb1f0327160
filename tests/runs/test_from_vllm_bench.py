"""A GPU known only by what `vllm bench serve` reported: its engine is simulated at loads that were not reported."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from bench_files import TOTAL_BUDGET, plain, served, write
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.latency.model import TABLES_FOLDER, LatencyModel
from engine.workload.agreement import IidAgreement
from runs import profile
from runs.evaluation import load_profile
from runs.from_vllm_bench import replay as replaying
from runs.from_vllm_bench.calibration import BenchCalibration, acceptance_of
from runs.from_vllm_bench.factors import Factors, fit_factors, predicted, scaled_document
from runs.from_vllm_bench.replay import Replay, wanted_s
from runs.from_vllm_bench.results import BenchFileError, BenchRun, read_bench_runs

CONF = Path(__file__).resolve().parents[2] / "conf"
THEIRS, BASE = "vicuna_13b_a100", "vicuna_7b_a100"


@functools.cache
def reported(rate: float, candidates: int = 0, table: str = THEIRS) -> dict[str, Any]:
    return served(table, rate, candidates=candidates, requests=100, seed=int(100 * rate) + candidates)


def run_of(document: dict[str, Any], folder: Path, name: str = "run") -> BenchRun:
    (run,) = read_bench_runs([write(folder, name, document)])
    return run


def base_document(name: str = BASE) -> dict[str, Any]:
    document = json.loads((TABLES_FOLDER / f"{name}.json").read_text())
    assert isinstance(document, dict)
    return document


def test_a_file_with_details_holds_every_request_and_one_without_their_means(tmp_path: Path) -> None:
    document = reported(2.0)
    detailed, short = run_of(document, tmp_path), run_of(plain(document), tmp_path, "plain")
    assert detailed.prompt_tokens.tolist() == document["input_lens"]
    assert detailed.sent_s is not None
    assert detailed.sent_s[0] == 0.0
    np.testing.assert_allclose(np.diff(detailed.sent_s), np.diff(document["start_times"]))
    assert short.sent_s is None
    assert set(short.prompt_tokens.tolist()) == {round(document["total_input_tokens"] / 100)}
    assert short.output_tokens.size == 100
    assert short.observed == detailed.observed
    assert detailed.observed["tpot_mean_s"] == pytest.approx(document["mean_tpot_ms"] / 1e3)
    assert (detailed.candidates, detailed.acceptance) == (0, ())


def test_failed_requests_are_left_out_and_appended_runs_are_runs_of_their_own(tmp_path: Path) -> None:
    document = reported(2.0) | {"failed": 1}
    document["output_lens"] = [0, *document["output_lens"][1:]]
    assert run_of(document, tmp_path).prompt_tokens.tolist() == document["input_lens"][1:]
    both = tmp_path / "both.json"
    both.write_text(json.dumps(reported(2.0)) + "\n" + json.dumps(plain(reported(1.0))))
    assert [(run.name, run.rate) for run in read_bench_runs([both])] == [("both:1", 2.0), ("both:2", 1.0)]


def test_draft_length_and_acceptance_are_read_and_explained_by_one_chance(tmp_path: Path) -> None:
    run = run_of(reported(1.0, 3), tmp_path)
    assert run.candidates == len(run.acceptance) == 3
    alpha = acceptance_of(run)
    assert alpha is not None
    assert alpha + alpha**2 + alpha**3 == pytest.approx(sum(run.acceptance))
    # Drawn with 0.7; drafts at the end of an output cannot be accepted whole.
    assert alpha == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean_tpot_ms": None}, "key 'mean_tpot_ms' must be a finite number"),
        ({"mean_ttft_ms": math.inf}, "key 'mean_ttft_ms'"),
        ({"completed": 0}, "key 'completed' must be more than 0"),
        ({"completed": "many"}, "key 'completed'"),
        ({"request_rate": -1.0}, "key 'request_rate'"),
        ({"max_concurrency": 0}, "key 'max_concurrency'"),
        ({"failed": 60}, "key 'failed' is 60 of 160 requests"),
        ({"ramp_up_strategy": "cubic"}, "key 'ramp_up_strategy' must be linear or exponential, got 'cubic'"),
        ({"ramp_up_strategy": "linear", "ramp_up_start_rps": 1}, "key 'ramp_up_end_rps' is missing"),
        (
            {"ramp_up_strategy": "exponential", "ramp_up_start_rps": 0, "ramp_up_end_rps": 9},
            "key 'ramp_up_start_rps' must be more than 0",
        ),
        ({"input_lens": [1, 2]}, "differ in length"),
        ({"output_lens": ["x"]}, "key 'output_lens' must be a list"),
        ({"output_lens": [0] * 100}, "no request that got a token"),
        (
            {"spec_decode_num_drafts": 10, "spec_decode_draft_tokens": 30},
            "key 'spec_decode_per_position_acceptance_rates'",
        ),
        (
            {
                "spec_decode_num_drafts": 10,
                "spec_decode_draft_tokens": 20,
                "spec_decode_per_position_acceptance_rates": [0.5, 0.4, 0.3],
            },
            "2.00 candidates a draft, and 3 positions",
        ),
        (
            {
                "spec_decode_num_drafts": 10,
                "spec_decode_draft_tokens": 20,
                "spec_decode_per_position_acceptance_rates": [0.4, 0.5],
            },
            "shares that do not rise",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_file_is_refused_with_its_name_and_key(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write(tmp_path, "theirs", reported(2.0) | change)
    with pytest.raises(BenchFileError, match=f"theirs.json.*{said}"):
        read_bench_runs([path])


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "not JSON"), ("{", "not JSON"), ("[1]", "must hold a JSON object"), ("{}", "key 'completed' is missing")],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "theirs.json"
    path.write_text(content)
    with pytest.raises(BenchFileError, match=f"theirs.json.*{said}"):
        read_bench_runs([path])
    with pytest.raises(BenchFileError, match=r"elsewhere\.json"):
        read_bench_runs([tmp_path / "elsewhere.json"])


def client(requests: int, rate: float, limit: int | None, prompt: int = 10, output: int = 3) -> BenchRun:
    return BenchRun(
        name="made",
        rate=rate,
        ramp=None,
        burstiness=1.0,
        max_concurrency=limit,
        prompt_tokens=np.full(requests, prompt, dtype=np.int32),
        output_tokens=np.full(requests, output, dtype=np.int32),
        sent_s=None,
        observed={},
        candidates=0,
        acceptance=(),
        model="made",
        digest="",
    )


@pytest.mark.parametrize(
    ("strategy", "rates"), [("linear", [2.0, 4.0, 6.0, 8.0, 10.0]), ("exponential", [2.0, 4.0, 8.0, 16.0, 32.0])]
)
def test_a_ramp_is_the_one_that_the_file_names_where_it_holds_no_send_times(
    tmp_path: Path, strategy: str, rates: list[float]
) -> None:
    """Rates from the first request to the last, as the client's `--ramp-up-strategy`; not all requests at once."""
    document = plain(reported(2.0)) | {
        "request_rate": math.inf,
        "ramp_up_strategy": strategy,
        "ramp_up_start_rps": 2,
        "ramp_up_end_rps": rates[-1],
    }
    (run,) = read_bench_runs([write(tmp_path, "ramp", document)])
    assert run.ramp is not None
    assert run.ramp.rates(5).tolist() == pytest.approx(rates)
    assert run.ramp.rates(1).tolist() == [2.0]
    assert run.load == f"2 to {rates[-1]:g}/s, {strategy}"
    # With all but regular gaps requests are sent as far apart as the rates say.
    wanted = wanted_s(replace(run, burstiness=1e9), seed=0)
    np.testing.assert_allclose(np.diff(wanted), 1.0 / run.ramp.rates(wanted.size)[1:], rtol=1e-3)


def test_send_times_in_the_file_are_used_before_a_ramp(tmp_path: Path) -> None:
    document = reported(2.0) | {"ramp_up_strategy": "linear", "ramp_up_start_rps": 1, "ramp_up_end_rps": 9}
    (run,) = read_bench_runs([write(tmp_path, "ramp", document)])
    assert run.sent_s is not None
    np.testing.assert_array_equal(wanted_s(run, seed=0), run.sent_s)


LINEAR = EngineConfig(name="linear", latency="linear", num_kv_blocks=4096)


def test_one_request_in_flight_is_served_after_the_other_each_as_if_alone() -> None:
    latency = LatencyModel.linear(0.01)
    figures = Replay(client(5, math.inf, 1), LINEAR, IidAgreement(alpha=0.0), 0).serve(latency, 64)
    assert figures["ttft_mean_s"] == pytest.approx(0.01)
    assert figures["ttft_p99_s"] == pytest.approx(0.01)
    assert figures["tpot_mean_s"] == pytest.approx(0.01)


def test_without_a_limit_all_wait_for_the_prompts_before_them() -> None:
    # 64 tokens an iteration hold six prompts of 10 and four tokens of a seventh; 10 ms each.
    latency = LatencyModel.linear(0.01)
    figures = Replay(client(8, math.inf, None), LINEAR, IidAgreement(alpha=0.0), 0).serve(latency, 64)
    assert figures["ttft_mean_s"] == pytest.approx((6 * 0.01 + 2 * 0.02) / 8)
    assert Replay(client(8, math.inf, 6), LINEAR, IidAgreement(alpha=0.0), 0).serve(latency, 64)[
        "ttft_mean_s"
    ] == pytest.approx(0.01)


@settings(max_examples=20)
@given(st.integers(1, 12), st.floats(1.0, 500.0), st.integers(2, 30), st.integers(0, 5))
def test_there_are_never_more_requests_in_flight_than_the_limit(
    limit: int, rate: float, requests: int, seed: int
) -> None:
    seen: list[dict[str, Any]] = []
    table = replaying.request_table
    replaying.request_table = lambda state: seen.append(table(state)) or seen[-1]  # type: ignore[assignment,func-returns-value]
    try:
        Replay(client(requests, rate, limit), LINEAR, IidAgreement(alpha=0.0), seed).serve(
            LatencyModel.linear(0.01), 64
        )
    finally:
        replaying.request_table = table
    sent, finished = seen[0]["arrival_s"], seen[0]["finish_s"]
    assert np.isfinite(finished).all()
    assert (np.diff(sent) >= 0.0).all()
    for moment in sent:
        assert ((sent <= moment) & (finished > moment)).sum() <= limit


def test_without_a_limit_the_replay_is_the_simulator_itself(tmp_path: Path) -> None:
    document = reported(2.0)
    run = run_of(document, tmp_path)
    config = EngineConfig(name="theirs", latency=THEIRS)
    quiet = dict.fromkeys(("idle_drafter_s", "idle_drafter_request_s", "draft_prefill_s", "draft_prefill_token_s"), 0.0)
    figures = Replay(run, config, IidAgreement(alpha=0.0), 0).serve(LatencyModel.load(THEIRS, **quiet), TOTAL_BUDGET)
    for key, value in run.observed.items():
        assert figures[key] == pytest.approx(value, rel=1e-9), key


LONE_DECODE = {"num_decodes": 1}
LONG_BATCH = {"num_decodes": 64, "decode_kv_tokens": 64 * 2000}
PROMPT = {"prefills": [(2048, 0)], "prompts_completed": 1}
DRAFTS = {"num_decodes": 1, "candidates": 4}


@pytest.mark.parametrize(
    ("name", "most_of", "none_of"),
    [
        ("weights", LONE_DECODE, None),
        ("attention", LONG_BATCH, PROMPT),
        ("compute", PROMPT, LONE_DECODE),
        ("drafter", DRAFTS, LONG_BATCH),
    ],
)
def test_a_factor_multiplies_what_it_names(name: str, most_of: dict[str, Any], none_of: dict[str, Any] | None) -> None:
    base = LatencyModel.from_document(base_document(), "base")
    slower = LatencyModel.from_document(scaled_document(base_document(), Factors(**{name: 2.0})), name)
    assert 1.3 * base.time(**most_of) < slower.time(**most_of) < 2.0 * base.time(**most_of)
    if none_of is not None:
        assert slower.time(**none_of) == pytest.approx(base.time(**none_of), rel=0.05)


def test_all_factors_together_multiply_an_iteration() -> None:
    base = LatencyModel.from_document(base_document(), "base")
    twice = LatencyModel.from_document(scaled_document(base_document(), Factors(2.0, 2.0, 2.0, 2.0, 2.0)), "twice")
    iteration: dict[str, Any] = {
        "num_decodes": 32,
        "candidates": 3,
        "decode_kv_tokens": 32 * 700,
        "prefills": [(512, 100)],
    }
    assert twice.time(**iteration) == pytest.approx(2.0 * base.time(**iteration), rel=1e-4)


def test_known_factors_are_found(tmp_path: Path) -> None:
    truth = Factors(weights=1.4, compute=0.7, attention=1.3, drafter=1.5)
    base = base_document()
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(scaled_document(base, truth)))
    runs = [
        run_of(served(str(path), rate, candidates=c, requests=80, seed=i), tmp_path, f"run{i}")
        for i, (rate, c) in enumerate([(0.5, 0), (3.0, 0), (7.0, 0), (1.0, 3), (4.0, 3)])
    ]
    config = EngineConfig(name="theirs", latency=BASE)
    replays = [Replay(run, config, IidAgreement(alpha=acceptance_of(run) or 0.0), 0) for run in runs]
    found = fit_factors(base, replays, TOTAL_BUDGET)
    # Fixed overhead and reading the weights are both once an iteration: their sum is what can be known.
    assert found.weights == pytest.approx(truth.weights, rel=0.05)
    assert found.compute == pytest.approx(truth.compute, rel=0.10)
    assert found.drafter == pytest.approx(truth.drafter, rel=0.25)
    assert found.client_s < 0.005
    for figures, run in zip(predicted(base, found, replays, TOTAL_BUDGET), runs, strict=True):
        assert figures["tpot_mean_s"] == pytest.approx(run.observed["tpot_mean_s"], rel=0.03)
        assert figures["ttft_mean_s"] == pytest.approx(run.observed["ttft_mean_s"], rel=0.05)


@pytest.fixture
def run(call_app: Callable[..., int]) -> Callable[..., int]:
    """Calls the app as the command line would; returns its exit status."""
    return functools.partial(call_app, profile.main, "profile")


def test_another_model_is_predicted_at_loads_that_were_not_fitted(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loads = [(0.5, 0), (2.0, 0), (4.0, 0), (1.0, 3), (3.0, 3)]
    files = [write(tmp_path, f"r{rate}c{c}", reported(rate, c)) for rate, c in loads]
    out = tmp_path / "theirs"
    assert run("--from-vllm-bench", *map(str, files), f"base={BASE}", f"hydra.run.dir={out}", "name=theirs") == 0
    assert "fitted without it" in capsys.readouterr().out
    card = json.loads((out / "card.json").read_text())
    for row in card["runs"]:
        assert abs(row["error_of_base"]["tpot_mean_s"]) > 0.3
        assert abs(row["error_left_out"]["tpot_mean_s"]) < 0.06
    config = load_profile(out / "engine.yaml")
    assert config.limits(LatencyModel.load(config.latency)).total_blocks > 1000
    alpha = yaml.safe_load((out / "agreement.yaml").read_text())["alpha"]
    # Between and beyond the loads of the files, by the simulator as every app has it.
    for rate, candidates in ((1.2, 0), (5.0, 0), (2.0, 3), (4.5, 3)):
        unseen = run_of(reported(rate, candidates), tmp_path, "unseen")
        overrides = {} if candidates else {"idle_drafter_s": 0.0, "draft_prefill_s": 0.0, "draft_prefill_token_s": 0.0}
        latency = LatencyModel.load(config.latency, **overrides)
        figures = Replay(unseen, config, IidAgreement(alpha=alpha), 0).serve(latency, TOTAL_BUDGET)
        assert figures["tpot_mean_s"] == pytest.approx(unseen.observed["tpot_mean_s"], rel=0.06), (rate, candidates)
        assert figures["ttft_mean_s"] == pytest.approx(unseen.observed["ttft_mean_s"], rel=0.10), (rate, candidates)


def test_both_spellings_are_one_command_and_its_engine_serves_in_every_app(run: Any, tmp_path: Path) -> None:
    files = [write(tmp_path, f"at {rate}", plain(reported(rate))) for rate in (1.0, 3.0)]
    quoted = ",".join(f"'{file}'" for file in files)
    assert run(f"base={BASE}", "--from-vllm-bench", *map(str, files), f"hydra.run.dir={tmp_path / 'one'}") == 0
    assert run(f"from_vllm_bench=[{quoted}]", f"base={BASE}", f"hydra.run.dir={tmp_path / 'other'}") == 0
    assert (tmp_path / "one" / "table.json").read_bytes() == (tmp_path / "other" / "table.json").read_bytes()
    assert not (tmp_path / "one" / "agreement.yaml").exists()
    card = json.loads((tmp_path / "one" / "card.json").read_text())
    assert card["factors"]["drafter"] == 1.0
    assert card["not_fitted"] == ["drafter: no run speculated"]
    with initialize_config_dir(str(CONF), version_base=None):
        given = [f"engine={tmp_path / 'one' / 'engine.yaml'}", "controller=fixed", "logger=none"]
        config = compose("evaluate", [*given, "workload=poisson_lmsys", "workload.num_requests=5"])
        evaluation = instantiate(config, _convert_="all")
    assert evaluation.run().summary["requests_finished"] == 5


def test_a_setting_that_ends_as_a_result_does_is_no_result() -> None:
    words = ["--from-vllm-bench", "a.json", "b.json", "base=measured/table.json", "name=mine"]
    assert profile.bench_arguments(words) == ["files=['a.json','b.json']", "base=measured/table.json", "name=mine"]


def test_positions_that_a_server_could_have_drafted_and_did_not_are_left_out(tmp_path: Path) -> None:
    drafts = {"spec_decode_num_drafts": 304, "spec_decode_draft_tokens": 608}
    rates = {"spec_decode_per_position_acceptance_rates": [0.55, 0.33, 0.0, 0.0]}
    run = read_bench_runs([write(tmp_path, "governed", reported(2.0) | drafts | rates)])[0]
    assert (run.candidates, run.acceptance) == (2, (0.55, 0.33))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base=vicuna_7b_a100"], "files"),
        (["{file}"], "base must be given"),
        (["{file}", "base=vicuna_7b"], "no latency table 'vicuna_7b'"),
        (["{missing}", "base=vicuna_7b_a100"], "missing.json"),
        (["{file}", "base=vicuna_7b_a100", "max_num_seq=3"], "max_num_seq"),
        (["{file}", "base=vicuna_7b_a100", "max_model_len=64"], "64 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_ends_the_command_with_its_name(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    names = {"file": write(tmp_path, "theirs", reported(2.0)), "missing": tmp_path / "missing.json"}
    out = tmp_path / "out"
    given = [word.format(**names) for word in words]
    assert run("--from-vllm-bench", *given, f"hydra.run.dir={out}") != 0
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert not (out / "engine.yaml").exists()


def test_the_configuration_lists_every_setting_with_its_default() -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        made = instantiate(compose("from_vllm_bench", ["files=[a.json]", f"base={BASE}"]), _convert_="all")
    assert made == BenchCalibration(files=(Path("a.json"),), base=BASE)
