"""The two embedded models and their tokenizer, read from the package's own files: nothing is downloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

WEIGHTS = Path(__file__).resolve().parent / "weights"
TARGET_FOLDER = WEIGHTS / "target"
DRAFTER_FOLDER = WEIGHTS / "drafter"


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a local folder in evaluation mode, its weights cast to `dtype`. Raises FileNotFoundError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder}: no weights here; reinstall the package, or train them: "
            f"python -m engine.models.train --out {folder.parent}"
        )
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.to(dtype).eval()


def load_target(dtype: torch.dtype = torch.float32) -> Any:
    """The target, a Llama of 6 layers x 256, as a `transformers` model in evaluation mode."""
    return load_model(TARGET_FOLDER, dtype)


def load_drafter(dtype: torch.dtype = torch.float32) -> Any:
    """The drafter, a Llama of 2 layers x 128 with the target's vocabulary, as a `transformers` model."""
    return load_model(DRAFTER_FOLDER, dtype)


def load_tokenizer(folder: Path = TARGET_FOLDER) -> Any:
    """The byte-level BPE tokenizer that both models share."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def deepen(model: Any, layers: int = 24) -> Any:
    """The same model with more layers to compute, which change nothing: what `torch_small` serves.

    A drafter pays only against a target of several times its depth, and an embedded target of that depth would have to
    be trained and shipped. Instead the layers added here are copies of the model's own, spread between them, with both
    output projections (`o_proj`, `down_proj`) zero: each adds exactly 0 to the residual stream. Logits are bit-equal to
    the model's, so tokens and acceptance are real; attention, KV cache and matrix products are computed in full, so the
    cost is real; only the depth is not earned by training. `model` itself is left as it is. Raises ValueError if it has
    more than `layers` layers, or layers without those projections.
    """
    own = model.config.num_hidden_layers
    if layers < own:
        raise ValueError(f"layers={layers}: the model has {own} layers already; give at least as many")
    deep = copy.deepcopy(model)
    added_after = [layers * (i + 1) // own - layers * i // own - 1 for i in range(own)]
    stack: Any = nn.ModuleList()
    for layer, count in zip(deep.model.layers, added_after, strict=True):
        stack.append(layer)
        stack.extend(_idle_copy(layer) for _ in range(count))
    for index, layer in enumerate(stack):
        layer.self_attn.layer_idx = index
    deep.model.layers = stack
    deep.config.num_hidden_layers = layers
    if getattr(deep.config, "layer_types", None):
        deep.config.layer_types = [
            kind for kind, count in zip(model.config.layer_types, added_after, strict=True) for _ in range(count + 1)
        ]
    return deep


def _idle_copy(layer: Any) -> Any:
    idle = copy.deepcopy(layer)
    try:
        outputs = (idle.self_attn.o_proj, idle.mlp.down_proj)
    except AttributeError as error:
        raise ValueError(f"{type(layer).__name__} has no self_attn.o_proj and mlp.down_proj to set to zero") from error
    for projection in outputs:
        for parameter in projection.parameters():
            nn.init.zeros_(parameter)
    return idle
