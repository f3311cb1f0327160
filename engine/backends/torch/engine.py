"""The torch engine: the shared scheduler drives a real model in real time."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Sequence
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends.clock import Clock
from engine.backends.real import RealEngine
from engine.backends.torch.generation import Ending, Generation
from engine.backends.torch.logprobs import TokenLogprob, token_logprobs
from engine.backends.torch.model import PagedModel
from engine.backends.torch.planned import Planned, look_up
from engine.backends.torch.stopwatch import Stopwatch
from engine.backends.torch.table import CacheTable
from engine.core import state as core
from engine.core.live import retire, stop_after
from engine.core.membership import cancel
from engine.core.redistribute import redistribute
from engine.core.scheduler import commit, plan
from engine.core.state import FINISHED
from engine.core.telemetry import Observation, observe
from engine.latency.measured_fit import MemoryFigures, weight_bytes
from engine.limits import EngineLimits
from engine.simulator.replay import Recording
from engine.speculation.allocation import CHAINS, Speculation
from engine.speculation.constraints import FREE, Constraints
from engine.speculation.drafter import Batch, Drafter, NoDrafter
from engine.speculation.sampling import GREEDY, Sampling, draw
from engine.speculation.tree import Drafts
from engine.speculation.verify import accept_greedy, accept_sampled

if TYPE_CHECKING:
    from engine.backends.torch.rehearsal import Rehearsal

NO_NODES: NDArray[np.int32] = np.zeros(0, dtype=np.int32)


class TorchEngine(RealEngine):
    """Serves token-id prompts with a model and a drafter, one `step` an iteration.

    Args:
        model: the target; its cache must have the blocks of `limits` and those for scratch (`CacheTable.num_blocks`).
        limits: scheduler limits.
        drafter: proposes candidates; none by default.
        speculation: allocation of an action's candidates; chains of c each by default.
        ttft_target: latency requirement on TTFT in s, which telemetry and lateness are counted against.
        queue_rows: M, the requests an observation lists one by one.
        clock: real time by default.
        record: store the data for `replay` in `recording`.
    """

    def __init__(
        self,
        model: PagedModel,
        limits: EngineLimits,
        drafter: Drafter | None = None,
        speculation: Speculation = CHAINS,
        *,
        ttft_target: float = 1.0,
        queue_rows: int = 64,
        max_candidates: int = core.MAX_CANDIDATES,
        clock: Clock | None = None,
        record: bool = False,
    ) -> None:
        self.model = model
        self.drafter: Drafter = NoDrafter() if drafter is None else drafter
        self.speculation = speculation
        self.table = CacheTable(limits)
        if (model.pool.num_blocks, model.pool.block_size) != (self.table.num_blocks, limits.block_size):
            raise ValueError(
                f"the model's cache has {model.pool.num_blocks} blocks of {model.pool.block_size} tokens; these limits "
                f"need {self.table.num_blocks} of {limits.block_size} (CacheTable(limits).num_blocks)"
            )
        most = min(max_candidates, self.drafter.most_candidates)
        super().__init__(limits, model.vocab_size, most, ttft_target=ttft_target, queue_rows=queue_rows, clock=clock)
        self.recording = Recording() if record else None
        self._drafting, self._forward = Stopwatch(model.device), Stopwatch(model.device)
        self._generations: dict[int, Generation] = {}
        self._retired = 0
        self.logprobs: dict[int, list[TokenLogprob]] = {}
        """Log probabilities of the latest iteration's emissions, by request, where requested.

        Those of the prompt's tokens from the second on, if requested too, come before those of the first output token.
        """
        self._scored: set[int] = set()

    @property
    def draft_s(self) -> float:
        """Seconds the drafter took in the latest iteration."""
        return self._drafting.seconds

    @property
    def forward_s(self) -> float:
        """Seconds the target's forward took in the latest iteration."""
        return self._forward.seconds

    def submit(
        self,
        prompt: Sequence[int] | NDArray[np.integer],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        stop: Collection[int] = (),
        ending: Ending | None = None,
        arrival: float | None = None,
        constraints: Constraints = FREE,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
    ) -> int:
        """See `RealEngine.submit`.

        Args:
            ending: an additional stop criterion on the tokens.
            constraints: on the tokens.
            logprobs: record log probabilities in `logprobs`, including those of this many most probable tokens.
            prompt_logprobs: record those of the prompt as well.
        """
        tokens, arrival, row = self._append(prompt, max_tokens, arrival)
        number = row + self._retired
        self._generations[number] = Generation(
            tokens, sampling, frozenset(stop), ending, sampling.generator(), constraints, logprobs, prompt_logprobs
        )
        if logprobs is not None:
            self._scored.add(number)
        if self.recording is not None:
            self.recording.requests.append((arrival, len(tokens), max_tokens))
        return number

    def cancel(self, number: int) -> bool:
        """Cancel a request, keeping its output so far; returns False when it was over already."""
        if number < self._retired or not cancel(self.state, 0, number - self._retired):
            return False
        self.drafter.forget(number)
        if self.recording is not None:
            self.recording.cancellations.append((len(self.recording.iterations), number))
        return True

    def output(self, number: int) -> list[int]:
        """Tokens generated so far."""
        return list(self._generations[number].output)

    def collect(self, number: int) -> list[int]:
        """Return the output of a finished request and drop it from the engine."""
        self._scored.discard(number)
        return self._generations.pop(number).output

    def stopped(self, number: int) -> bool:
        """Return True if a stop ended the output, and not its token limit."""
        return self._generations[number].stopped

    def timeline(self, number: int) -> np.void:
        """A copy of a request's row in the scheduler's table (`engine.core.state.REQUEST`); not after `retire`."""
        row: np.void = self.state.requests[number - self._retired].copy()
        return row

    def retire(self) -> NDArray[Any]:
        """Remove the rows of the earliest requests from the table, up to the first unfinished; returns them.

        Requests keep their numbers. The state then holds only the others.
        """
        self.table.leave(self.state)
        rows = retire(self.state, self.feed)
        self.table.renumber(len(rows))
        self._retired += len(rows)
        return rows

    def observe(self, observation: Observation) -> None:
        """Write telemetry into `observation` (see `engine.core.telemetry`)."""
        observe(self.state, 0, self.seen, observation)

    def step(self, candidates: int, token_budget: int) -> bool:
        """Run one iteration at the given c and n; False, at once, when no request has arrived that is unfinished."""
        start = self.clock.now()
        if not self._release(start):
            return False
        candidates = min(candidates, self.max_candidates)
        plan(self.state, 0, candidates, token_budget)
        planned = self._seat()
        drafts = self._draft(planned)
        branches = None if drafts is None else planned.branches(drafts)
        with self._forward:
            logits = self.model.forward(
                self.table, planned.seats, planned.starts, planned.counts, planned.keep, branches
            )
        # The only place where an iteration waits for the device.
        choices = self.model.top(logits)[:, 0]
        failed = planned.requests_of(~self.model.finite(logits, choices))
        if drafts is not None:
            drafts.tokens = self.model.known(drafts.tokens).astype(np.int32)
        self.logprobs = {}
        if drafts is None:
            emitted = self._choose(planned, logits, choices, failed)
        else:
            emitted, paths = self._verify(planned, drafts, logits, choices, failed)
            if branches is not None:
                self._compact(planned, paths)
        stops = self._stop(planned, emitted, failed)
        elapsed = self.clock.now() - start
        commit(self.state, 0, elapsed)
        self._store(planned, emitted, failed)
        if self.recording is not None:
            iteration, decodes = len(self.recording.iterations), planned.decodes
            self.recording.stops.extend((iteration, number, tokens) for number, tokens in stops)
            parts = (planned.counts, self.state.accepted[0], self.state.reach[0])
            self.recording.decodes.extend(zip(*(part[:decodes].tolist() for part in parts), strict=True))
            self.recording.iterations.append((start, elapsed, candidates, token_budget, decodes))
        for number in self.failed:
            self.cancel(number)
        return True

    def reset(self, clock: Clock | None = None) -> None:
        """See `RealEngine.reset`."""
        super().reset(clock)
        for number in self._generations:
            self.drafter.forget(number)
        self.table = CacheTable(self.limits)
        self.recording = None if self.recording is None else Recording()
        self._generations, self._scored, self.logprobs = {}, set(), {}
        self._retired = 0

    def prepare(self) -> None:
        """See `RealEngine.prepare`."""
        trees = self.speculation.branching > 1
        self.model.prepare(self.table, trees)
        self.drafter.prepare(self.table, trees)

    def rehearsal(self, text: NDArray[np.int32]) -> Rehearsal:
        """Driver that repeats single iterations of this engine, for profiling."""
        from engine.backends.torch.rehearsal import Rehearsal

        return Rehearsal(self, text)

    def memory(self) -> MemoryFigures:
        """Memory taken by weights and cache."""
        pool, device = self.model.pool, self.model.device
        cached = sum(tensor.numel() * tensor.element_size() for tensor in (*pool.keys, *pool.values))
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
        else:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        runner = getattr(self.drafter, "_runner", None)
        return MemoryFigures(
            total_bytes=float(total),
            weight_bytes=weight_bytes(self.model.model),
            drafter_weight_bytes=0.0 if runner is None else weight_bytes(runner.model),
            kv_bytes_per_token=cached // (pool.num_blocks * pool.block_size),
        )

    def about(self) -> dict[str, Any]:
        """Device and software that the engine runs on; JSON-serialisable."""
        device = self.model.device
        return {
            "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }

    def close(self) -> None:
        """Holds no resources that outlive the object."""

    def _seat(self) -> Planned:
        """Assign memory to the planned batch and gather its arrays."""
        for row in self.table.follow(self.state):
            tokens = self._generations[row + self._retired].tokens
            self.table.tokens[self.table.seat_of[row], : len(tokens)] = tokens
        batch = self.state.batches[0]
        size = int(batch["num_decodes"] + batch["num_prefills"])
        planned = look_up(self.state, self.table.seat_of, self._retired, int(batch["num_decodes"]), size)
        if self._scored:
            for i, number in enumerate(planned.numbers[planned.decodes :].tolist(), start=planned.decodes):
                generation = self._generations[number]
                planned.scored[i] = generation.prompt_logprobs and not generation.output
        return planned

    def _draft(self, planned: Planned) -> Drafts | None:
        """Draft candidates for the decodes and set their planned tokens to match; None: c = 0."""
        decodes = planned.decodes
        wanted = planned.counts[:decodes] - 1
        self._drafting.reset()
        if not wanted.any():
            return None
        batch = Batch(
            table=self.table,
            numbers=planned.numbers[:decodes],
            requests=[self._generations[number] for number in planned.numbers[:decodes].tolist()],
            seats=planned.seats[:decodes],
            lengths=planned.starts[:decodes] + 1,
            wanted=wanted,
            limits=planned.limits,
            speculation=self.speculation,
        )
        with self._drafting:
            drafts = self.drafter.propose(batch)
        if self.speculation.allocation != "global":
            planned.ran_out = drafts.counts < wanted
        redistribute(self.state, 0, 1 + drafts.counts)
        if self.speculation.allocation == "global":
            # Some may have more blocks than planned, or fewer tokens.
            self.table.follow(self.state)
            drafts.counts = self.state.batch_tokens[0, :decodes] - np.int64(1)
        planned.counts[:decodes] = 1 + drafts.counts
        columns = np.arange(drafts.tokens.shape[1])
        proposed = columns < drafts.counts[:, None]
        where = np.broadcast_to(planned.seats[:decodes, None], proposed.shape)[proposed]
        self.table.tokens[where, (batch.lengths[:, None] + columns)[proposed]] = drafts.tokens[proposed]
        return drafts

    def _choose(
        self, planned: Planned, logits: torch.Tensor, choices: NDArray[np.int64], failed: set[int]
    ) -> list[list[int]]:
        """Tokens emitted by each request of a batch without candidates: one, or none in the middle of its prompt."""
        decodes = planned.decodes
        self.state.accepted[0, :decodes] = 0
        self.state.reach[0, :decodes] = 0
        chosen = choices.tolist()
        emitted: list[list[int]] = []
        ends = np.cumsum(planned.keep).tolist()
        for i, (number, completes) in enumerate(zip(planned.numbers.tolist(), planned.completes.tolist(), strict=True)):
            if i >= decodes and not completes:
                emitted.append([])
                continue
            generation, row = self._generations[number], ends[i] - 1
            tokens = [chosen[row] if i in failed else _next(generation, logits, row, chosen[row])]
            if generation.may_stop and i not in failed:
                tokens = tokens[: generation.until_stop(tokens)]
            emitted.append(tokens)
        self._score(planned, emitted, failed, None, logits)
        return emitted

    def _verify(
        self,
        planned: Planned,
        drafts: Drafts,
        logits: torch.Tensor,
        choices: NDArray[np.int64],
        failed: set[int],
    ) -> tuple[list[list[int]], NDArray[np.int32]]:
        """Tokens emitted by each request of the batch, and (decodes, W) the accepted nodes of its tree.

        Fills `state.accepted` and `state.reach`. A request that failed with its candidates is tried without them, and
        removed from `failed` where its logits are then finite: a candidate's NaN spreads even if it is masked.
        """
        decodes = planned.decodes
        first_row = np.concatenate(([0], np.cumsum(planned.keep)))
        accepted, reach = self.state.accepted[0], self.state.reach[0]
        paths = np.zeros(drafts.tokens.shape, dtype=np.int32)
        generations = [self._generations[number] for number in planned.numbers.tolist()]
        for i, generation in enumerate(generations[:decodes]):
            if generation.constrained and generation.greedy and i not in failed:
                begin, end, nodes = int(first_row[i]), int(first_row[i + 1]), int(drafts.counts[i])
                tree = drafts.tokens[i, :nodes], drafts.parents[i, :nodes]
                choices[begin:end] = _scores(generation, logits[begin:end], *tree).argmax(-1)
        accept_greedy(
            choices, first_row[: decodes + 1], drafts.tokens, drafts.parents, paths, accepted[:decodes], reach[:decodes]
        )
        taken, lengths = drafts.tokens[np.arange(decodes)[:, None], paths].tolist(), accepted[:decodes].tolist()
        # A token's row comes one after that of the root.
        rows = np.concatenate((np.full((decodes, 1), -1, dtype=np.int32), paths), axis=1)
        last = 1 + rows[np.arange(decodes), accepted[:decodes]]
        following = choices[first_row[:decodes] + last].tolist()
        emitted: list[list[int]] = []
        for i, generation in enumerate(generations):
            first = int(first_row[i])
            if i in failed:
                emitted.append([int(choices[first])])
                if i < decodes:
                    accepted[i] = 0
                    reach[i] = min(1, int(drafts.counts[i]))
                continue
            if i >= decodes:
                if not planned.completes[i]:
                    emitted.append([])
                    continue
                last_row = int(first_row[i + 1]) - 1
                tokens = [_next(generation, logits, last_row, int(choices[last_row]))]
            elif generation.greedy:
                tokens = [*taken[i][: lengths[i]], following[i]]
            else:
                nodes = int(drafts.counts[i])
                tree = drafts.tokens[i, :nodes], drafts.parents[i, :nodes]
                weights = generation.sampling.probabilities(
                    _scores(generation, logits[first : first + 1 + nodes], *tree)
                )
                path, token, reach[i] = accept_sampled(weights, *tree, drafts.drawn_from[i], generation.random)
                paths[i, : len(path)] = path
                tokens = [*drafts.tokens[i, path].tolist(), token]
            if generation.may_stop:
                tokens = tokens[: generation.until_stop(tokens)]
            if i < decodes:
                accepted[i] = len(tokens) - 1
            emitted.append(tokens)
        self._score(planned, emitted, failed, paths, logits)
        for i, token in self._without_candidates(planned, [i for i in sorted(failed) if i < decodes]):
            failed.discard(i)
            generation = self._generations[int(planned.numbers[i])]
            emitted[i] = [token][: generation.until_stop([token])]
        # A candidate requested but not proposed counts as not accepted: yields are measured per requested c.
        reach[:decodes][planned.ran_out] = np.maximum(reach[:decodes], accepted[:decodes] + 1)[planned.ran_out]
        return emitted, paths

    def _without_candidates(self, planned: Planned, which: list[int]) -> list[tuple[int, int]]:
        """(place in the batch, next token) of these decodes where the logits without candidates are finite."""
        which = [i for i in which if planned.counts[i] > 1]
        if not which:
            return []
        seats, starts, one = planned.seats[which], planned.starts[which], np.ones(len(which), dtype=np.int64)
        self.model.pool.clear(self.table.places(seats, starts + 1, planned.counts[which] - 1))
        logits = self.model.forward(self.table, seats, starts, one, one)
        choices = self.model.top(logits)[:, 0]
        found = []
        for row in np.flatnonzero(self.model.finite(logits, choices)).tolist():
            generation = self._generations[int(planned.numbers[which[row]])]
            token = _next(generation, logits, row, int(choices[row]))
            if generation.logprobs is not None:
                number = int(planned.numbers[which[row]])
                self.logprobs[number] = token_logprobs(logits, [row], [token], generation.logprobs)
            found.append((which[row], token))
        return found

    def _compact(self, planned: Planned, paths: NDArray[np.int32]) -> None:
        """Move the target's cache of accepted nodes to the slots right after the tokens they follow."""
        accepted = self.state.accepted[0, : planned.decodes]
        column = np.arange(paths.shape[1])
        rows, columns = np.nonzero((column < accepted[:, None]) & (paths != column))
        if len(rows):
            first = planned.starts[rows] + 1
            self.model.move(self.table, planned.seats[rows], first + paths[rows, columns], first + columns)

    def _score(
        self,
        planned: Planned,
        emitted: list[list[int]],
        failed: set[int],
        paths: NDArray[np.int32] | None,
        logits: torch.Tensor,
    ) -> None:
        """Record the requested log probabilities of emitted tokens, and of the prompt tokens read so far."""
        if not self._scored:
            return
        first_row = np.concatenate(([0], np.cumsum(planned.keep))).tolist()
        for i, (number, tokens) in enumerate(zip(planned.numbers.tolist(), emitted, strict=True)):
            if number not in self._scored or i in failed:
                continue
            generation, first = self._generations[number], first_row[i]
            assert generation.logprobs is not None
            rows, scored = [first_row[i + 1] - 1], generation.prompt_scored
            if planned.scored[i]:
                start = int(planned.starts[i])
                # A prompt that lost its blocks is read again.
                known = range(max(start, len(scored)), min(start + int(planned.counts[i]), len(generation.prompt) - 1))
                after = [int(generation.prompt[position + 1]) for position in known]
                where = [first + position - start for position in known]
                scored.extend(token_logprobs(logits, where, after, generation.logprobs))
            elif paths is not None and i < planned.decodes:
                rows = [first, *(first + 1 + paths[i, : len(tokens) - 1]).tolist()]
            if tokens:
                before = scored if planned.scored[i] else []
                self.logprobs[number] = before + token_logprobs(logits, rows, tokens, generation.logprobs)

    def _stop(self, planned: Planned, emitted: list[list[int]], failed: set[int]) -> list[tuple[int, int]]:
        """Tell the scheduler which requests end before their limit; returns (request, tokens emitted now).

        A failed request counts one token, which is discarded; the request is cancelled and must not finish by it.
        """
        stops = []
        for i, (row, number) in enumerate(zip(planned.rows.tolist(), planned.numbers.tolist(), strict=True)):
            tokens = len(emitted[i])
            if i in failed or (self._generations[number].stopped and tokens):
                tokens += i in failed
                stop_after(self.state, 0, row, tokens)
                stops.append((number, tokens))
        return stops

    def _store(self, planned: Planned, emitted: list[list[int]], failed: set[int]) -> None:
        """Append emitted tokens to outputs and token table; discard the drafter's cache of rejected candidates."""
        table, generations = self.table, self._generations
        counts = np.array([len(tokens) for tokens in emitted], dtype=np.int64)
        lengths = planned.starts + planned.counts
        lengths[: planned.decodes] = planned.starts[: planned.decodes] + 1
        table.extend(planned.seats, lengths, counts, np.fromiter(chain.from_iterable(emitted), np.int64))
        numbers = planned.numbers.tolist()
        self.failed = [numbers[i] for i in sorted(failed)]
        self.emitted = [
            (number, tokens)
            for i, (number, tokens) in enumerate(zip(numbers, emitted, strict=True))
            if tokens and i not in failed
        ]
        for number, tokens in self.emitted:
            generations[number].output.extend(tokens)
        over = (counts > 0) & (self.state.requests["phase"][planned.rows] == FINISHED)
        self.finished = planned.numbers[over].tolist()
        for number in self.finished:
            self.drafter.forget(number)


def _next(generation: Generation, logits: torch.Tensor, row: int, top: int) -> int:
    """A request's next token, from its row of logits; `top`: the most probable one."""
    if generation.greedy and not generation.constrained:
        return top
    scores = _scores(generation, logits[row : row + 1])
    if generation.greedy:
        return int(scores[0].argmax())
    return draw(generation.sampling.probabilities(scores)[0], generation.random)


def _scores(
    generation: Generation,
    logits: torch.Tensor,
    tokens: NDArray[np.int32] = NO_NODES,
    parents: NDArray[np.int32] = NO_NODES,
) -> NDArray[np.float64]:
    """(1 + nodes, V) logits from which a request's tokens are chosen, after its output and each node of a tree."""
    scores: NDArray[np.float64] = logits.double().cpu().numpy()
    if not generation.constrained:
        return scores
    paths: list[list[int]] = [[]]
    for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
        paths.append([*paths[1 + parent], token])
    rows = zip(scores, paths, strict=True)
    return np.stack([generation.constraints.apply(row, generation.output, path) for row, path in rows])
