"""Trains a target and its drafter together: one batch, one target forward, whose logits are the drafter's labels."""

from __future__ import annotations

import hashlib
import io
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from engine.files import write_whole
from engine.models.muon import Muon

MAX_POSITIONS = 2048


class TrainingError(ValueError):
    """Settings, text or a checkpoint that cannot be trained from; the message says what to change."""


@dataclass(frozen=True)
class Shape:
    """Width and depth of a Llama: grouped-query attention with two query heads of 64 per key-value head."""

    hidden: int
    layers: int
    intermediate: int

    def build(self, vocabulary: int) -> Any:
        """A `LlamaForCausalLM` of this shape with fresh weights from torch's global generator."""
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = max(1, self.hidden // 64)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
        return LlamaForCausalLM(config)


TARGET = Shape(hidden=256, layers=6, intermediate=704)
DRAFTER = Shape(hidden=128, layers=2, intermediate=352)


@dataclass(frozen=True)
class Settings:
    """Training settings. The budget is `steps` if given, else `minutes` of processor time on each of `threads` threads.

    Processor time is what the wall clock shows on an idle machine; a busy one makes the run longer, not worse. The
    learning rate falls with the budget along a cosine, after `warmup_steps`. The last `long_share` of the budget trains
    on windows of `long_window` tokens in place of `window`, so that long contexts work; a step is `batch_tokens`.
    """

    minutes: float = 12.0
    steps: int | None = None
    threads: int = 2
    seed: int = 0
    batch_tokens: int = 1024
    window: int = 256
    long_window: int = 1024
    long_share: float = 0.15
    warmup_steps: int = 10
    matrix_lr: float = 8e-3
    embedding_lr: float = 5e-3
    weight_decay: float = 0.1
    target: Shape = TARGET
    drafter: Shape = DRAFTER

    def __post_init__(self) -> None:
        if self.steps is None and not self.minutes > 0:
            raise TrainingError(f"minutes={self.minutes}: must be more than 0")
        if self.steps is not None and self.steps < 1:
            raise TrainingError(f"steps={self.steps}: must be at least 1")
        if self.threads < 1:
            raise TrainingError(f"threads={self.threads}: must be at least 1")


class StepResult(NamedTuple):
    """Losses in nats, the target's and the drafter's, both on the text itself."""

    target_loss: float
    drafter_loss: float
    tokens: int
    learning_rate: float


class Trainer:
    """Both models, their optimizers and the spent budget; `save` and `restore` cover all of it."""

    def __init__(self, settings: Settings, vocabulary: int, tokens: NDArray[np.integer[Any]]) -> None:
        if tokens.size <= settings.long_window + 1:
            raise TrainingError(f"{tokens.size} tokens of text are less than one window of {settings.long_window}")
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.vocabulary = vocabulary
        self.tokens = tokens
        self.target = settings.target.build(vocabulary)
        self.drafter = settings.drafter.build(vocabulary)
        self.step_number = 0
        self.tokens_seen = 0
        self.processor_seconds = 0.0
        self._optimizers = [*_optimizers(self.target, settings), *_optimizers(self.drafter, settings)]

    @property
    def minutes(self) -> float:
        """Minutes of the budget spent so far, over every run that trained this state."""
        return self.processor_seconds / self.settings.threads / 60

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        if self.settings.steps is not None:
            return min(1.0, self.step_number / self.settings.steps)
        return min(1.0, self.minutes / self.settings.minutes)

    def step(self) -> StepResult:
        """One update of both models from the batch that belongs to this step number."""
        began = time.process_time()
        rate = self._rate_factor()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * rate
        windows = self._batch()
        labels = windows[:, 1:].reshape(-1)
        target_logits = self.target(input_ids=windows[:, :-1], use_cache=False).logits.flatten(0, 1)
        target_loss = functional.cross_entropy(target_logits, labels)
        target_loss.backward()
        teacher = functional.softmax(target_logits.detach(), dim=-1)
        student = functional.log_softmax(
            self.drafter(input_ids=windows[:, :-1], use_cache=False).logits.flatten(0, 1), dim=-1
        )
        soft_loss = -(teacher * student).sum(-1).mean()
        soft_loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        drafter_loss = functional.nll_loss(student.detach(), labels)
        self.step_number += 1
        self.tokens_seen += labels.numel()
        self.processor_seconds += time.process_time() - began
        return StepResult(
            float(target_loss.detach()),
            float(drafter_loss),
            labels.numel(),
            self.settings.matrix_lr * rate,
        )

    def save(self, path: Path) -> None:
        """Write everything that `restore` needs, atomically: a run killed here keeps the previous state."""
        state = {
            "identity": self._identity(),
            "step_number": self.step_number,
            "tokens_seen": self.tokens_seen,
            "processor_seconds": self.processor_seconds,
            "target": self.target.state_dict(),
            "drafter": self.drafter.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(path, content.getvalue())

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint written by `save`. Raises TrainingError if it was made with other settings."""
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise TrainingError(f"{path}: not a checkpoint of this script; delete it to start again") from error
        mine, theirs = self._identity(), state["identity"]
        different = [key for key in mine if mine[key] != theirs.get(key)]
        if different:
            raise TrainingError(
                f"{path}: made with "
                + ", ".join(f"{key}={theirs.get(key)} (now {mine[key]})" for key in different)
                + "; give the same to resume, or delete the file to start again"
            )
        self.target.load_state_dict(state["target"])
        self.drafter.load_state_dict(state["drafter"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step_number = state["step_number"]
        self.tokens_seen = state["tokens_seen"]
        self.processor_seconds = state["processor_seconds"]

    def _identity(self) -> dict[str, Any]:
        """Settings that must be equal to resume from a checkpoint."""
        text = hashlib.sha256(np.ascontiguousarray(self.tokens).tobytes()).hexdigest()
        return {**asdict(self.settings), "vocabulary": self.vocabulary, "text": text[:16]}

    def _rate_factor(self) -> float:
        warm = min(1.0, (self.step_number + 1) / self.settings.warmup_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * self.progress))

    def _batch(self) -> Tensor:
        """Windows (n, length + 1) drawn by seed and step number alone, so that a resumed run sees the same ones."""
        long = self.progress >= 1 - self.settings.long_share
        length = self.settings.long_window if long else self.settings.window
        rng = np.random.default_rng([self.settings.seed, self.step_number])
        starts = rng.integers(self.tokens.size - length, size=max(1, self.settings.batch_tokens // length))
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def _optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the (tied) embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=settings.matrix_lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers
