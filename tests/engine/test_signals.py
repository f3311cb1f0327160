"""Signals that a process was started to ignore stay ignored."""

from __future__ import annotations

import signal

import pytest

from engine.signals import handled


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_so_and_another_one_is_handled(ignored: signal.Signals) -> None:
    (other,) = {signal.SIGINT, signal.SIGTERM} - {ignored}
    outer = {ignored: signal.signal(ignored, signal.SIG_IGN), other: signal.signal(other, signal.default_int_handler)}
    heard: list[int] = []
    try:
        with handled(lambda number, _: heard.append(number), signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(ignored)
            signal.raise_signal(other)
        assert heard == [other]
        assert signal.getsignal(ignored) == signal.SIG_IGN
        assert signal.getsignal(other) == signal.default_int_handler
    finally:
        for number, handler in outer.items():
            signal.signal(number, handler)
