"""Claims about `engine.latency.ship`: a profile becomes an engine like the shipped ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from engine.backends.torch.config import TorchEngineConfig
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.latency import ship
from engine.latency.measured import MeasuredIterations
from engine.latency.model import LatencyModel
from engine.latency.predictors import ALL_FEATURES, Forest
from runs.profiling import Profile, SpeculationPrompts
from tests.runs.test_profile import unseen

ENGINE = TorchEngineConfig(name="small", max_num_seqs=4, max_model_len=128, num_kv_blocks=40, watermark=0.05)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    Profile(
        engine=ENGINE,
        actions=ActionGrid(candidate_choices=(0, 2), budget_choices=(16, 64)),
        minutes=1e-6,
        points=50,
        predictor=Forest(trees=5, features=ALL_FEATURES, guess="curves"),
        speculation=SpeculationPrompts(prompts=3, prompt_tokens=24, max_tokens=12),
    ).run(folder, unseen)
    return folder


def shipped(profile: Path, out: Path, *more: str) -> tuple[Path, Path]:
    tables, engines = out / "tables", out / "engines"
    arguments = [str(profile), "--name", "small_cpu", "--tables", str(tables), "--engines", str(engines), *more]
    ship.main(arguments)
    return tables, engines


def test_a_shipped_profile_is_an_engine_with_the_measured_limits_and_times(profile: Path, tmp_path: Path) -> None:
    tables, engines = shipped(profile, tmp_path)
    settings = yaml.safe_load((engines / "small_cpu.yaml").read_text())
    # What shipped engines interpolate is resolved where they are composed.
    settings["tpot_target"] = 0.05
    assert settings.pop("_target_") == "engine.config.EngineConfig"
    config = EngineConfig.model_validate(settings)
    assert (config.name, config.latency) == ("small_cpu", "small_cpu")
    latency = LatencyModel.load(tables / "small_cpu.json")
    assert config.limits(latency) == ENGINE.limits
    before = LatencyModel.load(profile / "table.json")
    for now, then in zip(latency.tables, before.tables, strict=True):
        np.testing.assert_array_equal(now, then)


def test_every_setting_of_the_other_shipped_engines_stands_in_its_file_with_its_comment(
    profile: Path, tmp_path: Path
) -> None:
    _, engines = shipped(profile, tmp_path)
    pattern = (ship.ENGINES_FOLDER / ship.PATTERN).read_text().splitlines()[1:]
    made = (engines / "small_cpu.yaml").read_text().splitlines()[1:]
    assert [line.partition(":")[0] for line in made] == [line.partition(":")[0] for line in pattern]
    assert [line.partition("#")[2] for line in made] == [line.partition("#")[2] for line in pattern]


def test_a_shipped_table_says_what_was_measured_and_how_far_off_it_is(profile: Path, tmp_path: Path) -> None:
    tables, _ = shipped(profile, tmp_path)
    document = json.loads((tables / "small_cpu.json").read_text())
    assert (document["name"], document["model"], document["gpu"]) == ("small_cpu", "embedded", "cpu")
    errors = json.loads((profile / "card.json").read_text())["latency table"]
    assert document["provenance"]["held_out_error"]["overall"] == pytest.approx(errors["overall"], abs=1e-5)
    assert document["provenance"]["points"] == 50
    rows = MeasuredIterations.read(tables / "small_cpu.parquet")
    np.testing.assert_array_equal(rows.seconds, MeasuredIterations.read(profile / "iterations.parquet").seconds)


def test_a_shape_is_named_by_its_name_and_a_path_by_its_end() -> None:
    assert ship._model("shape:vicuna_7b") == "vicuna_7b"
    assert ship._model("models/vicuna-7b/") == "vicuna-7b"


def test_an_engine_that_is_there_is_replaced_only_when_asked_for(profile: Path, tmp_path: Path) -> None:
    tables, _ = shipped(profile, tmp_path)
    (tables / "small_cpu.json").write_text("another")
    with pytest.raises(ship.ShipError, match="--replace"):
        shipped(profile, tmp_path)
    assert (tables / "small_cpu.json").read_text() == "another"
    shipped(profile, tmp_path, "--replace")
    assert json.loads((tables / "small_cpu.json").read_text())["name"] == "small_cpu"


@pytest.mark.parametrize("missing", ["table.json", "card.json", "engine.yaml", "iterations.parquet"])
def test_an_unfinished_profile_is_refused_and_nothing_is_written(profile: Path, tmp_path: Path, missing: str) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for name in {"table.json", "card.json", "engine.yaml", "iterations.parquet"} - {missing}:
        (half / name).write_bytes((profile / name).read_bytes())
    with pytest.raises(ship.ShipError, match=missing):
        ship.ship(half, "small_cpu", tmp_path / "tables", tmp_path / "engines")
    assert not (tmp_path / "tables").exists()
    assert not (tmp_path / "engines").exists()


def test_a_name_that_no_file_should_have_is_refused(profile: Path, tmp_path: Path) -> None:
    with pytest.raises(ship.ShipError, match="vicuna_7b_h200"):
        ship.ship(profile, "../other", tmp_path, tmp_path)
