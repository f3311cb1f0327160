"""A schedule as each serving engine wants it: files, the command line, and both read back as a controller."""

from __future__ import annotations

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import yaml

from controllers.controller import Controller
from controllers.sarathi import Sarathi
from controllers.sglang_adaptive import SglangAdaptive
from controllers.trtllm_schedule import TrtllmSchedule
from controllers.vllm_schedule import VllmSchedule
from runs.exporting.schedule import Schedule

Files = Mapping[str, str]
"""Content by file name."""

DraftKind = Literal["draft_model", "eagle", "medusa", "ngram"]
"""Kinds of drafters that can be simulated: a small model of its own, heads on the target's features, prompt lookup."""


@dataclass(frozen=True)
class Deployment:
    """What a command line names beside the schedule.

    model, drafter: paths or hub names · method: what the engine calls the drafter's kind; None: its word for the kind
    that was simulated · kv_tokens: room of the KV cache · simulated: `DraftKind` of the drafter whose times and
    acceptance the schedule was chosen with · parallel_drafting: whether the drafter proposes all candidates at once.
    """

    model: str
    drafter: str
    method: str | None
    kv_tokens: int
    simulated: DraftKind = "draft_model"
    parallel_drafting: bool = False


class Format(ABC):
    """How one engine is told a schedule.

    `controller` reads what `files` and `command` wrote, as the engine would, so that what is played back is what was
    exported.
    """

    usual_method: ClassVar[str]
    methods: ClassVar[Mapping[DraftKind, str]]
    """What the engine calls the kinds of drafters that it has under such a schedule."""
    one_length: ClassVar[bool] = False
    """Whether the engine knows a single draft length, whatever the batch."""
    first_is_longest: ClassVar[bool] = False
    """Whether the smallest batches must have the longest drafts."""

    @abstractmethod
    def files(self, schedule: Schedule, deployment: Deployment) -> dict[str, str]:
        """What is written beside the command line, by name."""

    @abstractmethod
    def command(self, schedule: Schedule, deployment: Deployment, folder: str) -> list[str]:
        """The words of the command line that serves with it; `folder` holds the files."""

    @abstractmethod
    def controller(self, command: list[str], files: Files) -> Controller:
        """Who chooses as the engine would with these files and this command line."""

    def alternatives(self) -> tuple[Format, ...]:
        """Other ways to tell the same engine the same schedule, that may serve it better."""
        return ()

    def method(self, deployment: Deployment) -> str:
        """What the engine calls the drafter's kind; its usual one where it has no such kind as was simulated."""
        return deployment.method or self.methods.get(deployment.simulated, self.usual_method)

    def draft_slots(self, longest: int, deployment: Deployment) -> int:
        """Tokens of the budget that the engine takes for each request beside its c + 1, for drafts of `longest`."""
        return 0


class Vllm(Format):
    """`num_speculative_tokens_per_batch_size` in `--speculative-config`, and `--max-num-batched-tokens`.

    vLLM's budget counts all tokens of a step, as `Schedule.total_budget` does. vLLM counts every request scheduled in a
    step, and gives K to the drafts that the next step verifies. Of every request in a step it takes the input slots
    that the drafter needs more than the target off the budget (`draft_slots`).

    Source: vLLM, `vllm/v1/spec_decode/dynamic/utils.py`, `docs/features/speculative_decoding`;
    `SpeculativeConfig.max_num_new_slots_for_drafting` and where `vllm/v1/core/sched/scheduler.py` reads it.
    """

    usual_method = "eagle3"
    methods: ClassVar[Mapping[DraftKind, str]] = {
        "draft_model": "draft_model", "eagle": "eagle", "medusa": "medusa", "ngram": "ngram",
    }  # fmt: skip
    parallel: ClassVar[frozenset[str]] = frozenset({"dflash", "dspark"})
    """Methods that propose all candidates at once, whatever `parallel_drafting` says."""

    def draft_slots(self, longest: int, deployment: Deployment) -> int:
        return _vllm_slots(self.method(deployment), deployment.parallel_drafting, longest)

    def files(self, schedule: Schedule, deployment: Deployment) -> dict[str, str]:
        if not schedule.speculates:
            return {}
        return {"speculative_config.json": json.dumps(self._config(schedule, deployment)) + "\n"}

    def command(self, schedule: Schedule, deployment: Deployment, folder: str) -> list[str]:
        words = ["vllm", "serve", deployment.model, "--max-num-seqs", str(schedule.max_num_seqs)]
        words += ["--max-num-batched-tokens", str(schedule.total_budget)]
        if schedule.speculates:
            words += ["--speculative-config", json.dumps(self._config(schedule, deployment))]
        return words

    def controller(self, command: list[str], files: Files) -> Controller:
        total = int(_value(command, "--max-num-batched-tokens"))
        if "--speculative-config" not in command:
            return Sarathi(total_budget=total)
        config = json.loads(_value(command, "--speculative-config"))
        return VllmSchedule(
            schedule=config["num_speculative_tokens_per_batch_size"],
            num_speculative_tokens=config["num_speculative_tokens"],
            total_budget=total,
            draft_slots=_vllm_slots(
                config["method"], config.get("parallel_drafting", False), config["num_speculative_tokens"]
            ),
        )

    def _config(self, schedule: Schedule, deployment: Deployment) -> dict[str, Any]:
        method = self.method(deployment)
        return {
            "method": method,
            **({} if method in WITHOUT_MODEL else {"model": deployment.drafter}),
            "num_speculative_tokens": schedule.longest,
            "num_speculative_tokens_per_batch_size": [list(entry) for entry in schedule.entries],
            **({"parallel_drafting": True} if deployment.parallel_drafting else {}),
        }


