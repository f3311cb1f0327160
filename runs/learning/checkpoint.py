"""Checkpoints that training resumes from: arrays and JSON in one `.npz`, so that reading one runs no code.

A checkpoint holds `None`, numbers, strings, lists, tuples, dicts, NumPy arrays and generators, CPU tensors and
policies, nested at will. A digest over all of it tells a damaged or edited file from one that training wrote.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.recfunctions import repack_fields
from numpy.typing import NDArray

from controllers.network import Network
from controllers.policy import Header, Policy
from engine.files import write_whole

CHECKPOINT = "checkpoint.npz"
PICKLE = "checkpoint.pkl"
"""Former versions' checkpoint. It is never read, since a pickle can run any code."""

_DOCUMENT = "document"
_DIGEST = "digest"

Arrays = dict[str, NDArray[Any]]


def save_checkpoint(folder: Path, fingerprint: str, content: dict[str, Any]) -> None:
    """Write a checkpoint of the configuration and code that `fingerprint` names, whole or not at all.

    Raises:
        TypeError: `content` holds something else than what the module lists.
    """
    arrays: Arrays = {}
    document = json.dumps({"fingerprint": fingerprint, "content": _packed(content, "content", arrays)}).encode()
    parts = arrays | {_DOCUMENT: np.frombuffer(document, dtype=np.uint8), _DIGEST: _digest(document, arrays)}
    file = io.BytesIO()
    np.savez(file, **parts)
    write_whole(folder / CHECKPOINT, file.getvalue())


def load_checkpoint(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the content of the folder's checkpoint, or None where there is none.

    Raises:
        ValueError: the checkpoint is of another configuration or version of the code, a pickle, or damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        if (folder / PICKLE).exists():
            raise ValueError(
                f"{folder / PICKLE} is a pickle of an earlier version, which could run any code and is not read: "
                "remove it to begin anew"
            )
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        document, digest = arrays.pop(_DOCUMENT).tobytes(), arrays.pop(_DIGEST)
    except Exception as error:  # zipfile, NumPy and json raise a dozen kinds for damaged bytes
        raise ValueError(f"{path} cannot be read ({error}); remove it to begin anew") from error
    if not np.array_equal(digest, _digest(document, arrays)):
        raise ValueError(f"{path} was changed after training wrote it; remove it to begin anew")
    stored_document = json.loads(document)
    if stored_document["fingerprint"] != fingerprint:
        raise ValueError(
            f"{path} is of another configuration or version of the code: set hydra.run.dir (in a sweep "
            "hydra.sweep.subdir) to another folder, or remove it to begin anew"
        )
    content: dict[str, Any] = _unpacked(stored_document["content"], arrays)
    return content


def _digest(document: bytes, arrays: Arrays) -> NDArray[np.uint8]:
    digest = hashlib.sha256(document)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.descr} {array.shape}".encode())
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _packed(value: Any, place: str, arrays: Arrays) -> Any:
    """Return `value` as JSON in which an object is a container or names an array, which is added to `arrays`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        arrays[place] = value.detach().numpy()
        return {"tensor": place}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        # The padding of an aligned record is arbitrary, and a file does not keep it.
        arrays[place] = repack_fields(value)
        return {"array": place}
    if isinstance(value, np.random.Generator):
        return {"generator": _packed(value.bit_generator.state, place, arrays)}
    if isinstance(value, Policy):
        return {"policy": [value.header.model_dump(mode="json"), _packed(value.network._asdict(), place, arrays)]}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(entry, f"{place}/{key}", arrays)] for key, entry in value.items()]}
    # A named tuple would come back as a plain one.
    if type(value) in (list, tuple):
        entries = [_packed(entry, f"{place}/{i}", arrays) for i, entry in enumerate(value)]
        return entries if isinstance(value, list) else {"tuple": entries}
    raise TypeError(f"{place}: a checkpoint cannot hold a {type(value).__name__}")


def _unpacked(packed: Any, arrays: Arrays) -> Any:
    if isinstance(packed, list):
        return [_unpacked(entry, arrays) for entry in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, inner),) = packed.items()
    if kind == "tensor":
        return torch.from_numpy(arrays[inner])
    if kind == "array":
        return arrays[inner]
    if kind == "generator":
        state = _unpacked(inner, arrays)
        bits: np.random.BitGenerator = getattr(np.random, state["bit_generator"])()
        bits.state = state
        return np.random.Generator(bits)
    if kind == "policy":
        header, network = inner
        return Policy(Header.model_validate(header), Network(**_unpacked(network, arrays)))
    if kind == "tuple":
        return tuple(_unpacked(entry, arrays) for entry in inner)
    return {key: _unpacked(entry, arrays) for key, entry in inner}
