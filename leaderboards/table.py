"""Table: one row a defense, from records; for the screen, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

from purebench.evaluate import der
from purebench.record import Record

UNDEFENDED = "none"
CONTROL = "none"  # the attack that poisons nothing

# heading, field, percent
_COLUMNS = (
    ("ACC % ↑", "acc", True),
    ("ASR % ↓", "asr", True),
    ("RA % ↑", "ra", True),
    ("DER % ↑", "der", True),
    ("seconds ↓", "seconds", False),
)


@dataclass(frozen=True)
class Row:
    """A defense against one attack, or (``attack`` is "mean") against all that took.

    acc, asr, ra, der, seconds: one number a cell; a failed or diverged cell counts as the worst
        (0, 1, 0, 0), a weak attack's and a skipped cell not at all.
    """

    attack: str
    defense: str
    acc: tuple[float, ...] = ()
    asr: tuple[float, ...] = ()
    ra: tuple[float, ...] = ()
    der: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    benign_count: int = 0
    remarks: tuple[str, ...] = field(default=())

    @property
    def worst_asr(self) -> float | None:
        return max(self.asr, default=None)

    @property
    def order(self) -> tuple[bool, float, float, str]:
        """Undefended first, then by mean DER (control: ACC), then by worst ASR."""
        ratings = self.der or self.acc
        rating = statistics.fmean(ratings) if ratings else -1.0
        return self.defense != UNDEFENDED, -rating, max(self.asr, default=2.0), self.defense


def rows(records: Iterable[Record]) -> dict[str, list[Row]]:
    """Attack -> its rows, best first; "mean" over attacks where there are several."""
    groups: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        attack, defense = record.cell.attack["name"], record.cell.defense["name"]
        groups[attack][defense].append(record)
        if attack != CONTROL:
            groups["mean"][defense].append(record)
    if len([attack for attack in groups if attack not in ("mean", CONTROL)]) < 2:
        groups.pop("mean", None)
    return {
        attack: sorted(
            (_row(attack, defense, found) for defense, found in defenses.items()),
            key=lambda row: row.order,
        )
        for attack, defenses in sorted(groups.items(), key=lambda item: item[0] == "mean")
    }


def _row(attack: str, defense: str, records: Sequence[Record]) -> Row:
    scores: list[tuple[float, float, float, float]] = []
    seconds: list[float] = []
    remarks: dict[str, None] = {}
    for record in records:
        before, after = record.before, record.after
        if record.status == "skipped":
            remarks[f"skipped: {record.error}"] = None
            continue
        weak = before is not None and not before.diverged and not record.took
        if attack == "mean" and weak:
            remarks["without weak attacks"] = None
            continue
        if record.status != "ok" or before is None or after is None:
            remarks[f"{record.status}: {record.error}"] = None
            scores.append((0.0, 1.0, 0.0, 0.0))
            continue
        if attack != CONTROL and weak:
            remarks["weak attack"] = None
        if after.degenerate:
            remarks["degenerate: one class for > 95 %"] = None
        scores.append((after.acc, after.asr, after.ra, der(before, after)))
        seconds.append(record.cost["seconds"])
    acc, asr, ra, ratings = zip(*scores, strict=True) if scores else ((), (), (), ())
    if attack == CONTROL:  # there is no trigger to succeed
        asr = ra = ratings = ()
    return Row(
        attack, defense, acc, asr, ra, ratings, tuple(seconds),
        max(record.benign_count for record in records), tuple(remarks),
    )  # fmt: skip


def spread(values: Sequence[float], percent: bool) -> str:
    """Mean, and for several values ± the sample standard deviation."""
    if not values:
        return "–"
    scale, digits = (100, 2) if percent else (1, 1)
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def _cells(table: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    remarked = any(row.remarks for row in table)
    several = table[0].attack == "mean"
    headings = ["defense", *(heading for heading, _, _ in _COLUMNS)]
    if several:
        headings.insert(3, "worst ASR %")
    headings += ["benign", *(["remarks"] if remarked else [])]
    lines = []
    for row in table:
        line = [row.defense]
        line += [spread(getattr(row, name), percent) for _, name, percent in _COLUMNS]
        if several:
            line.insert(3, spread([row.worst_asr] if row.worst_asr is not None else [], True))
        line.append(f"{row.benign_count:,}")
        if remarked:
            line.append("; ".join(row.remarks))
        lines.append(line)
    return headings, lines


def _render(table: Sequence[Row], style: str) -> str:
    headings, lines = _cells(table)
    if style == "pipe":
        lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    align = ["left", *["right"] * (len(headings) - 1)]
    if headings[-1] == "remarks":
        align[-1] = "left"
    return tabulate(lines, headings, tablefmt=style, colalign=align, disable_numparse=True)


def title(records: Sequence[Record], attack: str) -> str:
    """One line that says what a table is about."""
    cells = [record.cell for record in records if attack in ("mean", record.cell.attack["name"])]
    first = cells[0]
    seeds = sorted({cell.seed for cell in cells})
    parts = [f"{first.dataset['name']} · {first.model['name']}"]
    if attack == "mean":
        names = sorted({cell.attack["name"] for cell in cells} - {CONTROL})
        parts.append(f"mean over {', '.join(names)}")
    elif attack == CONTROL:
        parts.append("no attack (clean control)")
    else:
        whole = "the target class" if first.clean_label else "the training split"
        goal = "all-to-all" if first.all_to_all else f"target {first.target}"
        parts.append(f"{attack}, {first.poison_rate:.3g} of {whole}, {goal}")
    parts.append(f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}")
    return " · ".join(parts)


def screen(records: Sequence[Record]) -> str:
    """All tables, for a terminal."""
    return "\n\n".join(
        f"{title(records, attack)}\n{_render(table, 'simple')}"
        for attack, table in rows(records).items()
    )


def markdown(records: Sequence[Record]) -> str:
    """All tables, as Markdown."""
    return (
        "\n\n".join(
            f"**{title(records, attack)}**\n\n{_render(table, 'pipe')}"
            for attack, table in rows(records).items()
        )
        + "\n"
    )


def as_json(records: Sequence[Record]) -> str:
    """All rows, fractions unrounded."""
    content = [
        {
            "title": title(records, attack),
            "attack": attack,
            "rows": [
                {
                    "defense": row.defense,
                    "n": len(row.acc),
                    **{name: list(getattr(row, name)) for _, name, _ in _COLUMNS},
                    "benign_count": row.benign_count,
                    "remarks": list(row.remarks),
                }
                for row in table
            ],
        }
        for attack, table in rows(records).items()
    ]
    return json.dumps(content, indent=1) + "\n"


def as_csv(records: Sequence[Record]) -> str:
    """All rows: mean and sample standard deviation, fractions unrounded."""
    names = [name for _, name, _ in _COLUMNS]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    headings = [part for name in names for part in (name, f"{name}_std")]
    writer.writerow(["attack", "defense", "n", *headings, "worst_asr", "benign_count", "remarks"])
    for attack, table in rows(records).items():
        for row in table:
            numbers: list[float | str] = []
            for name in names:
                values = getattr(row, name)
                numbers.append(statistics.fmean(values) if values else "")
                numbers.append(statistics.stdev(values) if len(values) > 1 else "")
            worst = "" if row.worst_asr is None else row.worst_asr
            remarks = "; ".join(row.remarks)
            writer.writerow(
                [attack, row.defense, len(row.acc), *numbers, worst, row.benign_count, remarks]
            )
    return out.getvalue()
