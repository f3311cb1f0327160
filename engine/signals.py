"""Handlers of signals that leave alone what the process was started to ignore."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any], *signals: int) -> Iterator[None]:
    """Have `handler` called on these signals, and the handlers from before again at the end.

    A signal that the process was started to ignore, as Ctrl-C in the background of a shell, stays ignored. Does nothing
    outside the main thread, where there are no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)
