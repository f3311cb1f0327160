"""The corpus split and the readers of prompt files."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.models.corpus import (
    CorpusError,
    Prompt,
    cut_prompts,
    held_out_prompts,
    is_held_out,
    library_files,
    library_texts,
    read_prompts,
)
from engine.models.load import load_tokenizer
from engine.workload.workload import WorkloadError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_training_and_held_out_files_are_disjoint_and_the_same_every_time():
    training, held_out = library_files(held_out=False), library_files(held_out=True)
    assert not set(training) & set(held_out)
    assert training == library_files(held_out=False)
    assert 0.03 < len(held_out) / (len(training) + len(held_out)) < 0.2


def test_the_split_depends_on_the_relative_path_alone(tmp_path):
    names = [f"package{i}/module.py" for i in range(50)]
    for name in names:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x = 1\n")
    assert library_files(True, tmp_path) == sorted(filter(is_held_out, names))
    assert is_held_out("asyncio/queues.py")
    assert not is_held_out("asyncio/tasks.py")


def test_third_party_packages_tests_and_tables_are_left_out(tmp_path):
    for name in ("site-packages/a.py", "test/b.py", "idlelib/idle_test/c.py", "encodings/d.py", "config-3/e.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "_sysconfigdata_x.py").write_text("x = 1\n")
    with pytest.raises(CorpusError, match="no training Python sources"):
        library_files(False, tmp_path)


def test_files_that_are_no_source_or_empty_are_skipped(tmp_path):
    name = next(f"m{i}.py" for i in range(100) if not is_held_out(f"m{i}.py"))
    other = next(f"n{i}.py" for i in range(100) if not is_held_out(f"n{i}.py"))
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    (tmp_path / other).write_text("\n")
    assert list(library_texts(False, tmp_path)) == []


def test_prompts_have_exactly_the_lengths_asked_for_and_come_from_held_out_files(tokenizer):
    lengths = [1, 7, 128, 900, 128]
    prompts = held_out_prompts(tokenizer, lengths, seed=3)
    assert [prompt.tokens.size for prompt in prompts] == lengths
    for prompt in prompts:
        name, start = prompt.name.rsplit("+", 1)
        assert is_held_out(name)
        assert int(start) == 0 or prompt.text.startswith("\n")
        assert prompt.text == tokenizer.decode(prompt.tokens.tolist())
    again = held_out_prompts(tokenizer, lengths, seed=3)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(prompts, again, strict=True))
    assert [p.name for p in held_out_prompts(tokenizer, lengths, seed=4)] != [p.name for p in prompts]


def test_no_text_is_used_twice_before_every_long_enough_one_was_used(tokenizer):
    texts = [(f"text{i}", "\n".join(f"value_{i} = {j}" for j in range(30))) for i in range(5)] + [("short", "x")]
    prompts = cut_prompts(texts, tokenizer, [20] * 10, np.random.default_rng(0))
    names = [prompt.name.split("+")[0] for prompt in prompts]
    assert sorted(names[:5]) == sorted(names[5:]) == [f"text{i}" for i in range(5)]


def test_a_prompt_longer_than_every_text_is_refused_with_the_longest(tokenizer):
    texts = [("a.py", "x = 1\n"), ("b.py", "x = 1\ny = 2\n")]
    with pytest.raises(CorpusError, match=r"no text has 500 tokens; the longest, b\.py, has \d+"):
        cut_prompts(texts, tokenizer, [1, 500], np.random.default_rng(0))
    with pytest.raises(CorpusError, match="at least one token"):
        cut_prompts(texts, tokenizer, [0], np.random.default_rng(0))
    with pytest.raises(CorpusError, match="no text to cut"):
        cut_prompts([], tokenizer, [1], np.random.default_rng(0))


@given(st.text())
def test_every_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def _write(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_jsonl_gives_a_prompt_a_line(tmp_path):
    path = _write(
        tmp_path, {"prompt": "a", "max_tokens": 3, "arrival_s": 0}, "", {"prompt": "b", "arrival_s": 1.5, "id": 7}
    )
    assert read_prompts(path) == [
        Prompt("prompts.jsonl:1", "a", 3, 0.0),
        Prompt("prompts.jsonl:3", "b", None, 1.5),
    ]


def test_another_text_file_is_one_prompt_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufefffirst\r\nsecond — third\n".encode())
    assert read_prompts(path) == [Prompt("notes.txt", "first\r\nsecond — third\n")]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["{", {}], "row 1: not JSON"),
        ([{"prompt": "a"}, ["prompt"]], "row 2: must be a JSON object"),
        ([{"prompt": "a"}, {"text": "b"}], "row 2: 'prompt' must be text"),
        ([{"prompt": ""}], "row 1: 'prompt' must be text of at least one character"),
        ([{"prompt": ["a"]}], "row 1: 'prompt' must be text"),
        ([{"promt": "a"}], "row 1: unknown key 'promt'; did you mean 'prompt'"),
        ([{"prompt": "a", "max_token": 4}], "row 1: unknown key 'max_token'; did you mean 'max_tokens'"),
        ([{"prompt": "a", "max_tokens": 0}], "row 1: 'max_tokens' must be a whole number from 1 to 16777216, not 0"),
        ([{"prompt": "a", "max_tokens": True}], "row 1: 'max_tokens' .* not True"),
        ([{"prompt": "a", "output_tokens": 2.5}], "row 1: 'output_tokens' .* not 2.5"),
        ([{"prompt": "a", "output_tokens": 3, "max_tokens": 4}], "row 1: 'max_tokens' and 'output_tokens' differ"),
        ([{"timestamp": 0, "input_length": 1}], "row 1: 'prompt' must be text .*workload=trace"),
        ([{"conversations": [{"value": "a"}, {"value": 3}]}], "row 1: the first two 'conversations' must"),
        ([{"prompt": "a", "arrival_s": -1}], "row 1: 'arrival_s' must be seconds, 0 or more, not -1"),
        (['{"prompt": "a", "arrival_s": NaN}'], "row 1: 'arrival_s' must be seconds"),
        ([{"prompt": "a", "arrival_s": 2}, {"prompt": "b", "arrival_s": 1}], "row 2: arrives 1 s before"),
        ([{"prompt": "a", "arrival_s": 2}, {"prompt": "b"}], "row 2: 'arrival_s' must be on every row or on none"),
        ([{"prompt": "a"}, {"prompt": "b", "arrival_s": 1}], "row 2: 'arrival_s' must be on every row or on none"),
        (['{"prompt": "\\ud800"}'], "row 1: the text has half of a surrogate pair"),
        (["", ""], "the file has no prompts"),
    ],
)
def test_a_wrong_line_is_named_with_its_file(tmp_path, lines, complaint):
    path = _write(tmp_path, *lines)
    with pytest.raises(ValueError, match=f"prompts.jsonl.*{complaint}"):
        read_prompts(path)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(CorpusError, match=r"absent.jsonl: cannot be read: no such file"):
        read_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(WorkloadError, match=r"latin.txt, line 2: not UTF-8 at byte 4"):
        read_prompts(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    with pytest.raises(CorpusError, match=r"empty.txt: the file is empty"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "trace.csv").write_bytes(b"arrival_s,prompt_tokens,output_tokens")
    with pytest.raises(CorpusError, match=r"trace.csv: a table .*workload=trace"):
        read_prompts(tmp_path / "trace.csv")


def test_vllms_custom_prompts_keep_their_output_tokens(tmp_path):
    path = _write(
        tmp_path, {"prompt": "a", "output_tokens": 12}, {"prompt": "b", "output_tokens": "3"}, {"prompt": "c"}
    )
    assert [prompt.max_tokens for prompt in read_prompts(path)] == [12, 3, None]


def test_a_sharegpt_list_gives_first_turns_with_their_answers(tmp_path):
    path = tmp_path / "sharegpt.json"
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}, {"from": "human", "value": "bye"}]
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}, {"conversations": turns[1:]}]))
    assert read_prompts(path) == [
        Prompt("sharegpt.json:1", "hi", answer="hello"),
        Prompt("sharegpt.json:3", "hello", answer="bye"),
    ]
