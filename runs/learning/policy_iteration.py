"""Policy iteration by paired rollouts: learn which choice would have been better than the policy's own, and take it."""

import itertools
import logging
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from controllers.learned import decide, policy_memory, policy_params
from controllers.network import ACTIVATIONS, Network
from controllers.policy import Policy
from engine.policy import Policy as EnginePolicy
from runs.learning.checkpoint import load_checkpoint, save_checkpoint
from runs.learning.foresight import Trial, foresee, new_trial
from runs.learning.record import STEP, Metrics, Row
from runs.learning.training import POLICY, Learner, Training
from runs.learning.validation import Validation, reference, serving
from runs.learning.vec_env import GovernorVecEnv, Group
from runs.serving import Progress

log = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class PolicyIteration(Learner):
    """Approximate policy iteration (Bertsekas, 2011; Lagoudakis and Parr, ICML 2003) from `analytic` on.

    In every round the environments run under the policy so far, now and then under a choice drawn at random. At some
    moments the engine is copied and rolled on once for each of several shifts of the choice, the policy going on after
    the first decision; all of them meet the same requests and the same luck. A network learns what a shift saves, from
    what a controller is shown, and the new policy takes the shift that saves the most if it saves more than a margin.
    The margin is the best of `margins` in validation; a round that does not improve ends the search.

    The luck to come is in every sample but not in what the network is shown, so that it learns the mean over it.

    Args:
        rounds: rounds of sampling and learning.
        moments: engines copied per round, over all environments.
        shifts: shifts tried at each, besides the policy's own choice; they are drawn at random.
        every: decisions between two moments of an environment.
        explore: share of decisions drawn at random.
        horizon_s: s of the engine's clock that a rollout lasts, as a factor on the TTFT target.
        clip: share of samples at either end that are cut to the value there. A few rollouts part ways by chance and
            differ by hundreds of times what a shift saves; with a small share they are all that is learnt.
        layers, learning_rate, batch_size, epochs, weight_decay: of the network and AdamW.
        margins: least savings, in standard deviations of what the network predicts.
    """

    rounds: Count = 1
    moments: Count = 24_000
    shifts: Count = 8
    every: Count = 16
    explore: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    horizon_s: Positive = 6.0
    clip: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.05
    layers: Annotated[tuple[Count, ...], Field(min_length=1)] = (64, 64)
    learning_rate: Positive = 1e-3
    batch_size: Count = 1024
    epochs: Count = 4
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-2
    margins: Annotated[tuple[Annotated[float, Field(ge=0.0)], ...], Field(min_length=1)] = (0.0, 0.25, 0.5, 1.0, 2.0)

    @property
    def name(self) -> str:
        return "policy iteration"

    def run(self, training: Training, folder: Path, on_progress: Progress | None = None) -> dict[str, Any]:
        if training.env.residual is None:
            raise ValueError(
                "learner=policy_iteration shifts analytic's choice: set env.residual={candidates: 2, budgets: 3}"
            )
        return _Iteration(self, training, folder).go(on_progress)