WITHOUT_MODEL = ("ngram", "suffix")
"""vLLM's methods that read no drafter."""


def _vllm_slots(method: str, parallel_drafting: bool, longest: int) -> int:
    """Input slots a request: 1 for a draft model, which reads the token it continues; K at most, drafted at once."""
    if parallel_drafting or method in Vllm.parallel:
        return longest
    return int(method == "draft_model")


@dataclass(frozen=True)
class Sglang(Format):
    """`--speculative-adaptive-config`: the draft steps that each range of batch sizes may choose from.

    With `spread` 0 every range has one number of steps, which is the schedule; with 1 it may also take one step less or
    more, as the accepted lengths say. `--chunked-prefill-size` counts prompt tokens only, which SGLang runs in batches
    of their own while it speculates: `engine.prefill=first` or `turns` is nearer to it than chunks beside decodes.

    Source: SGLang, `python/sglang/srt/speculative/adaptive_spec_params.py`.
    """

    spread: int = 0

    usual_method = "EAGLE3"
    methods: ClassVar[Mapping[DraftKind, str]] = {"eagle": "EAGLE"}
    file: ClassVar[str] = "speculative_adaptive.json"

    def alternatives(self) -> tuple[Format, ...]:
        return (Sglang(spread=1),) if self.spread == 0 else ()

    def files(self, schedule: Schedule, deployment: Deployment) -> dict[str, str]:
        slots = {
            str(low): {"candidate_steps": self._steps(candidates, schedule.most_candidates)}
            for low, _, candidates in schedule.entries
        }
        return {self.file: json.dumps(slots, indent=1) + "\n"} if schedule.speculates else {}

    def command(self, schedule: Schedule, deployment: Deployment, folder: str) -> list[str]:
        words = ["python", "-m", "sglang.launch_server", "--model-path", deployment.model]
        words += ["--max-running-requests", str(schedule.max_num_seqs)]
        words += ["--chunked-prefill-size", str(schedule.total_budget)]
        if schedule.speculates:
            first = schedule.entries[0][2]
            words += ["--speculative-algorithm", self.method(deployment)]
            words += ["--speculative-draft-model-path", deployment.drafter, "--speculative-eagle-topk", "1"]
            words += ["--speculative-num-steps", str(first), "--speculative-num-draft-tokens", str(first + 1)]
            words += ["--speculative-adaptive", "--speculative-adaptive-config", f"{folder}/{self.file}"]
        return words

    def controller(self, command: list[str], files: Files) -> Controller:
        total = int(_value(command, "--chunked-prefill-size"))
        if "--speculative-adaptive" not in command:
            return Sarathi(total_budget=total)
        slots = {int(key): slot for key, slot in json.loads(files[self.file]).items()}
        return SglangAdaptive(
            slots=slots, initial_steps=int(_value(command, "--speculative-num-steps")), total_budget=total
        )

    def _steps(self, candidates: int, most: int) -> list[int]:
        spread = self.spread if candidates > 0 else 0
        return list(range(max(1, candidates - spread) if candidates else 0, min(most, candidates + spread) + 1))


