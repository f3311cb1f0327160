"""The poster's claims, counted from runs: per load window, per chunked-prefill budget, and at every load.

Each function returns a tidy frame; `RULES` says in words what each counts, and is printed beside the tables.
"""

from typing import Any

import numpy as np
import pandas as pd

from runs.reporting.collate import METRICS
from runs.reporting.statistics import (
    ATTAINMENT_ENOUGH,
    ATTAINMENT_MARGIN,
    ROUNDING,
    SETTING,
    PairedDifference,
    best_fixed,
    close_to,
    comparable_settings,
    paired_difference,
)

WINDOW_TOLERANCE = 0.01
TPOT_TOLERANCE = 0.02
MINIMUM_MEASURED = 20
NONE_ATTAINS = "no fixed pair attains as much"
_NEEDED = [*SETTING, *METRICS, "seed", "workload_digest", "folder", "request_rate_rps", "ttft_target_s"]

BEST_FIXED_RULE = (
    "Best fixed setting of a load, chosen in hindsight: the lowest mean TPOT among the fixed (c, n) whose TTFT "
    "attainment is close to the highest that any fixed (c, n) reaches there (at most 1 point less, and at most a tenth "
    "of it less), or at least 95 %."
)
RULES = {
    "windows": (
        "A load window is one time window of one seed in which every compared run finished at least "
        f"{MINIMUM_MEASURED} requests that have a TPOT; a request belongs to the window it arrives in. In each, the "
        "best fixed c is the lowest mean TPOT among the fixed settings that share the budget n, chosen in hindsight "
        "window by window, which no single setting can do. Counted: windows in which a controller's mean TPOT is at "
        "most 1 % above it. The rows of single fixed c show how far each of them gets by the same count."
    ),
    "budgets": (
        "The controller's mean TPOT against the lowest that any fixed setting reaches among those meeting the "
        "target, that is with TTFT attainment of at least 95 %. Holds when the controller meets the target too and "
        "its TPOT is not above that of the best fixed n; 'Interval says' asks the same of the ratio's whole interval."
    ),
    "loads": (
        "Attainment holds when it is at most 1 point below the highest that any fixed (c, n) reaches at that load, "
        "or at least 95 %. TPOT holds when it is at most 2 % above the lowest among the fixed (c, n) that attain as "
        "much: at least what the controller attains, or at least 95 %. Where no fixed pair attains as much it holds, "
        "and the ratio, for information, is to the pair that attains the most. 'Interval says' asks the same of the "
        "ratio's whole 95 % interval: a verdict whose interval is undecided, or missing, is no finding."
    ),
}


def headline_budgets(settings: pd.DataFrame) -> dict[tuple[str, str], int]:
    """The budget n at which the c's of each (engine, scenario) are compared: the best fixed setting's.

    Where that n was run with one c only, the n with the most c's, and of those the one with the lowest TPOT.
    """
    budgets: dict[tuple[str, str], int] = {}
    for (engine, scenario), group in settings[settings["role"] == "fixed"].groupby(["engine", "scenario"]):
        by_budget = group.groupby("token_budget").agg(
            choices=("candidates", "nunique"), best=("best_fixed", "any"), tpot=("tpot_mean_s", "min")
        )
        by_budget["several"] = by_budget["choices"] > 1
        order = by_budget.sort_values(["several", "best", "choices", "tpot"], ascending=[False, False, False, True])
        budgets[engine, scenario] = int(order.index[0])
    return budgets


def panel_budgets(settings: pd.DataFrame) -> dict[tuple[str, str], int]:
    """The one budget n at which the c's of each (engine, family) are drawn over all its loads.

    The n with which some c attains as much as the best fixed setting's rule asks at the most loads; of equal ones,
    that with the lowest TPOT over the loads.
    """
    budgets: dict[tuple[str, str], int] = {}
    fixed = settings[settings["role"] == "fixed"]
    for (engine, family), group in fixed.groupby(["engine", "family"]):
        needed = group.groupby("scenario")["ttft_attainment"].transform("max").map(close_to)
        attains = group["ttft_attainment"] >= needed.clip(upper=ATTAINMENT_ENOUGH) - ROUNDING
        score = (
            group.assign(attains=attains)
            .groupby(["token_budget", "scenario"])
            .agg(attains=("attains", "any"), tpot=("tpot_mean_s", "min"))
        )
        order = score.groupby("token_budget").agg({"attains": "sum", "tpot": "mean"})
        budgets[engine, family] = int(order.sort_values(["attains", "tpot"], ascending=[False, True]).index[0])
    return budgets


