"""One iteration in slow, plain Python, written from the design's description of it and not from the compiled code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class Request:
    """A request and all that happened to it; `agrees[p]` says whether the drafter is right at output position p."""

    number: int
    arrival: float
    prompt: int
    output: int
    agrees: list[bool]
    phase: str = "queued"
    generated: int = 0
    cached: int = 0
    context: int = 0
    slots: int = 0
    admitted: float = math.nan
    preemptions: int = 0
    emissions: list[tuple[float, int]] = field(default_factory=list)
    drafts: list[tuple[int, int]] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Prompt tokens it still has to prefill."""
        return 0 if self.phase in ("decoding", "finished") else self.context - self.cached

    @property
    def gaps(self) -> list[float]:
        """Seconds between its consecutive emissions."""
        times = [time for time, _ in self.emissions]
        return [b - a for a, b in pairwise(times)]


class Engine:
    """A serving engine that looks at all requests whenever it needs to know something."""

    def __init__(
        self,
        requests: list[Request],
        *,
        block_size: int,
        total_blocks: int,
        watermark_blocks: int,
        max_num_seqs: int,
        prefill: str = "chunked",
    ) -> None:
        self.requests = requests
        self.block_size = block_size
        self.total_blocks = total_blocks
        self.watermark_blocks = watermark_blocks
        self.max_num_seqs = max_num_seqs
        self.prefill = prefill
        self.now = 0.0
        self.decodes: list[tuple[Request, int]] = []
        self.prefills: list[tuple[Request, int]] = []
        for request in requests:
            request.context = request.prompt

    def blocks(self, slots: int) -> int:
        return math.ceil(slots / self.block_size)

    @property
    def free_blocks(self) -> int:
        return self.total_blocks - sum(self.blocks(request.slots) for request in self.requests)

    @property
    def running(self) -> list[Request]:
        return [request for request in self.requests if request.phase in ("prefilling", "decoding")]

    @property
    def queue(self) -> list[Request]:
        """Arrived, neither running nor finished, first come first served."""
        return [request for request in self.requests if request.phase == "queued" and request.arrival <= self.now]

    @property
    def done(self) -> bool:
        return all(request.phase == "finished" for request in self.requests)

    def wake(self) -> None:
        """With nothing to do, jump to the next arrival."""
        if not self.running and not self.queue and not self.done:
            self.now = min(request.arrival for request in self.requests if request.phase == "queued")

    def plan(self, candidates: int, token_budget: int) -> list[tuple[int, int]]:
        """The next batch as (request, tokens), decodes first."""
        prompts_ran = bool(self.prefills)
        self.decodes, self.prefills = [], []
        if self.prefill in ("chunked", "whole"):
            preempted = self._plan_decodes(candidates)
            self._plan_prompts(token_budget, may_admit=not preempted)
        else:
            decodes_turn = prompts_ran and any(request.phase == "decoding" for request in self.running)
            if self.prefill == "first" or not decodes_turn:
                self._plan_prompts(token_budget, may_admit=True)
            if not self.prefills:
                self._plan_decodes(candidates)
        return [(request.number, tokens) for request, tokens in self.decodes + self.prefills]

    def _plan_decodes(self, candidates: int) -> bool:
        """Every decoding request decodes; returns whether one had to be preempted for that."""
        preempted = self._make_room()
        for request in self.running:
            if request.phase == "decoding":
                tokens = min(1 + candidates, request.output - request.generated)
                while self._missing(request, tokens) > self.free_blocks:
                    tokens -= 1
                request.slots = max(request.slots, request.cached + tokens)
                self.decodes.append((request, tokens))
        return preempted

    def _plan_prompts(self, token_budget: int, may_admit: bool) -> None:
        for request in self.running:
            if request.phase == "prefilling" and token_budget > 0:
                token_budget -= self._chunk(request, token_budget)
        while token_budget > 0 and may_admit and self.queue:
            request = self.queue[0]
            reserve = self.watermark_blocks if self.running else 0
            if len(self.running) == self.max_num_seqs or self.blocks(request.context) + reserve > self.free_blocks:
                break
            if self.prefill in ("whole", "first") and self.prefills and request.context > token_budget:
                break
            request.phase = "prefilling"
            request.slots = request.context
            if math.isnan(request.admitted):
                request.admitted = self.now
            token_budget -= self._chunk(request, token_budget)

    def commit(self, elapsed: float) -> None:
        """End the iteration: emit what was accepted plus one, finish who has all of its output."""
        self.now += elapsed
        for request, tokens in self.decodes:
            right = request.agrees[request.generated : request.generated + tokens - 1]
            accepted = right.index(False) if False in right else len(right)
            request.cached += accepted + 1
            request.drafts.append((tokens - 1, accepted))
            self._emit(request, accepted + 1)
        for request, tokens in self.prefills:
            request.cached += tokens
            if request.cached == request.context:
                request.phase = "decoding"
                self._emit(request, 1)

    def accepted(self) -> list[int]:
        """How many candidates of each planned decode will be accepted."""
        counts = []
        for request, tokens in self.decodes:
            count = 0
            while count < tokens - 1 and request.agrees[request.generated + count]:
                count += 1
            counts.append(count)
        return counts

    def _missing(self, request: Request, tokens: int) -> int:
        return max(0, self.blocks(request.cached + tokens) - self.blocks(request.slots))

    def _make_room(self) -> bool:
        """Preempt the latest arrivals until every decode left has a slot for its next token."""
        preempted = False
        for request in self.running:
            while request.phase == "decoding" and self._missing(request, 1) > self.free_blocks:
                self._preempt(self.running[-1])
                preempted = True
            if request.phase == "decoding":
                request.slots = max(request.slots, request.cached + 1)
        return preempted

    def _preempt(self, request: Request) -> None:
        request.phase = "queued"
        request.context = request.prompt + request.generated
        request.cached = 0
        request.slots = 0
        request.preemptions += 1

    def _chunk(self, request: Request, most: int) -> int:
        tokens = request.context - request.cached
        if self.prefill in ("chunked", "turns"):
            tokens = min(most, tokens)
        self.prefills.append((request, tokens))
        return tokens

    def _emit(self, request: Request, tokens: int) -> None:
        request.generated += tokens
        request.emissions.append((self.now, tokens))
        if request.generated == request.output:
            request.phase = "finished"
            request.slots = 0
