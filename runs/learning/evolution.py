"""The cross-entropy method on the analytic controller's own few parameters: the cheap rival of a network."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from controllers.analytic import Analytic
from controllers.features import Layout
from controllers.policy import Policy, Residual
from engine.files import write_whole
from runs.learning.checkpoint import load_checkpoint, save_checkpoint
from runs.learning.record import STEP, Metrics
from runs.learning.training import POLICY, Learner, Training
from runs.learning.validation import MakeController, Validation, reference
from runs.serving import Progress

log = logging.getLogger(__name__)

CONTROLLER = "controller.yaml"
BLIND = Layout(queue_rows=0, predictions=False)
TRAINING_SEED = 2_000_000
"""First seed of the workloads that candidates are tried on; those of validation are others."""


class Span(BaseModel):
    """Where a parameter is looked for: from `low` to `high`, in its logarithm where `log`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0.0):
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}, and above 0 with log=true")
        return self

    def value(self, place: float) -> float:
        """The parameter at a place in [0, 1]."""
        if self.log:
            return float(self.low * (self.high / self.low) ** place)
        return float(self.low + place * (self.high - self.low))

    def place(self, value: float) -> float:
        """The place of a value in [0, 1]."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


class CEM(Learner):
    """Cross-entropy method (Rubinstein, 1999; Szita and Lőrincz, Neural Computation 2006) on `analytic`'s parameters.

    Every generation draws parameters from a normal distribution (in the spans' coordinates, clipped), serves a fresh
    set of workloads with each, all the same, and moves the distribution to the best `elite` of them. What is kept is
    the mean of the distribution that is best in validation.

    A candidate's score is its mean objective relative to plain `analytic` on the same requests. With
    `env.reward.constraint=lagrangian` it is its mean TPOT relative to `analytic`'s plus a learnt price on missing more
    deadlines than `analytic` and `env.reward.slack` in any scenario; what is kept then is the lowest TPOT that does
    not.

    Args:
        generations, population, elite: the latter two in candidates.
        workloads: per scenario and generation.
        spans: the parameters that are searched.
        spread: standard deviation to begin with, as a share of the spans.
        least_spread: added to the standard deviation, shrinking to 0 over the generations.
    """

    generations: Annotated[int, Field(ge=1)] = 30
    population: Annotated[int, Field(ge=4)] = 24
    elite: Annotated[int, Field(ge=2)] = 6
    workloads: Annotated[int, Field(ge=1)] = 2
    spans: Annotated[dict[str, Span], Field(min_length=1)]
    spread: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    least_spread: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        if self.elite > self.population:
            raise ValueError(f"elite={self.elite} must not be above population={self.population}")
        for name, span in self.spans.items():
            for value in (span.low, span.high):
                Analytic(**{name: value})  # type: ignore[arg-type]  # pydantic checks
        return self

    @property
    def name(self) -> str:
        return "analytic cem"

    def run(self, training: Training, folder: Path, on_progress: Progress | None = None) -> dict[str, Any]:
        return _Search(self, training, folder).go(on_progress)


class _Search:
    """The state of a search."""

    def __init__(self, settings: CEM, training: Training, folder: Path) -> None:
        self.settings = settings
        self.training = training
        self.folder = folder
        self.names = sorted(settings.spans)
        self.saved = load_checkpoint(folder, training.fingerprint)
        self.metrics = Metrics(folder, training.logger, training.label, training.model_dump(mode="json"))
        start = [settings.spans[name].place(getattr(Analytic(), name)) for name in self.names]
        self.mean = np.clip(start, 0.0, 1.0)
        self.deviation = np.full(len(self.names), settings.spread)
        self.generation = 0
        self.served = 0
        self.wall_s = 0.0
        self.multiplier = training.env.reward.multiplier
        self.best: tuple[float, dict[str, float], dict[str, float], int] | None = None
        self.begun_at = time.perf_counter()

    def go(self, on_progress: Progress | None) -> dict[str, Any]:
        """Learn to the end, going on from the folder's checkpoint where there is one; returns the summary of it."""
        if self.saved is not None:
            vars(self).update(self.saved["search"])
            self.metrics.resume(self.saved["rows"])
            log.info("goes on from generation %d", self.generation)
        validation = Validation(self.training.env, self.training.validation_workloads, reference)
        while self.generation < self.settings.generations:
            scores = self._generation()
            self.generation += 1
            self._record(scores, validation)
            self._save()
            if on_progress is not None:
                on_progress(self.generation, self.settings.generations)
        assert self.best is not None
        _, parameters, figures, step = self.best
        document = {"_target_": "controllers.analytic.Analytic", "ttft_target": 1.0} | parameters
        write_whole(self.folder / CONTROLLER, yaml.safe_dump(document, sort_keys=False).encode())
        self._policy(parameters).save(self.folder / POLICY)
        result: dict[str, Any] = {
            "name": self.training.label,
            "steps": self.served,
            "best_at_step": step,
            "wall_s": self._wall(),
            "parameters": parameters,
        } | {f"eval/{name}": value for name, value in figures.items()}
        self.metrics.finish(result)
        return result

    def _policy(self, parameters: dict[str, float]) -> Policy:
        """`analytic` with these parameters in the form of every other policy: a residual one that shifts nothing."""
        env = self.training.env.model_copy(
            update={
                "residual": Residual(candidates=0, budgets=0, base=dict(parameters)),
                "decide_every": 1,
                "layout": BLIND,
            }
        )
        tuned = self.training.model_copy(update={"env": env})
        return tuned.unshifted(parameters=parameters, workloads=self.served)

    def _wall(self) -> float:
        return self.wall_s + time.perf_counter() - self.begun_at

    def _parameters(self, places: np.ndarray[Any, Any]) -> dict[str, float]:
        spans = self.settings.spans
        return {name: spans[name].value(float(place)) for name, place in zip(self.names, places, strict=True)}

    def _generation(self) -> np.ndarray[Any, Any]:
        settings = self.settings
        rng = np.random.default_rng([self.training.seed, self.generation])
        drawn = rng.normal(self.mean, self.deviation, (settings.population, len(self.names)))
        # The mean itself takes part, so that what is kept has been tried on the same requests.
        drawn[0] = self.mean
        drawn = np.clip(drawn, 0.0, 1.0)
        first = TRAINING_SEED + 1_000 * (self.training.seed * settings.generations + self.generation)
        tried = Validation(self.training.env, settings.workloads, reference, first)
        figures = [tried.figures(self._tuned(self._parameters(places))) for places in drawn]
        episodes = settings.population * settings.workloads * len(self.training.env.scenarios)
        self.served += episodes
        scores = np.array([self._score(row) for row in figures])
        order = np.argsort(scores, kind="stable")[: settings.elite]
        elite = drawn[order]
        self._price(float(np.mean([figures[i]["attainment_difference_worst"] for i in order])), episodes)
        left = 1.0 - (self.generation + 1) / settings.generations
        self.mean = elite.mean(axis=0)
        self.deviation = elite.std(axis=0) + settings.least_spread * left
        return scores

    @staticmethod
    def _tuned(parameters: dict[str, float]) -> MakeController:
        """`analytic` with these parameters and a scenario's targets."""
        return lambda slo: Analytic(ttft_target=slo.ttft_target, **parameters)  # type: ignore[arg-type]

    def _score(self, figures: dict[str, float]) -> float:
        """What a candidate should have little of; the worst scenario counts, since a mean lets one pay for another."""
        reward = self.training.env.reward
        if reward.constraint == "price":
            return figures["objective_ratio"]
        return figures["tpot_ratio"] - self.multiplier * (figures["attainment_difference_worst"] + reward.slack)

    def _price(self, attainment_difference: float, episodes: int) -> None:
        """Dual ascent on the price of a missed deadline, as far as so many finished episodes move it."""
        reward = self.training.env.reward
        short = -attainment_difference - reward.slack
        self.multiplier = max(0.0, self.multiplier + reward.multiplier_rate * episodes * short)

    def _validated(self, figures: dict[str, float]) -> float:
        """What the kept parameters have the least of: violated constraints count more than any TPOT."""
        reward = self.training.env.reward
        if reward.constraint == "price":
            return figures["objective_ratio"]
        short = max(0.0, -figures["attainment_difference_worst"] - reward.slack)
        return figures["tpot_ratio"] + (1.0 + 1e3 * short if short > 0.0 else 0.0)

    def _record(self, scores: np.ndarray[Any, Any], validation: Validation) -> None:
        parameters = self._parameters(self.mean)
        figures = validation.figures(self._tuned(parameters))
        if self.best is None or self._validated(figures) < self.best[0]:
            self.best = (self._validated(figures), parameters, figures, self.served)
        row = {STEP: float(self.served), "train/wall_s": self._wall(), "train/generation": float(self.generation)}
        row["train/violation_multiplier"] = self.multiplier
        row |= {"train/score_mean": float(scores.mean()), "train/score_best": float(scores.min())}
        row |= {f"train/{name}": value for name, value in parameters.items()}
        row |= {f"eval/{name}": value for name, value in figures.items()}
        self.metrics.add(row)
        log.info(
            "generation %d: %s objective %.4f", self.generation, json.dumps(parameters), figures["objective_ratio"]
        )

    def _save(self) -> None:
        names = ("mean", "deviation", "generation", "served", "multiplier", "best")
        search = {name: getattr(self, name) for name in names} | {"wall_s": self._wall()}
        save_checkpoint(self.folder, self.training.fingerprint, {"search": search, "rows": self.metrics.rows})
