"""The claims, counted from runs: per load window, at equal TTFT attainment, and at every load.

Each function returns a tidy frame; `RULES` says in words what each counts, and is printed beside the tables.
"""

from typing import Any

import numpy as np
import pandas as pd

from runs.reporting.collate import METRICS
from runs.reporting.statistics import (
    ROUNDING,
    SETTING,
    PairedDifference,
    best_static,
    close_to,
    comparable_settings,
    margin,
    paired_difference,
)

WINDOW_TOLERANCE = 0.01
TPOT_MARGIN = 0.02
MINIMUM_MEASURED = 20
BETTER, LEVEL, WORSE = "better", "level", "worse"
UNDECIDED = "?"
_NEEDED = [*SETTING, *METRICS, "seed", "workload_digest", "folder", "request_rate_rps", "ttft_target_s"]

BEST_STATIC_RULE = (
    "Static setting: one candidate count c and one budget in every iteration, whether the budget counts prompt tokens "
    "(n) or all tokens of an iteration (total). Best static setting of a load, chosen in hindsight: of those whose "
    "share of requests that meet both targets is at most half a point (and at most a tenth of it) below the highest, "
    "the one with the lowest mean TPOT."
)
RULES = {
    "windows": (
        "A load window is one time window of one seed in which every compared run finished at least "
        f"{MINIMUM_MEASURED} requests that have a TPOT; a request belongs to the window it arrives in. In each, the "
        "best static c is the lowest mean TPOT among the static settings that share the budget, chosen in hindsight "
        "window by window, which no single setting can do. Counted: windows in which a controller's mean TPOT is at "
        "most 1 % above it. A controller that also moves its budget gains or loses by that too, and attainment is not "
        "looked at. The rows of single static c show how far each of them gets by the same count."
    ),
    "budgets": (
        "The controller's mean TPOT against the lowest of a static setting whose TTFT attainment is at most half a "
        "point below the controller's, or below the highest of any static setting where that is lower. Lower, level or "
        "higher: by more than 2 %, either way. 'Interval says' asks the same of the ratio's whole interval."
    ),
    "loads": (
        "Against the best static setting of the load. Better or worse: the share of requests that meet both targets "
        "differs by more than half a point (or more than a tenth of it); where it does not, mean TPOT differs by more "
        f"than 2 %; level: neither does. '{UNDECIDED}' marks a verdict that the 95 % interval over seeds leaves open."
    ),
}


def headline_budgets(settings: pd.DataFrame) -> dict[tuple[str, str], str]:
    """The budget at which the c's of each (engine, scenario) are compared: the best static setting's.

    Where that was run with one c only, the budget with the most c's, and of those the one with the lowest TPOT.
    """
    budgets: dict[tuple[str, str], str] = {}
    for (engine, scenario), group in settings[settings["role"] == "static"].groupby(["engine", "scenario"]):
        by_budget = group.groupby("budget").agg(
            choices=("candidates", "nunique"), best=("best_static", "any"), tpot=("tpot_mean_s", "min")
        )
        by_budget["several"] = by_budget["choices"] > 1
        order = by_budget.sort_values(["several", "best", "choices", "tpot"], ascending=[False, False, False, True])
        budgets[engine, scenario] = str(order.index[0])
    return budgets


def panel_budgets(settings: pd.DataFrame) -> dict[tuple[str, str], str]:
    """The one budget at which the c's of each (engine, family) are drawn over all its loads.

    The budget with which some c is as good as the best static setting's rule asks at the most loads; of equal ones,
    that with the lowest TPOT over the loads.
    """
    budgets: dict[tuple[str, str], str] = {}
    static = settings[settings["role"] == "static"]
    for (engine, family), group in static.groupby(["engine", "family"]):
        needed = group.groupby("scenario")["slo_attainment"].transform("max").map(close_to)
        score = (
            group.assign(attains=group["slo_attainment"] >= needed - ROUNDING)
            .groupby(["budget", "scenario"])
            .agg(attains=("attains", "any"), tpot=("tpot_mean_s", "min"))
        )
        order = score.groupby("budget").agg({"attains": "sum", "tpot": "mean"})
        budgets[engine, family] = str(order.sort_values(["attains", "tpot"], ascending=[False, True]).index[0])
    return budgets


