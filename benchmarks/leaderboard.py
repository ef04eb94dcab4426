"""Leaderboard: every table, the page and the figures of many synthetic records, timed.

    python -m benchmarks.leaderboard [--records 10000]

The records are made of random counts, as the sweeps make them: attacks x defenses x three seeds,
at each attack's own poison rate and at .01, with two benign shares, network after network until
there are enough. They lie in a temporary folder, and are read from there. Wall time is held to the
limit, so on a machine that does nothing else; CPU time stands beside it. Peak memory is that of the
whole process until then, libraries included.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from tabulate import tabulate

from purebench.record import Cell, Record, read_records
from purebench.scores import Scores

from ._timing import Times, conditions

SECONDS, BYTES = 30.0, 10**9  # what all of it may take
ATTACKS = (
    "adaptive_blend", "badnets", "blend", "blind", "bpp", "clean_label", "ftrojan", "input_aware",
    "lira", "low_frequency", "sig", "ssba", "trojannn", "wanet", "another_attack",
)  # fmt: skip
DEFENSES = (
    "abl", "activation_clustering", "adversarial_tune", "anp", "anp_oracle", "bnp", "clp", "ep",
    "fine_prune", "fine_tune", "fst", "ft_sam", "i_bau", "mcr", "nad", "neural_cleanse", "npd",
    "prune", "rnp", "robust_recovery", "sau", "scratch_distill", "spectral", "subspace_projection",
    "tsbd",
)  # fmt: skip
OWN_RATES = {"adaptive_blend": 0.003, "clean_label": 0.5, "sig": 0.5}

_CLEAN, _TRIGGERED = 10_000, 9_000


def synthetic(
    rates: Sequence[float | None] = (0.01, None), benign: Sequence[float] = (0.05, 0.01)
) -> Iterator[Record]:
    """Records without end, network after network.

    rates: None is the attack's own.
    """
    for network, share in ((n, share) for n in itertools.count() for share in benign):
        poisoned = [(attack, rate) for rate in rates for attack in ATTACKS]
        for attack, rate in [("none", 0.0), *poisoned]:
            own = OWN_RATES.get(attack, 0.1) if rate is None else rate
            for defense, seed in itertools.product(("none", *DEFENSES), range(3)):
                yield _record(f"network_{network}", attack, defense, seed, own, share)


def _record(
    network: str, attack: str, defense: str, seed: int, rate: float, share: float
) -> Record:
    cell = Cell(
        dataset={"name": "synthetic", "settings": {}},
        model={"name": network, "settings": {}},
        attack={"name": attack, "settings": {}, "revision": 1},
        defense={"name": defense, "settings": {}, "revision": 1},
        recipe={"name": "mnist_fast", "settings": {}},
        seed=seed,
        poison_rate=rate,
        clean_label=attack in ("clean_label", "sig"),
        target=0,
        all_to_all=False,
        benign_fraction=share,
        benign_source="train",
    )
    digest = hashlib.sha256(repr(cell).encode()).hexdigest()
    before = Scores(9_800, _CLEAN, 8_900, 50, _TRIGGERED, 1_100, 0)
    skill, rng = random.Random(defense), random.Random(digest)
    after = before
    if defense != "none":
        left = min(1.0, skill.random() ** 3 * rng.uniform(0.5, 1.5))
        lost = 1_200 * skill.random() ** 4 * rng.uniform(0.8, 1.2) + rng.uniform(0, 60)
        opened = int(left * _TRIGGERED)
        true = int((_TRIGGERED - opened) * rng.uniform(0.9, 1))
        after = Scores(9_800 - int(lost), _CLEAN, opened, true, _TRIGGERED, 1_100, 0)
    failed = rng.random() < 0.003
    return Record(
        cell,
        digest[:16],
        hashlib.sha256(f"{network} {attack} {rate} {seed}".encode()).hexdigest()[:16],
        "failed" if failed else "ok",
        before,
        None if failed else after,
        int(60_000 * share),
        "ValueError: a synthetic failure" if failed else None,
        stealth={"psnr": 25.0, "ssim": 0.95, "linf": 0.3, "l2": 1.4},
        cost={"seconds": 30 * rng.random(), "training_seconds": 20.0},
    )


def file_name(record: Record) -> str:
    """As a board names it."""
    cell = record.cell
    words = (part["name"] for part in (cell.dataset, cell.model, cell.attack, cell.defense))
    return f"{'-'.join(words)}-s{cell.seed}-{record.fingerprint}.json"


def write(records: Sequence[Record], folder: Path) -> None:
    """One file each; not waiting for the disk as a run does."""
    (folder / "records").mkdir()
    for record in records:
        text = json.dumps(asdict(record))
        (folder / "records" / file_name(record)).write_text(text, "utf-8")


@dataclass(frozen=True)
class Result:
    """peak_bytes: of the process until then. byte_count: of what came out."""

    name: str
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    byte_count: int


def measure(folder: Path) -> list[Result]:
    """One result an output, and one for reading the records."""
    table, page, figures = (
        import_module(f"purebench.leaderboards.{name}") for name in ("table", "page", "figures")
    )
    records: list[Record] = []

    def read() -> int:
        records.extend(read_records([folder]))
        return sum(path.stat().st_size for path in (folder / "records").iterdir())

    def drawn() -> int:
        return sum(path.stat().st_size for path in figures.draw(records, folder / "figures"))

    def rendered() -> int:
        page.write(records, [folder], folder / "index.html")
        return (folder / "index.html").stat().st_size

    def text(render: Callable[[Sequence[Record]], str]) -> Callable[[], int]:
        return lambda: len(render(records).encode())

    tables = ("screen", "markdown", "latex", "as_csv", "as_json")
    outputs: dict[str, Callable[[], int]] = {
        "reading": read,
        **{name.removeprefix("as_"): text(getattr(table, name)) for name in tables},
        "page": rendered,
        "figures": drawn,
    }
    found = []
    for name, make in outputs.items():
        times = Times()
        with times.measured():
            size = make()
        wall, cpu = times.wall_seconds[0], times.cpu_seconds[0]
        found.append(Result(name, wall, cpu, _peak_bytes(), size))
    return found


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leaderboard", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--records", type=int, default=10_000, help="(default: 10000)")
    options = parser.parse_args(words)
    if options.records < 1:
        parser.error(f"--records must be at least 1, got {options.records}")
    with tempfile.TemporaryDirectory(prefix="purebench-") as place:
        write(list(itertools.islice(synthetic(), options.records)), Path(place))
        found = measure(Path(place))
    wall, cpu = sum(result.wall_seconds for result in found), sum(r.cpu_seconds for r in found)
    peak = max(result.peak_bytes for result in found)
    rows = [
        (r.name, f"{r.wall_seconds:.1f}", f"{r.cpu_seconds:.1f}", f"{r.peak_bytes / 1e6:.0f}",
         f"{r.byte_count / 1e3:,.0f}")
        for r in found
    ]  # fmt: skip
    rows.append(("all", f"{wall:.1f}", f"{cpu:.1f}", f"{peak / 1e6:.0f}", ""))
    heads = ("output", "wall s", "CPU s", "peak MB", "kB")
    print(tabulate(rows, heads, colalign=("left", *["right"] * 4), disable_numparse=True))
    limits = f"{SECONDS:g} s and {BYTES / 1e9:g} GB"
    held = "yes" if wall <= SECONDS and peak <= BYTES else "no"
    about = conditions()
    print(f"\n{options.records:,} records; within {limits}: {held}.")
    print(f"{about['machine']}, {about['threads']} thread; n = 1.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
