"""A controller's telemetry, read from the queues of a vLLM scheduler.

vLLM is not imported: any object with a scheduler's attributes works, and its owner reports each event.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from engine.core import telemetry
from engine.core.acceptance import own_acceptance
from engine.core.state import MAX_CANDIDATES
from engine.core.telemetry import NO_DEADLINE_S, RATE_BANDS, Observation, allocate_observation


def decodes(request: Any) -> bool:
    """Return True if a running vLLM request has only its latest token left to compute."""
    generated = request.num_output_tokens + request.num_output_placeholders
    return bool(generated > 0 and _remaining(request) <= 1)


def decode_tokens(request: Any, max_model_len: int) -> int:
    """Tokens that vLLM's next step schedules for a decoding request: its latest token and its draft.

    Under async scheduling a request whose step in flight is certainly its last gets none.
    """
    placeholders = request.num_output_placeholders
    last = request.num_prompt_tokens + request.max_tokens
    if placeholders > 0 and request.num_computed_tokens + 2 - placeholders >= last:
        return 0
    tokens = request.num_tokens_with_spec + placeholders - request.num_computed_tokens
    return max(0, min(tokens, max_model_len - request.num_computed_tokens - 1))


def _remaining(request: Any) -> int:
    return int(request.num_tokens + request.num_output_placeholders - request.num_computed_tokens)


@dataclass(slots=True)
class _Seen:
    """Per-request data that vLLM does not keep."""

    deadline: float
    """s on the observer's clock, for its first token."""
    waits: bool = True
    """Its first token is not out."""
    overdue: bool = False
    accepted: int = 0
    rejections: int = 0
    band: int = 0
    ran_out: bool = False
    """The drafter proposed fewer candidates than requested, in the latest step."""

    def __post_init__(self) -> None:
        self.rate_again()

    def rate_again(self) -> None:
        """Put it in the band of its acceptance rate."""
        self.band = min(int(own_acceptance.py_func(self) * RATE_BANDS), RATE_BANDS - 1)


@dataclass(slots=True)
class _Step:
    """A step between `planned` and `done`."""

    started: float
    candidates: int
    """c that its drafts were requested with, one step earlier."""
    num_decodes: int = 0
    decode_kv_tokens: int = 0
    prefill_tokens: int = 0
    drafted: dict[str, int] = field(default_factory=dict)
    """Candidates verified, by decoding request."""