def window_claim(windows: pd.DataFrame, headline_budgets: dict[tuple[str, str], str]) -> pd.DataFrame:
    """Claim (i): in how many load windows each controller is within 1 % of, or better than, the best static c.

    One row per engine, scenario, budget and label (optimizers, and each static c itself). `headline` marks the budget
    given for that engine and scenario, normally the best static setting's. An optimizer that was itself held to one
    budget is compared at that one only.
    """
    rows: list[dict[str, Any]] = []
    usable = windows[windows["measured"] >= MINIMUM_MEASURED]
    # The requests of a window are the same in two runs exactly when all three of these are.
    usable = usable.assign(place=usable.groupby(["workload_digest", "seed", "window"]).ngroup())
    for (engine, family, scenario), group in usable.groupby(["engine", "family", "scenario"], sort=False):
        tpots = group.pivot(index="place", columns="label", values="tpot_s")
        settings = group.drop_duplicates("label").set_index("label")
        for budget, shared in settings[settings["role"] == "static"].groupby("budget"):
            if shared["candidates"].nunique() < 2:
                continue
            rivals = settings[settings["role"] == "optimizer"]
            rivals = rivals[rivals["budget"].isna() | (rivals["budget"] == budget)]
            place = {"engine": engine, "family": family, "scenario": scenario, "budget": budget}
            place["headline"] = headline_budgets.get((engine, scenario)) == budget
            rows += [{**place, **row} for row in _count_windows(tpots, shared, rivals)]
    return pd.DataFrame(rows)


def pool_windows(claim: pd.DataFrame) -> pd.DataFrame:
    """Claim (i) summed over the loads of each engine and workload family, at the headline budgets only."""
    if claim.empty:
        return claim
    chosen = claim[claim["headline"]].copy()
    # At another load the same c has another budget: pooled, a static setting is its c.
    static = chosen["role"] == "static"
    chosen.loc[static, "label"] = [f"static c={c:.0f}" for c in chosen.loc[static, "candidates"]]
    keys = ["engine", "family", "label", "role"]
    pooled = chosen.groupby(keys, sort=False)[["windows", "within"]].sum().reset_index()
    pooled["share"] = pooled["within"] / pooled["windows"]
    return pooled


def budget_claim(runs: pd.DataFrame) -> pd.DataFrame:
    """Claim (ii): each optimizer's TPOT against the lowest of a static setting at equal TTFT attainment.

    An optimizer held to one c is compared with static settings of that c, any other with every static setting.
    """
    rows: list[dict[str, Any]] = []
    for group, own, settings in _optimizers(runs):
        rivals = settings
        if pd.notna(own["candidates"]):
            rivals = rivals[rivals["candidates"] == own["candidates"]]
        best = best_static(rivals, float(own["ttft_attainment"]))
        if best is None:
            continue
        row = _against(group, own, best)
        row["attainment_difference"] = row["ttft_attainment"] - row["against_ttft_attainment"]
        row["verdict"] = _side(row["tpot_ratio"], 1 - TPOT_MARGIN, 1 + TPOT_MARGIN, ("lower", LEVEL, "higher"))
        ends = [row[f"tpot_ratio_{end}"] for end in ("low", "high")]
        said = {_side(end, 1 - TPOT_MARGIN, 1 + TPOT_MARGIN, ("lower", LEVEL, "higher")) for end in ends}
        row["interval_says"] = "–" if np.isnan(ends[0]) else said.pop() if len(said) == 1 else "undecided"
        rows.append(row)
    return pd.DataFrame(rows)


