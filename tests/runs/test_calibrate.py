"""A calibration end to end with the model that ships: served, recorded, replayed, predicted, resumed."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from controllers.fixed import Fixed
from engine.backends.torch.config import TorchEngineConfig
from engine.core.action import ActionGrid
from engine.latency.model import LatencyModel
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import FixedLengths
from engine.workload.prompts import PromptSource
from engine.workload.workload import offsets
from runs import calibration_cells as cells
from runs.calibration import Calibration, CalibrationError, agreement_model, as_log
from runs.reporting import calibration_page
from runs.reporting.calibration import OWN_AGREEMENTS, PREDICTED
from runs.reporting.calibration_page import Card

CONF = Path(__file__).resolve().parents[2] / "conf"
ENGINE = {"name": "torch_tiny", "max_num_seqs": 8, "max_model_len": 256}


def write_profile(folder: Path) -> Path:
    """A profile in the form that `runs.profile` leaves, of another engine: its times are wrong here, and may be."""
    folder.mkdir(parents=True)
    engine = folder / "engine.yaml"
    limits = {"max_num_seqs": 8, "max_model_len": 256, "num_kv_blocks": 128}
    settings = {"name": "stand_in", "latency": "vicuna_7b_a100", **limits}
    engine.write_text("\n".join(f"{key}: {value}" for key, value in settings.items()))
    rng = np.random.default_rng(5)
    rank = (rng.random(20 * 25) > 0.6).astype(np.uint8)
    np.savez(folder / "agreement.npz", rank=rank, confidence=np.full(500, 0.5), offset=25 * np.arange(21))
    (folder / "card.json").write_text(json.dumps({"latency table": {"overall": 0.05}}))
    return engine


def calibration(profile: Path, **changes: object) -> Calibration:
    settings: dict[str, object] = {
        "engine": TorchEngineConfig(**ENGINE, profile=profile),  # type: ignore[arg-type]
        "workload": PromptSource(
            arrivals=PoissonArrivals(rate=4.0), lengths=FixedLengths(prompt_tokens=24, output_tokens=12)
        ),
        "controllers": {
            "c0": Fixed(candidates=0, token_budget=64),
            "c3": Fixed(candidates=3, token_budget=64),
        },
        "levels": {"idle": 0.5, "queueing": 3.0},
        "actions": ActionGrid(candidate_choices=(0, 3), budget_choices=(64,)),
        "run_s": 0.2,
        "fewest_requests": 6,
        "most_requests": 12,
        "repeats": 1,
    }
    return Calibration(**(settings | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Card]:
    root = tmp_path_factory.mktemp("calibration")
    profile = write_profile(root / "profile")
    card = calibration(profile).run(root / "out")
    calibration_page.write(card, root / "out")
    return profile, root / "out", card


def test_every_real_run_is_compared_in_both_ways_and_replays_to_the_bit(served: tuple[Path, Path, Card]) -> None:
    _, out, card = served
    assert card.parity == {"runs": 4, "identical": 4}
    assert len(card.cells) == 4
    assert card.pairs.groupby(["level", "label", "way"]).ngroups == 2 * 2 * 2
    assert set(card.pairs["way"]) == {PREDICTED, OWN_AGREEMENTS}
    assert np.isfinite(card.pairs["real"]).all()
    assert (card.iterations[["measured_s", "predicted_s"]] > 0).all().all()
    assert card.levels.set_index("level")["request_rate_rps"]["queueing"] == pytest.approx(
        6 * card.levels.set_index("level")["request_rate_rps"]["idle"]
    )
    written = json.loads((out / "calibration.json").read_text())
    assert written["held_out_mape"] == {"latency table": {"overall": 0.05}}
    assert (out / "calibration.html").is_file()


def test_with_the_runs_own_agreements_the_simulator_accepts_what_the_engine_accepted(
    served: tuple[Path, Path, Card],
) -> None:
    """A greedy chain at fixed c verifies the same candidates whatever the timing."""
    card = served[2]
    own = card.pairs[(card.pairs["way"] == OWN_AGREEMENTS) & (card.pairs["metric"] == "tokens_per_iteration")]
    np.testing.assert_allclose(own["real"], own["simulated"], rtol=1e-12)
    assert (own.loc[own["label"].str.contains("c=3"), "real"] > 1.0).all()


def test_the_predicted_acceptance_is_the_profiles_and_not_the_runs(served: tuple[Path, Path, Card]) -> None:
    card = served[2]
    predicted = card.pairs[(card.pairs["way"] == PREDICTED) & (card.pairs["metric"] == "tokens_per_iteration")]
    speculating = predicted[predicted["label"].str.contains("c=3")]
    # Independent agreement of .6: 1 + .6 + .36 + .216 tokens, a little less at the ends of outputs.
    assert speculating["simulated"].to_numpy() == pytest.approx(2.1, abs=0.35)


def test_a_finished_calibration_serves_nothing_again_and_a_lost_run_alone_is_served(
    served: tuple[Path, Path, Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, out, card = served
    whole = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("summary.json")}
    lost = next(iter(whole))
    lost.unlink()
    again = calibration(profile).run(out)
    for path, written in whole.items():
        assert (path.stat().st_mtime_ns == written) == (path != lost)
    kept = again.pairs["level"] + again.pairs["label"] != _place_of(lost)
    pd.testing.assert_frame_equal(again.pairs[kept], card.pairs[kept])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to serve")

    monkeypatch.setattr(TorchEngineConfig, "build", refuse)
    pd.testing.assert_frame_equal(calibration(profile).run(out).pairs, again.pairs)


def _place_of(summary: Path) -> str:
    run = json.loads(summary.read_text())["run"]
    return str(run["level"] + run["label"])


def test_a_folder_of_another_calibration_is_refused(served: tuple[Path, Path, Card]) -> None:
    profile, out, _ = served
    with pytest.raises(CalibrationError, match=r"another profile; choose another folder with hydra\.run\.dir"):
        calibration(profile, run_s=0.3).run(out)


def test_the_order_of_runs_is_random_and_the_same_for_a_seed(tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "profile")
    one, other = calibration(profile, repeats=4), calibration(profile, repeats=4, seed=1)
    assert one._order() == one._order() != other._order()
    assert sorted(map(str, one._order())) == sorted(map(str, other._order()))
    assert [cell.level for cell in one._order()] != sorted(cell.level for cell in one._order())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": TorchEngineConfig(**ENGINE)}, "engine.profile must be given"),  # type: ignore[arg-type]
        ({"controllers": {}}, "controllers and levels must each name at least one"),
        ({"levels": {"idle": 0.0}}, "greater than 0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_with_its_key(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        calibration(write_profile(tmp_path / "profile"), **changes)


def test_the_shipped_configuration_is_a_calibration(tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "profile")
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("calibrate", [f"engine.profile={profile}"])
    OmegaConf.set_struct(config, False)
    assert config.pop("vllm") is None
    made = instantiate(config, _convert_="all")
    assert isinstance(made, Calibration)
    assert {name: one.label() for name, one in made.controllers.items()} == {
        "c0": "fixed c=0 n=512", "c4": "fixed c=4 n=512", "analytic": "analytic",
    }  # fmt: skip


def test_agreement_becomes_a_log_in_which_every_drafted_position_is_seen() -> None:
    rank = np.array([0, 0, 1, 0, 0, 255, 0, 3, 0], dtype=np.uint8)
    log = as_log(Path("agreement.npz"), rank, np.array([0, 6, 8, 9]))
    assert [turn.observed().tolist() for turn in log.turns] == [[-1, 1, 0, 1, 1, 0], [-1, 0]]
    assert [turn.accepted.tolist() for turn in log.turns] == [[1, 2, 0], [0, 0]]


def test_a_profile_without_agreement_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"agreement\.npz: no such file; python -m runs\.profile writes it"):
        agreement_model(tmp_path / "agreement.npz")


def test_replay_asks_the_tables_about_the_batches_that_ran(served: tuple[Path, Path, Card]) -> None:
    profile, out, _ = served
    config = calibration(profile)
    run = cells.read(out / "runs" / "idle-c3-0")
    tables = LatencyModel.linear(base_s=2.0, per_token_s=1e-3).tables
    again = cells.replayed(run, config.engine.limits, config.slo.ttft_target, tables)
    assert again.identical
    assert len(again.iterations) == run.summary["iterations"]
    prefill = run.requests["prompt_tokens"].sum()
    decoded = again.iterations["predicted_s"].sum() - 2.0 * len(again.iterations) - 1e-3 * prefill
    # Every decode is planned with its 1 + c tokens, cut at the output's end, whatever the drafter then proposed.
    assert (
        1e-3 * (run.requests["output_tokens"] - 1).sum()
        <= decoded
        <= 1e-3 * 4 * sum(row[4] for row in run.recording.iterations)
    )
    np.testing.assert_allclose(again.iterations["measured_s"], [row[1] for row in run.recording.iterations])
    assert 0.0 <= again.between_share < 1.0


def test_a_tampered_recording_is_not_called_identical(served: tuple[Path, Path, Card]) -> None:
    profile, out, _ = served
    config = calibration(profile)
    run = cells.read(out / "runs" / "idle-c0-0")
    start, elapsed, *rest = run.recording.iterations[-1]
    run.recording.iterations[-1] = (start, elapsed + 1e-9, *rest)  # type: ignore[assignment]
    tables = LatencyModel.linear(base_s=1.0).tables
    assert not cells.replayed(run, config.engine.limits, config.slo.ttft_target, tables).identical
    assert offsets(run.requests["output_tokens"])[-1] == len(run.agreement.rank)
