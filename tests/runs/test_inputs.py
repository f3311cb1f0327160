"""Input files are told apart by what they hold."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel

from runs.inputs import file_digests, kept


class Section(BaseModel):
    path: Path | None
    name: str = "conv"


@dataclass(frozen=True)
class Controller:
    path: str


def test_every_file_that_settings_name_is_found_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    settings = {"workload": Section(path=tmp_path / "a"), "list": ["b", {"deep": ("c", 3, None)}], "text": "no file"}
    found = file_digests([settings, Controller("d")])
    assert list(found) == sorted([str(tmp_path / "a"), "b", "c", "d"])
    assert len(set(found.values())) == 4


def test_an_edited_file_has_another_digest_even_with_the_old_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("0.0,50,8\n")
    before, time = file_digests(path), path.stat().st_mtime_ns
    path.write_text("0.0,50,9\n")
    os.utime(path, ns=(time, time))
    assert file_digests(path) != before
    path.write_text("0.0,50,8\n")
    assert file_digests(path) == before


def test_a_models_folder_counts_and_another_does_not(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("1")
    assert file_digests(str(tmp_path)) == {}
    (tmp_path / "config.json").write_text("{}")
    before = file_digests(str(tmp_path))
    (tmp_path / "weights").write_text("12")
    assert file_digests(str(tmp_path)) != before


def test_a_kept_result_is_made_anew_when_the_file_has_changed(tmp_path: Path) -> None:
    made = []

    @kept(2)
    def read(path: Path) -> str:
        made.append(path)
        return path.read_text()

    path = tmp_path / "file"
    path.write_text("a")
    assert [read(path), read(path)] == ["a", "a"]
    path.write_text("b")
    assert [read(path), read(path)] == ["b", "b"]
    assert len(made) == 2