def load_claim(runs: pd.DataFrame) -> pd.DataFrame:
    """Claim (iii): at every load, each optimizer against the best static setting of the load.

    `verdict` as `RULES["loads"]` says, `decided` whether the intervals over seeds leave no other.
    """
    rows: list[dict[str, Any]] = []
    for group, own, settings in _optimizers(runs):
        best = best_static(settings)
        if best is None:
            continue
        row = _against(group, own, best)
        ratios = tuple(row[f"tpot_ratio{end}"] for end in ("", "_low", "_high"))
        points = tuple(row[f"slo_difference{end}"] for end in ("", "_low", "_high"))
        # The ends that are best and worst for the controller together.
        row["verdict"] = _verdict(points[0], ratios[0], row["against_slo_attainment"])
        ends = {
            _verdict(points[1], ratios[2], row["against_slo_attainment"]),
            _verdict(points[2], ratios[1], row["against_slo_attainment"]),
        }
        row["decided"] = not np.isnan(points[1]) and ends == {row["verdict"]}
        rows.append(row)
    return pd.DataFrame(rows)


def sentences(pooled: pd.DataFrame, budgets: pd.DataFrame, loads: pd.DataFrame) -> list[str]:
    """What the claims come to, in words: one sentence per claim and optimizer, losses named."""
    said: list[str] = []
    for label, mine in loads.groupby("label", sort=False) if len(loads) else ():
        said.append(f"Every load: {_load_sentence(label, mine)}.")
    for label, mine in budgets.groupby("label", sort=False) if len(budgets) else ():
        said.append(f"Equal TTFT attainment: {_budget_sentence(label, mine)}.")
    if not pooled.empty:
        for label, mine in pooled[pooled["role"] == "optimizer"].groupby("label", sort=False):
            within, total = int(mine["within"].sum()), int(mine["windows"].sum())
            rival = pooled[pooled["role"] == "static"].groupby("label")[["within", "windows"]].sum()
            share = rival["within"] / rival["windows"]
            text = f"Load windows: {label} is within 1 % of the best static c, or better, in {within} of {total}"
            if share.notna().any():
                single, most = share.idxmax(), 100 * share.max()
                text += f" ({100 * within / total:.0f} %); the best single one, {single}, in {most:.0f} %"
            said.append(text + ".")
    return said


def _load_sentence(label: str, claim: pd.DataFrame) -> str:
    counts = {verdict: int((claim["verdict"] == verdict).sum()) for verdict in (BETTER, LEVEL, WORSE)}
    text = f"{label} against the best static setting of each load: " + ", ".join(
        f"{verdict} at {count}" for verdict, count in counts.items()
    )
    text += f" of {len(claim)} loads"
    ranked = claim.sort_values("slo_difference")
    ends = [written_points(ranked.iloc[place]) for place in ((0, -1) if len(ranked) > 1 else (0,))]
    text += f"; {' to '.join(ends)} points of the requests meet both targets"
    if claim["slo_difference_low"].isna().all():
        text += " (one seed: no interval, so no finding)"
    elif not claim["decided"].all():
        text += f"; the interval leaves {int((~claim['decided']).sum())} of these open"
    lost = claim[claim["verdict"] == WORSE]
    if len(lost) and len(lost) < len(claim):
        text += f"; worse at {_list_places(lost, claim['engine'].nunique() > 1)}"
    return text


def _budget_sentence(label: str, claim: pd.DataFrame) -> str:
    ranked = claim.dropna(subset="tpot_ratio").sort_values("tpot_ratio")
    if ranked.empty:
        return f"{label} has no TPOT to compare"
    ends = [written_ratio(ranked.iloc[place]) for place in ((0, -1) if len(ranked) > 1 else (0,))]
    higher = int((ranked["verdict"] == "higher").sum())
    text = f"{label}'s mean TPOT is {' to '.join(ends)} times the lowest of a static setting"
    text += f"; more than 2 % higher at {higher} of {len(claim)} loads"
    more = int((claim["attainment_difference"] > claim["against_ttft_attainment"].map(margin) + ROUNDING).sum())
    if more:
        text += f"; at {more} no static setting attains as much, and the ratio is to those that attain the most"
    if ranked["tpot_ratio_low"].isna().all():
        text += " (one seed: no interval, so no finding)"
    elif undecided := int((claim["interval_says"] == "undecided").sum()):
        text += f"; the interval leaves {undecided} of these open"
    return text


