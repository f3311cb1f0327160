"""What a vLLM in this process is told, checked without vLLM."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from engine.backends.vllm.engine_config import VllmEngineConfig
from engine.models.load import DRAFTER_FOLDER, TARGET_FOLDER
from engine.speculation.allocation import CHAINS, Speculation

SMALL = {"name": "vllm", "max_num_seqs": 4, "max_model_len": 100, "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"max_num_batched_tokens": 16}, r"max_num_batched_tokens=16 .*\(16 tokens\).*lower max_num_seqs"),
        ({"ngram_shortest": 4}, "ngram_shortest=4 is above ngram_longest=3"),
        ({"num_speculative_tokens": 33}, "num_speculative_tokens"),
        ({"drafted": 3}, "drafted"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name(setting: dict[str, int], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        VllmEngineConfig.model_validate(SMALL | setting)


def test_vllm_is_told_of_the_embedded_pair_and_of_a_cache_for_every_request() -> None:
    told = VllmEngineConfig.model_validate(SMALL).arguments(on_processor=True)
    assert told["model"] == str(TARGET_FOLDER)
    drafter = {"method": "draft_model", "model": str(DRAFTER_FOLDER), "num_speculative_tokens": 3}
    assert told["speculative_config"] == drafter
    # 4 requests of 100 tokens in blocks of 32, and vLLM's own block.
    assert told["num_gpu_blocks_override"] == 4 * 4 + 1
    assert told["kv_cache_memory_bytes"] > 0
    assert VllmEngineConfig.model_validate(SMALL).arguments(on_processor=False)["kv_cache_memory_bytes"] is None


def test_a_drafter_decides_what_vllm_speculates_with() -> None:
    lookup = VllmEngineConfig(**SMALL, drafter="ngram")  # type: ignore[arg-type]
    speculation = lookup.arguments(on_processor=False)["speculative_config"]
    assert (speculation["method"], speculation["prompt_lookup_min"], speculation["prompt_lookup_max"]) == (
        "ngram",
        1,
        3,
    )
    none = VllmEngineConfig(**SMALL, drafter="none")  # type: ignore[arg-type]
    assert none.arguments(on_processor=False)["speculative_config"] is None
    assert none.most_candidates == 0
    assert lookup.variant == "vllm drafter=ngram num_speculative_tokens=3"


def test_candidates_are_shared_out_in_one_way() -> None:
    engine = VllmEngineConfig.model_validate(SMALL)
    assert engine.governed_by(CHAINS) is engine.governed_by(None) is engine
    with pytest.raises(ValueError, match="which only simulated engines"):
        engine.governed_by(Speculation(allocation="global"))