class Trtllm(Format):
    """`draft_len_schedule` in the options file of `trtllm-serve`, and `max_num_tokens`, which counts all tokens.

    TensorRT-LLM wants the length of the smallest batches to be `max_draft_len`, and speculates no more above the last.

    Source: TensorRT-LLM, `tensorrt_llm/llmapi/llm_args.py` (`DecodingBaseConfig.draft_len_schedule`).
    """

    usual_method = "Eagle3"
    methods: ClassVar[Mapping[DraftKind, str]] = {
        "draft_model": "Draft_Target", "eagle": "Eagle", "medusa": "Medusa", "ngram": "NGram",
    }  # fmt: skip
    first_is_longest = True
    file: ClassVar[str] = "llm_api.yaml"

    def files(self, schedule: Schedule, deployment: Deployment) -> dict[str, str]:
        """See `Format.files`."""
        options: dict[str, Any] = {
            "max_batch_size": schedule.max_num_seqs,
            "max_num_tokens": schedule.total_budget,
            "enable_chunked_prefill": True,
        }
        if schedule.speculates:
            entries = list(schedule.entries)
            if entries[-1][2] == 0:
                entries.pop()
            method = self.method(deployment)
            options["speculative_config"] = {
                "decoding_type": method,
                **({} if method == "NGram" else {"speculative_model": deployment.drafter}),
                "max_draft_len": schedule.entries[0][2],
                "draft_len_schedule": {high: candidates for _, high, candidates in entries},
            }
        return {self.file: yaml.safe_dump(options, sort_keys=False)}

    def command(self, schedule: Schedule, deployment: Deployment, folder: str) -> list[str]:
        return ["trtllm-serve", deployment.model, "--extra_llm_api_options", f"{folder}/{self.file}"]

    def controller(self, command: list[str], files: Files) -> Controller:
        options = yaml.safe_load(files[self.file])
        total = int(options["max_num_tokens"])
        speculative = options.get("speculative_config")
        if speculative is None:
            return Sarathi(total_budget=total)
        return TrtllmSchedule(draft_len_schedule=speculative["draft_len_schedule"], total_budget=total)


class LlamaCpp(Format):
    """`--spec-draft-n-max` and `--batch-size` of `llama-server`, which knows one draft length for every batch.

    A batch of llama-server holds the tokens of all its slots first and prompts in what is left of `--batch-size`, as
    the Sarathi controller has it; `--ubatch-size` of the same size runs it at once.

    Source: llama.cpp, `common/arg.cpp`, `tools/server`.
    """

    usual_method = "draft-simple"
    methods: ClassVar[Mapping[DraftKind, str]] = {"draft_model": "draft-simple"}
    one_length = True

    def files(self, schedule: Schedule, deployment: Deployment) -> dict[str, str]:
        return {}

    def command(self, schedule: Schedule, deployment: Deployment, folder: str) -> list[str]:
        total = str(schedule.total_budget)
        words = ["llama-server", "--model", deployment.model, "--parallel", str(schedule.max_num_seqs)]
        words += ["--kv-unified", "--ctx-size", str(deployment.kv_tokens)]
        words += ["--batch-size", total, "--ubatch-size", total]
        if schedule.speculates:
            words += ["--spec-type", self.method(deployment), "--spec-draft-model", deployment.drafter]
            words += ["--spec-draft-n-max", str(schedule.longest), "--spec-draft-n-min", "0"]
            words += ["--spec-draft-p-min", "0"]
        return words

    def controller(self, command: list[str], files: Files) -> Controller:
        candidates = int(_value(command, "--spec-draft-n-max")) if "--spec-draft-n-max" in command else 0
        return Sarathi(total_budget=int(_value(command, "--batch-size")), candidates=candidates)


FORMATS: dict[str, Format] = {"vllm": Vllm(), "sglang": Sglang(), "trtllm": Trtllm(), "llamacpp": LlamaCpp()}


def command_line(words: list[str]) -> str:
    """The words as a shell takes them, an option and its value on a line each."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--") and lines[-1]:
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(shlex.join(line) for line in lines)


def _value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]
