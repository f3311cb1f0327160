"""SB3's distribution over several independent choices, computed at once.

`MultiCategoricalDistribution` makes a torch `Categorical` for every choice at every step, which normalises twice and
draws with `multinomial`; on the small networks here that took a fifth of a PPO step.
"""

from typing import Any

import torch
from stable_baselines3.common.distributions import MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy


class Choices(MultiCategoricalDistribution):
    """One categorical distribution per choice, independent of each other."""

    def proba_distribution(self, action_logits: torch.Tensor) -> "Choices":
        """Set the logits, (batch, sum of the choices' sizes)."""
        self._logs = [part.log_softmax(dim=1) for part in action_logits.split(self.action_dims, dim=1)]
        return self

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """(batch,) of the actions, (batch, choices)."""
        picked = actions.long()
        return sum(logs.gather(1, picked[:, i : i + 1]) for i, logs in enumerate(self._logs)).squeeze(1)

    def entropy(self) -> torch.Tensor:
        """(batch,) in nats."""
        return -sum((logs.exp() * logs).sum(dim=1) for logs in self._logs)

    def sample(self) -> torch.Tensor:
        """(batch, choices), drawn: the largest log-probability plus Gumbel noise."""
        drawn = [(logs - torch.empty_like(logs).exponential_().log_()).argmax(dim=1) for logs in self._logs]
        return torch.stack(drawn, dim=1)

    def mode(self) -> torch.Tensor:
        """(batch, choices), the likeliest."""
        return torch.stack([logs.argmax(dim=1) for logs in self._logs], dim=1)


class ChoicesPolicy(ActorCriticPolicy):
    """SB3's actor and critic with `Choices`; for `MultiDiscrete` actions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.action_dist, MultiCategoricalDistribution)
        self.action_dist = Choices(self.action_dist.action_dims)
