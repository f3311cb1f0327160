"""Stable-Baselines3's algorithms with the settings that matter here, and their networks taken out for service."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from controllers.network import ACTIVATIONS, Network
from controllers.policy import Residual
from runs.learning.choices import ChoicesPolicy
from runs.learning.cloning import Clone, clone
from runs.learning.reinforcement import Run
from runs.learning.scenarios import TrainingEnv
from runs.learning.training import Learner, Training
from runs.learning.vec_env import Form
from runs.serving import Progress

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Activation = Literal["tanh", "relu"]

MODULES = {"tanh": nn.Tanh, "relu": nn.ReLU}


class SB3Learner(Learner):
    """One of SB3's algorithms.

    Args:
        steps: environment steps of all environments together.
        layers: widths of the policy's hidden layers.
        learning_rate, final_learning_rate: falls in a straight line from the first to the second.
        gamma: discount per decision.
    """

    form: ClassVar[Form]
    algorithm: ClassVar[type[BaseAlgorithm]]
    masked: ClassVar[bool] = False
    on_policy: ClassVar[bool] = True

    steps: Count = 20_000_000
    layers: Annotated[tuple[Count, ...], Field(min_length=1)] = (64, 64)
    learning_rate: Positive = 1e-3
    final_learning_rate: Positive | None = None
    gamma: Share = 0.998

    @property
    def name(self) -> str:
        return self.algorithm.__name__.lower().replace("ppo", " ppo").strip()

    def run(self, training: Training, folder: Path, on_progress: Progress | None = None) -> dict[str, Any]:
        return Run(training, self, folder, on_progress).go()

    @abstractmethod
    def build(self, env: VecNormalize, seed: int) -> BaseAlgorithm:
        """The algorithm, untrained, on an environment."""

    def rate(self) -> Callable[[float], float]:
        """Learning rate by the share of training that remains."""
        return LinearRate(self.learning_rate, self.final_learning_rate or self.learning_rate)

    def common(self, env: VecNormalize, seed: int) -> dict[str, Any]:
        """Arguments that all algorithms share."""
        return {
            "env": env,
            "seed": seed,
            "device": "cpu",
            "learning_rate": self.rate(),
            "gamma": self.gamma,
            "verbose": 0,
        }

    def prepare(self, model: BaseAlgorithm, env: VecNormalize, training: Training) -> dict[str, float]:
        """What is done to an untrained model before it learns; returns figures for the result."""
        return {}

    @abstractmethod
    def actor(self, model: BaseAlgorithm) -> "Actor":
        """The layers that choose."""


class LinearRate:
    """A learning rate that falls in a straight line; a class, so that checkpoints can hold it."""

    def __init__(self, first: float, last: float) -> None:
        self.first = first
        self.last = last

    def __call__(self, remaining: float) -> float:
        return self.last + (self.first - self.last) * max(0.0, min(1.0, remaining))


class Actor:
    """The layers of a policy: an LSTM or none, then fully connected ones with one activation between them."""

    def __init__(self, layers: list[nn.Linear], activation: Activation, lstm: nn.LSTM | None = None) -> None:
        self.layers = layers
        self.activation: Activation = activation
        self.lstm = lstm

    def network(self, normalizer: VecNormalize) -> Network:
        """The same in the form that controllers run."""
        statistics: Any = normalizer.obs_rms
        scale = 1.0 / np.sqrt(statistics.var + normalizer.epsilon)
        flat = [part for layer in self.layers for part in (_plain(layer.weight).T.ravel(), _plain(layer.bias))]
        widths = [self.layers[0].in_features, *(layer.out_features for layer in self.layers)]
        lstm = np.zeros(0, dtype=np.float32)
        if self.lstm is not None:
            bias = _plain(self.lstm.bias_ih_l0) + _plain(self.lstm.bias_hh_l0)
            parts = (_plain(self.lstm.weight_ih_l0).T.ravel(), _plain(self.lstm.weight_hh_l0).T.ravel(), bias)
            lstm = np.concatenate(parts).astype(np.float32)
        return Network(
            mean=np.asarray(statistics.mean, dtype=np.float32),
            scale=np.asarray(scale, dtype=np.float32),
            lstm=lstm,
            hidden=0 if self.lstm is None else self.lstm.hidden_size,
            sizes=np.array(widths, dtype=np.int64),
            weights=np.concatenate(flat).astype(np.float32),
            activation=ACTIVATIONS.index(self.activation),
        )


def _plain(parameter: Any) -> NDArray[np.float32]:
    array: NDArray[np.float32] = parameter.detach().cpu().numpy()
    return array


def linears(*modules: nn.Module) -> list[nn.Linear]:
    """The fully connected layers within, in order."""
    return [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]


class PPOLearner(SB3Learner):
    """Proximal policy optimisation (Schulman et al., 2017).

    Args:
        n_steps: decisions of each environment per update.
        batch_size, n_epochs, gae_lambda, clip_range, ent_coef, vf_coef, max_grad_norm, target_kl: as in SB3.
        activation: between layers.
        clone: behaviour cloning of `analytic` to begin with.
        stay: of a residual policy, how likely it leaves c, and n, alone before it has learnt anything.
    """

    form: ClassVar[Form] = "pair"
    algorithm: ClassVar[type[BaseAlgorithm]] = PPO

    n_steps: Count = 128
    batch_size: Count = 4096
    n_epochs: Count = 3
    gae_lambda: Share = 0.95
    clip_range: Positive = 0.2
    ent_coef: Annotated[float, Field(ge=0.0)] = 1e-3
    vf_coef: Positive = 0.5
    max_grad_norm: Positive = 10.0
    target_kl: Positive | None = None
    activation: Activation = "relu"
    clone: Clone = Clone()
    stay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8

    @property
    def name(self) -> str:
        return ("cloned " if self.clone.rounds else "") + super().name

    def prepare(self, model: BaseAlgorithm, env: VecNormalize, training: Training) -> dict[str, float]:
        """Clone, or let a residual policy mostly leave its base's choice alone."""
        if training.env.residual is not None:
            self._stay(model, training.env, training.env.residual)
        if self.clone.rounds == 0:
            return {}
        return {"cloned_agreement": clone(model, env, self.clone, training.env, training.seed, self.gamma)}

    def _stay(self, model: BaseAlgorithm, env: TrainingEnv, residual: Residual) -> None:
        policy: Any = model.policy
        bias = policy.action_net.bias.data
        first = 0
        for many, reach in zip(env.spread, (residual.candidates, residual.budgets), strict=True):
            if many > 1:
                others = (1.0 - self.stay) / (many - 1)
                bias[first + reach] = float(np.log(self.stay / others))
            first += many

    def build(self, env: VecNormalize, seed: int) -> BaseAlgorithm:
        names = (
            "n_steps", "batch_size", "n_epochs", "gae_lambda", "clip_range", "ent_coef", "vf_coef", "max_grad_norm",
            "target_kl",
        )  # fmt: skip
        settings = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return self.algorithm(self._policy, policy_kwargs=self._policy_settings, **settings, **self.common(env, seed))

    _policy: ClassVar[str | type[BasePolicy]] = ChoicesPolicy

    @property
    def _policy_settings(self) -> dict[str, Any]:
        layers = list(self.layers)
        return {"net_arch": {"pi": layers, "vf": layers}, "activation_fn": MODULES[self.activation]}

    def actor(self, model: BaseAlgorithm) -> Actor:
        policy: Any = model.policy
        return Actor(
            linears(policy.mlp_extractor.policy_net, policy.action_net),
            self.activation,
            getattr(policy, "lstm_actor", None),
        )


