"""Claims about prompts: one seed, one set; cut from text or as the user wrote them; unservable ones are refused."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.limits import EngineLimits
from engine.models.corpus import CorpusError, is_held_out, library_folder
from engine.models.load import load_tokenizer
from engine.workload.agreement import IidAgreement
from engine.workload.arrivals import PoissonArrivals, SinusoidArrivals
from engine.workload.lengths import FixedLengths, LognormalLengths
from engine.workload.prompts import Prompts, PromptSource, prompts_for
from engine.workload.source import SyntheticSource
from engine.workload.workload import WorkloadError

LIMITS = EngineLimits(total_blocks=64, block_size=16, watermark_blocks=0, max_num_seqs=8, max_model_len=512)
LENGTHS = LognormalLengths(prompt_median=40.0, prompt_sigma=0.5, output_median=20.0, output_sigma=0.5)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file: quicker to cut than the standard library."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(f"def step_{i}(state):\n    return state + {i}\n\n" for i in range(200)))
    return path


def rows(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def source(path: Path | None = None, **more: Any) -> PromptSource:
    return PromptSource(**{"path": path, "arrivals": PoissonArrivals(rate=4.0), "lengths": LENGTHS, **more})


def test_the_same_seed_gives_the_same_requests_and_another_seed_other_ones(tokenizer: Any, text: Path) -> None:
    made = source(text, num_requests=20)
    first, again, other = (made.draw_prompts(seed, tokenizer, LIMITS) for seed in (3, 3, 4))
    assert first.digest == again.digest != other.digest
    assert not np.array_equal(first.arrival, other.arrival)
    assert [len(tokens) for tokens in first.tokens] != [len(tokens) for tokens in other.tokens]


def test_without_a_file_prompts_are_cut_from_held_out_files(tokenizer: Any) -> None:
    prompts = source(num_requests=12).draw_prompts(0, tokenizer, LIMITS)
    lengths = LENGTHS.draw(np.random.default_rng(np.random.SeedSequence(0, spawn_key=(1,))), 12)
    assert [len(tokens) for tokens in prompts.tokens] == lengths.prompt_tokens.tolist()
    assert prompts.max_tokens.tolist() == lengths.output_tokens.tolist()
    for tokens, origin in zip(prompts.tokens, prompts.origin, strict=True):
        name = origin.rpartition("+")[0]
        assert is_held_out(name)
        assert tokenizer.decode(tokens[1:-1].tolist()) in (library_folder() / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        {"rate_scale": 0.5},
        {"arrivals": SinusoidArrivals(mean_rate=5.0, amplitude=0.5, period_s=10.0)},
        {"sampling": {"temperature": 0.7}},
        {"max_tokens": 9},
        {"stop": ["\n"]},
        {"num_requests": 35},
    ],
    ids=lambda change: next(iter(change)),
)
def test_one_setting_changed_leaves_the_rest_of_a_request_alone(
    tokenizer: Any, text: Path, change: dict[str, Any]
) -> None:
    before = source(text, num_requests=20).draw_prompts(1, tokenizer, LIMITS)
    after = source(text, **{"num_requests": 20, **change}).draw_prompts(1, tokenizer, LIMITS)
    assert before.digest != after.digest
    for one, other in zip(before.tokens, after.tokens, strict=False):
        assert np.array_equal(one, other)
    assert [one.seed for one in before.sampling] == [one.seed for one in after.sampling[:20]]
    if "max_tokens" not in change:
        assert np.array_equal(before.max_tokens, after.max_tokens[:20])
    if "rate_scale" in change:
        assert after.arrival == pytest.approx(2 * before.arrival)
    elif "arrivals" not in change:
        assert np.array_equal(before.arrival, after.arrival[:20])


def test_the_digest_covers_every_token_and_setting(tokenizer: Any, text: Path) -> None:
    made = source(text, num_requests=5).draw_prompts(0, tokenizer, LIMITS)
    changed = [tokens.copy() for tokens in made.tokens]
    changed[3][-1] += 1
    other = Prompts(made.name, made.arrival, changed, made.max_tokens, made.sampling, made.origin)
    assert other.digest != made.digest


def test_requests_have_seeds_of_their_own(tokenizer: Any, text: Path) -> None:
    prompts = source(text, num_requests=20, sampling={"temperature": 0.8, "top_k": 5, "top_p": 0.9}).draw_prompts(
        0, tokenizer, LIMITS
    )
    assert len({one.seed for one in prompts.sampling}) == 20
    assert {(one.temperature, one.top_k, one.top_p) for one in prompts.sampling} == {(0.8, 5, 0.9)}


def test_a_users_prompts_are_taken_as_they_are_and_over_again(tokenizer: Any, tmp_path: Path) -> None:
    texts = ["def add(a, b):\n", "import os\n", "class Node:\n    "]
    path = rows(
        tmp_path / "own.jsonl", *({"prompt": text} for text in texts[:2]), {"prompt": texts[2], "max_tokens": 3}
    )
    prompts = source(path).draw_prompts(0, tokenizer, LIMITS)
    assert [tokenizer.decode(tokens.tolist()) for tokens in prompts.tokens] == texts
    drawn = source(path, max_tokens=11).draw_prompts(0, tokenizer, LIMITS)
    assert drawn.max_tokens.tolist() == [11, 11, 3]
    assert prompts.max_tokens[2] == 3
    again = source(path, num_requests=5).draw_prompts(0, tokenizer, LIMITS)
    assert again.origin == ["own.jsonl:1", "own.jsonl:2", "own.jsonl:3", "own.jsonl:1", "own.jsonl:2"]


def test_vllms_custom_prompts_get_the_outputs_that_the_file_says(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "custom.jsonl.gz"
    lines = [{"prompt": "def a():", "output_tokens": 12}, {"prompt": "x = 1", "output_tokens": 3}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    prompts = source(path, max_tokens=8).draw_prompts(0, tokenizer, LIMITS)
    assert prompts.max_tokens.tolist() == [12, 3]


def test_sharegpt_conversations_are_taken_as_vllm_takes_them(tokenizer: Any, tmp_path: Path) -> None:
    question, answer = "def add(a, b):\n    return a", "    return a + b\n    # the sum of both\n"
    pairs = [(question, answer), ("x", answer), (question, "y"), ("a = 1\n" * 600, answer), (answer, question)]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"conversations": [{"value": value} for value in pair]} for pair in pairs]))
    prompts = source(path).draw_prompts(0, tokenizer, LIMITS)
    assert [tokenizer.decode(tokens.tolist()) for tokens in prompts.tokens] == [question, answer]
    assert prompts.max_tokens.tolist() == [len(tokenizer(text)["input_ids"]) for text in (answer, question)]
    fixed = source(path, max_tokens=5).draw_prompts(0, tokenizer, LIMITS)
    assert fixed.origin == ["sharegpt.json:1", "sharegpt.json:3", "sharegpt.json:5"]
    assert fixed.max_tokens.tolist() == [5, 5, 5]
    path.write_text(json.dumps([{"conversations": [{"value": "hi"}, {"value": "ho"}]}]))
    with pytest.raises(WorkloadError, match=r"none of its 1 conversations is taken.*shorter than 4 tokens"):
        source(path).draw_prompts(0, tokenizer, LIMITS)


def test_arrivals_are_the_files_own_a_traces_or_drawn(tokenizer: Any, tmp_path: Path) -> None:
    path = rows(tmp_path / "own.jsonl", *({"prompt": "x = 1", "arrival_s": second} for second in (5.0, 5.5, 8.0)))
    trace = tmp_path / "busy.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n1,9,9\n1.25,9,0\n2,9,9\n4,9,9\n")

    def arrivals(**more: Any) -> list[float]:
        return source(path, **more).draw_prompts(0, tokenizer, LIMITS).arrival.tolist()

    assert arrivals() == [0.0, 0.5, 3.0]
    assert arrivals(rate_scale=0.5) == [0.0, 1.0, 6.0]
    assert arrivals(duration_s=1.0) == [0.0, 0.5]
    assert arrivals(arrivals_path=trace) == [0.0, 1.0, 3.0]
    assert len(arrivals(own_arrivals=False, num_requests=7)) == 7
    with pytest.raises(WorkloadError, match=r"own.jsonl: 3 arrivals for 4 requests.*num_requests=3"):
        arrivals(num_requests=4)


def test_a_trace_of_arrivals_bounds_the_requests(tokenizer: Any, tmp_path: Path, text: Path) -> None:
    trace = tmp_path / "busy.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n1,9,9\n2,9,9\n4,9,9\n")
    made = source(text, arrivals_path=trace)
    assert made.draw_prompts(0, tokenizer, LIMITS).arrival.tolist() == [0.0, 1.0, 3.0]
    assert re.fullmatch("story@[0-9a-f]{6} at busy@[0-9a-f]{6}", made.scenario)


def test_scenarios_say_the_load(tmp_path: Path) -> None:
    assert source(rate_scale=0.5).scenario == "prompts 2/s"
    assert source(name="mine").scenario == "mine 4/s"
    own = rows(tmp_path / "own.jsonl", {"prompt": "x", "arrival_s": 0})
    assert re.fullmatch("own@[0-9a-f]{6} x0.5", source(own, rate_scale=0.5).scenario)
    assert re.fullmatch("own@[0-9a-f]{6} 4/s", source(own, own_arrivals=False).scenario)


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.integers(1, 90),
    output=st.integers(1, 90),
    most=st.integers(2, 100),
    too_long=st.sampled_from(["clip", "drop"]),
)
def test_what_is_kept_fits_the_engine(
    tokenizer: Any, text: Path, prompt: int, output: int, most: int, too_long: str
) -> None:
    lengths = FixedLengths(prompt_tokens=prompt, output_tokens=output)
    made = source(text, lengths=lengths, too_long=too_long, num_requests=3)
    limits = EngineLimits(64, 16, 0, 8, most)
    if too_long == "drop" and prompt + output > most:
        with pytest.raises(WorkloadError, match="leaves no request"):
            made.draw_prompts(0, tokenizer, limits)
        return
    prompts = made.draw_prompts(0, tokenizer, limits)
    assert prompts.num_requests == 3
    for tokens, limit in zip(prompts.tokens, prompts.max_tokens, strict=True):
        assert len(tokens) >= 1
        assert limit >= 1
        assert len(tokens) + limit <= most
        assert prompt + output > most or (len(tokens), limit) == (prompt, output)


def test_too_long_prompts_are_refused_clipped_at_the_front_or_dropped(tokenizer: Any, tmp_path: Path) -> None:
    long = "a = 1\n" * 200 + "the_end"
    path = rows(tmp_path / "own.jsonl", {"prompt": "x = 1"}, {"prompt": long})
    with pytest.raises(WorkloadError, match=r"own\.jsonl, row 2: \d+ prompt \+ 8 output .* 512 .*too_long=clip"):
        source(path, max_tokens=8).draw_prompts(0, tokenizer, LIMITS)
    clipped = source(path, max_tokens=8, too_long="clip").draw_prompts(0, tokenizer, LIMITS)
    assert len(clipped.tokens[1]) == 504
    assert tokenizer.decode(clipped.tokens[1].tolist()).endswith("the_end")
    dropped = source(path, max_tokens=8, too_long="drop").draw_prompts(0, tokenizer, LIMITS)
    assert dropped.origin == ["own.jsonl:1"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "absent.jsonl: cannot be read"),
        ("", "no prompts"),
        ('{"prompt": "x"}\n{"text": "y"}\n', "row 2: 'prompt' must be text"),
        ('{"prompt": "x"}\n{"prompt": 3}\n', "row 2: 'prompt' must be text"),
        ('{"prompt": "x", "max_tokens": 0}\n', "row 1: 'max_tokens' must be"),
        ('{"prompt": "x", "arrival_s": 2}\n{"prompt": "x", "arrival_s": 1}\n', "row 2: arrives 1 s before"),
        ("prompt\n", "row 1: not JSON"),
    ],
)
def test_a_bad_file_is_refused_with_file_and_line(tokenizer: Any, tmp_path: Path, lines: str | None, said: str) -> None:
    path = tmp_path / "absent.jsonl"
    if lines is not None:
        path.write_text(lines)
    with pytest.raises(ValueError, match=said):
        source(path).draw_prompts(0, tokenizer, LIMITS)


def test_a_text_shorter_than_a_prompt_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("one line\n")
    with pytest.raises(CorpusError, match=r"note\.txt, has \d+"):
        source(path).draw_prompts(0, tokenizer, LIMITS)


@pytest.mark.parametrize(
    ("stop", "said"), [(["return self"], "'return self' is [2-9] tokens"), ([99999], "99999: token ids are 0 to 2047")]
)
def test_a_stop_that_is_no_token_is_refused(tokenizer: Any, text: Path, stop: list[Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        source(text, stop=stop).draw_prompts(0, tokenizer, LIMITS)


def test_stops_are_ids_or_texts(tokenizer: Any, text: Path) -> None:
    prompts = source(text, stop=["<|endoftext|>", "\n", 7]).draw_prompts(0, tokenizer, LIMITS)
    assert prompts.stop == {tokenizer.eos_token_id, tokenizer("\n")["input_ids"][0], 7}


@pytest.mark.parametrize(
    "change", [{"sampling": {"top_p": 0.0}}, {"num_requests": 0}, {"too_long": "cut"}, {"ways": 1}]
)
def test_a_wrong_setting_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=str(next(iter(change)))):
        source(**change)


def test_a_simulated_engine_is_told_which_engines_take_prompts() -> None:
    with pytest.raises(WorkloadError, match="engine=torch_tiny"):
        source().draw(0)


def test_a_workload_of_lengths_gets_text_of_these_lengths(tokenizer: Any) -> None:
    synthetic = SyntheticSource(
        arrivals=PoissonArrivals(rate=3.0), lengths=LENGTHS, agreement=IidAgreement(alpha=0.5), num_requests=8
    )
    workload = synthetic.draw(2)
    prompts = prompts_for(workload, 2, tokenizer, LIMITS)
    assert [len(tokens) for tokens in prompts.tokens] == workload.prompt_tokens.tolist()
    assert prompts.max_tokens.tolist() == workload.output_tokens.tolist()
    assert np.array_equal(prompts.arrival, workload.arrival)
    assert not prompts.stop
    assert prompts.digest == prompts_for(workload, 2, tokenizer, LIMITS).digest != workload.digest
    short = EngineLimits(64, 16, 0, 8, 40)
    with pytest.raises(WorkloadError, match=r"too_long=clip.*max_total_tokens=40"):
        prompts_for(workload, 2, tokenizer, short)
