"""Fitted lengths of prompts and outputs: numbers only, with the source of each.

`TABLES` holds quantiles in tokens at `LEVELS`, with the Gaussian copula correlation (2 sin(pi rho / 6) of Spearman's
rho), computed by `python -m engine.workload.fit_lengths`. Held-out errors come from fitting on one half of the rows and
comparing with the other (KS = Kolmogorov-Smirnov distance, prompts / outputs; mean = relative error of the means):

| name | rows | KS | mean | source |
|---|---|---|---|---|
| sharegpt | 30,731 | .008 / .006 | +0.6 % / -0.1 % | Sarathi-Serve sharegpt_8k, Llama-2 tokens, with history |
| arxiv | 28,257 | .024 / .014 | -2.0 % / -4.2 % | Vidur (MLSys'24) arXiv summarization 4k, Llama-2 tokens |
| specbench | 560 | .062 / .059 | -6.2 % / +1.1 % | Spec-Bench (Xia et al., 2024), Vicuna template, greedy Vicuna-7B |
| azure_conv | 10,108 | .038 / .024 | +0.9 % / -0.2 % | Azure LLM inference trace 2023 (Splitwise, ISCA'24), 30 min |
| azure_code | 5,740 | .025 / .027 | -2.0 % / -8.2 % | the same, code completion |

arXiv's negative correlation comes from its bound on the total; Azure's two lengths are all but independent.

`LOGNORMALS` holds medians in tokens and standard deviations of the natural logarithm. Figures taken from papers are
second hand: they were not recomputed from the data, so check them against the paper before citing them.

- lmsys_chat_1m: one turn without history. The means, 69.5 prompt and 214.5 response tokens, are published (Zheng et
  al., "LMSYS-Chat-1M", ICLR'24, section 3). The output's sigma is that of lmsys_chat_1m_4k below; the prompt's sigma
  of 1.2 and the independence are estimates. Medians follow from mean = median exp(sigma^2 / 2).
- lmsys_chat_1m_4k: turns with their history, total at most 4096. Medians and sigmas follow from the published median
  and 90th percentile, 417 and 1678 prompt tokens, 139 and 484 output tokens (Vidur, table of workloads). The
  independence is an estimate. The law's means are 3 % and 12 % above the published 686 and 197.
- cnn_dailymail: computed from the 80 CNN/DailyMail questions of Spec-Bench with Vicuna-7B's greedy summaries
  (medians, sigmas and correlation of logarithms: 793, 0.46, 159, 0.37, 0.50). A small sample, one model's verbosity.
- bigcodebench: an estimate. The mean prompt of 1,112.5 characters and the mean solution of 426 characters (Zhuo et
  al., "BigCodeBench", ICLR'25, statistics of Complete) count 3.5 and 3.2 characters a Llama-2 token. Prompts have 40
  more tokens of instruction. Solutions count twice: chat models repeat signature and imports, and explain. Sigmas and
  correlation are guesses.
"""

from __future__ import annotations

from typing import Any

LEVELS = (
    0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85,
    0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0,
)  # fmt: skip

TABLES: dict[str, dict[str, Any]] = {
    "sharegpt": {
        "prompt_quantiles": [
            1, 12, 16, 29, 74, 181, 382, 580, 777, 973, 1203, 1457, 1730, 2060, 2401, 2799, 3235, 3735, 4278, 4918,
            5696, 6104, 6563, 6950, 7164, 7434, 7622, 8141,
        ],
        "output_quantiles": [
            2, 6, 19, 44, 84, 130, 181, 228, 271, 312, 346, 381, 415, 453, 493, 534, 581, 628, 683, 754, 834, 876,
            920, 957, 975, 998, 1009, 1024,
        ],
        "correlation": 0.053,
        "max_total_tokens": 8_192,
    },
    "arxiv": {
        "prompt_quantiles": [
            1, 73, 229, 749, 1242, 1564, 1802, 1986, 2150, 2308, 2453, 2596, 2730, 2861, 2996, 3127, 3249, 3370,
            3490, 3597, 3702, 3759, 3813, 3863, 3892, 3933, 3963, 4054,
        ],
        "output_quantiles": [
            5, 36, 44, 60, 78, 92, 104, 115, 125, 135, 145, 156, 167, 179, 192, 206, 222, 242, 268, 304, 372, 438,
            736, 2197, 2775, 3270, 3583, 4056,
        ],
        "correlation": -0.119,
        "max_total_tokens": 4_096,
    },
    "specbench": {
        "prompt_quantiles": [
            48, 49, 49, 50, 53, 57, 64, 72, 80, 86, 94, 105, 119, 161, 288, 394, 491, 673, 787, 827, 881, 910, 1004,
            1189, 1349, 1544, 1689, 1772,
        ],
        "output_quantiles": [
            6, 10, 11, 15, 21, 26, 33, 39, 54, 76, 89, 107, 120, 135, 150, 166, 190, 220, 248, 304, 358, 390, 470,
            582, 696, 990, 1024, 1024,
        ],
        "correlation": 0.125,
    },
    "azure_conv": {
        "prompt_quantiles": [
            2, 39, 120, 181, 310, 379, 389, 398, 406, 426, 944, 1009, 1033, 1055, 1080, 1106, 1142, 1204, 1322,
            2221, 4076, 4081, 4086, 4092, 4099, 4123, 4146, 14050,
        ],
        "output_quantiles": [
            7, 16, 18, 38, 49, 60, 71, 80, 87, 93, 100, 110, 134, 162, 198, 374, 390, 396, 403, 414, 427, 433, 460,
            520, 564, 610, 656, 1000,
        ],
        "correlation": 0.03,
    },
    "azure_code": {
        "prompt_quantiles": [
            3, 17, 40, 76, 147, 230, 374, 575, 768, 925, 1060, 1219, 1460, 1677, 1880, 2141, 2410, 2702, 3148, 3893,
            5011, 6040, 7315, 7435, 7436, 7436, 7436, 7437,
        ],
        "output_quantiles": [
            6, 6, 6, 6, 7, 7, 8, 9, 9, 10, 11, 12, 13, 14, 16, 17, 19, 23, 28, 37, 53, 65, 85, 125, 162, 248, 319,
            1899,
        ],
        "correlation": -0.015,
    },
}  # fmt: skip

LOGNORMALS: dict[str, dict[str, Any]] = {
    "lmsys_chat_1m": {
        "prompt_median": 33.8,
        "prompt_sigma": 1.2,
        "output_median": 133.6,
        "output_sigma": 0.973,
        "max_prompt_tokens": 2048,
        "max_output_tokens": 2048,
    },
    "lmsys_chat_1m_4k": {
        "prompt_median": 417.0,
        "prompt_sigma": 1.086,
        "output_median": 139.0,
        "output_sigma": 0.973,
        "max_total_tokens": 4096,
    },
    "cnn_dailymail": {
        "prompt_median": 793.0,
        "prompt_sigma": 0.46,
        "output_median": 159.0,
        "output_sigma": 0.37,
        "correlation": 0.5,
        "max_prompt_tokens": 3072,
        "max_output_tokens": 1024,
    },
    "bigcodebench": {
        "prompt_median": 334.0,
        "prompt_sigma": 0.4,
        "output_median": 235.0,
        "output_sigma": 0.5,
        "correlation": 0.3,
        "max_prompt_tokens": 2048,
        "max_output_tokens": 1280,
    },
}
