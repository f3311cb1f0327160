"""Claims about `runs.profile`: a small engine measured end to end, and what is made of it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from controllers.analytic import Analytic
from engine.backends.torch.config import TorchEngineConfig
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.latency.lookup import LookupTable
from engine.latency.measured import MeasuredIterations
from engine.latency.measured_card import table_times
from engine.latency.model import LatencyModel
from engine.latency.predictors import ALL_FEATURES, Forest
from engine.workload.acceptance_log import read_acceptance_log
from engine.workload.source import SyntheticSource
from runs.evaluation import Evaluation, load_profile
from runs.measured_folder import Result
from runs.profiling import Profile, SpeculationPrompts

CONF = Path(__file__).resolve().parents[2] / "conf"
CHOICES = ActionGrid(candidate_choices=(0, 2), budget_choices=(16, 64))
SMALL = TorchEngineConfig(name="small", max_num_seqs=4, max_model_len=128, num_kv_blocks=40)


@contextmanager
def unseen(_what: str):
    yield None


def profile(out: Path) -> Result:
    return Profile(
        engine=SMALL,
        actions=CHOICES,
        minutes=1e-6,
        points=50,
        predictor=Forest(trees=5, features=ALL_FEATURES, guess="curves"),
        speculation=SpeculationPrompts(prompts=3, prompt_tokens=24, max_tokens=12),
    ).run(out, unseen)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    profile(folder)
    return folder


def test_the_engine_that_a_profile_leaves_is_the_real_one_simulated(out: Path) -> None:
    config = load_profile(out / "engine.yaml")
    latency = LatencyModel.load(config.latency)
    assert config.name == "small_measured"
    assert config.limits(latency) == SMALL.limits
    measured = MeasuredIterations.read(out / "iterations.parquet")
    assert len(measured) == 50
    simulated = table_times(json.loads(Path(config.latency).read_text()), measured)
    # Few points on a machine that other tests keep busy: the right size, not the right figure.
    assert np.median(np.abs(simulated / measured.seconds - 1.0)) < 0.5


def test_an_evaluation_of_the_measured_engine_predicts_from_what_was_measured(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LookupTable, "load_or_fit", lambda *_, **__: pytest.fail("sampled, not measured"))
    with initialize_config_dir(str(CONF), version_base=None):
        given = ["workload=synthetic", "workload/lengths=fixed", "workload.num_requests=20"]
        given += ["workload.lengths.prompt_tokens=40", "workload.lengths.output_tokens=20"]
        config = compose("evaluate", [f"engine={out / 'engine.yaml'}", *given, "logger=none"])
        evaluation = instantiate(config, _convert_="all")
    assert isinstance(evaluation, Evaluation)
    assert isinstance(evaluation.engine, EngineConfig)
    assert isinstance(evaluation.controller, Analytic)
    assert isinstance(evaluation.workload, SyntheticSource)
    summary = evaluation.run().summary
    assert summary["requests_finished"] == 20
    assert summary["run"]["engine"] == "small_measured"


def test_everything_that_a_profile_promises_is_there(out: Path) -> None:
    card = json.loads((out / "card.json").read_text())
    assert {"linear", "random forest", "extra trees", "latency table"} <= card.keys()
    assert all(error > 0 for error in card["extra trees"].values())
    gains = json.loads((out / "tokens_per_iteration.json").read_text())["tokens_per_iteration"]
    assert gains["0"] == 1.0
    assert 1.0 <= gains["2"] <= 3.0
    turns = read_acceptance_log(out / "acceptance.jsonl").turns
    assert [turn.new_tokens for turn in turns] == [12] * 3
    with np.load(out / "agreement.npz") as agreement:
        assert agreement["rank"].dtype == np.uint8
        assert agreement["rank"].shape == agreement["confidence"].shape == (36,)
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["torch_threads"] == 1
    assert provenance["points"] == 50
    assert not list(out.glob(".*partial*"))


def test_the_same_command_again_measures_nothing_anew(out: Path) -> None:
    before = {name: (out / name).read_bytes() for name in ("visits.jsonl", "iterations.parquet")}
    profile(out)
    assert before == {name: (out / name).read_bytes() for name in before}


def test_the_configuration_lists_every_setting_with_its_default() -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        made = instantiate(compose("profile"), _convert_="all")
        raw = yaml.safe_load((CONF / "profile.yaml").read_text())
    assert isinstance(made, Profile)
    assert made == Profile(engine=made.engine)
    assert set(Profile.model_fields) - {"engine", "actions"} <= raw.keys()


@pytest.mark.parametrize("prefill", ["whole", "first", "turns"])
def test_an_engine_that_mixes_prompts_and_decodes_otherwise_is_not_profiled(prefill: str) -> None:
    with pytest.raises(ValueError, match=f"engine.prefill={prefill}.*profile with engine.prefill=chunked"):
        Profile(engine=SMALL.model_copy(update={"prefill": prefill}))
