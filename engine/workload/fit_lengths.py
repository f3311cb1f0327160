"""Refit the length tables and print them with their held-out error: `python -m engine.workload.fit_lengths --data DIR`.

DIR holds `lengths/` and `requests/` with the files named in `SOURCES`. No file is written: `length_tables.py` holds
the printed tables.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp, spearmanr

from engine.command import run
from engine.files import reading
from engine.workload.length_tables import LEVELS
from engine.workload.lengths import QuantileLengths

SOURCES: dict[str, tuple[str, str, str, int | None]] = {
    "sharegpt": ("lengths/sharegpt_8k_llama2_lengths.csv", "prompt_tokens", "output_tokens", 8192),
    "arxiv": ("lengths/arxiv_summarization_4k_llama2_lengths.csv", "prompt_tokens", "output_tokens", 4096),
    "specbench": (
        "lengths/specbench_vicuna7b_lengths.csv",
        "prompt_tokens_vicuna_template",
        "vicuna7b_output_tokens",
        None,
    ),
    "azure_conv": ("requests/azure2023_conv_0-30min.csv", "prompt_tokens", "output_tokens", None),
    "azure_code": ("requests/azure2023_code_0-30min.csv", "prompt_tokens", "output_tokens", None),
}


def fit(prompt: NDArray[np.int64], output: NDArray[np.int64], max_total_tokens: int | None = None) -> QuantileLengths:
    """Quantile tables at `LEVELS` and the Gaussian copula with the sample's Spearman rank correlation."""
    rho = float(spearmanr(prompt, output).statistic)
    return QuantileLengths(
        levels=list(LEVELS),
        prompt_quantiles=[int(q) for q in np.quantile(prompt, LEVELS, method="nearest")],
        output_quantiles=[int(q) for q in np.quantile(output, LEVELS, method="nearest")],
        correlation=round(2.0 * np.sin(np.pi * rho / 6.0), 3),
        max_total_tokens=max_total_tokens,
    )


def heldout_error(
    prompt: NDArray[np.int64], output: NDArray[np.int64], max_total_tokens: int | None
) -> dict[str, float]:
    """Fit on a random half of the rows and compare 100,000 draws with the other half.

    Returns Kolmogorov-Smirnov distances (`*_ks`), relative errors of the means (`*_mean`) and of the mean total, and
    the Spearman correlations drawn and held out.
    """
    order = np.random.default_rng(0).permutation(prompt.size)
    train, test = order[::2], order[1::2]
    drawn = fit(prompt[train], output[train], max_total_tokens).draw(np.random.default_rng(1), 100_000)
    return {
        "prompt_ks": float(ks_2samp(drawn.prompt_tokens, prompt[test]).statistic),
        "output_ks": float(ks_2samp(drawn.output_tokens, output[test]).statistic),
        "prompt_mean": float(drawn.prompt_tokens.mean() / prompt[test].mean() - 1.0),
        "output_mean": float(drawn.output_tokens.mean() / output[test].mean() - 1.0),
        "spearman": float(spearmanr(drawn.prompt_tokens, drawn.output_tokens).statistic),
        "spearman_heldout": float(spearmanr(prompt[test], output[test]).statistic),
    }


def read_lengths(path: Path, prompt: str, output: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two integer columns of a CSV file. Raises FileFaultError."""
    with (
        reading(path, kind=f"CSV with the columns {prompt} and {output}"),
        path.open(newline="", encoding="utf-8") as file,
    ):
        rows = [(int(row[prompt]), int(row[output])) for row in csv.DictReader(file)]
    columns = np.array(rows, dtype=np.int64)
    return columns[:, 0], columns[:, 1]


def main() -> None:
    """Print every fitted table and its held-out error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with lengths/ and requests/")
    data = parser.parse_args().data
    for name, (file, prompt_column, output_column, most) in SOURCES.items():
        prompt, output = read_lengths(data / file, prompt_column, output_column)
        model = fit(prompt, output, most)
        print(f"{name}: {prompt.size} rows; mean {prompt.mean():.1f} prompt, {output.mean():.1f} output tokens")
        print(f"  prompt_quantiles={model.prompt_quantiles}")
        print(f"  output_quantiles={model.output_quantiles}")
        print(f"  correlation={model.correlation}")
        errors = heldout_error(prompt, output, most)
        print("  held out: " + ", ".join(f"{key} {value:+.3f}" for key, value in errors.items()))


if __name__ == "__main__":
    run(main)
