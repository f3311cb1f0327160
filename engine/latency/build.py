"""Build the shipped latency tables from the raw profile folder.

    python -m engine.latency.build --profiles DIR --out engine/latency/tables

Deterministic: the same profiles give the same bytes. Rows that `engine.latency.holdout` marks are never fitted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.command import run
from engine.latency import compose, recipes
from engine.latency.estimates import Estimates
from engine.latency.recipes import ENGINES, KV_TOKENS, REQUESTS, Engine, Sources
from engine.latency.shapes import gpu_spec
from engine.latency.table_file import SCHEMA, dump, rounded

ORIGINS = {
    "vidur": "microsoft/vidur 7d47513, MIT",
    "frontier": "NetX-lab/Frontier a4b22df, MIT",
    "llmservingsim": "casys-kaist/LLMServingSim 5daddb2, MIT",
    "aiconfigurator": "aiconfigurator-core 0.12.0 (ai-dynamo/aiconfigurator), Apache-2.0",
}
"""First folder of a profile path -> where it was published, and its licence."""


def memory_section(engine: Engine, estimates: Estimates) -> dict[str, Any]:
    """Bytes that determine the KV capacity: every GPU holds the whole drafter, so its cache counts once per GPU."""
    drafter = engine.drafter
    drafter_kv = engine.tensor_parallel * drafter.kv_bytes_per_token if drafter else 0
    return {
        "gpu_memory_bytes": gpu_spec(engine.gpu).memory_bytes,
        "weight_bytes": engine.model.weight_bytes,
        "drafter_weight_bytes": drafter.weight_bytes if drafter else 0,
        "activation_reserve_bytes": estimates.activation_reserve_bytes,
        "kv_bytes_per_token": engine.model.kv_bytes_per_token + drafter_kv,
    }


def provenance(engine: Engine, sources: Sources, estimates: Estimates) -> dict[str, Any]:
    """Provenance of the table: files with origin and licence, parts not measured, rows held out."""
    folders = sorted({path.split("/")[0] for path in sources.used})
    not_measured = ["overhead.*, drafter.*: see engine/latency/estimates.py"]
    if engine.gpu not in recipes.LLMSERVINGSIM:
        not_measured.append("sampler: measured on an RTX PRO 6000, scaled by vocabulary and bandwidth")
        not_measured.append("LM head: interpolated between the vocabularies of the GEMM table")
    if engine.model.name == "vicuna_33b":
        not_measured.append("linear: GEMMs interpolated in n and k; element-wise operators scaled by width")
    if engine.gpu == "a100_80gb" and engine.model.heads // engine.tensor_parallel != 32:
        not_measured.append("attention: the 32-head profile moved to this head count")
    if engine.gpu == "h100_80gb":
        not_measured.append("prefill_attention.context_token_seconds: from the area of causal attention")
    return {
        "command": "python -m engine.latency.build",
        "origins": [f"{folder}: {ORIGINS[folder]}" for folder in folders],
        "files": sources.used,
        "held_out": "see engine/latency/holdout.py; those rows are not fitted here",
        "not_measured": not_measured,
        "estimates": estimates.provenance(),
    }


def table_document(root: Path, name: str, estimates: Estimates | None = None) -> dict[str, Any]:
    """The content of one engine's table file, composed from the profiles under `root`."""
    engine, e, sources = ENGINES[name], estimates or Estimates(), Sources(root)
    layers = engine.model.layers
    linear = recipes.linear_part(sources, engine)
    attention = recipes.attention_part(sources, engine)
    sampler = recipes.sampler_part(sources, engine)
    head = recipes.head_part(sources, engine, sampler)
    draft = compose.drafter_times(engine.drafter, gpu_spec(engine.gpu), sampler, REQUESTS, e)
    decode: dict[str, Any] = {
        "requests": REQUESTS.tolist(),
        "kv_tokens_per_request": KV_TOKENS.tolist(),
        "seconds": rounded(attention.decode * layers),
    }
    if attention.mixed is not None:
        decode["mixed_seconds"] = rounded(attention.mixed * layers)
    prefill = attention.prefill
    return {
        "schema": SCHEMA,
        "name": name,
        "model": engine.model.name,
        "drafter_model": engine.drafter.name if engine.drafter else "ngram",
        "gpu": engine.gpu,
        "tensor_parallel": engine.tensor_parallel,
        "memory": memory_section(engine, e),
        "overhead": {
            "fixed_seconds": e.fixed_s,
            "per_request_seconds": e.per_request_s,
            "speculation_seconds": e.speculation_s,
            "idle_drafter_seconds": e.idle_drafter_s if engine.drafter else 0.0,
            "idle_drafter_request_seconds": e.idle_drafter_request_s if engine.drafter else 0.0,
        },
        "attention": {"verify_row_fraction": rounded([attention.verify_row_fraction], 3)[0]},
        "linear": {"tokens": linear.nodes.astype(np.int64).tolist(), "seconds": rounded(linear.seconds)},
        "head": {"rows": head.nodes.astype(np.int64).tolist(), "seconds": rounded(head.seconds)},
        "decode_attention": decode,
        "prefill_attention": {
            "fresh_chunk": prefill.fresh.nodes.astype(np.int64).tolist(),
            "fresh_seconds": rounded(prefill.fresh.seconds * layers),
            "chunk": prefill.extra.nodes.astype(np.int64).tolist(),
            "extra_seconds": rounded(prefill.extra.seconds * layers),
            "context_token_seconds": rounded(prefill.context.seconds * layers),
        },
        "drafter": {
            "requests": draft.step.nodes.astype(np.int64).tolist(),
            "step_seconds": rounded(draft.step.seconds),
            "kv_token_seconds": rounded([draft.kv_token_s])[0],
            "prefill_seconds": rounded([draft.prefill_s])[0],
            "prefill_token_seconds": rounded([draft.prefill_token_s])[0],
        },
        "provenance": provenance(engine, sources, e),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: build every engine's table, or those named."""
    parser = argparse.ArgumentParser(description="Build the shipped latency tables from the raw profile folder.")
    parser.add_argument("--profiles", type=Path, required=True, help="folder that holds PROFILES.md")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--engine", choices=sorted(ENGINES), action="append", help="only this one (repeatable)")
    options = parser.parse_args(arguments)
    documents = {name: dump(table_document(options.profiles, name)) for name in options.engine or ENGINES}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in documents.items():
        (options.out / f"{name}.json").write_text(text)
        print(f"{options.out / name}.json: {len(text):,} bytes")


if __name__ == "__main__":
    run(main)
