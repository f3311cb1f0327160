"""Exported schedules: bad ones are refused, good ones are what was found, and the engine's own file says the same."""

import functools
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st

from controllers.batch_schedule import BatchSchedule
from controllers.controller import Controller
from controllers.sarathi import Sarathi
from controllers.sglang_adaptive import SglangAdaptive
from engine.latency.model import LatencyModel
from engine.simulator.loop import ITERATION
from runs import export
from runs.evaluation import Evaluation
from runs.exporting.export import COMMAND, CONTROLLER, SCHEDULE, Export
from runs.exporting.formats import FORMATS, Deployment, DraftKind, Sglang
from runs.exporting.schedule import Entry, Schedule, ScheduleError, check_schedule, merged
from runs.exporting.search import SAME, Choice, Ranges, Seen, cheapest_by_size, search

CONF = Path(__file__).resolve().parents[2] / "conf"
THEIRS = Deployment("their/model", "their/drafter", None, 4096)
MOST, SEQS, TOTAL = 8, 64, 1024


@pytest.mark.parametrize(
    ("entries", "total", "said"),
    [
        ([], TOTAL, "at least one entry"),
        ([(2, 64, 3)], TOTAL, r"\[2, 64, 3\]: the first entry must begin at batch size 1"),
        ([(1, 8, 3), (12, 64, 1)], TOTAL, r"\[12, 64, 1\] leaves a gap: batch sizes 9 to 11"),
        ([(1, 8, 3), (8, 64, 1)], TOTAL, r"\[8, 64, 1\] overlaps the entry \[1, 8, 3\]"),
        ([(1, 8, 3), (17, 64, 1), (9, 16, 2)], TOTAL, r"\[17, 64, 1\] leaves a gap"),
        ([(1, 4, 3), (5, 8, 2), (1, 4, 1)], TOTAL, r"\[1, 4, 1\] is not sorted: it belongs before .*\[5, 8, 2\]"),
        ([(1, 64, 9)], TOTAL, r"\[1, 64, 9\]: candidates must be between 0 and the maximum of 8"),
        ([(1, 64, -1)], TOTAL, "between 0 and the maximum"),
        ([(1, 8, 3), (9, 4, 1)], TOTAL, "ends before it begins"),
        ([(1, 8, 3), (9, 64, 3)], TOTAL, "make one of the two"),
        ([(1, 8, 3), (9, 64, 2)], 150, r"\[9, 64, 2\] needs 192 tokens for a batch of 64.*total_budget=150"),
        ([(1, 8, 3)], TOTAL, "ends at batch size 8, the engine's max_num_seqs is 64"),
        ([(1, 64, 1)], 0, "total_budget=0"),
    ],
)
def test_a_bad_schedule_is_refused_with_the_reason(entries: list[Entry], total: int, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        check_schedule(entries, total, MOST, SEQS)
    with pytest.raises(ScheduleError, match=said):
        Schedule(tuple(entries), total, MOST, SEQS)


@st.composite
def schedules(draw: st.DrawFn, descending: bool = False) -> Schedule:
    ends = sorted(draw(st.sets(st.integers(1, SEQS - 1), max_size=6)) | {SEQS})
    chosen = [draw(st.integers(0, MOST)) for _ in ends]
    if descending:
        chosen[0] = max(chosen)
    return Schedule(merged(ends, chosen), TOTAL, MOST, SEQS)


@given(st.data())
def test_merged_ranges_are_a_good_schedule_with_the_same_candidates_everywhere(data: st.DataObject) -> None:
    ends = sorted(data.draw(st.sets(st.integers(1, SEQS - 1))) | {SEQS})
    chosen = [data.draw(st.integers(0, MOST)) for _ in ends]
    entries = merged(ends, chosen)
    check_schedule(entries, TOTAL, MOST, SEQS)
    for size in range(1, SEQS + 1):
        place = int(np.searchsorted(ends, size))
        assert [c for low, high, c in entries if low <= size <= high] == [chosen[place]]


def by_size(controller: Controller) -> list[int]:
    """c for 1, 2, ... decoding requests, as the controller that an exported file makes chooses it."""
    if isinstance(controller, BatchSchedule):
        return list(controller.by_batch_size(SEQS))[1:]
    if isinstance(controller, SglangAdaptive):
        assert all(len(slot.candidate_steps) == 1 for slot in controller.slots.values())
        slots = sorted(controller.slots)
        return [
            controller.slots[slots[int(np.searchsorted(slots, size, side="right")) - 1]].candidate_steps[0]
            for size in range(1, SEQS + 1)
        ]
    assert isinstance(controller, Sarathi)
    return [controller.candidates] * SEQS


@pytest.mark.parametrize("name", sorted(FORMATS))
@given(st.data())
def test_what_a_format_writes_and_reads_back_is_the_schedule(name: str, data: st.DataObject) -> None:
    way = FORMATS[name]
    schedule = data.draw(schedules(descending=way.first_is_longest))
    if way.one_length:
        schedule = Schedule(((1, SEQS, schedule.longest),), TOTAL, MOST, SEQS)
    command, files = way.command(schedule, THEIRS, "folder"), way.files(schedule, THEIRS)
    player = way.controller(command, files)
    expected = [next(c for low, high, c in schedule.entries if low <= size <= high) for size in range(1, SEQS + 1)]
    assert by_size(player) == expected
    assert player.total_budget == TOTAL  # type: ignore[attr-defined]
    drafting = any(THEIRS.drafter in text for text in [*command, *files.values()])
    assert drafting == schedule.speculates


def test_vllm_gets_its_ranges_sglang_its_slots_tensorrt_its_bounds_and_llama_cpp_its_length() -> None:
    schedule = Schedule(((1, 8, 4), (9, 32, 2), (33, 64, 0)), 512, MOST, SEQS)
    config = json.loads(FORMATS["vllm"].files(schedule, THEIRS)["speculative_config.json"])
    assert config == {
        "method": "draft_model",
        "model": "their/drafter",
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": [[1, 8, 4], [9, 32, 2], [33, 64, 0]],
    }
    assert json.loads(Sglang().files(schedule, THEIRS)["speculative_adaptive.json"]) == {
        "1": {"candidate_steps": [4]},
        "9": {"candidate_steps": [2]},
        "33": {"candidate_steps": [0]},
    }
    wider = json.loads(Sglang(spread=1).files(schedule, THEIRS)["speculative_adaptive.json"])
    assert [slot["candidate_steps"] for slot in wider.values()] == [[3, 4, 5], [1, 2, 3], [0]]
    options = yaml.safe_load(FORMATS["trtllm"].files(schedule, THEIRS)["llm_api.yaml"])
    assert options["max_num_tokens"] == 512
    assert options["speculative_config"]["max_draft_len"] == 4
    assert options["speculative_config"]["draft_len_schedule"] == {8: 4, 32: 2}
    words = FORMATS["llamacpp"].command(Schedule(((1, SEQS, 3),), 512, MOST, SEQS), THEIRS, "folder")
    assert words[words.index("--spec-draft-n-max") + 1] == "3"
    assert words[words.index("--batch-size") + 1] == words[words.index("--ubatch-size") + 1] == "512"


@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [
        ("vllm", "draft_model", "draft_model"),
        ("vllm", "eagle", "eagle"),
        ("vllm", "medusa", "medusa"),
        ("vllm", "ngram", "ngram"),
        ("trtllm", "draft_model", "Draft_Target"),
        ("trtllm", "medusa", "Medusa"),
        ("llamacpp", "draft_model", "draft-simple"),
        ("sglang", "eagle", "EAGLE"),
    ],
)
def test_the_command_line_names_the_kind_of_drafter_that_was_simulated(name: str, kind: DraftKind, method: str) -> None:
    way, schedule = FORMATS[name], Schedule(((1, SEQS, 3),), TOTAL, MOST, SEQS)
    simulated = replace(THEIRS, simulated=kind)
    text = " ".join([*way.command(schedule, simulated, "folder"), *way.files(schedule, simulated).values()])
    assert re.search(rf"[\s\"']{method}\b", text)
    assert way.method(replace(simulated, method="theirs")) == "theirs"


