"""Table: one row a defense, from records; for the screen, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tabulate import tabulate

from purebench.evaluate import der
from purebench.record import Record
from purebench.settings import canonical

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

    acc, asr, ra, der, seconds: one number a seed; over several attacks, their mean. A failed or
        diverged cell counts as the worst (0, 1, 0, 0), a weak attack's and a skipped cell not at
        all.
    worst_asr: of all cells, the maximum.
    """

    attack: str
    defense: str
    acc: tuple[float, ...] = ()
    asr: tuple[float, ...] = ()
    ra: tuple[float, ...] = ()
    der: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    worst_asr: float | None = None
    benign_count: int = 0
    remarks: tuple[str, ...] = field(default=())

    @property
    def order(self) -> tuple[bool, float, float, str]:
        """Undefended first, then by mean DER (control: ACC), then by worst ASR."""
        ratings = self.der or self.acc
        rating = statistics.fmean(ratings) if ratings else -1.0
        worst = 2.0 if self.worst_asr is None else self.worst_asr
        return self.defense != UNDEFENDED, -rating, worst, self.defense


def boards(records: Iterable[Record]) -> list[list[Record]]:
    """Records that may stand in one table: equal but for attack, defense, seed and rate.

    Raises ValueError where they were measured under different protocols.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    protocols = set()
    for record in records:
        protocols.add(record.protocol)
        shared = asdict(record.cell)
        for key in ("attack", "defense", "seed", "poison_rate", "clean_label"):
            del shared[key]
        groups[canonical(shared)].append(record)
    if len(protocols) > 1:
        raise ValueError(f"one table cannot mix protocols: {', '.join(sorted(protocols))}")
    return list(groups.values())


def _names(plugins: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """Canonical (name, settings) -> what a table calls it: the name, and where it stands there
    with several settings, those that differ."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for name, settings in plugins:
        found[name][canonical([name, settings])] = settings
    labels = {}
    for name, variants in found.items():
        values: dict[str, set[str]] = defaultdict(set)
        for settings in variants.values():
            for key, value in settings.items():
                values[key].add(canonical(value))
        differing = [key for key, seen in values.items() if len(seen) > 1]
        for variant, settings in variants.items():
            told = ", ".join(f"{key}={settings.get(key)}" for key in differing)
            labels[variant] = f"{name} ({told})" if told else name
    return labels


def _identity(plugin: dict[str, Any], **more: Any) -> tuple[str, dict[str, Any]]:
    return plugin["name"], {**plugin["settings"], **more}


def _labelled(records: Sequence[Record]) -> list[tuple[str, str, Record]]:
    """(attack, defense, record) under the names that a table uses."""
    attacks = [_identity(r.cell.attack, rate=r.cell.poison_rate) for r in records]
    defenses = [_identity(r.cell.defense) for r in records]
    attack_names, defense_names = _names(attacks), _names(defenses)
    return [
        (attack_names[canonical(attack)], defense_names[canonical(defense)], record)
        for attack, defense, record in zip(attacks, defenses, records, strict=True)
    ]


def rows(records: Sequence[Record]) -> dict[str, list[Row]]:
    """Attack -> its rows, best first; "mean" over attacks where there are several.

    Args:
        records: of one board, see ``boards``.
    """
    groups: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    met: dict[str, set[str]] = defaultdict(set)
    for attack, defense, record in _labelled(records):
        groups[attack][defense].append(record)
        if attack != CONTROL:
            groups["mean"][defense].append(record)
            met[defense].add(attack)
    total = len(set().union(*met.values()))
    if total < 2:
        groups.pop("mean", None)
    tables = {
        attack: [_row(attack, defense, found) for defense, found in defenses.items()]
        for attack, defenses in sorted(groups.items(), key=lambda item: item[0] == "mean")
    }
    if "mean" in tables:  # a mean over fewer attacks is another number
        tables["mean"] = [
            replace(row, remarks=(f"{len(met[row.defense])} of {total} attacks", *row.remarks))
            if len(met[row.defense]) < total
            else row
            for row in tables["mean"]
        ]
    return {attack: sorted(table, key=lambda row: row.order) for attack, table in tables.items()}


