"""The engine's thread: days of requests in the memory of a moment, and nothing lost when things go wrong."""

from __future__ import annotations

import asyncio
import gc
import logging
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from controllers.fixed import Fixed
from engine.backends.torch.engine import TorchEngine
from engine.core.metrics import request_table
from engine.core.state import CANCELLED, FINISHED, REQUEST
from engine.speculation.sampling import GREEDY
from runs.server import worker as working
from runs.server.guard import Guarded
from runs.server.ledger import Ledger
from runs.server.metrics import Metrics
from runs.server.worker import RETIRE_AT, Refused, Ticket, Worker
from tests.engine.backends.torch import models

MODEL = "llama"
PROMPTS = models.prompts([1, 4, 9, 2])


def worker_on(engine: TorchEngine, folder: Path, most_open: int = 64) -> Worker:
    guard = Guarded(Fixed(candidates=0, token_budget=64), Fixed(candidates=0, token_budget=64), 0, 10.0, 100)
    metrics = Metrics("tiny", 256, 64, 4)
    return Worker(engine, guard, most_open, Ledger(folder), metrics)


def ticket(worker: Worker, prompt: list[int], max_tokens: int) -> Ticket:
    return Ticket(prompt, max_tokens, GREEDY, frozenset(), None, worker.now())


async def read(one: Ticket) -> tuple[list[int], str]:
    tokens: list[int] = []
    while True:
        _, emission = await one.emissions.get()
        tokens += emission.tokens
        if emission.finish is not None:
            return tokens, emission.finish


def serving(worker: Worker, client: Callable[[], Awaitable[None]]) -> NDArray[np.void]:
    """Run a client beside the worker, then close it; the rows of all requests."""

    async def both() -> None:
        worker.start(asyncio.get_running_loop())
        try:
            await asyncio.wait_for(client(), 600)
        finally:
            worker.close()

    asyncio.run(both())
    return worker.history()


def test_memory_and_tables_stay_flat_over_thousands_of_requests_and_history_is_whole(tmp_path: Path) -> None:
    engine = models.engine(MODEL, "none", models.limits())
    worker = worker_on(engine, tmp_path)
    expected = [models.generated(MODEL, prompt, 3) for prompt in PROMPTS]
    served = 0

    async def pass_over(requests: int) -> None:
        nonlocal served
        for _ in range(requests // 40):
            wave = [(i % 4, ticket(worker, PROMPTS[i % 4], 1 + i % 2)) for i in range(40)]
            for _, one in wave:
                worker.submit(one)
            for which, one in wave:
                tokens, finish = await read(one)
                assert (tokens, finish) == (expected[which][: one.max_tokens], "length")
            served += 40

    async def client() -> None:
        tracemalloc.start()
        await pass_over(2 * RETIRE_AT)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        await pass_over(2 * RETIRE_AT)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        rows = len(engine.state.requests)
        assert rows <= 2 * RETIRE_AT, "the request table does not grow"
        assert len(engine.table.seat_of) <= rows
        assert grown < 8 * served, "a request leaves next to nothing behind"

    table = request_table(serving(worker, client))
    assert len(table["request"]) == served == int(engine.state.totals["finished"][0])
    assert (np.diff(table["arrival_s"]) >= 0).all()
    assert (table["finish_s"] >= table["first_token_s"]).all()
    assert table["generated_tokens"].tolist() == [1 + i % 40 % 2 for i in range(served)]


def test_a_long_request_among_short_ones_keeps_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working, "RETIRE_AT", 8)
    engine = models.engine(MODEL, "none", models.limits())
    worker = worker_on(engine, tmp_path)
    retired: list[int] = []
    retire = engine.retire
    monkeypatch.setattr(engine, "retire", lambda: _noted(retire(), retired))

    async def client() -> None:
        for _ in range(3):
            long = ticket(worker, PROMPTS[2], 40)
            worker.submit(long)
            for _ in range(12):
                short = ticket(worker, PROMPTS[1], 1)
                worker.submit(short)
                assert (await read(short))[0] == models.generated(MODEL, PROMPTS[1], 1)
            assert (await read(long))[0] == models.generated(MODEL, PROMPTS[2], 40)

    table = request_table(serving(worker, client))
    assert sum(retired) > 20
    assert table["generated_tokens"].tolist() == ([40] + [1] * 12) * 3


def _noted(rows: np.ndarray, counts: list[int]) -> np.ndarray:
    counts.append(len(rows))
    return rows


