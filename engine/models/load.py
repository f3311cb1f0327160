"""Models and tokenizers of Hugging Face folders and hub ids, and the two embedded in the package."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

WEIGHTS = Path(__file__).resolve().parent / "weights"
TARGET_FOLDER = WEIGHTS / "target"
DRAFTER_FOLDER = WEIGHTS / "drafter"


class ModelFilesError(ValueError):
    """A model or tokenizer cannot be read; the message says of which folder or hub id, and why."""


def load_pretrained(source: str, dtype: str = "auto", *, trust_remote_code: bool = False) -> Any:
    """The causal language model of a folder or hub id. Code that comes with it runs only with `trust_remote_code`.

    Raises ModelFilesError, also where weights are missing.
    """
    from transformers import AutoModelForCausalLM

    model, info = _read(AutoModelForCausalLM, source, trust_remote_code, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(entry) for entry in info.get(kind, ())):
            raise ModelFilesError(
                f"{source}: {kind.removesuffix('_keys')} weights: {', '.join(names[:3])}"
                + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            )
    return model


def load_pretrained_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id, as `load_pretrained` reads models."""
    from transformers import AutoTokenizer

    return _read(AutoTokenizer, source, trust_remote_code)


def _read(kind: Any, source: str, trust_remote_code: bool, **options: Any) -> Any:
    """`kind.from_pretrained` with all its errors as ModelFilesError. It never prompts on the terminal."""
    path = Path(source).expanduser()
    if path.is_file():
        raise ModelFilesError(f"{source}: a file; give the folder that holds the model's config.json and weights")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        if not path.is_dir():
            raise ModelFilesError(f"{source}: no such folder (from {Path.cwd()})")
    elif not path.exists():
        path = Path(source)
    # Without network its retries would log ten lines; the final error holds the same information.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    what = "model" if "Model" in kind.__name__ else "tokenizer"
    try:
        return kind.from_pretrained(str(path), trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # a damaged file may raise anything in the reader
        if "trust_remote_code" in str(error):
            reason = "it comes with Python code of its own, which runs only with engine.trust_remote_code=true"
        elif not path.exists():
            reason = (
                "no such folder, and the Hugging Face hub gave no such model (no network, no such id, or no access); "
                "give a local folder or download the model first"
            )
        else:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ModelFilesError(f"{source}: its {what} cannot be read: {reason}") from error


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a local folder in evaluation mode, its weights cast to `dtype`. Raises FileNotFoundError."""
    from transformers.utils import logging as progress

    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder}: no weights here; reinstall the package, or train them: "
            f"python -m engine.models.train --out {folder.parent}"
        )
    shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        model = load_pretrained(str(folder))
    finally:
        if shown:
            progress.enable_progress_bar()
    return model.to(dtype).eval()


def load_target(dtype: torch.dtype = torch.float32) -> Any:
    """The target, a Llama of 6 layers x 256, as a `transformers` model in evaluation mode."""
    return load_model(TARGET_FOLDER, dtype)


def load_drafter(dtype: torch.dtype = torch.float32) -> Any:
    """The drafter, a Llama of 2 layers x 128 with the target's vocabulary, as a `transformers` model."""
    return load_model(DRAFTER_FOLDER, dtype)


def load_tokenizer(folder: Path = TARGET_FOLDER) -> Any:
    """The byte-level BPE tokenizer that both models share."""
    return load_pretrained_tokenizer(str(folder))


def deepen(model: Any, layers: int = 24) -> Any:
    """The same model with additional layers that cost time and do not change its output, as served by `torch_small`.

    A drafter pays off only against a target of several times its depth, and an embedded target of that depth would have
    to be trained and shipped. Instead the added layers are copies of the model's own, spread between them, with both
    output projections (`o_proj`, `down_proj`) zero, so that each adds exactly 0 to the residual stream. Logits are
    bit-equal to the model's, so tokens and acceptance are real. Attention, KV cache and matrix products are computed in
    full, so the cost is real. `model` itself is unchanged. Raises ValueError if it has more than `layers` layers, or
    layers without those projections.
    """
    if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
        raise ValueError(f"layers={layers}: {type(model).__name__} cannot be deepened: it is not built as Llama is")
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
        raise ValueError(f"{type(layer).__name__} cannot be deepened: no self_attn.o_proj and mlp.down_proj") from error
    for projection in outputs:
        for parameter in projection.parameters():
            nn.init.zeros_(parameter)
    return idle
