"""Commands of the engine package end with one line on what their user can fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.command import run
from engine.latency import build, validate
from engine.models import train
from engine.workload import fit_lengths


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (build, ["--profiles", "absent", "--out", "tables"], "absent/vidur"),
        (validate, ["--profiles", "absent"], "absent/"),
        (train, ["--out", "a_file/models", "--steps", "1"], "a_file/models"),
        (train, ["--out", "models", "--steps", "0"], "steps=0"),
        (fit_lengths, ["--data", "absent"], "absent/"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: object,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    monkeypatch.setattr("sys.argv", ["command", *arguments])
    with pytest.raises(SystemExit) as end:
        run(command.main)  # type: ignore[attr-defined]
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert said in message
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]
