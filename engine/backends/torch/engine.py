"""The torch engine: the shared scheduler drives a real model in real time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends.clock import Clock, WallClock
from engine.backends.replay import Recording
from engine.backends.torch.generation import Generation
from engine.backends.torch.model import PagedModel
from engine.backends.torch.table import CacheTable
from engine.config import EngineLimits
from engine.core import state as core
from engine.core.live import append, cancel, grown, shorten_drafts, stop_after
from engine.core.scheduler import advance_clock, commit, has_work, plan, release
from engine.core.state import FINISHED
from engine.core.telemetry import Observation, allocate_observation, observe
from engine.speculation.drafter import Batch, Drafter, Drafts, NoDrafter, no_drafts
from engine.speculation.sampling import GREEDY, Sampling
from engine.speculation.verify import accept_greedy, accept_sampled


class RequestError(ValueError):
    """A request cannot be served by this engine; the message says which limit it breaks."""


@dataclass
class _Planned:
    """The batch of one iteration as arrays over its requests, decodes first."""

    numbers: NDArray[np.int64]
    seats: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    decodes: int
    completes: NDArray[np.bool_]
    """Prefills whose last chunk this is; the rest False."""

    @property
    def keep(self) -> NDArray[np.int64]:
        """Rows of logits wanted: all of a decode, the last of a prompt's last chunk."""
        keep = self.completes.astype(np.int64)
        keep[: self.decodes] = self.counts[: self.decodes]
        return keep