def window_claim(windows: pd.DataFrame, headline_budgets: dict[tuple[str, str], int]) -> pd.DataFrame:
    """Claim (i): in how many load windows each controller is within 1 % of, or better than, the best fixed c.

    One row per engine, scenario, budget n and label (optimizers, and each fixed c itself). `headline` marks the budget
    given for that engine and scenario, normally the best fixed setting's. An optimizer that was itself held to one
    budget is compared at that one only.
    """
    rows: list[dict[str, Any]] = []
    usable = windows[windows["measured"] >= MINIMUM_MEASURED]
    # The requests of a window are the same in two runs exactly when all three of these are.
    usable = usable.assign(place=usable.groupby(["workload_digest", "seed", "window"]).ngroup())
    for (engine, family, scenario), group in usable.groupby(["engine", "family", "scenario"], sort=False):
        tpots = group.pivot(index="place", columns="label", values="tpot_s")
        settings = group.drop_duplicates("label").set_index("label")
        for budget, shared in settings[settings["role"] == "fixed"].groupby("token_budget"):
            if shared["candidates"].nunique() < 2:
                continue
            rivals = settings[settings["role"] == "optimizer"]
            rivals = rivals[rivals["token_budget"].isna() | (rivals["token_budget"] == budget).fillna(False)]
            place = {"engine": engine, "family": family, "scenario": scenario, "token_budget": int(budget)}
            place["headline"] = headline_budgets.get((engine, scenario)) == int(budget)
            rows += [{**place, **row} for row in _count_windows(tpots, shared, rivals)]
    return pd.DataFrame(rows)


def pool_windows(claim: pd.DataFrame) -> pd.DataFrame:
    """Claim (i) summed over the loads of each engine and workload family, at the headline budgets only."""
    if claim.empty:
        return claim
    chosen = claim[claim["headline"]].copy()
    # At another load the same c has another budget: pooled, a fixed setting is its c.
    fixed = chosen["role"] == "fixed"
    chosen.loc[fixed, "label"] = [f"fixed c={c:.0f}" for c in chosen.loc[fixed, "candidates"]]
    keys = ["engine", "family", "label", "role"]
    pooled = chosen.groupby(keys, sort=False)[["windows", "within"]].sum().reset_index()
    pooled["share"] = pooled["within"] / pooled["windows"]
    return pooled


def budget_claim(runs: pd.DataFrame) -> pd.DataFrame:
    """Claim (ii): each optimizer's TPOT against the best fixed n that meets the same TTFT target.

    An optimizer held to one c is compared with fixed settings of that c, any other with every fixed setting.
    """
    rows: list[dict[str, Any]] = []
    for group, own, settings in _optimizers(runs):
        rival = settings[settings["role"] == "fixed"]
        if pd.notna(own["candidates"]):
            rival = rival[rival["candidates"] == own["candidates"]]
        meeting = rival[rival["ttft_attainment"] >= ATTAINMENT_ENOUGH - ROUNDING]
        best = meeting.sort_values(["tpot_mean_s", "label"]).iloc[0] if len(meeting) else None
        row = _against(group, own, best, most=1.0)
        row["meets_target"] = bool(own["ttft_attainment"] >= ATTAINMENT_ENOUGH - ROUNDING)
        if best is None:
            row["holds"] = "no fixed n meets it" if len(rival) else "no fixed runs"
        else:
            row["holds"] = _word(row["meets_target"] and row["tpot_ratio"] <= 1.0 + ROUNDING)
        rows.append(row)
    return pd.DataFrame(rows)


