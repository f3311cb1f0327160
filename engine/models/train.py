"""`python -m engine.models.train`: trains the embedded models on the running interpreter's standard library.

Writes to `--out`: `target/` and `drafter/` (Hugging Face folders, bfloat16), `train.csv` (the log)
and `heldout.json` (held-out figures). A run that was stopped or killed resumes from its last checkpoint when the same
command is given again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.command import run
from engine.files import locked
from engine.models.corpus import library_texts
from engine.models.heldout import speculation_figures, token_losses
from engine.models.load import WEIGHTS, load_model, load_tokenizer
from engine.models.trainer import MAX_POSITIONS, Settings, StepResult, Trainer
from engine.signals import handled

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"
CHECKPOINT_EVERY_S = 60.0
LOG_EVERY_STEPS = 10
LOG_COLUMNS = (
    "step",
    "minutes",
    "tokens",
    "learning_rate",
    "target_loss",
    "drafter_loss",
    "tokens_per_s",
)


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` whose token 0 ends a text; every text survives encode and decode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Any, texts: Iterable[str]) -> NDArray[np.uint16]:
    """All texts in one row of token ids, each followed by the end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    rows = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([*row.ids, end], np.uint16) for row in rows])


def train(
    settings: Settings,
    out: Path,
    texts: list[str],
    tokenizer: Any,
    show: Callable[[Trainer, StepResult, float], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Trainer:
    """Spend the budget on `texts`, resuming from a checkpoint in `out` and saving one there. Raises TrainingError.

    `show(trainer, result, tokens_per_s)` is called after every step; the run ends early, with its state saved, once
    `stop()` is true. The log is `out/train.csv`.
    """
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, tokenizer.get_vocab_size(), token_stream(tokenizer, texts))
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.restore(checkpoint)
    saved = time.monotonic()
    with _log(out / "train.csv", trainer.step_number) as log:
        since_log: list[StepResult] = []
        began = time.monotonic()
        while trainer.progress < 1 and not stop():
            result = trainer.step()
            since_log.append(result)
            speed = sum(r.tokens for r in since_log) / (time.monotonic() - began)
            if show is not None:
                show(trainer, result, speed)
            if trainer.step_number % LOG_EVERY_STEPS == 0 or trainer.progress >= 1:
                _log_rows(log, trainer, since_log, speed)
                since_log, began = [], time.monotonic()
            if time.monotonic() - saved > CHECKPOINT_EVERY_S:
                trainer.save(checkpoint)
                saved = time.monotonic()
    trainer.save(checkpoint)
    return trainer


def save_models(trainer: Trainer, tokenizer: Any, out: Path) -> None:
    """Write both models as Hugging Face folders in bfloat16, each with the tokenizer."""
    for name, model in (("target", trainer.target), ("drafter", trainer.drafter)):
        model.to(torch.bfloat16).save_pretrained(out / name)
        tokenizer.save(str(out / name / "tokenizer.json"))
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "model_max_length": MAX_POSITIONS,
            "clean_up_tokenization_spaces": False,
        }
        (out / name / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def held_out_figures(out: Path, prompts: int = 64) -> dict[str, Any]:
    """Held-out figures of the saved models: losses, by depth in the context, and speculation's acceptance."""
    tokenizer = load_tokenizer(out / "target")
    target, drafter = (load_model(out / name) for name in ("target", "drafter"))
    stream = token_stream(tokenizer.backend_tokenizer, [text for _, text in library_texts(held_out=True)])
    figures: dict[str, Any] = {"held_out_tokens": int(stream.size)}
    for window, windows in ((256, 192), (MAX_POSITIONS, 8)):
        starts = np.linspace(0, stream.size - window - 1, windows).astype(int)
        rows = torch.from_numpy(stream[starts[:, None] + np.arange(window + 1)].astype(np.int64))
        losses = {name: token_losses(model, rows) for name, model in (("target", target), ("drafter", drafter))}
        if window == 256:
            figures.update({f"{name}_loss": round(float(loss.mean()), 4) for name, loss in losses.items()})
        else:
            edges = ((0, 256), (256, 1024), (1024, MAX_POSITIONS))
            for name, loss in losses.items():
                figures[f"{name}_loss_by_context"] = {
                    f"{a}-{b}": round(float(loss[:, a:b].mean()), 4) for a, b in edges
                }
    figures["speculation"] = speculation_figures(target, drafter, tokenizer, prompts, prompt_tokens=128, new_tokens=96)
    return figures


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status. Raises TrainingError, CorpusError, FileFaultError and OSError."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.set_num_threads(options.threads)
    settings = Settings(minutes=options.minutes, steps=options.steps, threads=options.threads, seed=options.seed)
    with locked(options.out):
        return _train_and_save(settings, options.out)


def _train_and_save(settings: Settings, out: Path) -> int:
    texts = [text for _, text in library_texts(held_out=False)]
    print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} million characters to train on", file=sys.stderr)
    tokenizer = train_tokenizer(texts)
    with _progress() as show, _asked_to_stop() as stop:
        trainer = train(settings, out, texts, tokenizer, show, stop)
    if trainer.progress < 1:
        print(f"stopped; the same command goes on from {out / 'checkpoint.pt'}", file=sys.stderr)
        return 130
    save_models(trainer, tokenizer, out)
    figures = {
        "training": {
            "python": platform.python_version(),
            "threads": settings.threads,
            "minutes": round(trainer.minutes, 2),
            "steps": trainer.step_number,
            "tokens": trainer.tokens_seen,
            "corpus_tokens": int(trainer.tokens.size),
            "seed": settings.seed,
        },
        **held_out_figures(out),
    }
    (out / "heldout.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (out / "checkpoint.pt").unlink()
    print(json.dumps(figures, indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.models.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder to write to (default: the package's own)")
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="minutes of processor time on each thread (default: 12)"
    )
    parser.add_argument("--steps", type=int, help="a budget in steps, in place of --minutes")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first weights and of the batches (default: 0)")
    return parser


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a flag that is checked between steps, never in the middle of one."""
    asked = threading.Event()
    with handled(lambda *_: asked.set(), signal.SIGINT, signal.SIGTERM):
        yield asked.is_set


@contextmanager
def _progress() -> Iterator[Any]:
    """A function of (trainer, result, tokens a second): draws a bar on a terminal, else prints a line now and then."""
    if not sys.stderr.isatty():

        def line(trainer: Trainer, result: StepResult, speed: float) -> None:
            if trainer.step_number % LOG_EVERY_STEPS == 0:
                print(_status(trainer, result, speed), file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    with Progress(
        BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), console=Console(stderr=True)
    ) as bars:
        task = bars.add_task("", total=1.0)
        yield lambda trainer, result, speed: bars.update(
            task, completed=trainer.progress, description=_status(trainer, result, speed)
        )


def _status(trainer: Trainer, result: StepResult, speed: float) -> str:
    return (
        f"step {trainer.step_number}, {trainer.minutes:.1f} min, target loss {result.target_loss:.2f}, "
        f"drafter loss {result.drafter_loss:.2f}, {speed:,.0f} tokens/s"
    )


@contextmanager
def _log(path: Path, from_step: int) -> Iterator[Any]:
    """A CSV writer on the log, which keeps the rows up to the step that a resumed run starts from."""
    kept: list[list[str]] = []
    if from_step and path.exists():
        with path.open(newline="", encoding="utf-8") as old:
            kept = [row for row in list(csv.reader(old))[1:] if row and int(row[0]) <= from_step]
    with path.open("w", newline="", encoding="utf-8", buffering=1) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(LOG_COLUMNS)
        writer.writerows(kept)
        yield writer


def _log_rows(log: Any, trainer: Trainer, results: list[StepResult], speed: float) -> None:
    names = ("target_loss", "drafter_loss")
    means = [np.mean([getattr(result, name) for result in results]) for name in names]
    log.writerow(
        [
            trainer.step_number,
            f"{trainer.minutes:.3f}",
            trainer.tokens_seen,
            f"{results[-1].learning_rate:.3e}",
            *(f"{value:.4f}" for value in means),
            f"{speed:.0f}",
        ]
    )


if __name__ == "__main__":
    run(main)