def written_points(row: Any) -> str:
    """A claim row's difference in the requests that meet both targets, in points, as `-1.1 [-1.9, -0.3]`."""
    figures = [100 * row.slo_difference, 100 * row.slo_difference_low, 100 * row.slo_difference_high]
    # Adding 0 turns a rounded -0.0 into 0.0.
    mean, low, high = (f"{round(figure, 1) + 0.0:+.1f}" for figure in figures)
    return mean if pd.isna(row.slo_difference_low) else f"{mean} [{low}, {high}]"


def written_ratio(row: Any) -> str:
    """A claim row's TPOT ratio with its interval over seeds, as `0.936 [0.931, 0.941]`."""
    if pd.isna(row.tpot_ratio):
        return "–"
    if pd.isna(row.tpot_ratio_low):
        return f"{row.tpot_ratio:.3f}"
    return f"{row.tpot_ratio:.3f} [{row.tpot_ratio_low:.3f}, {row.tpot_ratio_high:.3f}]"


def _count_windows(tpots: pd.DataFrame, static: pd.DataFrame, rivals: pd.DataFrame) -> list[dict[str, Any]]:
    best = tpots[list(static.index)].dropna().min(axis=1)
    rows = []
    for label, setting in pd.concat([rivals, static.sort_values("candidates")]).iterrows():
        ratio = (tpots[label] / best).dropna()
        if ratio.empty:
            continue
        within = int((ratio <= 1.0 + WINDOW_TOLERANCE + ROUNDING).sum())
        rows.append(
            {
                "label": label,
                "role": setting["role"],
                "candidates": int(setting["candidates"]) if setting["role"] == "static" else None,
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


def _against(group: pd.DataFrame, own: pd.Series, best: pd.Series) -> dict[str, Any]:
    row: dict[str, Any] = {
        "engine": own["engine"],
        "family": own["family"],
        "scenario": own["scenario"],
        "request_rate_rps": float(own["request_rate_rps"]),
        "ttft_target_s": float(own["ttft_target_s"]),
        "label": own["label"],
        "seeds": int(own["seeds"]),
        "against": best["label"],
    }
    for name in ("slo_attainment", "ttft_attainment", "tpot_attainment", "tpot_mean_s"):
        row |= {name: float(own[name]), f"against_{name}": float(best[name])}
    mine, theirs = (group[group["label"] == label] for label in (own["label"], best["label"]))
    both = paired_difference(mine, theirs, "slo_attainment")
    tpot = paired_difference(mine, theirs, "tpot_mean_s")
    none = (np.nan,) * 3
    row |= _ends("slo_difference", (both.difference, both.low, both.high) if both else none)
    row |= _ends("tpot_ratio", (tpot.ratio, tpot.ratio_low, tpot.ratio_high) if tpot else none)
    row["tpot_ratio_by_seed"] = _by_seed(tpot)
    return row


def _ends(name: str, figures: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), figures, strict=True))


def _by_seed(paired: PairedDifference | None) -> dict[str, float]:
    return {} if paired is None else dict(zip(map(str, paired.seeds), paired.ratios, strict=True))


def _verdict(points: float, ratio: float, best: float) -> str:
    """The verdict on a difference in the share that meets both targets and a TPOT ratio; `best`: the rival's."""
    most = margin(best)
    word = _side(points, -most, most, (WORSE, LEVEL, BETTER))
    if word == LEVEL and not np.isnan(ratio):
        return _side(ratio, 1 - TPOT_MARGIN, 1 + TPOT_MARGIN, (BETTER, LEVEL, WORSE))
    return word


def _side(value: float, low: float, high: float, words: tuple[str, str, str]) -> str:
    return words[0] if value < low - ROUNDING else words[2] if value > high + ROUNDING else words[1]


def _list_places(places: pd.DataFrame, several: bool, most: int = 4) -> str:
    named = [f"{row.engine}, {row.scenario}" if several else row.scenario for row in places.itertuples()]
    more = f" and {len(named) - most} more" if len(named) > most else ""
    return "; ".join(named[:most]) + more
