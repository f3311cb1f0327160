"""A mapping that the command line gives whole is the setting; Hydra alone would merge it into what was there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from controllers.sglang_adaptive import SglangAdaptive
from controllers.trtllm_schedule import TrtllmSchedule
from runs import whole

CONF = Path(__file__).resolve().parents[2] / "conf"
OWN = "defaults: [trtllm_schedule, _self_]\ndraft_len_schedule: {2: 5, 32: 1}\n"


def made(*overrides: str, app: str = "evaluate") -> Any:
    """What an app makes of these words."""
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(app, list(overrides))
    whole.replace(config, overrides)
    return config


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_schedule_replaces_the_default_one(sign: str) -> None:
    config = made("controller=trtllm_schedule", sign + "controller.draft_len_schedule={1:3,8:2}")
    assert instantiate(config.controller, _convert_="all") == TrtllmSchedule(draft_len_schedule={1: 3, 8: 2})
    config = made("controller=sglang_adaptive", sign + "controller.slots={1:{candidate_steps:[2]}}")
    slots = instantiate(config.controller, _convert_="all").slots
    assert slots == SglangAdaptive(slots={1: {"candidate_steps": [2]}}).slots  # type: ignore[dict-item]


@pytest.mark.parametrize("sign", ["+", "++"])
def test_a_schedule_replaces_that_of_a_file_of_ones_own(tmp_path: Path, sign: str) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    own = f"controller={tmp_path / 'own.yaml'}"
    assert made(own).controller.draft_len_schedule == {2: 5, 32: 1}
    assert made(own, sign + "controller.draft_len_schedule={1:3,8:2}").controller.draft_len_schedule == {1: 3, 8: 2}


def test_every_setting_of_type_dict_is_replaced_and_sections_are_merged() -> None:
    kinds = made("workload=randomized", "workload.kinds={poisson:1}", "workload.load={low:0.2}").workload
    assert kinds.kinds == {"poisson": 1}
    assert kinds.load == {"low": 0.2, "high": 1.2}
    assert made("+levels={low:0.2}", app="calibrate").levels == {"low": 0.2}


def test_single_entries_behind_a_mapping_still_change_it() -> None:
    config = made("workload=randomized", "workload.kinds={poisson:1,gamma:1}", "workload.kinds.gamma=3")
    assert config.workload.kinds == {"poisson": 1, "gamma": 3}
