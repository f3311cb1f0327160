"""The report's layout: verdicts in view, rows of one line, figures whole. Every number is made up."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
from fake_runs import write_constant, write_sweep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from runs import report
from runs.reporting import claims, figures, page, palette, profiles, scores, tables
from runs.reporting.collate import collate
from runs.reporting.statistics import mark_best_static

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ONE_LINE_PX = 36
MEASURE = """
const seen = document.querySelector("iframe").contentDocument, place = node => node.getBoundingClientRect();
const tables = [...seen.querySelectorAll("table")].filter(table => place(table).height > 0).map(table => ({
  heads: [...table.querySelectorAll("th")].map(head => [head.textContent, place(head).right]),
  tallest: Math.max(...[...table.tBodies[0].rows].map(row => row.querySelector(".long") ? 0 : place(row).height)),
}));
const pictures = [...seen.querySelectorAll("img")].map(picture => place(picture).right);
const measured = JSON.stringify({tables, pictures, width: seen.documentElement.scrollWidth});
document.body.innerHTML = "<pre id='measured'></pre>";
document.querySelector("pre").textContent = measured;
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layout")
    write_sweep(root / "runs", scales=(0.25, 1.0), candidates=(0, 3), budgets=(512, 2048), seeds=range(5))
    assert report.main([str(root / "runs"), "--out", str(root / "out")]) == 0
    return root / "out" / "report.html"


def _measure(document: Path, width: int, folder: Path) -> dict[str, Any]:
    """What a browser makes of a page in a window of `width` pixels."""
    framed = html.escape(document.read_text(), quote=True)
    frame = f"<iframe style='border:0;width:{width}px;height:3000px' srcdoc=\"{framed}\"></iframe>"
    script = f"<script>onload = () => {{ {MEASURE} }}</script>"
    (folder / "frame.html").write_text(f"<!doctype html><meta charset='utf-8'><body>{frame}{script}</body>")
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width + 60},3200", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<pre id=\"measured\">(.*?)</pre>", done.stdout, re.DOTALL)
    assert found is not None
    measured: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    return measured


@pytest.mark.skipif(BROWSER is None, reason="no chromium to lay the page out")
@pytest.mark.parametrize("width", [390, 1400, 1920])
def test_verdicts_are_in_view_and_rows_are_one_line_high(written: Path, tmp_path: Path, width: int) -> None:
    measured = _measure(written, width, tmp_path)
    # What is wider than the window scrolls by itself, not with the page.
    assert measured["width"] <= width
    assert max(measured["pictures"]) <= width
    verdicts = [
        right for table in measured["tables"] for name, right in table["heads"] if name in ("verdict", "TPOT is")
    ]
    assert len(verdicts) >= 3
    if width >= 1400:
        assert max(verdicts) <= width / 2
    assert 0 < max(table["tallest"] for table in measured["tables"]) <= ONE_LINE_PX


@pytest.mark.parametrize(
    "columns", [tables.LOADS, tables.BUDGETS, tables.COMPARISON], ids=["loads", "ttft", "settings"]
)
def test_the_verdict_stands_right_after_what_it_is_about(columns: tuple[tables.Column, ...]) -> None:
    titles = [column.title for column in columns]
    assert titles[titles.index("controller") + 1] in ("verdict", "TPOT is")


def test_what_is_the_same_in_every_row_is_in_the_title(written: Path) -> None:
    (heading,) = re.findall(r"<h3>Every load: against the best static setting[^<]*</h3>", written.read_text())
    assert heading.endswith("· vicuna_7b_a100</h3>")


def test_only_long_texts_may_take_more_than_one_line() -> None:
    frame = pd.DataFrame({"short": ["no static setting attains as much"], "long": ["word " * 40]})
    columns = tuple(tables.Column(key, key, number=False) for key in frame)
    written = page.noted(tables.Table("", columns, frame))
    assert re.findall(r"<td class='([^']*)' data-value='(\w+)", written) == [("", "no"), ("long", "word")]


def _legend_is_whole(figure: Figure) -> bool:
    figure.set_dpi(palette.DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(canvas.get_renderer()), figure.bbox
    over = all(axes.get_window_extent(canvas.get_renderer()).y1 < box.y0 for axes in figure.axes)
    return whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1 and over


@pytest.mark.parametrize("count", [1, 2, 5, 7, 8, 13])
@pytest.mark.parametrize("label", ["mpc", "vllm_schedule total=2048", "a controller with quite a long name in a row"])
def test_the_legend_of_the_profiles_is_within_the_figure(count: int, label: str) -> None:
    deciding = [f"{label} {place}" for place in range(count)]
    settings = dict.fromkeys(deciding, "optimizer") | {"sarathi 768 c=2": "static", scores.ONE: "bound"}
    runs = pd.DataFrame(
        [
            {"label": name, "role": role, "engine": "e", "scenario": scenario, "seed": seed, "score": 0.1 * place}
            for place, (name, role) in enumerate(settings.items())
            for scenario in "ab"
            for seed in range(2)
        ]
    )
    aggregates = pd.DataFrame({"label": settings.keys(), "role": settings.values()})
    assert _legend_is_whole(profiles.profiles(runs, aggregates, scores.BEST_STATIC))


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize(
    "labels", [["short"] * 9, ["a rather long name of a setting"] * 5, ["a", "b" * 60, "c", "d" * 30]]
)
def test_every_legend_is_within_its_figure(labels: list[str], columns: int) -> None:
    handles = [palette.handle(name, palette.INK) for name in labels]
    with mpl.rc_context(palette.STYLE):
        figure, outer = palette.grid(1, columns, 2.0, palette.Head(handles))
        for place in range(columns):
            figure.add_subplot(outer[0, place])
    assert _legend_is_whole(figure)


def test_a_static_setting_that_ran_at_one_load_has_a_mark(tmp_path: Path) -> None:
    """A line through one point is invisible, and a trace at its own rate is one load."""
    for label, candidates in (("fixed c=0 n=512", 0), ("fixed c=1 n=512", 1)):
        write_constant(tmp_path / label, label, 0.01 * (candidates + 1), scenario="trace")
    collation = collate([tmp_path])
    settings = mark_best_static(collation.runs)
    panels = (
        figures.overview(settings).axes + figures.speculation(collation.windows, claims.panel_budgets(settings)).axes
    )
    lines = [line for axes in panels for line in axes.lines]
    assert lines
    assert all(line.get_marker() == "o" for line in lines if len(line.get_xdata()) == 1)


def test_labels_beside_a_panel_stay_clear_of_the_next_panel_and_the_edge(tmp_path: Path) -> None:
    for family in ("conv", "code"):
        for place, label in enumerate(("fixed c=1 n=512", "a controller of quite a long name")):
            folder = tmp_path / f"{family}{place}"
            write_constant(folder, label, 0.01 * (place + 1), scenario=f"{family} x1", digest=family)
    figure = figures.overview(mark_best_static(collate([tmp_path]).runs))
    figure.set_dpi(palette.DPI)
    FigureCanvasAgg(figure).draw()
    labels = [text for axes in figure.axes for text in axes.texts if text.get_text().startswith("a controller")]
    ends = [label.get_window_extent().x1 for label in labels]
    starts = [axes.get_window_extent().x0 for axes in figure.axes]
    assert len(ends) == 2
    assert min(ends) < max(starts)
    assert max(ends) <= figure.bbox.x1