def load_claim(runs: pd.DataFrame) -> pd.DataFrame:
    """Claim (iii): at every load, each optimizer's attainment and TPOT against the best fixed pairs.

    Where no fixed pair attains as much, `against` is the one that attains the most and `tpot_holds` says so.
    """
    rows: list[dict[str, Any]] = []
    for group, own, settings in _optimizers(runs):
        fixed = settings[(settings["role"] == "fixed") & settings["tpot_mean_s"].notna()]
        if fixed.empty:
            continue
        order = fixed.sort_values(["ttft_attainment", "tpot_mean_s", "label"], ascending=[False, True, True])
        highest, attainment = float(order["ttft_attainment"].iloc[0]), float(own["ttft_attainment"])
        as_much = best_fixed(settings, attainment)
        row = _against(group, own, order.iloc[0] if as_much is None else as_much, most=1.0 + TPOT_TOLERANCE)
        row["attainment_best_fixed"] = highest
        row["attainment_difference"] = attainment - highest
        row["attainment_holds"] = _word(attainment >= min(highest - ATTAINMENT_MARGIN, ATTAINMENT_ENOUGH) - ROUNDING)
        if as_much is None:
            row["tpot_holds"], row["interval_says"] = NONE_ATTAINS, "–"
        else:
            row["tpot_holds"] = _word(row["tpot_ratio"] <= 1.0 + TPOT_TOLERANCE + ROUNDING)
        row["holds"] = _word(row["attainment_holds"] == "holds" and row["tpot_holds"] != "fails")
        rows.append(row)
    return pd.DataFrame(rows)


def sentences(pooled: pd.DataFrame, budgets: pd.DataFrame, loads: pd.DataFrame) -> list[str]:
    """What the claims come to, in words: one sentence per claim and optimizer, failures named."""
    said: list[str] = []
    if not pooled.empty:
        for label, mine in pooled[pooled["role"] == "optimizer"].groupby("label", sort=False):
            within, total = int(mine["within"].sum()), int(mine["windows"].sum())
            rival = pooled[pooled["role"] == "fixed"].groupby("label")[["within", "windows"]].sum()
            share = rival["within"] / rival["windows"]
            text = f"Load windows: {label} is within 1 % of the best fixed c, or better, in {within} of {total}"
            if share.notna().any():
                single, most = share.idxmax(), 100 * share.max()
                text += f" ({100 * within / total:.0f} %); the best single one, {single}, in {most:.0f} %"
            said.append(text + ".")
    for name, claim, unit in (("Same TTFT target", budgets, "best fixed n"), ("Every load", loads, "best fixed pair")):
        for label, mine in claim.groupby("label", sort=False) if len(claim) else ():
            said.append(f"{name}: {_sentence(label, mine, unit)}.")
    return said


def _sentence(label: str, claim: pd.DataFrame, unit: str) -> str:
    decided = claim[claim["holds"].isin(["holds", "fails"])]
    if decided.empty:
        return f"no fixed setting to compare {label} with meets it"
    failed = decided[decided["holds"] == "fails"]
    several = claim["engine"].nunique() > 1
    text = f"{label} holds at {len(decided) - len(failed)} of {len(decided)} loads"
    equal = decided[decided["tpot_holds"] != NONE_ATTAINS] if "tpot_holds" in decided else decided
    if len(equal) < len(decided):
        text += f"; at {len(decided) - len(equal)} {NONE_ATTAINS}"
    ranked = equal.dropna(subset="tpot_ratio").sort_values("tpot_ratio")
    if len(ranked):
        ends = [written_ratio(ranked.iloc[place]) for place in ((0, -1) if len(ranked) > 1 else (0,))]
        text += f"; TPOT is {' to '.join(ends)} times the {unit}'s"
        if ranked["tpot_ratio_low"].isna().all():
            text += " (one seed: no interval, so no finding)"
    undecided = int((equal["interval_says"] == "undecided").sum())
    if undecided:
        text += f"; the interval leaves {undecided} of these undecided"
    if len(failed) and len(failed) < len(decided):
        text += f"; fails at {_list_places(failed, several)}"
    return text


