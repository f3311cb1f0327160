"""Behaviour cloning: a policy that begins where `analytic` stands."""

from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize
from torch.nn.functional import cross_entropy, mse_loss

from controllers.policy import Residual
from runs.learning.scenarios import TrainingEnv
from runs.learning.vec_env import GovernorVecEnv

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

CLONE_SEED = 7_000_000
"""Added to the seed of the environments that are cloned in, so that they are not those trained in."""


class Clone(BaseModel):
    """Behaviour cloning of `analytic` before reinforcement learning, with its mistakes corrected where it makes them.

    In every round the environments run for `decisions` steps, the first under `analytic`, the others under the clone as
    it is, `analytic`'s choice being what it should have done (DAgger; Ross, Gordon and Bagnell, AISTATS 2011). The
    value function is fitted to the returns of the same steps.

    Args:
        rounds: 0 does not clone.
        decisions: steps of all environments together, per round.
        epochs: passes over all steps so far, per round.
        learning_rate, batch_size: of Adam.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds: Annotated[int, Field(ge=0)] = 0
    decisions: Count = 131_072
    epochs: Count = 4
    learning_rate: Positive = 1e-3
    batch_size: Count = 2048


def clone(
    model: BaseAlgorithm, normalizer: VecNormalize, settings: Clone, training: TrainingEnv, seed: int, gamma: float
) -> float:
    """Make the model's policy choose as `analytic` does.

    Returns the share of the last round's steps in which it would. ValueError for a policy that cannot be cloned into.
    """
    if not hasattr(model.policy, "mlp_extractor") or hasattr(model.policy, "lstm_actor"):
        raise ValueError("learner.clone.rounds: only ppo and maskable_ppo can begin from a clone; set it to 0")
    if training.residual is not None:
        raise ValueError("learner.clone.rounds: a residual policy begins at analytic's choice anyway; set it to 0")
    choices = training.actions
    reach = Residual(candidates=len(choices.candidate_choices) - 1, budgets=len(choices.budget_choices) - 1)
    shown = training.model_copy(update={"residual": reach})
    env = GovernorVecEnv(shown, seed=CLONE_SEED + seed)
    taken: list[tuple[NDArray[Any], ...]] = []
    generator = torch.Generator().manual_seed(seed)
    observation: Any = env.reset()
    width = len(training.inputs)
    agreed = 0.0
    for turn in range(settings.rounds):
        inputs, labels, rewards, dones = [], [], [], []
        agreements = []
        for _ in range(max(1, settings.decisions // env.num_envs)):
            base = np.concatenate([group.base for group in env.groups])
            student = _chosen(model, normalizer, observation[:, :width])
            shift = (base if turn == 0 else student) - base + [reach.candidates, reach.budgets]
            agreements.append((student == base).all(axis=1).mean())
            inputs.append(observation[:, :width])
            labels.append(base)
            observation, reward, done, _ = env.step(shift)
            rewards.append(reward)
            dones.append(done)
        agreed = float(np.mean(agreements))
        gained = _returns(np.array(rewards), np.array(dones), gamma)
        taken.append((np.concatenate(inputs), np.concatenate(labels), gained.ravel()))
        # Returns under the student are not those of the clone that comes out, so only the policy learns from them.
        _fit(model, normalizer, settings, taken, generator, values=turn == 0)
    return agreed


def _returns(rewards: NDArray[np.float32], dones: NDArray[np.bool_], gamma: float) -> NDArray[np.float32]:
    """(T, N) discounted sums of what follows, up to the end of the episode or of the record."""
    gained = np.zeros_like(rewards)
    after = np.zeros(rewards.shape[1], dtype=np.float32)
    for t in range(len(rewards) - 1, -1, -1):
        after = rewards[t] + gamma * after * ~dones[t]
        gained[t] = after
    return gained


def _chosen(model: BaseAlgorithm, normalizer: VecNormalize, inputs: NDArray[np.float32]) -> NDArray[np.int64]:
    with torch.no_grad():
        logits = _logits(model, torch.as_tensor(normalizer.normalize_obs(inputs.copy())))
    return np.stack([part.argmax(dim=1).numpy() for part in logits], axis=1)


def _logits(model: BaseAlgorithm, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    policy: Any = model.policy
    latent = policy.mlp_extractor.forward_actor(inputs)
    split: tuple[torch.Tensor, ...] = torch.split(policy.action_net(latent), policy.action_space.nvec.tolist(), dim=1)
    return split


def _fit(
    model: BaseAlgorithm,
    normalizer: VecNormalize,
    settings: Clone,
    taken: list[tuple[NDArray[Any], ...]],
    generator: torch.Generator,
    values: bool,
) -> None:
    policy: Any = model.policy
    inputs, labels, gained = (np.concatenate(parts) for parts in zip(*taken, strict=True))
    if len(taken) == 1:
        statistics: Any = normalizer.obs_rms
        statistics.update(inputs)
    data = torch.as_tensor(np.asarray(normalizer.normalize_obs(inputs), dtype=np.float32))
    wanted, returns = torch.as_tensor(labels), torch.as_tensor(gained)
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
    for _ in range(settings.epochs):
        order = torch.randperm(len(data), generator=generator)
        for rows in order.split(settings.batch_size):
            logits = _logits(model, data[rows])
            loss = sum(cross_entropy(part, wanted[rows, i]) for i, part in enumerate(logits))
            if values:
                value = policy.value_net(policy.mlp_extractor.forward_critic(data[rows])).flatten()
                loss = loss + 0.1 * mse_loss(value, returns[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