def test_places_are_bounded_and_free_again_when_clients_leave(tmp_path: Path) -> None:
    worker = worker_on(models.engine(MODEL, "none", models.limits()), tmp_path, most_open=3)

    async def client() -> None:
        open_ones = [ticket(worker, PROMPTS[0], 200) for _ in range(3)]
        for one in open_ones:
            worker.submit(one)
        with pytest.raises(Refused) as refused:
            worker.submit(ticket(worker, PROMPTS[0], 1))
        assert refused.value.reason == "full"
        assert refused.value.retry_s >= 1
        for one in open_ones:
            worker.leave(one)
        assert {(await read(one))[1] for one in open_ones} == {"abort"}
        assert worker.num_open == 0
        late = ticket(worker, PROMPTS[0], 2)
        worker.submit(late)
        assert (await read(late))[1] == "length"
        worker.leave(late)

    serving(worker, client)
    state = worker.engine.state
    assert (state.totals["cancelled"][0], state.totals["finished"][0]) == (3, 1)
    assert state.instances["free_blocks"][0] == 64


def test_a_drain_finishes_what_was_accepted_and_accepts_nothing_more(tmp_path: Path) -> None:
    worker = worker_on(models.engine(MODEL, "none", models.limits()), tmp_path)

    async def client() -> None:
        accepted = [ticket(worker, PROMPTS[i % 4], 20) for i in range(20)]
        for one in accepted:
            worker.submit(one)
        draining = asyncio.ensure_future(worker.drain(60.0))
        await asyncio.sleep(0)
        with pytest.raises(Refused) as refused:
            worker.submit(ticket(worker, PROMPTS[0], 1))
        assert refused.value.reason == "draining"
        assert await draining
        assert {(await read(one))[1] for one in accepted} == {"length"}

    assert (serving(worker, client)["phase"] == FINISHED).sum() == 20


def test_a_drain_that_takes_too_long_drops_the_rest_and_says_so(tmp_path: Path) -> None:
    worker = worker_on(models.engine(MODEL, "none", models.limits()), tmp_path)

    async def client() -> None:
        slow = ticket(worker, PROMPTS[0], 250)
        worker.submit(slow)
        assert not await worker.drain(0.0)
        assert (await read(slow))[1] == "abort"

    assert (serving(worker, client)["phase"] == CANCELLED).sum() == 1


def test_when_the_engine_fails_every_open_request_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = models.engine(MODEL, "none", models.limits())
    worker = worker_on(engine, tmp_path)
    step, ended = engine.step, []
    monkeypatch.setattr(
        engine, "step", lambda *action: step(*action) if engine.state.totals["iterations"][0] < 5 else 1 / 0
    )
    worker.on_broken = lambda: ended.append(True)

    async def client() -> None:
        accepted = [ticket(worker, PROMPTS[i % 4], 100) for i in range(12)]
        for one in accepted:
            worker.submit(one)
        assert {(await read(one))[1] for one in accepted} == {"error"}
        with pytest.raises(Refused) as refused:
            worker.submit(ticket(worker, PROMPTS[0], 1))
        assert refused.value.reason == "broken"

    with caplog.at_level(logging.ERROR):
        serving(worker, client)
    assert ended == [True]
    assert "ZeroDivisionError" in caplog.text


def test_one_request_that_the_engine_cannot_serve_disturbs_no_other(tmp_path: Path) -> None:
    worker = worker_on(models.engine(MODEL, "none", models.limits()), tmp_path)

    async def client() -> None:
        good, bad = ticket(worker, PROMPTS[1], 9), ticket(worker, [models.VOCABULARY], 9)
        for one in (good, bad):
            worker.submit(one)
        assert (await read(bad))[1] == "error"
        assert await read(good) == (models.generated(MODEL, PROMPTS[1], 9), "length")

    serving(worker, client)


def test_a_full_disk_costs_rows_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path)
    rows = np.zeros(3, dtype=REQUEST)
    rows["prompt"] = [1, 2, 3]
    ledger.add(rows)
    write = ledger._file.write
    ledger._file = type("Full", (), {"write": lambda _, content: write(content[:50]), "seek": ledger._file.seek,
                                     "read": ledger._file.read, "close": ledger._file.close})()  # fmt: skip
    ledger.add(rows)
    ledger.add(rows)
    assert ledger.lost == 6
    assert caplog.text.count("will miss requests: the disk is full") == 1
    assert ledger.whole(np.zeros(0, dtype=REQUEST))["prompt"].tolist() == [1, 2, 3]
