"""Training: the optimizer's equations, a step that learns, and a run that goes on where it was killed."""

import csv
import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch

from engine.files import FileFaultError, locked
from engine.models import train as command
from engine.models.muon import Muon, orthogonalised
from engine.models.train import token_stream, train, train_tokenizer
from engine.models.trainer import Settings, Shape, Trainer, TrainingError

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * 12 for i in range(20)]
TOY = Settings(
    steps=6,
    threads=1,
    batch_tokens=128,
    window=16,
    long_window=32,
    long_share=0.25,
    warmup_steps=2,
    target=Shape(hidden=64, layers=2, intermediate=96),
    drafter=Shape(hidden=64, layers=1, intermediate=64),
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocabulary=300)


@pytest.fixture
def trainer(tokenizer):
    return Trainer(TOY, tokenizer.get_vocab_size(), token_stream(tokenizer, TEXTS))


def _states(trainer):
    models = {**trainer.target.state_dict(prefix="t."), **trainer.drafter.state_dict(prefix="d.")}
    return {name: value.clone() for name, value in models.items()}


def _assert_equal_states(a, b):
    first, second = _states(a), _states(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (a.step_number, a.tokens_seen) == (b.step_number, b.tokens_seen)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales(shape):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    singular = torch.linalg.svdvals(orthogonalised(matrix))
    assert singular.max() < 1.3
    assert singular.median() > 0.6
    assert torch.nn.functional.cosine_similarity(orthogonalised(matrix).flatten(), (u @ vh).flatten(), dim=0) > 0.95


def test_muon_does_what_its_equations_say():
    rng = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(6, 4, generator=rng))
    first, second = torch.randn(2, 6, 4, generator=rng)
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    expected, momentum = weight.detach().clone(), torch.zeros(6, 4)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + gradient
        update = orthogonalised((gradient + 0.9 * momentum)[None])[0]
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 0.2 * 6**0.5 * update
    torch.testing.assert_close(weight.detach(), expected)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"not for a parameter of shape \(5,\)"):
        Muon([torch.nn.Parameter(torch.zeros(5))])


def test_every_weight_has_one_optimizer(trainer):
    for model in (trainer.target, trainer.drafter):
        held = [
            id(p)
            for optimizer in trainer._optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if any(p is q for q in model.parameters())
        ]
        assert sorted(held) == sorted(map(id, model.parameters()))


def test_a_step_lowers_both_losses_on_its_own_batch(trainer):
    batch = trainer._batch()
    with torch.no_grad():
        before = [model(batch, labels=batch).loss for model in (trainer.target, trainer.drafter)]
    result = trainer.step()
    with torch.no_grad():
        after = [model(batch, labels=batch).loss for model in (trainer.target, trainer.drafter)]
    assert after[0] < before[0]
    assert after[1] < before[1]
    assert result.tokens == 128


def test_the_target_learns_nothing_from_its_drafter(tokenizer):
    stream = token_stream(tokenizer, TEXTS)
    wide = Settings(**{**TOY.__dict__, "drafter": Shape(hidden=128, layers=1, intermediate=64)})
    trainers = [Trainer(settings, tokenizer.get_vocab_size(), stream) for settings in (TOY, wide)]
    for trainer in trainers:
        trainer.step()
    a, b = (trainer.target.state_dict() for trainer in trainers)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path, tokenizer):
    whole = train(TOY, tmp_path / "whole", TEXTS, tokenizer)
    seen = []
    part = train(
        TOY,
        tmp_path / "parts",
        TEXTS,
        tokenizer,
        show=lambda t, *_: seen.append(t.step_number),
        stop=lambda: len(seen) == 4,
    )
    assert part.progress == pytest.approx(4 / 6)
    rest = train(TOY, tmp_path / "parts", TEXTS, tokenizer)
    assert rest.progress == 1
    _assert_equal_states(whole, rest)
    for name in ("whole", "parts"):
        with (tmp_path / name / "train.csv").open() as log:
            assert [row["step"] for row in csv.DictReader(log)] == ["6"]