class MaskablePPOLearner(PPOLearner):
    """PPO that never tries a choice whose effect is that of a smaller one (Huang and Ontañón, FLAIRS 2022)."""

    algorithm: ClassVar[type[BaseAlgorithm]] = MaskablePPO
    _policy: ClassVar[str | type[BasePolicy]] = "MlpPolicy"
    masked: ClassVar[bool] = True


class RecurrentPPOLearner(PPOLearner):
    """PPO with one LSTM layer in front.

    Args:
        lstm_hidden: its width.
    """

    algorithm: ClassVar[type[BaseAlgorithm]] = RecurrentPPO
    _policy: ClassVar[str | type[BasePolicy]] = "MlpLstmPolicy"

    lstm_hidden: Count = 32

    @property
    def _policy_settings(self) -> dict[str, Any]:
        own = {"lstm_hidden_size": self.lstm_hidden, "shared_lstm": False, "enable_critic_lstm": True}
        return super()._policy_settings | own


class DQNLearner(SB3Learner):
    """Deep Q-learning over all pairs (Mnih et al., Nature 2015).

    Args:
        buffer_size, learning_starts, batch_size: in decisions.
        train_freq: decisions of each environment between updates.
        gradient_steps: updates each time.
        target_update_interval: decisions of all environments between copies to the target network.
        exploration_fraction, exploration_final_eps: as in SB3.
    """

    form: ClassVar[Form] = "joint"
    algorithm: ClassVar[type[BaseAlgorithm]] = DQN
    on_policy: ClassVar[bool] = False

    steps: Count = 4_000_000
    buffer_size: Count = 200_000
    learning_starts: Annotated[int, Field(ge=0)] = 20_000
    batch_size: Count = 1024
    train_freq: Count = 4
    gradient_steps: Count = 4
    target_update_interval: Count = 20_000
    exploration_fraction: Share = 0.3
    exploration_final_eps: Share = 0.02

    def build(self, env: VecNormalize, seed: int) -> BaseAlgorithm:
        names = (
            "buffer_size", "learning_starts", "batch_size", "train_freq", "gradient_steps", "target_update_interval",
            "exploration_fraction", "exploration_final_eps",
        )  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        return DQN("MlpPolicy", policy_kwargs={"net_arch": list(self.layers)}, **settings, **self.common(env, seed))

    def actor(self, model: BaseAlgorithm) -> Actor:
        policy: Any = model.policy
        return Actor(linears(policy.q_net.q_net), "relu")


class SACLearner(SB3Learner):
    """Soft actor-critic on the Box form of the action (Haarnoja et al., ICML 2018).

    Args:
        buffer_size, learning_starts, batch_size: in decisions.
        train_freq: decisions of each environment between updates.
        gradient_steps: updates each time.
        tau: share of the critics that the target critics take over at each update.
    """

    form: ClassVar[Form] = "box"
    algorithm: ClassVar[type[BaseAlgorithm]] = SAC
    on_policy: ClassVar[bool] = False

    steps: Count = 2_000_000
    buffer_size: Count = 200_000
    learning_starts: Annotated[int, Field(ge=0)] = 20_000
    batch_size: Count = 1024
    train_freq: Count = 4
    gradient_steps: Count = 4
    tau: Share = 0.01

    def build(self, env: VecNormalize, seed: int) -> BaseAlgorithm:
        names = ("buffer_size", "learning_starts", "batch_size", "train_freq", "gradient_steps", "tau")
        settings = {name: getattr(self, name) for name in names}
        return SAC("MlpPolicy", policy_kwargs={"net_arch": list(self.layers)}, **settings, **self.common(env, seed))

    def actor(self, model: BaseAlgorithm) -> Actor:
        actor: Any = model.policy.actor
        return Actor(linears(actor.latent_pi, actor.mu), "relu")
