"""Compiles the kernels for a GPU that need not be there, and prints what became of them: `python -m ... 90`.

One JSON object a line: kernel, registers, bytes of local memory (spills), bytes of shared memory, whether tensor cores
multiply, and whether 16 bytes are loaded at once.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.backends.torch import triton_kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

VICUNA_7B = {"HEADS": 32, "KV_HEADS": 32, "BLOCK_SIZE": 16}
ATTENTION = VICUNA_7B | {"WIDTH": 128, "BLOCK_N": triton_kernels.KEYS_AT_ONCE}
CASES: list[tuple[str, dict[str, Any], int | None]] = [
    ("_embed", {"WIDTH": 4096, "BLOCK": 4096}, 4),
    ("_normalise", {"ADDED": True, "WIDTH": 4096, "BLOCK": 4096}, 8),
    ("_normalise", {"ADDED": True, "WIDTH": 6656, "BLOCK": 8192}, 16),
    ("_activate", {"WIDTH": 11008, "BLOCK": 1024}, 4),
    ("_turn_and_cache", VICUNA_7B | {"HALF": 64, "AT_ONCE": 8}, 4),
    ("_attend", ATTENTION | {"TREES": False, "SPLITS": 8, "BLOCK_M": 16}, None),
    ("_attend", ATTENTION | {"TREES": True, "SPLITS": 1, "BLOCK_M": 16}, None),
    ("_attend", ATTENTION | {"TREES": False, "SPLITS": 1, "BLOCK_M": 64}, None),
    ("_attend", ATTENTION | {"TREES": True, "SPLITS": 4, "BLOCK_M": 64}, None),
    ("_join", {"WIDTH": 128, "SPLITS": 8}, 1),
]
KINDS = {
    **dict.fromkeys(("ids", "positions", "slots", "tiles", "block_table", "prefix"), "*i32"),
    **dict.fromkeys(("promised", "bits"), "*i64"),
    **dict.fromkeys(("cos", "sin", "partial", "peaks", "sums"), "*fp32"),
    **dict.fromkeys(("scale", "eps"), "fp32"),
    **dict.fromkeys(("rows", "query_stride", "table_width", "results"), "i32"),
}


def report(name: str, constants: dict[str, Any], warps: int | None, capability: int) -> dict[str, Any]:
    """What the compiler made of one kernel in bfloat16."""
    if warps is None:
        warps = triton_kernels.attention_warps(constants["BLOCK_M"], capability // 10)
    kernel = getattr(triton_kernels, name)
    names = kernel.arg_names
    kinds = {one: "constexpr" if one in constants else KINDS.get(one, "*bf16") for one in names}
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={(names.index(one),): value for one, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, one in enumerate(names) if kinds[one].startswith("*")},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": name,
        "constants": constants,
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": made.metadata.shared,
        "tensor_cores": bool(re.search(r"\bHG?MMA\b", code)),
        "wide_loads": bool(re.search(r"(LDG|LDGSTS)\.\S*128", code)),
    }


if __name__ == "__main__":
    for case in CASES:
        print(json.dumps(report(*case, int(sys.argv[1]))), flush=True)