def test_a_checkpoint_carries_the_whole_state(tmp_path, trainer, tokenizer):
    trainer.step()
    trainer.save(tmp_path / "checkpoint.pt")
    other = Trainer(TOY, tokenizer.get_vocab_size(), trainer.tokens)
    other.restore(tmp_path / "checkpoint.pt")
    assert other.processor_seconds == trainer.processor_seconds > 0
    trainer.step()
    other.step()
    _assert_equal_states(trainer, other)
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint.pt"]


def test_a_checkpoint_of_other_settings_or_text_is_refused(tmp_path, trainer, tokenizer):
    trainer.save(tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match=r"made with seed=0 \(now 5\); give the same to resume, or delete"):
        train(Settings(**{**TOY.__dict__, "seed": 5}), tmp_path, TEXTS, tokenizer)
    with pytest.raises(TrainingError, match=r"made with text="):
        train(TOY, tmp_path, TEXTS[1:], tokenizer)
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(TrainingError, match="not a checkpoint of this script; delete it"):
        train(TOY, tmp_path, TEXTS, tokenizer)


def test_the_last_part_of_the_budget_trains_on_long_windows(trainer):
    lengths = []
    while trainer.progress < 1:
        lengths.append(trainer._batch().shape[1] - 1)
        trainer.step_number += 1
    assert lengths == [16, 16, 16, 16, 16, 32]


def test_the_learning_rate_rises_then_falls_along_a_cosine(trainer):
    factors = []
    for step in range(6):
        trainer.step_number = step
        factors.append(trainer._rate_factor())
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(6) / 6))
    np.testing.assert_allclose(factors, cosine * [0.5, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("wrong", "message"), [({"minutes": 0}, "minutes=0"), ({"steps": 0}, "steps=0"), ({"threads": 0}, "threads=0")]
)
def test_a_budget_that_trains_nothing_is_refused(wrong, message):
    with pytest.raises(TrainingError, match=message):
        Settings(**wrong)


def test_less_text_than_a_window_is_refused(tokenizer):
    with pytest.raises(TrainingError, match="less than one window of 32"):
        Trainer(TOY, tokenizer.get_vocab_size(), np.zeros(33, np.uint16))


@pytest.fixture
def toy_command(monkeypatch, tmp_path):
    """The command on toy texts and toy models, writing to `tmp_path`."""
    toy = {name: getattr(TOY, name) for name in ("batch_tokens", "window", "long_window", "target", "drafter")}
    monkeypatch.setattr(command, "Settings", partial(Settings, **toy))
    monkeypatch.setattr(
        command, "library_texts", lambda held_out: [(f"{i}.py", text * 2) for i, text in enumerate(TEXTS)]
    )
    return partial(command.main, ["--out", str(tmp_path), "--steps", "3", "--threads", "1"])


def test_the_command_leaves_models_log_and_figures_and_no_checkpoint(toy_command, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert toy_command() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drafter", "heldout.json", "target", "train.csv"]
    for name in ("target", "drafter"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).config.hidden_size == 64
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.decode(tokenizer.encode("def f ( x ) :\n\tpass")) == "def f ( x ) :\n\tpass"
    figures = json.loads((tmp_path / "heldout.json").read_text())
    assert figures["training"]["steps"] == 3
    assert 0 < figures["target_loss"] < 10
    assert len(figures["speculation"]["drafter_acceptance_by_position"]) == 6
    assert json.loads(capsys.readouterr().out) == figures


def test_a_stopped_command_says_how_to_go_on_and_then_does(toy_command, tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def killed_in_the_second_step(trainer):
        if trainer.step_number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", killed_in_the_second_step)
        assert toy_command() == 130
    assert "the same command goes on from" in capsys.readouterr().err
    assert torch.load(tmp_path / "checkpoint.pt")["step_number"] == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert toy_command() == 0
    assert json.loads((tmp_path / "heldout.json").read_text())["training"]["steps"] == 3


def test_a_second_command_is_refused_the_folder_of_one_that_runs(toy_command, tmp_path):
    with locked(tmp_path), pytest.raises(FileFaultError, match="another process is writing into this folder"):
        toy_command()


def test_in_the_background_of_a_shell_ctrl_c_stays_ignored_and_a_kill_stops():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with command._asked_to_stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop()
            signal.raise_signal(signal.SIGTERM)
            assert stop()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_names_what_it_cannot_use(toy_command, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: not a checkpoint of this script"):
        toy_command()