class _Iteration:
    """The state of a run."""

    def __init__(self, settings: PolicyIteration, training: Training, folder: Path) -> None:
        torch.set_num_threads(1)
        self.settings = settings
        self.training = training
        self.folder = folder
        self.saved = load_checkpoint(folder, training.fingerprint)
        self.metrics = Metrics(folder, training.logger, training.label, training.model_dump(mode="json"))
        assert training.env.residual is not None
        self.reach = np.array([training.env.residual.candidates, training.env.residual.budgets])
        self.policy = training.unshifted(moments=0)
        self.best: tuple[float, Policy, Row] | None = None
        self.better = True
        self.round = 0
        self.moments = 0
        self.wall_s = 0.0
        self.samples: list[NDArray[Any]] = []
        self.begun_at = self.saved_at = time.perf_counter()

    def go(self, on_progress: Progress | None) -> dict[str, Any]:
        """Learn to the end, going on from the folder's checkpoint where there is one; returns the summary of it."""
        if self.saved is not None:
            vars(self).update(self.saved["state"])
            self.metrics.resume(self.saved["rows"])
            log.info("goes on from round %d, moment %d", self.round, self.moments)
        validation = Validation(self.training.env, self.training.validation_workloads, reference)
        while self.better and self.round < self.settings.rounds:
            samples = self._sample(on_progress)
            self.better = self._improve(samples, validation)
            self.round += 1
            self.samples, self.moments = [], 0
            self._save(None)
        assert self.best is not None
        _, policy, row = self.best
        policy.save(self.folder / POLICY)
        result: dict[str, Any] = {
            "name": policy.header.name,
            "steps": self.round * self.settings.moments,
            "best_at_step": int(row[STEP]),
            "wall_s": self._wall(),
        } | {name: value for name, value in row.items() if name.startswith("eval/")}
        self.metrics.finish(result)
        return result

    def _wall(self) -> float:
        return self.wall_s + time.perf_counter() - self.begun_at

    def _save(self, env: dict[str, Any] | None) -> None:
        if self.samples:
            self.samples = [np.concatenate(self.samples)]
        names = ("policy", "best", "better", "round", "moments", "samples")
        state = {name: getattr(self, name) for name in names} | {"wall_s": self._wall()}
        content = {"state": state, "rows": self.metrics.rows, "env": env}
        save_checkpoint(self.folder, self.training.fingerprint, content)
        self.saved_at = time.perf_counter()

    def _sample(self, on_progress: Progress | None) -> NDArray[Any]:
        """Rows of (inputs, policy's own c and n, shifts of c and n, what the shift costs more)."""
        settings = self.settings
        saved, self.saved = None if self.saved is None else self.saved["env"], None
        env = GovernorVecEnv(self.training.env, self.training.seed + 10_000 * (self.round + 1))
        rng = np.random.default_rng([self.training.seed, self.round])
        inputs: Any = env.reset()
        step = 0
        if saved is not None:
            env.restore(saved["env"])
            rng, inputs, step = saved["rng"], saved["inputs"], saved["step"]
        copies = [_Copies(group, self.policy, settings) for group in env.groups]
        phase = np.random.default_rng(self.training.seed).integers(settings.every, size=env.num_envs)
        while self.moments < settings.moments:
            own = np.concatenate([copy.chosen() for copy in copies])
            asked = np.flatnonzero((step + phase) % settings.every == 0)
            rows = [self._moment(copies, i, inputs[i], own[i], rng) for i in asked.tolist()]
            self.samples += rows
            self.moments += len(rows)
            random = rng.random(env.num_envs) < settings.explore
            drawn = np.stack([rng.integers(many, size=env.num_envs) for many in self.training.env.spread], axis=1)
            inputs, _, _, _ = env.step(np.where(random[:, None], drawn, own))
            env.take_episodes()
            step += 1
            if on_progress is not None and rows:
                on_progress(self.round * settings.moments + self.moments, settings.rounds * settings.moments)
            if time.perf_counter() - self.saved_at >= self.training.checkpoint_s:
                self._save({"env": env.snapshot(), "rng": rng, "inputs": inputs, "step": step})
        return np.concatenate(self.samples)

    def _moment(
        self,
        copies: list["_Copies"],
        i: int,
        inputs: NDArray[np.float32],
        own: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> NDArray[Any]:
        many = self.training.env.spread
        pairs = np.empty((self.settings.shifts + 1, 2), dtype=np.int64)
        pairs[0] = own
        for k in range(1, len(pairs)):
            pairs[k] = own
            # One of the two is shifted, every third time both: what they save is learnt as a sum.
            which = int(rng.integers(3))
            if which != 1:
                pairs[k, 0] = rng.integers(many[0])
            if which != 0:
                pairs[k, 1] = rng.integers(many[1])
        for copy in copies:
            if i < copy.count:
                break
            i -= copy.count
        more = copy.more(i, pairs)
        block = np.empty((len(more), len(inputs) + 5), dtype=np.float32)
        block[:, : len(inputs)] = inputs
        block[:, -5:-3] = own
        block[:, -3:-1] = pairs[1:]
        block[:, -1] = more
        return block

    def _improve(self, samples: NDArray[np.float32], validation: Validation) -> bool:
        """Learn from the samples and keep the best margin's policy; whether it is better than what there was."""
        low, high = np.quantile(samples[:, -1], [self.settings.clip, 1.0 - self.settings.clip])
        samples[:, -1] = np.clip(samples[:, -1], low, high)
        network, figures = self._fit(samples)
        row: Row = {STEP: float((self.round + 1) * self.settings.moments), "train/wall_s": self._wall()}
        row |= {f"train/{name}": value for name, value in figures.items()}
        before = self.best
        for margin in self.settings.margins:
            policy = self.training.policy(
                self._with_margin(network, margin * figures["predicted_std"]), "pair", masked=False, moments=row[STEP]
            )
            tried = {f"eval/{name}": value for name, value in validation.figures(serving(policy)).items()}
            log.info(
                "round %d, margin %g: objective %.4f, TPOT %.4f times analytic's, TTFT attainment %+.4f",
                self.round, margin, tried["eval/objective_ratio"], tried["eval/tpot_ratio"],
                tried["eval/attainment_difference"],
            )  # fmt: skip
            if self.best is None or tried["eval/objective_ratio"] < self.best[0]:
                self.best = (tried["eval/objective_ratio"], policy, row | tried | {"train/margin": margin})
        improved = self.best is not before
        assert self.best is not None
        if improved:
            self.policy = self.best[1]
        self.metrics.add(self.best[2] if improved else row)
        return improved

    def _with_margin(self, network: Network, margin: float) -> Network:
        """The network's outputs are what each index saves; the base's own choice gets a lead."""
        weights = network.weights.copy()
        many = self.training.env.spread
        bias = weights[-sum(many) :]
        bias[self.reach[0]] += margin
        bias[many[0] + self.reach[1]] += margin
        return network._replace(weights=weights)

    def _fit(self, samples: NDArray[np.float32]) -> tuple[Network, dict[str, float]]:
        """A network of what each index of c, and of n, saves; and how well it does on held-out moments."""
        settings, width = self.settings, len(self.training.env.inputs)
        many = self.training.env.spread
        torch.manual_seed(self.training.seed)
        mean, deviation = samples[:, :width].mean(axis=0), samples[:, :width].std(axis=0)
        scale = 1.0 / np.maximum(deviation, 1e-2)
        data = torch.as_tensor(np.clip((samples[:, :width] - mean) * scale, -10.0, 10.0))
        index = torch.as_tensor(samples[:, width:-1].astype(np.int64))
        unit = float(samples[:, -1].std()) or 1.0
        saved = torch.as_tensor(-samples[:, -1] / unit)
        held = torch.zeros(len(data), dtype=torch.bool)
        # Whole moments are held out: the shifts of one moment share its luck.
        held[-(len(data) // settings.shifts // 10) * settings.shifts :] = True
        widths = [width, *settings.layers]
        parts: list[nn.Module] = []
        for ins, outs in itertools.pairwise(widths):
            parts += [nn.Linear(ins, outs), nn.ReLU()]
        last = nn.Linear(widths[-1], sum(many))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        net = nn.Sequential(*parts, last)
        optimizer = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        seen = torch.nonzero(~held).flatten()
        batches = settings.epochs * (len(seen) // settings.batch_size + 1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=batches)

        def predicted(rows: torch.Tensor) -> torch.Tensor:
            out, at = net(data[rows]), index[rows]
            c, n = out[:, : many[0]], out[:, many[0] :]
            gained = c.gather(1, at[:, 2:3]) - c.gather(1, at[:, 0:1])
            return (gained + n.gather(1, at[:, 3:4]) - n.gather(1, at[:, 1:2])).flatten()

        generator = torch.Generator().manual_seed(self.training.seed)
        for _ in range(settings.epochs):
            order = seen[torch.randperm(len(seen), generator=generator)]
            for rows in order.split(settings.batch_size):
                loss = ((predicted(rows) - saved[rows]) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            unseen = torch.nonzero(held).flatten()
            guess = predicted(unseen)
            residue = float(((guess - saved[unseen]) ** 2).mean())
            outputs = net(data[unseen])
        linears = [layer for layer in net if isinstance(layer, nn.Linear)]
        flat = [
            array
            for layer in linears
            for array in (layer.weight.detach().T.numpy().ravel(), layer.bias.detach().numpy())
        ]
        network = Network(
            mean=mean.astype(np.float32),
            scale=scale.astype(np.float32),
            lstm=np.zeros(0, dtype=np.float32),
            hidden=0,
            sizes=np.array([*widths, sum(many)], dtype=np.int64),
            weights=np.concatenate(flat).astype(np.float32),
            activation=ACTIVATIONS.index("relu"),
        )
        figures = {
            "explained_variance": 1.0 - residue / float((saved[unseen] ** 2).mean()),
            "predicted_std": float(outputs.std(dim=0).mean()),
            "saved_std_s": unit,
        }
        log.info("round %d: %s", self.round, {name: round(value, 4) for name, value in figures.items()})
        return network, figures


class _Copies:
    """Rolls a scenario's engines on."""

    def __init__(self, group: Group, policy: Policy, settings: PolicyIteration) -> None:
        self.count = group.count
        self._group = group
        slo = group.scenario.slo
        self._policy = EnginePolicy(
            decide,
            policy_params(policy, group.plant, slo.ttft_target, slo.tpot_target),
            policy_memory(policy, group.plant, 1),
        )
        self._prices = slo.prices.per_unit(slo.ttft_target)
        self._horizon_s = settings.horizon_s * slo.ttft_target
        self._trial: Trial | None = None

    def chosen(self) -> NDArray[np.int64]:
        """(count, 2) the policy's own indices now."""
        return self._group.chosen(self._policy.params, self._policy.memory.network)

    def more(self, e: int, pairs: NDArray[np.int64]) -> NDArray[np.float64]:
        """What each of `pairs` but the first costs more than the first, in s of what `analytic` is charged."""
        batch = self._group.env.batch
        simulator = batch.simulator
        if self._trial is None or len(self._trial.system.state.requests) < len(simulator.state.requests):
            self._trial = new_trial(simulator, self._policy)
        trial = self._trial._replace(system=self._trial.system._replace(trace=simulator.system.trace))
        costs = np.zeros(len(pairs))
        foresee(
            simulator.system, simulator.seen, e, self._group.memory, self._group.base[e], trial, pairs,
            self._horizon_s, batch.decision_s, self._prices, self._group.scenario.slo.tpot_target, costs,
        )  # fmt: skip
        earned: NDArray[np.float64] = (costs[1:] - costs[0]) / self._group.charged[e].per_second
        return earned
