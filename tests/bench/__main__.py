"""All benchmarks, one after the other: `python -m tests.bench` from the repository root."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.bench import cold_start, decisions, environment, instances, simulator

for benchmark in (simulator, decisions, environment, instances, cold_start):
    benchmark.main()
