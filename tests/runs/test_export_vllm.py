"""vLLM's own argument parser, configuration and scheduler classes take an exported schedule."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
pytest.importorskip("vllm", reason="vLLM is in an environment of its own")

from vllm.engine.arg_utils import EngineArgs  # type: ignore[import-not-found]
from vllm.entrypoints.launchers.cli_args import make_arg_parser  # type: ignore[import-not-found]
from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-not-found]
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup  # type: ignore[import-not-found]

from controllers.vllm_schedule import VllmSchedule
from engine.models.load import DRAFTER_FOLDER, TARGET_FOLDER
from runs.exporting.formats import Deployment, Vllm
from runs.exporting.schedule import Schedule

MOST, SEQS = 8, 128
SCHEDULES = [
    ((1, 64, 3), (65, 128, 1)),
    ((1, 1, 2), (2, 7, 5), (8, 8, 0), (9, 128, 4)),
    ((1, 127, 8), (128, 128, 0)),
]


def engine_config(words: list[str]):  # type: ignore[no-untyped-def]
    """vLLM's configuration of the command line `vllm serve ...`."""
    assert words[:2] == ["vllm", "serve"]
    given = make_arg_parser(FlexibleArgumentParser()).parse_args(
        [*words[3:], "--model", words[2], "--dtype", "float32"]
    )
    return EngineArgs.from_cli_args(given).create_engine_config()


@pytest.mark.parametrize("entries", SCHEDULES, ids=str)
def test_vllm_parses_the_command_line_and_looks_up_the_k_that_is_played_back(entries: tuple) -> None:
    schedule = Schedule(entries, 2048, MOST, SEQS)
    way = Vllm()
    deployment = Deployment(str(TARGET_FOLDER), str(DRAFTER_FOLDER), "draft_model", 4096)
    words = way.command(schedule, deployment, "")
    config = engine_config(words)
    speculative = config.speculative_config
    assert speculative.uses_dynamic_speculative_decoding()
    assert [tuple(entry) for entry in speculative.num_speculative_tokens_per_batch_size] == list(entries)
    assert config.scheduler_config.max_num_seqs == SEQS
    assert config.scheduler_config.max_num_batched_tokens == 2048
    # As its scheduler does when it is made.
    lookup = build_dynamic_sd_schedule_lookup(
        speculative.num_speculative_tokens_per_batch_size,
        vllm_max_batch_size=config.scheduler_config.max_num_seqs,
        vllm_num_speculative_tokens=speculative.num_speculative_tokens,
    )
    player = way.controller(words, way.files(schedule, deployment))
    assert isinstance(player, VllmSchedule)
    assert lookup[1:] == list(player.by_batch_size(SEQS))[1:]


def test_vllm_serves_without_speculation_where_none_pays() -> None:
    deployment = Deployment(str(TARGET_FOLDER), str(DRAFTER_FOLDER), None, 4096)
    config = engine_config(Vllm().command(Schedule(((1, SEQS, 0),), 1024, MOST, SEQS), deployment, ""))
    assert config.speculative_config is None
    assert config.scheduler_config.max_num_batched_tokens == 1024
