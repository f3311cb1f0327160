"""A checkpoint comes back as it was saved, or is refused in one line, and never runs code."""

from __future__ import annotations

import pickle
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runs.learning.checkpoint import CHECKPOINT, PICKLE, load_checkpoint, save_checkpoint

PADDED = np.dtype([("a", np.int8), ("b", np.float64)], align=True)


def _content() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "numbers": [1, -(2**127), 0.1, float("inf"), True, None, "é"],
        "by number": {0: (1.5, 2), 7: {"x": []}},
        "array": rng.random((3, 2), dtype=np.float32),
        "records": np.array([(1, 2.5), (3, -0.0)], dtype=PADDED),
        "tensors": [torch.tensor(2.0), torch.arange(4)],
        "generator": rng,
    }


def _damaged(path: Path, content: bytes) -> ValueError:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="remove it to begin anew") as caught:
        load_checkpoint(path.parent, "made with")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    content = _content()
    save_checkpoint(tmp_path, "made with", content)
    back = load_checkpoint(tmp_path, "made with")
    assert back is not None
    assert back.keys() == content.keys()
    for key in ("numbers", "by number"):
        assert back[key] == content[key]
    assert isinstance(back["by number"][0], tuple)
    assert back["array"].dtype == np.float32
    np.testing.assert_array_equal(back["array"], content["array"])
    np.testing.assert_array_equal(back["records"].astype(PADDED), content["records"])
    for ours, theirs in zip(back["tensors"], content["tensors"], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    drawn = np.random.default_rng(3)
    drawn.random((3, 2), dtype=np.float32)
    assert back["generator"].random() == drawn.random()


def test_a_folder_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, "made with") is None


@pytest.mark.parametrize("value", [namedtuple("Pair", "a b")(1, 2), {1, 2}, object(), np.array([None])])
def test_what_would_come_back_as_something_else_is_not_saved(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="content/state/0: a checkpoint cannot hold a"):
        save_checkpoint(tmp_path, "made with", {"state": [value]})
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "made with", _content())
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    for length in (0, 1, 3, 4, len(whole) // 2, len(whole) - 1):
        _damaged(path, whole[:length])
    _damaged(path, b"not a checkpoint")
    # A flipped bit is refused, or was in what a ZIP file does not need, such as the time of an entry.
    refused = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            back = load_checkpoint(tmp_path, "made with")
        except ValueError:
            refused += 1
        else:
            assert back is not None
            np.testing.assert_array_equal(back["array"], _content()["array"])
    assert refused > len(whole) / 7 / 2


def test_an_edited_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "made with", _content())
    path = tmp_path / CHECKPOINT
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["content/array"] = arrays["content/array"][:2]
    with path.open("wb") as file:
        np.savez(file, **arrays)
    assert "was changed after training wrote it" in str(_damaged(path, path.read_bytes()))


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "made with", {})
    with pytest.raises(ValueError, match="of another configuration or version of the code"):
        load_checkpoint(tmp_path, "made otherwise")


class _Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def test_no_pickle_is_ever_read(tmp_path: Path) -> None:
    went_off = tmp_path / "went off"
    bomb = pickle.dumps(_Bomb(went_off))
    pickle.loads(bomb)
    went_off.unlink()
    (tmp_path / PICKLE).write_bytes(bomb)
    with pytest.raises(ValueError, match=rf"{PICKLE} is a pickle of an earlier version, .* remove it to begin anew"):
        load_checkpoint(tmp_path, "made with")
    (tmp_path / PICKLE).unlink()
    _damaged(tmp_path / CHECKPOINT, bomb)
    with (tmp_path / CHECKPOINT).open("wb") as file:
        np.savez(file, document=np.array([_Bomb(went_off)], dtype=object), digest=np.zeros(1))
    _damaged(tmp_path / CHECKPOINT, (tmp_path / CHECKPOINT).read_bytes())
    assert not went_off.exists()
