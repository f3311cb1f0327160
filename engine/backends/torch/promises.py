"""Deferred tokens: chosen on the GPU and not yet known to the host.

A drafter's next step needs the token of the previous step, but only on the device. Until the host reads it, such a
token has the negative id -1 - i for entry i of a tensor on the device. Token tables and forwards accept it like any
other token.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


class Promises:
    """Buffer of `room` deferred tokens on a device.

    values: (room + 1,) int64 on the device; the last entry is for choices that were not requested · logits: (room + 1,)
    float32 likewise, of these tokens, where a forward chose them.
    """

    def __init__(self, room: int, device: torch.device) -> None:
        self.values = torch.zeros(room + 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(room + 1, dtype=torch.float32, device=device)
        self._known = np.zeros(room, dtype=np.int64)
        self._finite = np.ones(room, dtype=np.bool_)
        self._used = 0
        self._settled = False
        self.settled = 0
        """Number of waits for the device."""

    @property
    def spare(self) -> int:
        """The entry for choices that were not requested."""
        return len(self.values) - 1

    @property
    def left(self) -> int:
        """Entries that can be made before the next `settle`."""
        return self.spare - (0 if self._settled else self._used)

    def make(self, count: int) -> NDArray[np.int64]:
        """(count,) entries to be filled on the device. Numbering restarts after `settle`.

        Raises RuntimeError when the buffer is full because `settle` was not called in time.
        """
        if self._settled:
            self._used, self._settled = 0, False
        first = self._used
        if first + count > self.spare:
            raise RuntimeError(f"{first + count} tokens deferred since the last read; there is room for {self.spare}")
        self._used += count
        return np.arange(first, first + count)

    def settle(self) -> None:
        """Wait until the device has finished its work, and read the deferred tokens."""
        device = self.values.device
        if self._settled:
            return
        on_gpu = device.type == "cuda"
        read = torch.empty(self._used, dtype=torch.int64, pin_memory=on_gpu)
        read.copy_(self.values[: self._used], non_blocking=True)
        logits = torch.empty(self._used, dtype=torch.float32, pin_memory=on_gpu)
        logits.copy_(self.logits[: self._used], non_blocking=True)
        if on_gpu:
            done = torch.cuda.Event()
            done.record()
            done.synchronize()
        self._known[: self._used] = read.numpy()
        self._finite[: self._used] = np.isfinite(logits.numpy())
        self._settled = True
        self.settled += 1

    def known(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Tokens of any shape, with those deferred before the last `settle` filled in."""
        promised = tokens < 0
        if promised.all():
            return self._known[-1 - tokens]
        return np.where(promised, self._known[np.maximum(-1 - tokens, 0)], tokens)

    def finite(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """True where the logits of tokens that were deferred before the last `settle` are finite."""
        return self._finite[-1 - tokens]
