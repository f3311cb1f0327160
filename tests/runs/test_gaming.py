"""Controllers that game the objective rather than serve score below doing nothing, on scenarios of the suite."""

from collections.abc import Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from numpy.typing import NDArray
from pydantic import Field

from controllers.controller import Controller, configured
from controllers.fixed import Fixed
from engine.core.telemetry import NUM_DECODES, NUM_WAITING
from engine.plant import Plant
from runs.evaluation import Evaluation
from runs.reporting.scores import ZERO, score
from runs.reporting.statistics import PairedDifference, paired_difference

CONF = Path(__file__).resolve().parents[2] / "conf"
SEEDS = range(5)
SCENARIOS = {
    "7b/near-saturation": 120,
    "7b/bursts": 124,
    "33b/near-saturation": 120,
    "33b/long-prompts": 60,
}
"""Scenarios of the suite, and how many of their requests are served here."""
SOUND = ("thrashing", "33b/long-prompts")
"""No game: prompts that may wait for 4 s lose nothing by a pause, and gain by the long chunks after it."""

Observation = Mapping[str, NDArray[np.float32]]


@configured
class Delaying(Controller):
    """Prefills next to nothing until a prompt's deadline is upon it: meanwhile decodes have short iterations."""

    def choose(self, observation: Observation) -> tuple[int, int]:
        queue = observation["queue"]
        waiting = queue[:, 0] > 0
        slack_s = float(queue[waiting, 1].min()) if waiting.any() else 1.0
        return 0, 4096 if slack_s <= 0.0 else 1


@configured
class Starving(Controller):
    """Prefills nothing for a prompt that waits alone while others decode: only one request suffers."""

    def choose(self, observation: Observation) -> tuple[int, int]:
        load = observation["load"]
        return 0, 0 if load[NUM_DECODES] > 0 and load[NUM_WAITING] == 1 else 512


@configured
class Thrashing(Controller):
    """Changes between two pairs every `period` iterations.

    Args:
        pairs: (c, n) of either.
        period: iterations.
    """

    pairs: tuple[tuple[int, int], tuple[int, int]] = ((0, 1), (0, 1023))
    period: Annotated[int, Field(ge=1)] = 64

    def reset(self, plant: Plant) -> None:
        super().reset(plant)
        self._iteration = 0

    def choose(self, observation: Observation) -> tuple[int, int]:
        self._iteration += 1
        return self.pairs[self._iteration // self.period % 2]


PROBES: dict[str, Controller] = {
    "delaying": Delaying(),
    "starving": Starving(),
    # On average doing nothing's own budget.
    "thrashing": Thrashing(),
}
EXTREMES: dict[str, Controller] = {
    "extremes in step": Thrashing(pairs=((8, 4096), (0, 32)), period=1),
    "extremes in turn": Thrashing(pairs=((8, 32), (0, 4096)), period=1),
}
STEADY: dict[str, Controller] = {
    f"fixed c={c} n={n}": Fixed(candidates=c, token_budget=n) for c, n in ((0, 512), (2, 1024), (3, 2048))
}


@cache
def served(scenario: str) -> pd.DataFrame:
    """Scored runs of every probe and steady pair on the same requests."""
    with initialize_config_dir(str(CONF), version_base=None):
        entries = compose("evaluate", ["experiment=bench"], return_hydra_config=True).hydra.sweeper.alternatives.load
        (entry,) = (entry for entry in entries if entry.scenario == scenario)
        given = [f"{key}={value}" for key, value in entry.items()]
        given += ["controller=fixed", "logger=none", f"workload.num_requests={SCENARIOS[scenario]}"]
        base = instantiate(compose("evaluate", given), _convert_="all")
    assert isinstance(base, Evaluation)
    rows = []
    for label, controller in {**STEADY, **PROBES, **EXTREMES}.items():
        for seed in SEEDS:
            summary = base.model_copy(update={"controller": controller, "seed": seed}).run().summary
            run = {**summary["run"], "label": label, "role": "static", "folder": f"{label}-{seed}"}
            assert summary["requests_finished"] == SCENARIOS[scenario]
            rows.append(run | {name: summary[name] for name in ("objective", "ttft_attainment", "tpot_mean_s")})
    scored = score(pd.DataFrame(rows))
    assert scored is not None
    assert not scored.notes
    return scored.frame


def _against(scenario: str, probe: str, label: str) -> PairedDifference:
    runs = served(scenario)
    paired = paired_difference(*(runs[runs["label"] == name] for name in (probe, label)), "objective")
    assert paired is not None
    assert len(paired.seeds) == len(SEEDS)
    return paired


@pytest.mark.parametrize(("probe", "scenario"), [case for case in product(PROBES, SCENARIOS) if case != SOUND])
def test_gaming_scores_below_doing_nothing(probe: str, scenario: str) -> None:
    # Worse with the whole interval over seeds, not on average only.
    assert _against(scenario, probe, ZERO).low > 0.0
    runs = served(scenario)
    assert runs.loc[runs["label"] == probe, "score"].max() < 0.0


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("probe", EXTREMES)
def test_changing_both_between_extremes_is_beaten_by_a_steady_pair(probe: str, scenario: str) -> None:
    """It may beat doing nothing, which never speculates; a steady pair that does all the time beats it."""
    runs = served(scenario)
    best = runs[runs["label"].isin(STEADY)].groupby("label")["objective"].mean().idxmin()
    assert _against(scenario, probe, str(best)).low > 0.0
    scores = runs.groupby("label")["score"].mean()
    assert scores[probe] < scores[best]