class Observer:
    """Counts the events of a vLLM scheduler, and writes them as telemetry.

    The scheduler's owner calls `arrived`, `planned`, `preempted`, `done` and `gone` at these events, and `observe`
    before a step.

    Args:
        scheduler: vLLM's; only read.
        ttft_target: s, from the arrival at vLLM's front end.
        queue_rows: M, the waiting requests listed one by one.
        clock: seconds, of the same zero as the requests' `arrival_time`.
    """

    def __init__(
        self, scheduler: Any, *, ttft_target: float, queue_rows: int, clock: Callable[[], float] = time.time
    ) -> None:
        self.clock = clock
        self.num_decodes = 0
        """Requests that decode, at the latest observation."""
        self.decode_tokens = 0
        """Tokens that the next step schedules for them, at the latest observation."""
        self._scheduler = scheduler
        self._ttft_target = ttft_target
        self._queue_rows = queue_rows
        self._seen: dict[str, _Seen] = {}
        self._due: deque[_Seen] = deque()
        self._overdue = 0
        self._unstarted: dict[str, int] = {}
        self._unstarted_tokens = 0
        self._preempted: dict[str, Any] = {}
        self._steps: dict[int, _Step] = {}
        self._seen_at = self._last_end = clock()
        self._last: tuple[float, _Step, int] = (0.0, _Step(0.0, 0), 0)
        self._stopped = np.zeros(MAX_CANDIDATES + 1, dtype=np.int64)
        self._exhausted = np.zeros(MAX_CANDIDATES + 1, dtype=np.int64)
        self._forget_counts()

    def _forget_counts(self) -> None:
        self._counts = dict.fromkeys(
            (
                "iterations",
                "arrivals",
                "arrived_tokens",
                "finished",
                "finished_tokens",
                "emitted_tokens",
                "preemptions",
            ),
            0,
        )
        self._stopped[:] = 0
        self._exhausted[:] = 0

    def arrived(self, request: Any) -> None:
        """Record a request that joined the queue."""
        seen = _Seen(request.arrival_time + self._ttft_target)
        self._seen[request.request_id] = seen
        self._due.append(seen)
        self._unstarted[request.request_id] = request.num_prompt_tokens
        self._unstarted_tokens += request.num_prompt_tokens
        self._counts["arrivals"] += 1
        self._counts["arrived_tokens"] += request.num_prompt_tokens

    def preempted(self, request: Any) -> None:
        """Record that a running request lost its KV blocks and waits again."""
        self._preempted[request.request_id] = request
        self._counts["preemptions"] += 1

    def gone(self, request_id: str) -> None:
        """Record a request that ended early: aborted by its client, or failed."""
        self._preempted.pop(request_id, None)
        self._unstarted_tokens -= self._unstarted.pop(request_id, 0)
        seen = self._seen.pop(request_id, None)
        if seen is not None:
            self._no_longer_waits(seen)

    def planned(self, output: Any, candidates: int) -> None:
        """Record a scheduled step: `output` is vLLM's SchedulerOutput, its requests not yet advanced.

        `candidates` is the c that its drafts were requested with.
        """
        step = _Step(self.clock(), candidates)
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = self._scheduler.requests[request_id]
            self._unstarted_tokens -= self._unstarted.pop(request_id, 0)
            self._preempted.pop(request_id, None)
            if decodes(request):
                drafted = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
                step.drafted[request_id] = drafted
                step.num_decodes += 1
                step.decode_kv_tokens += request.num_computed_tokens - request.num_output_placeholders
            else:
                step.prefill_tokens += tokens
        self._steps[id(output)] = step

    def done(self, output: Any, before: Iterable[tuple[Any, int]]) -> None:
        """Record that the step of `output` ran and vLLM has taken its tokens.

        `before` holds its requests with their output tokens before the step.
        """
        step = self._steps.pop(id(output), None)
        if step is None:
            return
        now = self.clock()
        emitted_sum = 0
        for request, tokens_before in before:
            emitted = request.num_output_tokens - tokens_before
            seen = self._seen.get(request.request_id)
            if seen is None:
                continue
            emitted_sum += emitted
            finished = request.is_finished()
            if emitted > 0 and request.request_id in step.drafted:
                self._count_verified(seen, step, step.drafted[request.request_id], emitted - 1, finished)
            if emitted > 0 and seen.waits:
                self._no_longer_waits(seen)
            if finished:
                self._counts["finished"] += 1
                self._counts["finished_tokens"] += request.num_output_tokens
                self.gone(request.request_id)
        self._counts["emitted_tokens"] += emitted_sum
        if output.total_num_scheduled_tokens > 0:
            self._counts["iterations"] += 1
            # Steps overlap under async scheduling: a step's time counts from the end of the previous one.
            self._last = (max(0.0, now - max(step.started, self._last_end)), step, emitted_sum)
            self._last_end = now

    def _count_verified(self, seen: _Seen, step: _Step, drafted: int, accepted: int, finished: bool) -> None:
        """Record where a verification stopped. A candidate requested and not proposed counts as not accepted."""
        ran_out = seen.ran_out and drafted < step.candidates
        # Tokens after a request's end are cut off, accepted or not.
        rejected = not finished and (accepted < drafted or ran_out)
        counts = self._stopped if rejected else self._exhausted
        counts[min(accepted, MAX_CANDIDATES)] += 1
        seen.accepted += accepted
        seen.rejections += rejected
        seen.rate_again()

    def _no_longer_waits(self, seen: _Seen) -> None:
        if seen.overdue:
            self._overdue -= 1
        seen.waits = seen.overdue = False

    def observe(self, candidates: int) -> Observation:
        """Current telemetry (N = 1) in fresh arrays; resets the counters.

        `candidates` is the c that the latest drafts were requested with. It shows which drafters ran out of proposals.
        """
        now = self.clock()
        while self._due and self._due[0].deadline < now:
            seen = self._due.popleft()
            seen.overdue = seen.waits
            self._overdue += seen.waits
        scheduler = self._scheduler
        observation = allocate_observation(1, self._queue_rows, MAX_CANDIDATES)
        rates = [0] * RATE_BANDS
        prefilling: list[Any] = []
        num_decodes = tokens = kv_tokens = prefilling_tokens = 0
        for request in scheduler.running:
            if not decodes(request):
                prefilling.append(request)
                prefilling_tokens += _remaining(request)
                continue
            seen = self._seen[request.request_id]
            num_decodes += 1
            tokens += decode_tokens(request, scheduler.max_model_len)
            kv_tokens += request.num_computed_tokens - request.num_output_placeholders
            rates[seen.band] += 1
            seen.ran_out = len(request.spec_token_ids) < candidates
        waiting_tokens = (
            prefilling_tokens
            + self._unstarted_tokens
            + sum(request.num_tokens - request.num_computed_tokens for request in self._preempted.values())
        )
        num_waiting = len(prefilling) + len(self._unstarted) + len(self._preempted)
        self._observe_queue(observation.queue[0], prefilling, waiting_tokens, num_waiting, now)
        self._observe_acceptance(observation)
        observation.rates[0] = rates
        elapsed, last, emitted = self._last
        pool = scheduler.kv_cache_manager
        free_blocks = pool.block_pool.get_num_free_blocks() - getattr(pool, "watermark_blocks", 0)
        load = {
            "num_decodes": num_decodes,
            "decode_kv_tokens": kv_tokens,
            "num_waiting": num_waiting,
            "waiting_tokens": waiting_tokens,
            "prefilling_tokens": prefilling_tokens,
            "free_kv_tokens": max(0, free_blocks) * scheduler.block_size,
            "free_seqs": max(0, scheduler.max_num_active_reqs - len(scheduler.running)),
            "interval_s": min(max(0.0, now - self._seen_at), NO_DEADLINE_S),
            "last_iteration_s": elapsed,
            "last_candidates": last.candidates,
            "last_prefill_tokens": last.prefill_tokens,
            "last_num_decodes": last.num_decodes,
            "last_decode_kv_tokens": last.decode_kv_tokens,
            "last_emitted_tokens": emitted,
            "overdue": self._overdue,
            "ttft_target_s": self._ttft_target,
            **self._counts,
        }
        observation.load[0] = [load[name] for name in telemetry.LOAD_FIELDS]
        self.num_decodes, self.decode_tokens = num_decodes, tokens
        self._seen_at = now
        self._forget_counts()
        return observation

    def _observe_queue(
        self, queue: Any, prefilling: list[Any], waiting_tokens: int, num_waiting: int, now: float
    ) -> None:
        """The first M waiting requests in order of service, then one row that sums the rest."""
        rows = self._queue_rows
        scheduler = self._scheduler
        queued = chain(prefilling, getattr(scheduler, "kv_holding_waiting", ()), scheduler.waiting)
        listed = 0
        # Later rows arrived later, so the first with a deadline has the smallest slack.
        rest_slack = NO_DEADLINE_S
        filled: list[tuple[int, float]] = []
        for request in islice(queued, rows + 1 + len(self._preempted)):
            seen = self._seen[request.request_id]
            slack = max(seen.deadline - now, -NO_DEADLINE_S) if seen.waits else NO_DEADLINE_S
            if len(filled) == rows:
                if slack < NO_DEADLINE_S:
                    rest_slack = slack
                    break
                continue
            remaining = _remaining(request)
            filled.append((remaining, slack))
            listed += remaining
        if filled:
            queue[: len(filled)] = filled
        queue[rows] = max(0, waiting_tokens - listed), rest_slack if num_waiting > rows else 0.0

    def _observe_acceptance(self, observation: Observation) -> None:
        """Per-depth counts from the histograms of accepted lengths."""
        # A verification that accepted d or more reached depth d; one that stopped at d - 1 was rejected there.
        reached = np.cumsum((self._stopped + self._exhausted)[::-1])[::-1][1:]
        observation.accepted[0] = reached
        observation.drafted[0] = reached + self._stopped[:-1]
