"""How much the GPU benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """How much is measured: `GPU` for figures, `REHEARSED` to see on a CPU that everything runs.

    copy_bytes, matmul_size: of the peaks · kv_tokens: cached by one request, for bandwidth · prompt_tokens: of the
    prefill · decodes, candidates: the grid, each request with `grid_kv_tokens` cached · outside_decodes,
    outside_candidates: iterations whose time outside the forwards is told · steps: timed iterations of each kind ·
    prefills: timed · attention_decodes, attention_kv_tokens, verify_rows, tree_branching: batches to attend with ·
    block_sizes: of the caches they attend over · spread_bytes: so many layers are attended over that their caches come
    to this, more than a chip's own cache holds · repeats: of each way to attend.
    """

    copy_bytes: int
    matmul_size: int
    kv_tokens: tuple[int, ...]
    prompt_tokens: int
    decodes: tuple[int, ...]
    candidates: tuple[int, ...]
    grid_kv_tokens: int
    outside_decodes: tuple[int, ...]
    outside_candidates: tuple[int, ...]
    steps: int
    prefills: int
    attention_decodes: tuple[int, ...]
    attention_kv_tokens: tuple[int, ...]
    verify_rows: int
    tree_branching: int
    block_sizes: tuple[int, ...]
    spread_bytes: int
    repeats: int


GPU = Sizes(
    copy_bytes=4 << 30,
    matmul_size=8192,
    kv_tokens=(128, 512, 1024, 1792),
    prompt_tokens=2048,
    decodes=(1, 2, 4, 8, 16, 32, 64),
    candidates=(0, 2, 4, 8),
    grid_kv_tokens=512,
    outside_decodes=(1, 8, 32, 64),
    outside_candidates=(0, 4),
    steps=40,
    prefills=20,
    attention_decodes=(1, 8, 32, 64),
    attention_kv_tokens=(256, 1024, 2048),
    verify_rows=5,
    tree_branching=3,
    block_sizes=(16, 128),
    spread_bytes=256 << 20,
    repeats=20,
)

REHEARSED = Sizes(
    copy_bytes=16 << 20,
    matmul_size=256,
    kv_tokens=(16, 64),
    prompt_tokens=96,
    decodes=(1, 4),
    candidates=(0, 2),
    grid_kv_tokens=32,
    outside_decodes=(1, 4),
    outside_candidates=(0, 2),
    steps=5,
    prefills=3,
    attention_decodes=(1, 3),
    attention_kv_tokens=(32,),
    verify_rows=5,
    tree_branching=3,
    block_sizes=(16,),
    spread_bytes=0,
    repeats=2,
)