def written_ratio(row: Any) -> str:
    """A claim row's TPOT ratio with its interval over seeds, as `0.936 [0.931, 0.941]`."""
    if pd.isna(row.tpot_ratio):
        return "–"
    if pd.isna(row.tpot_ratio_low):
        return f"{row.tpot_ratio:.3f}"
    return f"{row.tpot_ratio:.3f} [{row.tpot_ratio_low:.3f}, {row.tpot_ratio_high:.3f}]"


def _count_windows(tpots: pd.DataFrame, fixed: pd.DataFrame, rivals: pd.DataFrame) -> list[dict[str, Any]]:
    best = tpots[list(fixed.index)].dropna().min(axis=1)
    rows = []
    for label, setting in pd.concat([rivals, fixed.sort_values("candidates")]).iterrows():
        ratio = (tpots[label] / best).dropna()
        if ratio.empty:
            continue
        within = int((ratio <= 1.0 + WINDOW_TOLERANCE + ROUNDING).sum())
        rows.append(
            {
                "label": label,
                "role": setting["role"],
                "candidates": int(setting["candidates"]) if setting["role"] == "fixed" else None,
                "windows": len(ratio),
                "within": within,
                "share": within / len(ratio),
                "ratio_median": float(np.median(ratio)),
                "ratio_worst": float(ratio.max()),
            }
        )
    return rows


def _optimizers(runs: pd.DataFrame) -> list[tuple[pd.DataFrame, pd.Series, pd.DataFrame]]:
    found = []
    for _, group in runs[_NEEDED].groupby(["engine", "scenario"], sort=False):
        by_seeds: dict[tuple[int, ...], pd.DataFrame] = {}
        for label in group.loc[group["role"] == "optimizer", "label"].unique():
            seeds = tuple(sorted(group.loc[group["label"] == label, "seed"]))
            if seeds not in by_seeds:
                by_seeds[seeds] = comparable_settings(group, label)
            settings = by_seeds[seeds]
            found.append((group, settings[settings["label"] == label].iloc[0], settings))
    return found


def _against(group: pd.DataFrame, own: pd.Series, best: pd.Series | None, most: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "engine": own["engine"],
        "family": own["family"],
        "scenario": own["scenario"],
        "request_rate_rps": float(own["request_rate_rps"]),
        "ttft_target_s": float(own["ttft_target_s"]),
        "label": own["label"],
        "seeds": int(own["seeds"]),
        "ttft_attainment": float(own["ttft_attainment"]),
        "tpot_mean_s": float(own["tpot_mean_s"]),
        "against": None if best is None else best["label"],
        "against_attainment": np.nan if best is None else float(best["ttft_attainment"]),
        "against_tpot_mean_s": np.nan if best is None else float(best["tpot_mean_s"]),
    }
    paired: PairedDifference | None = None
    if best is not None:
        mine, theirs = (group[group["label"] == label] for label in (own["label"], best["label"]))
        paired = paired_difference(mine, theirs, "tpot_mean_s")
    row["tpot_ratio"] = paired.ratio if paired else np.nan
    row["tpot_ratio_low"] = paired.ratio_low if paired else np.nan
    row["tpot_ratio_high"] = paired.ratio_high if paired else np.nan
    row["tpot_ratio_by_seed"] = dict(zip(map(str, paired.seeds), paired.ratios, strict=True)) if paired else {}
    row["interval_says"] = _interval_says(row["tpot_ratio_low"], row["tpot_ratio_high"], most)
    return row


def _interval_says(low: float, high: float, most: float) -> str:
    if np.isnan(low):
        return "–"
    if high <= most + ROUNDING:
        return "holds"
    return "fails" if low > most + ROUNDING else "undecided"


def _list_places(failed: pd.DataFrame, several: bool, most: int = 4) -> str:
    places = [f"{row.engine}, {row.scenario}" if several else row.scenario for row in failed.itertuples()]
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return "; ".join(places[:most]) + more


def _word(holds: bool) -> str:
    return "holds" if holds else "fails"
