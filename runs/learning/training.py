"""One training run as it is configured: what is trained on, who learns, and what is kept. No Hydra."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from controllers.network import ACTIVATIONS, Network
from controllers.policy import Head, Header, Policy
from runs.code import code_digest
from runs.inputs import file_digests
from runs.learning.scenarios import TrainingEnv
from runs.serving import Progress
from runs.tracking import Tracking

POLICY = "policy.npz"


class Learner(BaseModel, ABC):
    """A way to make a controller."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    @abstractmethod
    def name(self) -> str:
        """How tables call it."""

    @abstractmethod
    def run(self, training: "Training", folder: Path, on_progress: Progress | None = None) -> dict[str, Any]:
        """See `Training.run`."""


class Training(BaseModel):
    """Everything that one training run depends on.

    Args:
        env: what it is trained on.
        learner: who learns.
        seed: draws the networks, the exploration, and which workload each episode takes.
        kind: how tables call what comes out, with the seed behind it; None: the learner's name.
        validation_workloads: per scenario, for the figures `eval/...`; the policy that is best on them is kept.
        validation_every: environment steps between validations.
        checkpoint_s: seconds between checkpoints: what a kill can cost at most.
        log_every: environment steps between rows of metrics.
        optimized_metric: key of the result that a run returns to Hydra's sweeper, for one that optimizes.
        logger: Weights & Biases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    env: TrainingEnv
    learner: SerializeAsAny[Learner]
    seed: Annotated[int, Field(ge=0)] = 0
    kind: Annotated[str, Field(min_length=1)] | None = None
    validation_workloads: Annotated[int, Field(ge=1)] = 4
    validation_every: Annotated[int, Field(ge=1)] = 1_000_000
    checkpoint_s: Annotated[float, Field(gt=0.0)] = 60.0
    log_every: Annotated[int, Field(ge=1)] = 200_000
    optimized_metric: Annotated[str, Field(min_length=1)] = "eval/objective_ratio"
    logger: Tracking = Tracking()

    @property
    def fingerprint(self) -> str:
        """What a checkpoint must have been made with to be gone on from."""
        own = self.model_dump_json(exclude={"logger", "checkpoint_s", "optimized_metric"}, serialize_as_any=True)
        return f"{code_digest()} {own} {file_digests(self)}"

    @property
    def label(self) -> str:
        """How tables call the policy."""
        return f"{self.kind or self.learner.name} seed={self.seed}"

    def policy(self, network: Network, head: Head, masked: bool, **trained: Any) -> Policy:
        """The policy that a network is in this environment; `trained` says where it comes from."""
        first = next(iter(self.env.scenarios.values()))
        header = Header(
            name=self.label,
            features=self.env.inputs,
            layout=self.env.layout,
            actions=self.env.actions,
            decide_every=self.env.decide_every,
            residual=self.env.residual,
            head=head,
            masked=masked,
            ttft_target=first.slo.ttft_target,
            tpot_target=first.slo.tpot_target,
            hidden=network.hidden,
            activation="tanh" if ACTIVATIONS[network.activation] == "tanh" else "relu",
            env=self.env.digest,
            trained={
                "algorithm": self.learner.name,
                "seed": self.seed,
                "engines": sorted({scenario.engine.name for scenario in self.env.scenarios.values()}),
                "code": code_digest(),
            }
            | trained,
        )
        return Policy(header, network)

    def unshifted(self, **trained: Any) -> Policy:
        """The residual policy that always leaves its base's choice alone."""
        assert self.env.residual is not None
        width, (many_c, many_n) = len(self.env.inputs), self.env.spread
        bias = np.zeros(many_c + many_n, dtype=np.float32)
        bias[[self.env.residual.candidates, many_c + self.env.residual.budgets]] = 1.0
        network = Network(
            mean=np.zeros(width, dtype=np.float32),
            scale=np.ones(width, dtype=np.float32),
            lstm=np.zeros(0, dtype=np.float32),
            hidden=0,
            sizes=np.array([width, len(bias)], dtype=np.int64),
            weights=np.concatenate((np.zeros(width * len(bias), dtype=np.float32), bias)),
            activation=ACTIVATIONS.index("relu"),
        )
        return self.policy(network, "pair", masked=False, **trained)

    def run(self, folder: Path, on_progress: Progress | None = None) -> dict[str, Any]:
        """Train, or go on from the folder's checkpoint; returns the figures of the policy that is left in `folder`.

        Raises:
            ValueError: settings do not go together, or the checkpoint is of another configuration.
        """
        folder.mkdir(parents=True, exist_ok=True)
        return self.learner.run(self, folder, on_progress)
