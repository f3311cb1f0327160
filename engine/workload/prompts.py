"""Requests of real text, for engines that run a model: arrivals, tokens and sampling settings."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from engine.limits import EngineLimits
from engine.models.corpus import Prompt, cut_prompts, library_texts, read_prompts
from engine.speculation.sampling import GREEDY, Sampling
from engine.workload.arrivals import Arrivals
from engine.workload.formats import TimeUnit
from engine.workload.lengths import LengthModel
from engine.workload.records import ending, scenario_of, stem
from engine.workload.source import ARRIVALS, LENGTHS, PROMPTS, SAMPLING, Count, Seconds, WorkloadSource, stream
from engine.workload.trace import TooLong, read_trace
from engine.workload.workload import Workload, WorkloadError

log = logging.getLogger(__name__)

USUAL_REQUESTS = 100
"""Requests of a source that neither a setting nor a file bounds."""

SHAREGPT_LEAST, SHAREGPT_PROMPT, SHAREGPT_TOTAL = 4, 1024, 2048
"""Tokens of a ShareGPT conversation that `vllm bench serve` takes: at least, in its prompt, in prompt and answer."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """R requests, in order of arrival.

    arrival: (R,) s, non-decreasing · tokens: R arrays of token ids · max_tokens: (R,) output tokens of each, fewer
    only if it generates a token of `stop` · sampling: R settings, each with its own seed · origin: where each
    prompt's text is from.
    """

    name: str
    arrival: NDArray[np.float64]
    tokens: Sequence[NDArray[np.int32]]
    max_tokens: NDArray[np.int64]
    sampling: Sequence[Sampling]
    origin: Sequence[str]
    stop: frozenset[int] = frozenset()

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.tokens)

    @property
    def digest(self) -> str:
        """sha256 over all data that a run depends on, token by token."""
        sha = hashlib.sha256(f"prompts {sorted(self.stop)}".encode())
        sha.update(self.arrival.tobytes())
        sha.update(self.max_tokens.tobytes())
        for tokens, sampling in zip(self.tokens, self.sampling, strict=True):
            sha.update(f"{len(tokens)} {sampling}".encode())
            sha.update(tokens.tobytes())
        return sha.hexdigest()


class SamplingSettings(BaseModel):
    """Sampling settings of every request (`engine.speculation.sampling.Sampling`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    def draw(self, rng: np.random.Generator, num_requests: int) -> list[Sampling]:
        """One setting a request, each with a seed of its own."""
        seeds = rng.integers(2**63, size=num_requests).tolist()
        return [Sampling(self.temperature, self.top_k, self.top_p, seed) for seed in seeds]


class PromptSource(WorkloadSource):
    """Prompts cut from text, or given by the user one by one, with drawn or recorded arrivals.

    Without `path`, prompts are cut from the held-out files of the running Python's standard library, which the embedded
    models were not trained on (`engine.models.corpus`). A text file is cut the same way. The prompts of a `.jsonl`
    (vLLM's custom ones too) and the conversations of a ShareGPT `.json` are used as they are, in file order, and
    repeated when more are requested. Conversations are selected by length, as `vllm bench serve` does. The output has
    the length of the recorded answer unless `max_tokens` is set. Texts, lengths, arrivals and sampling are drawn from
    separate streams.
    """

    name: Annotated[str, Field(min_length=1)] | None = None
    """Name in reports; None: `prompts`, or the file's name."""
    path: Path | None = None
    arrivals: SerializeAsAny[Arrivals]
    arrivals_path: Path | None = None
    """Takes the arrival times of this trace file in place of `arrivals`, and nothing else of it."""
    time_unit: TimeUnit | None = None
    """Of `arrivals_path`, as `TraceSource` has it; so is `spread_ticks`."""
    spread_ticks: bool | None = None
    own_arrivals: bool = True
    """Takes `arrival_s` of a `.jsonl` that has them in place of `arrivals`."""
    lengths: SerializeAsAny[LengthModel]
    """Of prompts that are cut, and of the outputs where nothing else says."""
    max_tokens: Count | None = None
    """Output tokens of every prompt that has no `max_tokens` of its own; None: drawn by `lengths`."""
    too_long: TooLong = "error"
    num_requests: Count | None = None
    """None without `duration_s`: every row of the `.jsonl`, else every arrival of `arrivals_path`, else 100."""
    duration_s: Seconds | None = None
    sampling: SamplingSettings = SamplingSettings()
    stop: tuple[int | str, ...] = ()
    """Tokens that end an output: ids, or texts of one token."""

    @property
    def scenario(self) -> str:
        rate = getattr(self.arrivals, "rate", None)
        called = self._called if self.name or self.path is None else scenario_of(self.path)
        if self.arrivals_path is not None:
            return f"{called} at {scenario_of(self.arrivals_path)}{self._suffix()}"
        if rate is None or self._recorded(self._given()) is not None:
            return called + self._suffix()
        return f"{called} {rate * self.rate_scale:g}/s"

    def draw(self, seed: int) -> Workload:
        raise WorkloadError(
            "workload=prompts is text, which an engine that runs a model takes: set engine=torch_tiny or "
            "engine=torch_small; a simulated engine takes lengths, as workload=synthetic and workload=trace have them"
        )

    def draw_prompts(self, seed: int, tokenizer: Any, limits: EngineLimits) -> Prompts:
        """The requests for this seed, in the tokenizer's tokens, each fitting the limits.

        Raises:
            ValueError: a file is missing or wrong (`CorpusError`, `WorkloadError`, naming file and row), or a request
                is too long.
        """
        given = self._given()
        if given is not None:
            given = self._measured(given, tokenizer)
        arrival = self._arrivals(seed, given)
        count = arrival.size
        drawn = self.lengths.draw(stream(seed, LENGTHS), count)
        output = drawn.output_tokens if self.max_tokens is None else np.full(count, self.max_tokens, dtype=np.int64)
        sampling = self.sampling.draw(stream(seed, SAMPLING), count)
        if given is None:
            origin = [f"workload {self._called!r}, request {i}" for i in range(count)]
            prompt, output, kept = self._bounded(drawn.prompt_tokens, output, limits, origin)
            cut = cut_prompts(self._texts(), tokenizer, prompt[kept].tolist(), stream(seed, PROMPTS))
            tokens, origin = [one.tokens for one in cut], [one.name for one in cut]
        else:
            rows = [given[i % len(given)] for i in range(count)]
            own = [row.max_tokens for row in rows]
            output = np.array(
                [length if one is None else one for length, one in zip(output, own, strict=True)], np.int64
            )
            encoded = {row.name: _encoded(tokenizer, row, self.path) for row in rows[: len(given)]}
            length = np.array([encoded[row.name].size for row in rows])
            origin = [_where(row, self.path) for row in rows]
            prompt, output, kept = self._bounded(length, output, limits, origin)
            # The beginning is cut off, because the output continues the end.
            tokens = [encoded[rows[i].name][-prompt[i] :] for i in kept]
            origin = [rows[i].name for i in kept]
        prompts = Prompts(
            self._called,
            arrival[kept],
            tokens,
            output[kept],
            [sampling[i] for i in kept],
            origin,
            frozenset(_stop_token(one, tokenizer) for one in self.stop),
        )
        log.info(
            "%s: %s requests over %.6g s, on average %.1f prompt and %.1f output tokens",
            self.path or self._called,
            f"{prompts.num_requests:,}",
            np.ptp(prompts.arrival),
            np.mean([len(one) for one in tokens]),
            prompts.max_tokens.mean(),
        )
        return prompts

    @property
    def _called(self) -> str:
        return self.name or ("prompts" if self.path is None else stem(self.path))

    def _given(self) -> list[Prompt] | None:
        """The prompts of a `.jsonl` or `.json`; None when prompts are to be cut from text."""
        if self.path is None or ending(self.path) not in (".jsonl", ".json"):
            return None
        return read_prompts(self.path)

    def _measured(self, given: list[Prompt], tokenizer: Any) -> list[Prompt]:
        """Prompts with the lengths of their recorded answers, without the conversations that vLLM leaves out.

        With `num_requests`, no more than that many.
        """
        if all(row.answer is None for row in given):
            return given
        taken: list[Prompt] = []
        passed = 0
        for row in given:
            if len(taken) == self.num_requests:
                break
            if row.answer is not None:
                prompt = len(tokenizer(row.text, verbose=False)["input_ids"])
                answer = len(tokenizer(row.answer, verbose=False)["input_ids"])
                output = self.max_tokens or answer
                if (
                    min(prompt, output if self.max_tokens is None else prompt) < SHAREGPT_LEAST
                    or prompt > SHAREGPT_PROMPT
                    or prompt + output > SHAREGPT_TOTAL
                ):
                    passed += 1
                    continue
                row = replace(row, max_tokens=output)
            taken.append(row)
        rule = (
            f"shorter than {SHAREGPT_LEAST} tokens, prompts longer than {SHAREGPT_PROMPT} and totals over "
            f"{SHAREGPT_TOTAL} are left out, as vllm bench serve does"
        )
        if not taken:
            raise WorkloadError(f"{self.path}: none of its {passed} conversations is taken: {rule}")
        log.info("%s: ShareGPT conversations; %d taken, %d left out (%s)", self.path, len(taken), passed, rule)
        return taken

    def _texts(self) -> Iterable[tuple[str, str]]:
        if self.path is None:
            return library_texts(held_out=True)
        return [(prompt.name, prompt.text) for prompt in read_prompts(self.path)]

    def _recorded(self, given: list[Prompt] | None) -> NDArray[np.float64] | None:
        """Arrival times of a file, in s from its first; None: they are drawn."""
        if self.arrivals_path is not None:
            times = read_trace(self.arrivals_path, "drop", self.time_unit, self.spread_ticks).arrival
        elif self.own_arrivals and given is not None and given[0].arrival_s is not None:
            times = np.array([prompt.arrival_s for prompt in given], dtype=np.float64)
        else:
            return None
        return times - times[0]

    def _arrivals(self, seed: int, given: list[Prompt] | None) -> NDArray[np.float64]:
        bounded = self.num_requests is not None or self.duration_s is not None
        recorded = self._recorded(given)
        if recorded is None:
            usual = USUAL_REQUESTS if given is None else len(given)
            count = self.num_requests if bounded else usual
            return self.arrivals.draw(stream(seed, ARRIVALS), count, self.duration_s) / self.rate_scale
        count = self.num_requests or recorded.size
        if self.num_requests is None and given is not None and self.duration_s is None:
            count = len(given)
        if count > recorded.size:
            raise WorkloadError(
                f"{self.arrivals_path or self.path}: {recorded.size} arrivals for {count} requests; set "
                f"workload.num_requests={recorded.size}, or draw arrivals: workload.arrivals_path=null "
                "workload.own_arrivals=false"
            )
        times = recorded[:count]
        if self.duration_s is not None:
            times = times[times < self.duration_s]
        return times / self.rate_scale

    def _bounded(
        self, prompt: NDArray[np.int64], output: NDArray[np.int64], limits: EngineLimits, origin: Sequence[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Prompt and output lengths within the limits, and the kept requests."""
        most = min(limits.max_model_len, limits.total_blocks * limits.block_size)
        over = np.flatnonzero(prompt + output > most)
        everything = np.arange(prompt.size)
        if not over.size:
            return prompt, output, everything
        if self.too_long == "error":
            first = int(over[0])
            raise WorkloadError(
                f"{origin[first]}: {prompt[first]} prompt + {output[first]} output tokens exceed the engine's {most} "
                f"({over.size} of {prompt.size} requests do); set workload.too_long=clip or workload.too_long=drop, or "
                "raise engine.max_model_len (and engine.num_kv_blocks)"
            )
        if self.too_long == "drop":
            kept = np.setdiff1d(everything, over)
            if not kept.size:
                raise WorkloadError(f"workload.too_long=drop leaves no request of {most} tokens or fewer")
            return prompt, output, kept
        output = np.minimum(output, most - 1)
        return np.minimum(prompt, most - output), output, everything


def prompts_for(workload: Workload, seed: int, tokenizer: Any, limits: EngineLimits) -> Prompts:
    """The requests of a workload of lengths, given text: prompts cut from the standard library's held-out files.

    Outputs have the workload's lengths; no stop token ends one earlier. The workload's agreements are not used: real
    acceptance depends on the engine's drafter and target.

    Raises:
        WorkloadError: a request exceeds the limits; the message names rows and remedies.
    """
    workload.check_fits(limits.max_model_len, limits.total_blocks * limits.block_size)
    texts = library_texts(held_out=True)
    cut = cut_prompts(texts, tokenizer, workload.prompt_tokens.tolist(), stream(seed, PROMPTS))
    log.info(
        "%s has lengths only: prompts are cut from Python's standard library, and its agreements of drafter and target "
        "are not used",
        workload.name,
    )
    return Prompts(
        workload.name,
        workload.arrival,
        [one.tokens for one in cut],
        workload.output_tokens.astype(np.int64),
        [GREEDY] * workload.num_requests,
        [one.name for one in cut],
    )


def _where(prompt: Prompt, path: Path | None) -> str:
    return f"{path}, row {prompt.name.rpartition(':')[2]}"


def _encoded(tokenizer: Any, prompt: Prompt, path: Path | None) -> NDArray[np.int32]:
    tokens = np.asarray(tokenizer(prompt.text, verbose=False)["input_ids"], np.int32)
    if not tokens.size:
        raise WorkloadError(f"{_where(prompt, path)}: the tokenizer makes no token of this prompt")
    return tokens


def _stop_token(stop: int | str, tokenizer: Any) -> int:
    if isinstance(stop, int):
        if not 0 <= stop < len(tokenizer):
            raise WorkloadError(f"workload.stop={stop}: token ids are 0 to {len(tokenizer) - 1}")
        return stop
    tokens = tokenizer(stop, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        raise WorkloadError(f"workload.stop={stop!r} is {len(tokens)} tokens, {tokens}; give the text of one token")
    return int(tokens[0])
