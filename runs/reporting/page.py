"""One self-contained HTML page: verdicts, figures, tables, rules, and what was run. No network, no other file."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from runs.reporting.claims import BETTER, WORSE
from runs.reporting.tables import Column, Table, heading

MOST_OPEN_ROWS = 40
LONGEST_LINE = 60
_KINDS = {"holds": "good", "fails": "bad", BETTER: "good", WORSE: "bad"}
_STYLE = """
:root { --ink: #222; --quiet: #667; --line: #e3e6ea; --soft: #f6f7f9; --strong: #D55E00; --good: #0b7a55; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 28px 24px 80px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 44px 0 8px; }
h3 { font-size: 15px; margin: 24px 0 4px; }
p, li { max-width: 78ch; } .quiet { color: var(--quiet); }
.facts { color: var(--quiet); font-size: 13px; margin: 0 0 6px; }
nav a { margin-right: 16px; color: #0b5394; text-decoration: none; }
ul.verdicts { padding-left: 20px; } ul.verdicts li { margin: 4px 0; }
figure { margin: 18px 0 30px; } figure img { width: 100%; max-width: 900px; height: auto; display: block; }
figcaption { color: var(--quiet); font-size: 14px; max-width: 85ch; margin-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; border-bottom: 1.5px solid #b9bfc7; padding: 5px 8px; vertical-align: bottom;
  cursor: pointer; user-select: none; }
th[aria-sort=ascending]::after { content: " ▴"; } th[aria-sort=descending]::after { content: " ▾"; }
td { border-bottom: 1px solid var(--line); padding: 4px 8px; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 60ch; } .number { text-align: right; }
tr.emphasis td { background: #fff4ec; font-weight: 600; } tbody tr:hover td { background: var(--soft); }
.good { color: var(--good); } .bad { color: #b3261e; font-weight: 600; }
.toggle { font-size: 13px; color: var(--quiet); } #every:not(:checked) ~ .tables tr.minor { display: none; }
details { margin: 10px 0; } summary { cursor: pointer; color: #0b5394; }
.note { font-size: 13.5px; color: var(--quiet); }
.skipped { background: #fff4ec; padding: 10px 14px; border-left: 3px solid var(--strong); }
"""

_SORT = """
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {
  const table = head.closest("table"), place = [...head.parentNode.children].indexOf(head);
  const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => row.children[place].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
  });
  table.tBodies[0].append(...rows);
});
"""


@dataclass(frozen=True)
class Picture:
    """A figure of the page: PNG bytes, what it is called, and what to look at in it."""

    name: str
    title: str
    caption: str
    png: bytes


def render(
    *,
    facts: str,
    verdicts: Sequence[str],
    pictures: Sequence[Picture],
    across: Sequence[Table],
    claims: Sequence[Table],
    comparisons: Sequence[Table],
    ran: Sequence[Table],
    rules: Mapping[str, str],
    notes: Sequence[str],
) -> str:
    """The whole page as text. `across`, `claims`, `comparisons` and `ran` are tables in the order they appear."""
    body = ["<h2 id='figures'>Figures</h2>"]
    body += [figure(picture) for picture in pictures]
    if across:
        body.append("<h2 id='across'>All scenarios</h2>")
        body += [noted(table) for table in across]
    body.append("<h2 id='claims'>The claims, counted</h2>")
    body += [noted(table) for table in claims]
    body.append("<h2 id='loads'>Every load</h2>" + _LOADS_NOTE)
    body.append("<input type='checkbox' id='every'> <label class='toggle' for='every'>every static setting</label>")
    body.append("<div class='tables'>" + "".join(_section(table) for table in comparisons) + "</div>")
    body.append("<h2 id='rules'>Rules</h2>" + definitions(rules))
    body.append("<h2 id='ran'>What was run</h2>")
    body.append(_section(ran[0]))
    body += [folded(table) for table in ran[1:]]
    links = {
        "figures": "Figures",
        **({"across": "All scenarios"} if across else {}),
        "claims": "Claims",
        "loads": "Every load",
        "rules": "Rules",
        "ran": "What was run",
    }
    return document("Governor report", facts, links, verdicts, notes, body)


def document(
    title: str,
    facts: str,
    links: Mapping[str, str],
    verdicts: Sequence[str],
    notes: Sequence[str],
    body: Sequence[str],
) -> str:
    """A page around HTML: title, one line of facts, links to ids of `body`, what was found, what must be known."""
    navigation = "".join(f"<a href='#{place}'>{escape(name)}</a>" for place, name in links.items())
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><title>{escape(title)}</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p class='quiet'>{escape(facts)}</p>",
        f"<nav>{navigation}</nav>",
        _items(verdicts, "verdicts"),
    ]
    if notes:
        parts.append(f"<div class='skipped'>{_items(notes, 'verdicts')}</div>")
    return "\n".join([*parts, *body, f"<script>{_SORT}</script></body></html>\n"])


_LOADS_NOTE = (
    "<p class='note'>Means over seeds; a percentile is the mean of the seeds' percentiles. Both met: the share of "
    "requests that meet both targets. The marked row is the baseline; ratio and difference are in mean TPOT, paired "
    "seed by seed on the same requests, in brackets the 95 % interval. Click a heading to sort.</p>"
)


def figure(picture: Picture) -> str:
    """A figure with its caption."""
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f"<figure><h3>{escape(picture.title)}</h3><img alt='{escape(picture.title, quote=True)}' "
        f"src='data:image/png;base64,{data}'><figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def noted(table: Table) -> str:
    """A table under its title and note; folded away when it is long."""
    title, body = _table(table)
    if len(table.frame) > MOST_OPEN_ROWS:
        body = f"<details><summary>{len(table.frame)} rows</summary>{body}</details>"
    note = f"<p class='note'>{escape(table.note)}</p>" if table.note else ""
    return f"<h3>{escape(title)}</h3>{note}{body}"


def folded(table: Table) -> str:
    """A table behind its title."""
    title, body = _table(table)
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def definitions(rules: Mapping[str, str]) -> str:
    """What words on the page mean, one line each."""
    return "".join(
        ["<ul>", *(f"<li><b>{escape(name)}.</b> {escape(rule)}</li>" for name, rule in rules.items()), "</ul>"]
    )


def _section(table: Table) -> str:
    facts = f"<p class='facts'>{escape(' · '.join(table.facts))}</p>" if table.facts else ""
    title, body = _table(table)
    return f"<h3>{escape(title)}</h3>{facts}{body}"


def _table(table: Table) -> tuple[str, str]:
    """The table's title and its HTML."""
    frame = table.frame
    if frame.empty:
        return table.title, "<p class='quiet'>Nothing to count: no run of this kind.</p>"
    title, columns = heading(table)
    head = "".join(f"<th{' class=number' if column.number else ''}>{escape(column.title)}</th>" for column in columns)
    kinds = [(name, frame[key]) for name, key in (("emphasis", table.emphasis), ("minor", table.minor)) if key]
    cells = zip(*(_cells(column, frame) for column in columns), strict=True)
    rows = "".join(
        f"<tr class='{' '.join(name for name, marked in kinds if marked.iloc[place])}'>{''.join(row)}</tr>"
        for place, row in enumerate(cells)
    )
    return title, f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _cells(column: Column, frame: pd.DataFrame) -> list[str]:
    cells = []
    for value, sorted_by in zip(frame[column.key], frame[column.sort_key or column.key], strict=True):
        written = column.write(value)
        classes = ["number"] if column.number else ["long"] if len(written) > LONGEST_LINE else []
        classes += [kind for word, kind in _KINDS.items() if written.startswith(word)]
        sortable = escape(_sortable(sorted_by), quote=True)
        cells.append(f"<td class='{' '.join(classes)}' data-value='{sortable}'>{escape(written)}</td>")
    return cells


def _sortable(value: Any) -> str:
    return "" if value is None or pd.isna(value) else str(value)


def _items(lines: Sequence[str], kind: str) -> str:
    return f"<ul class='{kind}'>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""
