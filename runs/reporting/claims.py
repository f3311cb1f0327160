"""The poster's claims, counted from runs: per load window, per chunked-prefill budget, and at every load.

Each function returns a tidy frame; `RULES` says in words what each counts, and is printed beside the tables.
"""

from typing import Any

import numpy as np
import pandas as pd

from runs.reporting.statistics import (
    ATTAINMENT_ENOUGH,
    ATTAINMENT_MARGIN,
    PairedDifference,
    best_fixed,
    comparable_settings,
    paired_difference,
)

WINDOW_TOLERANCE = 0.01
TPOT_TOLERANCE = 0.02
MINIMUM_MEASURED = 20
_ROUNDING = 1e-12

BEST_FIXED_RULE = (
    "Best fixed setting of a load, chosen in hindsight: the lowest mean TPOT among the fixed (c, n) whose TTFT "
    "attainment is at most 1 point below the highest that any fixed (c, n) reaches there, or at least 95 %."
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
        "its TPOT is not above that of the best fixed n."
    ),
    "loads": (
        "Attainment holds when it is at most 1 point below the highest that any fixed (c, n) reaches at that load, "
        "or at least 95 %. TPOT holds when it is at most 2 % above the lowest among fixed (c, n) that attain as "
        "much (at most 1 point less than the controller, or at least 95 %); where no fixed setting attains as much, "
        "nothing can beat it."
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
        needed = group.groupby("scenario")["ttft_attainment"].transform("max") - ATTAINMENT_MARGIN
        attains = group["ttft_attainment"] >= needed.clip(upper=ATTAINMENT_ENOUGH) - _ROUNDING
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
        fixed = group[group["role"] == "fixed"]
        for budget, shared in fixed.groupby("token_budget"):
            if shared["candidates"].nunique() < 2:
                continue
            rivals = group[group["role"] == "optimizer"]
            rivals = rivals[rivals["token_budget"].isna() | (rivals["token_budget"] == budget).fillna(False)]
            headline = headline_budgets.get((engine, scenario)) == int(budget)
            for row in _count_windows(shared, rivals):
                rows.append(
                    {
                        "engine": engine,
                        "family": family,
                        "scenario": scenario,
                        "token_budget": int(budget),
                        "headline": headline,
                        **row,
                    }
                )
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
        meeting = rival[rival["ttft_attainment"] >= ATTAINMENT_ENOUGH - _ROUNDING]
        best = meeting.sort_values(["tpot_mean_s", "label"]).iloc[0] if len(meeting) else None
        meets = bool(own["ttft_attainment"] >= ATTAINMENT_ENOUGH - _ROUNDING)
        row = _against(group, own, best)
        row["meets_target"] = meets
        if best is None:
            row["holds"] = "no fixed n meets it" if len(rival) else "no fixed runs"
        else:
            row["holds"] = _word(meets and row["tpot_ratio"] <= 1.0 + _ROUNDING)
        rows.append(row)
    return pd.DataFrame(rows)


def load_claim(runs: pd.DataFrame) -> pd.DataFrame:
    """Claim (iii): at every load, each optimizer's attainment and TPOT against the best fixed pairs."""
    rows: list[dict[str, Any]] = []
    for group, own, settings in _optimizers(runs):
        fixed = settings[settings["role"] == "fixed"]
        if fixed.empty:
            continue
        highest = float(fixed["ttft_attainment"].max())
        attainment = float(own["ttft_attainment"])
        as_much = best_fixed(settings, attainment)
        row = _against(group, own, as_much if as_much is not None else best_fixed(settings))
        row["attainment_best_fixed"] = highest
        row["attainment_difference"] = attainment - highest
        row["attainment_holds"] = _word(attainment >= min(highest - ATTAINMENT_MARGIN, ATTAINMENT_ENOUGH) - _ROUNDING)
        if as_much is None:
            row["tpot_holds"] = "holds: no fixed attains as much"
        else:
            row["tpot_holds"] = _word(row["tpot_ratio"] <= 1.0 + TPOT_TOLERANCE + _ROUNDING)
        row["holds"] = _word(row["attainment_holds"] == "holds" and row["tpot_holds"].startswith("holds"))
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
        if claim.empty:
            continue
        for label, mine in claim.groupby("label", sort=False):
            decided = mine[mine["holds"].isin(["holds", "fails"])]
            failed = decided[decided["holds"] == "fails"]
            ratio = decided["tpot_ratio"].dropna()
            if decided.empty:
                said.append(f"{name}: no fixed setting to compare {label} with meets it.")
                continue
            text = f"{name}: {label} holds at {len(decided) - len(failed)} of {len(decided)} loads"
            if len(ratio):
                text += f"; TPOT {ratio.min():.3f} to {ratio.max():.3f} times the {unit}'s"
            if len(failed) and len(failed) < len(decided):
                text += f"; fails at {_list_places(failed)}"
            said.append(text + ".")
    return said


def _count_windows(fixed: pd.DataFrame, rivals: pd.DataFrame) -> list[dict[str, Any]]:
    table = fixed.pivot(index="place", columns="label", values="tpot_s").dropna()
    best = table.min(axis=1)
    candidates = fixed.drop_duplicates("label").set_index("label")["candidates"]
    rows = []
    for (label, role), mine in [
        *rivals.groupby(["label", "role"], sort=False),
        *fixed.sort_values("candidates").groupby(["label", "role"], sort=False),
    ]:
        ratio = (mine.set_index("place")["tpot_s"] / best).dropna()
        if ratio.empty:
            continue
        within = int((ratio <= 1.0 + WINDOW_TOLERANCE + _ROUNDING).sum())
        rows.append(
            {
                "label": label,
                "role": role,
                "candidates": int(candidates[label]) if role == "fixed" else None,
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
    for _, group in runs.groupby(["engine", "scenario"], sort=False):
        for label in group.loc[group["role"] == "optimizer", "label"].unique():
            settings = comparable_settings(group, label)
            found.append((group, settings[settings["label"] == label].iloc[0], settings))
    return found


def _against(group: pd.DataFrame, own: pd.Series, best: pd.Series | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "engine": own["engine"],
        "family": own["family"],
        "scenario": own["scenario"],
        "request_rate_rps": float(own["request_rate_rps"]),
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
    return row


def _list_places(failed: pd.DataFrame, most: int = 4) -> str:
    places = [f"{row.engine}, {row.scenario}" for row in failed.itertuples()]
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return "; ".join(places[:most]) + more


def _word(holds: bool) -> str:
    return "holds" if holds else "fails"
