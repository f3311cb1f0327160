"""Prometheus metrics of a server, under vLLM's names where vLLM has them.

Names and labels are those of vLLM 0.32 (`vllm:inter_token_latency_seconds` was `vllm:time_per_output_token_seconds`
until 0.11). Times are the engine's: what the network and the client add is not in them.
"""

from __future__ import annotations

import math
from itertools import count, takewhile
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runs.server.worker import Emission, Iteration, Ticket, Watcher

if TYPE_CHECKING:
    from runs.server.worker import Worker

FINISHES = ("stop", "length", "abort", "error")

GAPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
DECISION_S = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 0.1, 1)
BATCH_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics(Watcher):
    """Counts what a worker says, in a registry of its own.

    Args:
        model: name of the label `model_name`.
        max_model_len: most tokens of a request.
        num_kv_blocks, block_size: of the cache.
    """

    def __init__(self, model: str, max_model_len: int, num_kv_blocks: int, block_size: int) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        lengths = _one_two_five(max_model_len)
        cache = Gauge(
            "vllm:cache_config_info",
            "Information of the KV cache.",
            ["block_size", "num_gpu_blocks", "engine"],
            registry=self.registry,
        )
        cache.labels(str(block_size), str(num_kv_blocks), "0").set(1)
        self._running = self._gauge("vllm:num_requests_running", "Requests in the batch.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Accepted requests that are not in the batch.")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks held; 1 is all.")

        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens prefilled.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._preemptions = self._counter("vllm:num_preemptions", "Requests preempted.")
        success = self._labelled("vllm:request_success", "Requests that are over.", "finished_reason")
        self._success = {finish: success.labels(**self._labels, finished_reason=finish) for finish in FINISHES}
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Drafts verified.")
        self._draft_tokens = self._counter("vllm:spec_decode_num_draft_tokens", "Candidate tokens verified.")
        self._accepted_tokens = self._counter("vllm:spec_decode_num_accepted_tokens", "Candidate tokens accepted.")
        self._accepted_at = self._labelled(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Candidate tokens accepted, by draft position.", "position"
        )

        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token, s.", FIRST_S)
        self._itl = self._histogram(
            "vllm:inter_token_latency_seconds", "Gaps between a request's emissions, s.", GAPS_S
        )
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "A request's time per token after its first, s.", GAPS_S
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token, s.", REQUEST_S)
        self._queued = self._histogram("vllm:request_queue_time_seconds", "Arrival to admission, s.", REQUEST_S)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Admission to first token, s.", REQUEST_S)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First to last token, s.", REQUEST_S)
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds", "Admission to last token, s.", REQUEST_S
        )
        self._prompt_length = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", lengths)
        self._output_length = self._histogram("vllm:request_generation_tokens", "Tokens a request got.", lengths)
        self._asked = self._histogram("vllm:request_params_max_tokens", "The parameter max_tokens.", lengths)
        self._batch_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Prompt tokens computed and tokens generated in an iteration.", BATCH_TOKENS
        )

        self._candidates = self._gauge("governor_candidates", "c of the latest iteration, tokens per request.")
        self._token_budget = self._gauge("governor_token_budget", "n of the latest iteration, prompt tokens.")
        self._decision_s = self._histogram("governor_decision_seconds", "Time of a decision, s.", DECISION_S)
        self._iterations = self._labelled("governor_iterations", "Iterations, by the c chosen.", "candidates")
        self._faults = self._labelled("governor_decision_faults", "Failed decisions, by what was wrong.", "fault")
        self._refused = self._labelled("governor_requests_refused", "Requests turned away, by status.", "status")
        self._faults_seen: dict[str, int] = {}
        self._since: dict[Ticket, tuple[float, float, int]] = {}
        """Of every request with a first token: when it and the latest were, and how many tokens there are."""

    def watch(self, worker: Worker) -> None:
        """Read gauges off this worker."""
        self._running.set_function(lambda: worker.num_running)
        self._waiting.set_function(lambda: worker.num_open - worker.num_running)
        self._kv_usage.set_function(lambda: worker.kv_usage)

    def refused(self, status: int) -> None:
        """A request was turned away."""
        self._refused.labels(**self._labels, status=str(status)).inc()

    def counted(self, name: str) -> dict[str, int]:
        """Totals of a counter that has one label besides the usual ones, by that label."""
        return {
            list(sample.labels.values())[-1]: int(sample.value)
            for metric in self.registry.collect()
            if metric.name == name
            for sample in metric.samples
            if sample.name == f"{name}_total"
        }

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def emitted(self, ticket: Ticket, emission: Emission) -> None:
        """See `Watcher.emitted`."""
        tokens = len(emission.tokens)
        seen = self._since.get(ticket)
        if tokens:
            self._generation_tokens.inc(tokens)
            if seen is None:
                self._prompt_tokens.inc(len(ticket.prompt))
                self._ttft.observe(emission.at - ticket.received)
                seen = emission.at, emission.at, tokens
            else:
                self._itl.observe(emission.at - seen[1])
                seen = seen[0], emission.at, seen[2] + tokens
            self._since[ticket] = seen
        if emission.finish is None:
            return
        self._since.pop(ticket, None)
        self._success[emission.finish].inc()
        if emission.times is not None and emission.finish in ("stop", "length"):
            self._finished(ticket, emission, 0 if seen is None else seen[2])

    def iterated(self, iteration: Iteration) -> None:
        """See `Watcher.iterated`."""
        candidates, token_budget, seconds = iteration.decision
        self._candidates.set(candidates)
        self._token_budget.set(token_budget)
        self._decision_s.observe(seconds)
        self._iterations.labels(**self._labels, candidates=str(candidates)).inc()
        self._batch_tokens.observe(iteration.prompt_tokens + iteration.emitted_tokens)
        self._preemptions.inc(iteration.preemptions)
        self._drafts.inc(iteration.drafts)
        self._draft_tokens.inc(iteration.drafted_tokens)
        self._accepted_tokens.inc(iteration.accepted_tokens)
        for position in range(int((iteration.accepted_by_depth > 0).sum())):
            number = float(iteration.accepted_by_depth[position])
            self._accepted_at.labels(**self._labels, position=str(position)).inc(number)
        for fault, number in iteration.faults.items():
            self._faults.labels(**self._labels, fault=fault).inc(number - self._faults_seen.get(fault, 0))
        self._faults_seen = iteration.faults

    def _finished(self, ticket: Ticket, emission: Emission, tokens: int) -> None:
        times = emission.times
        assert times is not None
        self._e2e.observe(times.last_token - times.arrival)
        self._queued.observe(times.admitted - times.arrival)
        self._prefill.observe(times.first_token - times.admitted)
        self._decode.observe(times.last_token - times.first_token)
        self._inference.observe(times.last_token - times.admitted)
        if tokens > 1:
            self._tpot.observe((times.last_token - times.first_token) / (tokens - 1))
        self._prompt_length.observe(len(ticket.prompt))
        self._output_length.observe(tokens)
        self._asked.observe(ticket.max_tokens)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(name, what, list(self._labels), registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(name, what, list(self._labels), registry=self.registry).labels(**self._labels)

    def _labelled(self, name: str, what: str, label: str) -> Counter:
        return Counter(name, what, [*self._labels, label], registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, what, list(self._labels), buckets=(*buckets, math.inf), registry=self.registry)
        return made.labels(**self._labels)


def _one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, ... up to `most`."""
    values = (mantissa * 10**exponent for exponent in count() for mantissa in (1, 2, 5))
    return tuple(takewhile(lambda value: value <= most, values))