@pytest.mark.parametrize(
    ("method", "parallel", "slots"),
    [("draft_model", False, 1), ("eagle3", False, 0), ("medusa", False, 0), ("ngram", False, 0), ("dflash", False, 3),
     ("draft_model", True, 3), ("eagle3", True, 3)],
)  # fmt: skip
def test_vllms_budget_holds_the_draft_slots_of_every_request(method: str, parallel: bool, slots: int) -> None:
    """vLLM takes them off `max_num_batched_tokens` for each request in a step; too small a budget starves decodes."""
    way = FORMATS["vllm"]
    deployment = replace(THEIRS, method=method, parallel_drafting=parallel)
    assert way.draft_slots(3, deployment) == slots
    entries: tuple[Entry, ...] = ((1, 16, 3), (17, 64, 1))
    needed = max(16 * (1 + 3 + slots), 64 * (1 + 1 + slots))
    schedule = Schedule(entries, needed, MOST, SEQS, slots)
    player = way.controller(way.command(schedule, deployment, ""), way.files(schedule, deployment))
    assert player.draft_slots == slots  # type: ignore[attr-defined]
    with pytest.raises(
        ScheduleError, match=rf"needs {needed} tokens for a batch of 64, more than total_budget={needed - 1}"
    ):
        Schedule(entries, needed - 1, MOST, SEQS, slots)


def test_of_256_requests_with_a_draft_model_none_is_left_out_of_a_step() -> None:
    """What was exported once: 256 requests, a budget of 256. With c = 1 and a slot each only 85 of 100 decodes ran."""
    assert 256 // (1 + 1 + 1) == 85
    with pytest.raises(ScheduleError, match="needs 384 tokens for a batch of 128"):
        Schedule(((1, 48, 2), (49, 128, 1), (129, 256, 0)), 256, MOST, 256, FORMATS["vllm"].draft_slots(2, THEIRS))


def bowl(best: Choice) -> Callable[[Choice], float]:
    """An objective that grows with the distance from one choice."""

    def score(choice: Choice) -> float:
        steps = sum(abs(a - b) for a, b in zip(choice.candidates, best.candidates, strict=True))
        return 1.0 + 0.01 * steps + 0.01 * abs(np.log2(choice.total_budget / best.total_budget))

    return score


def test_the_search_finds_the_bottom_of_a_bowl_and_stops_there() -> None:
    best = Choice((5, 3, 1), 1024)
    scored: list[Choice] = []

    def score(choice: Choice) -> float:
        scored.append(choice)
        return bowl(best)(choice)

    found, objective = search(
        score, [Choice((1, 1, 1), 256), Choice((2, 0, 8), 512)], (256, 512, 1024, 2048), 8, [1, 0, 2], 500
    )
    assert (found, objective) == (best, 1.0)
    assert len(set(scored)) < 60


@given(st.integers(1, 30), st.lists(st.integers(0, 8), min_size=3, max_size=3))
def test_the_search_is_never_worse_than_where_it_began_and_keeps_to_its_tries(most: int, begin: list[int]) -> None:
    scored: set[Choice] = set()
    score = bowl(Choice((8, 4, 0), 2048))

    def counted(choice: Choice) -> float:
        scored.add(choice)
        return score(choice)

    start = Choice(tuple(begin), 512)
    _, objective = search(counted, [start], (512, 1024, 2048), 8, [0, 1, 2], most)
    assert objective <= score(start) * (1.0 + SAME)
    # What makes no difference is looked for after that: larger budgets, and either side of each range again and again.
    assert len(scored) <= most + 2 + 3 * 6


def test_ranges_that_make_no_difference_get_one_length() -> None:
    def score(choice: Choice) -> float:
        return 1.0 + abs(choice.candidates[0] - 3)

    found, _ = search(score, [Choice((3, 5, 2, 4, 3), 512)], (512,), 8, [0, 1, 2, 3, 4], 50)
    assert found.candidates == (3, 3, 3, 3, 3)
    # Nothing is known of a range that is never reached, so it keeps what was predicted.
    found, _ = search(score, [Choice((3, 5, 2, 4, 3), 512)], (512,), 8, [0, 1, 2], 50)
    assert found.candidates == (3, 3, 3, 4, 3)


def test_of_budgets_that_make_no_difference_the_largest_is_taken() -> None:
    def score(choice: Choice) -> float:
        return 1.0 if choice.total_budget <= 1024 else 2.0

    found, _ = search(score, [Choice((3,), 256)], (256, 512, 1024, 2048), 8, [0], 50)
    assert found.total_budget == 1024


def test_a_search_without_a_possible_start_says_which_key_to_raise() -> None:
    with pytest.raises(ValueError, match="set a larger one in budgets"):
        search(lambda _: np.inf, [Choice((3,), 256)], (256,), 8, [0], 10)


def test_what_was_chosen_is_counted_by_time_and_by_range() -> None:
    rows = np.zeros(5, dtype=ITERATION)
    rows["start_s"], rows["end_s"] = [0, 1, 2, 4, 5], [1, 2, 4, 5, 9]
    rows["num_decodes"] = [0, 1, 1, 5, 5]
    rows["candidates"] = [7, 2, 4, 1, 0]
    rows["token_budget"] = [512, 500, 400, 100, 300]
    rows["prefill_tokens"] = [512, 10, 0, 0, 0]
    rows["decode_tokens"] = [0, 3, 5, 10, 5]
    rows["kv_tokens"] = [0, 100, 100, 1000, 1000]
    seen = Seen.of(rows, Ranges.up_to([1, 4], 8))
    assert seen.seconds.tolist() == [3.0, 0.0, 5.0]
    assert seen.candidates.tolist() == [4, -1, 0]
    assert seen.total_budget == (512 + 503) / 2
    # 1 request for 3 s held 100 tokens, 5 for 5 s held 1,000.
    assert seen.kv_tokens == (100 * 3 + 1000 * 5) / (1 * 3 + 5 * 5)


def test_longer_drafts_pay_while_a_step_costs_less_than_the_tokens_it_wins() -> None:
    # T = 10 ms + 0.1 ms a token + 1 ms a draft step, all candidates accepted: the longest, until tokens dominate.
    latency = LatencyModel.linear(0.01, 1e-4, per_draft_step_s=1e-3)
    tokens = 1.0 + np.arange(5)
    assert cheapest_by_size(latency, Ranges((1, 64)), tokens, 100.0).tolist() == [4, 4]
    # None accepted: never.
    assert cheapest_by_size(latency, Ranges((1, 64)), np.ones(5), 100.0).tolist() == [0, 0]


SMALL = (
    "workload=poisson_lmsys", "workload.num_requests=40", "workload.arrivals.rate=4", "seeds=[0,1]", "search_seeds=[9]",
    "batch_sizes=[2,8]", "budgets=[512,2048]", "most_playbacks=15", "actions.candidate_choices=[0,2,4]",
    "actions.budget_choices=[512,2048]", "controller=goodput", "engine.max_num_seqs=64",
)  # fmt: skip


@pytest.fixture
def run(call_app: Callable[..., int]) -> Callable[..., int]:
    """Calls the app as the command line would; returns its exit status."""
    return functools.partial(call_app, export.main, "export")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_exported_schedule_played_back_from_its_files_gives_the_reported_score(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(*SMALL, f"format={name}", f"hydra.run.dir={tmp_path}") == 0
    said = capsys.readouterr().out
    written = json.loads((tmp_path / SCHEDULE).read_text())
    command = (tmp_path / COMMAND).read_text()
    assert command in said
    words = shlex.split(command.replace("\\\n", " "))
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    player = FORMATS[name].controller(words, files)
    if name == "sglang" and any(len(slot.candidate_steps) > 1 for slot in player.slots.values()):  # type: ignore[attr-defined]
        assert written["means"]["exported"]["label"] == "sglang adaptive"
    reached = []
    for seed in written["seeds"]:
        with initialize_config_dir(str(CONF), version_base=None):
            same = [
                word
                for word in SMALL
                if word.split("=")[0]
                not in ("seeds", "search_seeds", "batch_sizes", "budgets", "most_playbacks", "controller")
            ]
            config = compose("evaluate", [*same, f"controller={tmp_path / CONTROLLER}", f"seed={seed}", "logger=none"])
        evaluation = instantiate(config, _convert_="all")
        assert isinstance(evaluation, Evaluation)
        assert evaluation.controller == player
        reached.append(evaluation.run().summary["objective"])
    assert np.mean(reached) == written["means"]["exported"]["objective"]
    assert written["entries"][-1][1] == 64
    assert sum(written["share_of_decode_time"]) == pytest.approx(1.0, abs=1e-3)
    for against in written["exported_against"].values():
        assert against["objective"]["seeds"] == [0, 1]
        assert against["objective"]["low"] <= against["objective"]["difference"] <= against["objective"]["high"]


def test_what_may_not_hold_in_the_engine_is_said(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another drafter than the simulated one, ranges that hold none of the decode time, and prompts that come late."""
    overloaded = ["workload.arrivals.rate=40", "workload.num_requests=200", "least_attainment=0"]
    assert run(*SMALL, *overloaded, "format=vllm", "method=eagle3", f"hydra.run.dir={tmp_path}") == 0
    written = json.loads((tmp_path / SCHEDULE).read_text())
    said = " ".join(capsys.readouterr().err.split())
    assert "the command line says eagle3, but a draft model was simulated, with the times of llama_68m" in said
    for line in written["warnings"]:
        assert " ".join(line.split()) in said
    for share, chosen_by in zip(written["share_of_decode_time"], written["chosen_by"], strict=True):
        assert chosen_by == ("playback" if share >= 0.01 else "prediction")


def test_a_workload_that_overloads_the_engine_exports_nothing(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overloaded = ["workload.arrivals.rate=400", "workload.num_requests=400", "slo.ttft_target=0.2"]
    assert run(*SMALL, *overloaded, f"hydra.run.dir={tmp_path}") == 2
    message = capsys.readouterr().err
    assert re.search(r"[\d.]+ % of the requests meet ttft_target=0.2 s .* least_attainment=0.5", message)
    assert "Lower workload.rate_scale" in message
    assert [path.name for path in tmp_path.iterdir()] == ["export.log"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["format=trtllm", "parallel_drafting=true"], "parallel_drafting is an option of vLLM's"),
        (["engine=torch_tiny"], "python -m runs.profile"),
        (["controller=oracle_grid"], "it peeks"),
        (["search_seeds=[1,2]"], "share [1]"),
        (["format=vlm"], "format"),
        (["budgets=[512,256]"], "budgets=[512, 256] must be strictly increasing"),
        (["budgets=[32]"], "set a larger one in budgets"),
        (["+most_playback=3"], "did you mean most_playbacks?"),
    ],
)
def test_a_mistake_ends_the_command_with_its_name_and_writes_nothing(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert run(*SMALL, *overrides, f"hydra.run.dir={tmp_path}") == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["export.log"]


def test_the_configuration_lists_every_setting_with_its_default() -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        made = instantiate(compose("export"), _convert_="all")
    assert isinstance(made, Export)
    same = Export(engine=made.engine, workload=made.workload, controller=made.controller)
    assert made.model_dump(exclude={"controller"}) == same.model_dump(exclude={"controller"})
