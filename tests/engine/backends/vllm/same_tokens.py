"""Whether all runs of a sweep on the same requests generated the same tokens, as greedy decoding must whatever c is.

    python -m tests.engine.backends.vllm.same_tokens FOLDER...

Runs are those with an `outputs.jsonl` anywhere under the folders. Exits with 1 when some differ, with 2 when there is
nothing to compare.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from runs.folder import OUTPUTS, SUMMARY


def main(folders: list[Path]) -> int:
    """Compare, and print a line for each set of requests."""
    found: dict[str, dict[str, list[list[int]]]] = defaultdict(dict)
    for path in sorted(path for folder in folders for path in folder.rglob(OUTPUTS)):
        run = json.loads((path.parent / SUMMARY).read_text(encoding="utf-8"))["run"]
        lines = path.read_text(encoding="utf-8").splitlines()
        # Digests cover arrival times; the same prompts at another rate must give the same tokens too.
        prompts = json.dumps([json.loads(line)["prompt"] for line in lines])
        key = f"{run['workload']} seed {run['seed']}, {len(lines)} requests"
        found[key + "\0" + prompts][str(path.parent)] = [json.loads(line)["tokens"] for line in lines]
    wrong = False
    for key, runs in found.items():
        (first, expected), *others = runs.items()
        differing = [name for name, tokens in others if tokens != expected]
        wrong |= bool(differing)
        tokens = sum(map(len, expected))
        print(f"{key.split(chr(0))[0]}: {len(runs)} runs of {tokens} tokens, {len(differing)} unlike {first}")
        for name in differing:
            unlike = [i for i, (a, b) in enumerate(zip(runs[name], expected, strict=True)) if a != b]
            print(f"  {name}: requests {unlike}")
    if not any(len(runs) > 1 for runs in found.values()):
        print("no two runs of the same requests")
        return 2
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