def _row(attack: str, defense: str, records: Sequence[Record]) -> Row:
    by_seed: dict[int, list[tuple[float, float, float, float]]] = defaultdict(list)
    seconds: dict[int, list[float]] = defaultdict(list)
    remarks: dict[str, None] = {}
    for record in records:
        before, after, seed = record.before, record.after, record.cell.seed
        if record.status == "skipped":
            remarks[f"skipped: {record.error}"] = None
            continue
        weak = before is not None and not before.diverged and not record.took
        if attack == "mean" and weak:
            remarks["without weak attacks"] = None
            continue
        if record.status != "ok" or before is None or after is None:
            remarks[f"{record.status}: {record.error}"] = None
            by_seed[seed].append((0.0, 1.0, 0.0, 0.0))
            continue
        if attack != CONTROL and weak:
            remarks["weak attack"] = None
        if after.degenerate:
            remarks["degenerate: one class for > 95 %"] = None
        by_seed[seed].append((after.acc, after.asr, after.ra, der(before, after)))
        seconds[seed].append(record.cost["seconds"])
    means = [
        tuple(statistics.fmean(values) for values in zip(*cells, strict=True))
        for _, cells in sorted(by_seed.items())
    ]
    acc, asr, ra, ratings = zip(*means, strict=True) if means else ((), (), (), ())
    worst = max((cell[1] for cells in by_seed.values() for cell in cells), default=None)
    if attack == CONTROL:  # there is no trigger to succeed
        asr, ra, ratings, worst = (), (), (), None
    return Row(
        attack=attack,
        defense=defense,
        acc=acc,
        asr=asr,
        ra=ra,
        der=ratings,
        seconds=tuple(statistics.fmean(values) for _, values in sorted(seconds.items())),
        worst_asr=worst,
        benign_count=max(record.benign_count for record in records),
        remarks=tuple(remarks),
    )


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
    cells = [record.cell for name, _, record in _labelled(records) if attack in ("mean", name)]
    first = cells[0]
    seeds = sorted({cell.seed for cell in cells})
    parts = [f"{first.dataset['name']} · {first.model['name']}"]
    if attack == "mean":
        names = {name for name, _, _ in _labelled(records)} - {CONTROL}
        parts.append(f"mean over {', '.join(sorted(names))}")
    elif attack == CONTROL:
        parts.append("no attack (clean control)")
    else:
        whole = "the target class" if first.clean_label else "the training split"
        goal = "all-to-all" if first.all_to_all else f"target {first.target}"
        parts.append(f"{first.attack['name']}, {first.poison_rate:.3g} of {whole}, {goal}")
    parts.append(f"{100 * first.benign_fraction:g} % benign")
    parts.append(f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}")
    return " · ".join(parts)


def _tables(records: Sequence[Record], only: Sequence[str]) -> Iterator[tuple[str, str, list[Row]]]:
    """(title, attack, rows) of every table, board by board; of the attacks in ``only``, if any."""
    for board in boards(records):
        for attack, table in rows(board).items():
            if not only or attack in only:
                yield title(board, attack), attack, table


def screen(records: Sequence[Record], only: Sequence[str] = ()) -> str:
    """All tables, for a terminal."""
    return "\n\n".join(
        f"{heading}\n{_render(table, 'simple')}" for heading, _, table in _tables(records, only)
    )


def markdown(records: Sequence[Record], only: Sequence[str] = ()) -> str:
    """All tables, as Markdown."""
    return (
        "\n\n".join(
            f"**{heading}**\n\n{_render(table, 'pipe')}"
            for heading, _, table in _tables(records, only)
        )
        + "\n"
    )


def as_json(records: Sequence[Record], only: Sequence[str] = ()) -> str:
    """All rows, fractions unrounded."""
    content = [
        {
            "title": heading,
            "attack": attack,
            "rows": [
                {
                    "defense": row.defense,
                    "n": len(row.acc),
                    **{name: list(getattr(row, name)) for _, name, _ in _COLUMNS},
                    "worst_asr": row.worst_asr,
                    "benign_count": row.benign_count,
                    "remarks": list(row.remarks),
                }
                for row in table
            ],
        }
        for heading, attack, table in _tables(records, only)
    ]
    return json.dumps(content, indent=1) + "\n"


def as_csv(records: Sequence[Record], only: Sequence[str] = ()) -> str:
    """All rows: mean and sample standard deviation, fractions unrounded."""
    names = [name for _, name, _ in _COLUMNS]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    headings = [part for name in names for part in (name, f"{name}_std")]
    writer.writerow(
        ["title", "attack", "defense", "n", *headings, "worst_asr", "benign_count", "remarks"]
    )
    for heading, attack, table in _tables(records, only):
        for row in table:
            numbers: list[float | str] = []
            for name in names:
                values = getattr(row, name)
                numbers.append(statistics.fmean(values) if values else "")
                numbers.append(statistics.stdev(values) if len(values) > 1 else "")
            worst = "" if row.worst_asr is None else row.worst_asr
            writer.writerow(
                [
                    heading,
                    attack,
                    row.defense,
                    len(row.acc),
                    *numbers,
                    worst,
                    row.benign_count,
                    "; ".join(row.remarks),
                ]
            )
    return out.getvalue()