class TorchEngine:
    """Serves token-id prompts with a model and a drafter, one `step` an iteration.

    Args:
        model: the target; its cache must have the blocks of `limits` and those for scratch (`CacheTable.num_blocks`).
        limits: as the scheduler knows them.
        drafter: proposes candidates; none by default.
        ttft_target: latency requirement on TTFT in s, which telemetry and lateness are counted against.
        queue_rows: M, the requests an observation lists one by one.
        clock: real time by default.
        record: keep what `replay` needs, in `recording`.
    """

    def __init__(
        self,
        model: PagedModel,
        limits: EngineLimits,
        drafter: Drafter | None = None,
        *,
        ttft_target: float = 1.0,
        queue_rows: int = 64,
        max_candidates: int = core.MAX_CANDIDATES,
        clock: Clock | None = None,
        record: bool = False,
    ) -> None:
        self.model, self.limits = model, limits
        self.drafter: Drafter = NoDrafter() if drafter is None else drafter
        self.queue_rows = queue_rows
        self.max_candidates = min(max_candidates, self.drafter.most_candidates)
        self.table = CacheTable(limits)
        if (model.pool.num_blocks, model.pool.block_size) != (self.table.num_blocks, limits.block_size):
            raise ValueError(
                f"the model's cache has {model.pool.num_blocks} blocks of {model.pool.block_size} tokens; these limits "
                f"need {self.table.num_blocks} of {limits.block_size} (CacheTable(limits).num_blocks)"
            )
        self.state = core.allocate(
            1,
            64,
            total_blocks=limits.total_blocks,
            block_size=limits.block_size,
            watermark_blocks=limits.watermark_blocks,
            max_num_seqs=limits.max_num_seqs,
            ttft_target=ttft_target,
        )
        self.clock: Clock = WallClock() if clock is None else clock
        self.recording = Recording() if record else None
        self.emitted: list[tuple[int, list[int]]] = []
        """(request, tokens) of the latest iteration."""
        self._generations: dict[int, Generation] = {}

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        stop: Collection[int] = (),
        arrival: float | None = None,
    ) -> int:
        """Queue a request and return its number.

        Args:
            prompt: token ids.
            max_tokens: most tokens to generate.
            sampling: how tokens are chosen.
            stop: tokens that end the output.
            arrival: s on the engine's clock, possibly in the future; now if not given. Requests are submitted in order
                of arrival.

        Raises:
            RequestError: when the request cannot be served, or arrives before one submitted earlier.
        """
        tokens = np.array(prompt, dtype=np.int32)
        self._check(tokens, max_tokens)
        engine = self.state.engines[0]
        count = int(engine["num_requests"])
        latest = max(float(engine["now"]), float(self.state.requests["arrival"][0, count - 1]) if count else 0.0)
        if arrival is None:
            arrival = max(self.clock.now(), latest)
        elif arrival < latest:
            raise RequestError(f"arrival={arrival} s is in the past: the latest arrival or iteration was at {latest} s")
        self.state = grown(self.state, count + 1)
        number = int(append(self.state, 0, arrival, len(tokens), max_tokens))
        self._generations[number] = Generation(tokens, sampling, frozenset(stop), sampling.generator())
        if self.recording is not None:
            self.recording.requests.append((arrival, len(tokens), max_tokens))
        return number

    def _check(self, prompt: NDArray[np.int32], max_tokens: int) -> None:
        if prompt.ndim != 1 or prompt.size == 0 or max_tokens < 1:
            raise RequestError(f"prompt of shape {prompt.shape}, max_tokens={max_tokens}: need at least one token each")
        if prompt.min() < 0 or prompt.max() >= self.model.vocab_size:
            raise RequestError(f"prompt holds token {prompt.max()}; ids are 0 to {self.model.vocab_size - 1}")
        most = min(self.limits.max_model_len, self.limits.total_blocks * self.limits.block_size)
        if prompt.size + max_tokens > most:
            raise RequestError(
                f"prompt of {prompt.size} and max_tokens={max_tokens} exceed {most} tokens, the engine's context or "
                "cache"
            )

    def cancel(self, number: int) -> bool:
        """Drop a request, keeping the output it has; returns False when it was over already."""
        if not cancel(self.state, 0, number):
            return False
        self.drafter.forget(number)
        if self.recording is not None:
            self.recording.cancellations.append((len(self.recording.iterations), number))
        return True

    def output(self, number: int) -> list[int]:
        """Tokens generated so far."""
        return list(self._generations[number].output)

    def collect(self, number: int) -> list[int]:
        """The output of a request that is over, which the engine then no longer keeps."""
        return self._generations.pop(number).output

    @property
    def next_arrival(self) -> float | None:
        """When the next submitted request arrives, in s; None when all have."""
        engine = self.state.engines[0]
        if engine["released"] == engine["num_requests"]:
            return None
        return float(self.state.requests["arrival"][0, engine["released"]])

    def new_observation(self) -> Observation:
        """Fresh zeroed observation arrays of this engine's shapes."""
        return allocate_observation(1, self.queue_rows, self.max_candidates)

    def observe(self, observation: Observation) -> None:
        """Write telemetry into `observation` (see `engine.core.telemetry`)."""
        observe(self.state, 0, observation)

    def step(self, candidates: int, token_budget: int) -> bool:
        """Run one iteration at the given c and n; False, at once, when no request has arrived that is unfinished."""
        start = self.clock.now()
        advance_clock(self.state, 0, start)
        release(self.state, 0)
        if not has_work(self.state, 0):
            return False
        candidates = min(candidates, self.max_candidates)
        plan(self.state, 0, candidates, token_budget)
        planned = self._seat()
        drafts = self._draft(planned)
        logits = self.model.forward(self.table, planned.seats, planned.starts, planned.counts, planned.keep)
        emitted = self._verify(planned, drafts, logits)
        stops = self._stop(planned, emitted)
        elapsed = self.clock.now() - start
        commit(self.state, 0, elapsed)
        self._store(planned, emitted)
        if self.recording is not None:
            iteration, decodes = len(self.recording.iterations), planned.decodes
            self.recording.stops.extend((iteration, number, tokens) for number, tokens in stops)
            accepted = self.state.accepted[0, :decodes].tolist()
            self.recording.decodes.extend(zip(planned.counts[:decodes].tolist(), accepted, strict=True))
            self.recording.iterations.append((start, elapsed, candidates, token_budget, decodes))
        return True

    def run(self, candidates: int, token_budget: int) -> None:
        """Step at one c and n, waiting for arrivals, until every submitted request is over."""
        while True:
            if not self.step(candidates, token_budget):
                moment = self.next_arrival
                if moment is None:
                    return
                self.clock.wait_until(moment)

    def _seat(self) -> _Planned:
        """Give the planned batch its memory and look it up."""
        for number in self.table.follow(self.state):
            tokens = self._generations[number].tokens
            self.table.tokens[self.table.seat_of[number], : len(tokens)] = tokens
        engine = self.state.engines[0]
        size = int(engine["num_decodes"] + engine["num_prefills"])
        numbers = self.state.batch_request[0, :size].astype(np.int64)
        counts = self.state.batch_tokens[0, :size].astype(np.int64)
        rows = self.state.requests[0, numbers]
        starts = rows["computed"].astype(np.int64)
        completes = starts + counts == rows["context"]
        completes[: engine["num_decodes"]] = False
        seats = self.table.seat_of[numbers]
        return _Planned(numbers, seats, starts, counts, int(engine["num_decodes"]), completes)

    def _draft(self, planned: _Planned) -> Drafts:
        """Candidates for the decodes; those that get fewer than planned are given fewer tokens."""
        decodes = planned.decodes
        wanted = planned.counts[:decodes] - 1
        batch = Batch(
            table=self.table,
            numbers=planned.numbers[:decodes],
            requests=[self._generations[number] for number in planned.numbers[:decodes].tolist()],
            seats=planned.seats[:decodes],
            lengths=planned.starts[:decodes] + 1,
            wanted=wanted,
        )
        if not wanted.any():
            return no_drafts(batch)
        drafts = self.drafter.propose(batch)
        planned.counts[:decodes] = 1 + drafts.counts
        shorten_drafts(self.state, 0, planned.counts[:decodes])
        columns = np.arange(drafts.tokens.shape[1])
        proposed = columns < drafts.counts[:, None]
        where = np.broadcast_to(planned.seats[:decodes, None], proposed.shape)[proposed]
        self.table.tokens[where, (batch.lengths[:, None] + columns)[proposed]] = drafts.tokens[proposed]
        return drafts

    def _verify(self, planned: _Planned, drafts: Drafts, logits: torch.Tensor) -> list[list[int]]:
        """What every request of the batch emits; `state.accepted` is filled."""
        decodes = planned.decodes
        choices = logits.argmax(-1).cpu().numpy()
        first_row = np.concatenate(([0], np.cumsum(planned.keep)))
        accepted = self.state.accepted[0]
        accept_greedy(choices, first_row[: decodes + 1], drafts.tokens, accepted[:decodes])
        emitted: list[list[int]] = []
        for i, number in enumerate(planned.numbers.tolist()):
            generation, first = self._generations[number], int(first_row[i])
            if i >= decodes and not planned.completes[i]:
                emitted.append([])
                continue
            chain = drafts.tokens[i, : drafts.counts[i]] if i < decodes else drafts.tokens[:0, 0:0].reshape(-1)
            if generation.sampling.greedy:
                count = int(accepted[i]) if i < decodes else 0
                token = int(choices[first + count])
            else:
                rows = logits[first : first + len(chain) + 1].double().cpu().numpy()
                weights = generation.sampling.probabilities(rows)
                drawn_from = drafts.probabilities[i] if i < decodes else None
                count, token = accept_sampled(weights, drawn_from, chain, generation.random)
            tokens = [*chain[:count].tolist(), token]
            tokens = tokens[: generation.until_stop(tokens)]
            if i < decodes:
                accepted[i] = len(tokens) - 1
            emitted.append(tokens)
        return emitted

    def _stop(self, planned: _Planned, emitted: list[list[int]]) -> list[tuple[int, int]]:
        """Tell the scheduler which requests end before their limit; returns (request, tokens emitted now)."""
        stops = []
        for number, tokens in zip(planned.numbers.tolist(), emitted, strict=True):
            stop = self._generations[number].stop
            if stop and tokens and tokens[-1] in stop:
                stop_after(self.state, 0, number, len(tokens))
                stops.append((number, len(tokens)))
        return stops

    def _store(self, planned: _Planned, emitted: list[list[int]]) -> None:
        """Append what was emitted to outputs and token table; forget what the drafter cached of rejected candidates."""
        table, phase = self.table, self.state.requests["phase"][0]
        self.emitted = []
        for i, (number, tokens) in enumerate(zip(planned.numbers.tolist(), emitted, strict=True)):
            if not tokens:
                continue
            self._generations[number].output.extend(tokens)
            self.emitted.append((number, tokens))
            seat = planned.seats[i]
            length = int(planned.starts[i]) + (1 if i < planned.decodes else int(planned.counts[i]))
            table.tokens[seat, length : length + len(tokens)] = tokens
            table.draft_computed[seat] = min(table.draft_computed[seat], length + len(tokens) - 1)
            if phase[number] == FINISHED:
                self.drafter.forget(number)
