"""Models of other folders: their code stays unrun, and what cannot be read is named in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from engine.models.load import ModelFilesError, deepen, load_pretrained, load_pretrained_tokenizer

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Own: pass\n"


def _gpt2() -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def test_code_of_a_model_folder_is_neither_run_nor_asked_about(tmp_path: Path) -> None:
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    (tmp_path / "own.py").write_text(CODE)
    with pytest.raises(ModelFilesError, match=r"engine\.trust_remote_code=true"):
        load_pretrained(str(tmp_path))
    with pytest.raises(ModelFilesError, match="its tokenizer cannot be read"):
        load_pretrained_tokenizer(str(tmp_path))
    assert not list(tmp_path.rglob("ran"))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    _gpt2().save_pretrained(tmp_path / "whole")
    assert load_pretrained(str(tmp_path / "whole")).config.n_layer == 2
    weights = tmp_path / "whole" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, said in (
        ("absent", "no such folder"),
        ("file", "a file; give the folder"),
        ("empty", "cannot be read"),
        ("whole", "cannot be read"),
    ):
        with pytest.raises(ModelFilesError, match=f"{name}: .*{said}") as refusal:
            load_pretrained(str(tmp_path / name))
        assert "\n" not in str(refusal.value)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    model = _gpt2()
    weights = {name: value for name, value in model.state_dict().items() if "h.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelFilesError, match=r"missing weights: transformer\.h\.1\.mlp"):
        load_pretrained(str(tmp_path))


def test_a_model_of_another_build_cannot_be_deepened() -> None:
    with pytest.raises(ValueError, match="layers=4: GPT2LMHeadModel cannot be deepened"):
        deepen(_gpt2(), 4)
