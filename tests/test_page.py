"""The page: one file, safe whatever the names; in a real browser it sorts, filters, is quiet."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from benchmarks import leaderboard
from purebench.cli import OK, USAGE, main
from purebench.record import Cell, Record, read_records
from purebench.scores import Scores

pytest.importorskip("jinja2", reason="the page is made with Jinja2: pip install 'purebench[page]'")

page: Any = import_module("purebench.leaderboards.page")
charts: Any = import_module("purebench.leaderboards.charts")
plot: Any = import_module("purebench.leaderboards.plot")
rows: Any = import_module("purebench.leaderboards.rows")

PUBLISHED = Path(__file__).parent.parent / "leaderboards" / "published" / "mnist-lenet"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
EVIL = (
    "<script>document.title = 'harmed'</script>",
    "\"'><img src=x onerror=\"document.title='harmed'\">",
    "x" * 500,
    "a|b & c % d_e $f$",
    "naïve 防御 \u202eesrever",
    "{{ 7 * 7 }} javascript:alert(1)",
    "lone \ud800 half",
)


def record(attack: str, defense: str, acc: int, asr: int, **changed: Any) -> Record:
    """In percent, of an attack that left ACC 90 % and ASR 100 %."""
    cell = Cell(
        dataset={"name": changed.pop("dataset", "shapes"), "settings": {}},
        model={"name": changed.pop("model", "small_cnn"), "settings": {}},
        attack={"name": attack, "settings": {}},
        defense={"name": defense, "settings": {}},
        recipe={"name": "mnist_fast", "settings": {}},
        seed=changed.pop("seed", 0),
        poison_rate=0.1,
        clean_label=False,
        target=0,
        all_to_all=False,
        benign_fraction=0.05,
        benign_source="train",
    )
    made: dict[str, Any] = {
        "fingerprint": hashlib.sha256(repr(cell).encode()).hexdigest()[:16],
        "victim": "v",
        "status": "ok",
        "before": Scores(900, 1000, 500, 0, 500, 100, 0),
        "after": Scores(10 * acc, 1000, 5 * asr, 500 - 5 * asr, 500, 100, 0),
        "benign_count": 3000,
        "cost": {"seconds": 2.0},
    }
    return Record(cell, **{**made, **changed})


def board(
    defenses: dict[str, tuple[int, int]], attacks: Sequence[str], **more: Any
) -> list[Record]:
    """defenses: name -> (ACC, ASR) in percent, the same against every attack and seed."""
    return [
        record(attack, defense, acc, asr, seed=seed, **more)
        for attack in attacks
        for defense, (acc, asr) in defenses.items()
        for seed in range(3)
    ]


SOUND = board(
    {"none": (90, 100), "mid": (88, 20), "best": (89, 3), "even": (86, 1), "dear": (70, 0)},
    ("badnets", "blend", "none"),
)
HOSTILE = board(
    {name: (80 + i, 10 * i) for i, name in enumerate(EVIL)},
    ("blend", EVIL[0], EVIL[2]),
    dataset=EVIL[1],
    model=EVIL[2],
)


class Elements(HTMLParser):
    """(tag, attributes) of every element, and the texts that each tag is followed by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inside.setdefault(self._open, []).append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def elements(text: str) -> Elements:
    return Elements(text)


# --- what is drawn ------------------------------------------------------------------------------


def test_the_front_holds_who_is_beaten_by_nobody() -> None:
    """`mid` loses to `best` in both; the undefended network does not compete."""
    (made,) = rows.boards(SOUND)
    found = {point.defense: point.on_front for point in charts.points(made.conditions[0])}
    assert found == {"none": False, "mid": False, "best": True, "even": True, "dear": True}


def test_who_met_fewer_attacks_is_not_on_the_front() -> None:
    partial = [record("blend", "partial", 90, 0, seed=seed) for seed in range(3)]
    (made,) = rows.boards([*SOUND, *partial])
    (point,) = [point for point in charts.points(made.conditions[0]) if point.defense == "partial"]
    assert (point.whole, point.on_front) == (False, False)


def test_the_grid_has_holes_where_nothing_ran() -> None:
    (made,) = rows.boards([*SOUND, record("blend", "partial", 90, 40)])
    grid = charts.grid(made, made.conditions[0])
    assert grid.attacks == ("badnets", "blend")
    at = grid.defenses.index("partial")
    assert [grid.asr(at, attack) for attack in range(2)] == [None, 0.4]
    (single,) = rows.boards([record("blend", "prune", 90, 4)])
    assert charts.grid(single, single.conditions[0]) is None


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (97.1, 99.2, [97.5, 98, 98.5, 99]),
        (1, 3, [1, 1.5, 2, 2.5, 3]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_labels_meet_neither_each_other_nor_a_mark() -> None:
    crowd = {f"defense_{i:02d}": (86 + i % 5, i % 7) for i in range(20)}
    (made,) = rows.boards(board(crowd, ("badnets", "blend")))
    chart = plot.scatter(charts.points(made.conditions[0]))
    labels = [mark.label for mark in chart.marks if mark.label]
    boxes = [plot.Box(at.x, at.y - 10, at.x + plot.text_width(at.text), at.y + 3) for at in labels]
    assert len(boxes) >= 10
    assert all(chart.frame.holds(box) for box in boxes)
    for label, own in zip(labels, boxes, strict=True):
        x, y, to_x, to_y = label.leader or (0, 0, 0, 0)
        middle = plot.Box(*[(x + to_x) / 2, (y + to_y) / 2] * 2)
        assert not any(box.meets(middle) for box in boxes if box is not own)
    for index, box in enumerate(boxes):
        assert not any(box.meets(other) for other in boxes[:index])
        assert not any(
            box.left < m.x < box.right and box.top < m.y < box.bottom for m in chart.marks
        )


def test_rank_bars_overlap_where_ranks_are_closer_than_the_critical_difference() -> None:
    (made,) = rows.boards(SOUND)
    ranking = made.conditions[0].ranking
    bars = plot.rank_diagram(ranking).bars
    gap = ranking.critical_difference
    for one, other in pairwise(bars):
        assert (one.high >= other.low) == (other.rank - one.rank <= gap)


# --- the file -----------------------------------------------------------------------------------


def test_the_same_records_give_the_same_bytes() -> None:
    assert page.render(SOUND) == page.render(list(SOUND))


def test_the_policy_allows_our_style_and_script_alone() -> None:
    text = page.render(SOUND)
    found = elements(text)
    (policy,) = [
        meta["content"] for meta in found.all("meta") if "http-equiv" in meta and meta["content"]
    ]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        digest = base64.b64encode(
            hashlib.sha256("".join(found.inside[kind]).encode()).digest()
        ).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not any("style" in attributes for _, attributes in found.found)
    assert not any(name.startswith("on") for _, attributes in found.found for name in attributes)


@pytest.mark.parametrize("records", [SOUND, HOSTILE], ids=["sound", "hostile"])
def test_nothing_comes_from_elsewhere(records: list[Record]) -> None:
    found = elements(page.render(records)).found
    places = [found_at.get(name) for _, found_at in found for name in ("src", "href", "srcset")]
    assert all(re.match(r"#|data:", place) for place in places if place is not None)


def test_hostile_names_are_text() -> None:
    found = elements(page.render(HOSTILE))
    assert len(found.all("script")) == 1
    assert not found.all("img")
    names = set(found.inside["th"])
    assert EVIL[0] in names
    assert "{{ 7 * 7 }} javascript:alert(1)" in names
    assert "x" * 79 + "…" in names
    assert not any(char in name for name in names for char in "\u202e\ud800")


def test_it_reads_without_javascript() -> None:
    """All numbers are there; what needs JavaScript is hidden until it runs."""
    text = page.render(SOUND)
    found = elements(text)
    assert all("hidden" in label for label in found.all("label"))
    assert all("hidden" in button for button in found.all("button"))
    assert all(not column.startswith("button") for column in found.inside["th"])
    assert "86.00" in text
    assert "below this line" in text


def test_every_column_has_a_unit_or_a_direction() -> None:
    fewer = [record("blend", "fewer", 90, 0, benign_count=300)]
    (first, *_) = re.findall(r"<thead><tr>(.*?)</thead>", page.render([*SOUND, *fewer]))
    heads = re.split("<th(?: class=.*?)?>", first)[1:]
    assert {head for head in heads if "<small>" not in head} == {"defense"}
    assert {"ASR <small>% ↓</small>", "benign <small>images ↓</small>"} < set(heads)


def test_what_is_the_same_in_all_rows_has_no_column() -> None:
    text = page.render(SOUND)
    assert "5\u00a0% benign (3,000 images)" in text
    assert "<th>benign" not in text


def test_remarks_stand_once_below_their_table() -> None:
    failed = [
        record("blend", name, 90, 0, status="failed", after=None, error="RuntimeError: no")
        for name in ("one", "other")
    ]
    weak = [record("wanet", "none", 90, 0, before=Scores(900, 1000, 50, 450, 500, 100, 0))]
    found = elements(page.render([*SOUND, *failed, *weak]))
    marks, notes = found.inside["sup"], found.inside["li"]
    told = [note for note in notes if note.startswith("failed")]
    assert told == ["failed: RuntimeError: no"]
    assert "2 of 3 attacks" not in " ".join(found.inside["th"])
    assert marks.count("1") >= 2
    assert any("weak attack" in note for note in notes)


def test_a_crowd_has_the_width_of_two_drawings() -> None:
    few, many = ({f"d{i}": (80 + i % 9, i) for i in range(count)} for count in (12, 13))
    texts = [page.render(board(some, ("badnets", "blend"))) for some in (few, many)]
    widths = [float(text.partition('aria-label="Scatter of')[0].split('"0 0 ')[-1].split()[0])
              for text in texts]  # fmt: skip
    assert widths == [plot.NARROW[0], plot.WIDE[0]]


def test_errors_have_square_root_scales() -> None:
    """Four times the error is twice as far from none."""
    (made,) = rows.boards(board({"a": (96, 4), "b": (84, 16), "c": (99, 1)}, ("badnets", "blend")))
    chart = plot.scatter(charts.points(made.conditions[0]))
    assert chart is not None
    at = {mark.point.defense: mark for mark in chart.marks}
    assert at["b"].x - at["a"].x == pytest.approx(2 * (at["a"].x - at["c"].x), abs=0.5)
    assert at["b"].y - at["a"].y == pytest.approx(2 * (at["a"].y - at["c"].y), abs=0.5)
    assert [tick.text for tick in chart.y_ticks] == ["99.5", "99", "98", "95", "90"]


def test_the_citation_is_a_file() -> None:
    (place,) = [at for at in elements(page.render(SOUND)).all("a") if "download" in at]
    stem = "shapes-small_cnn-5"
    assert place["download"] == f"{stem}.bib"
    text = base64.b64decode((place["href"] or "").partition("base64,")[2]).decode()
    assert text.startswith(f"@misc{{purebench-{stem},\n  title = ")
    assert "5 \\% benign" in text
    assert f"{len(SOUND)} records" in text


def test_each_condition_has_its_table_and_a_place_in_the_index() -> None:
    """Two poison rates, two benign shares."""
    settings = [(rate, share) for rate in (0.1, 0.01) for share in (0.05, 0.01)]
    records = [
        replace(r, cell=replace(r.cell, poison_rate=rate, benign_fraction=share))
        for rate, share in settings
        for r in board({"none": (90, 100), "best": (89, 3)}, ("badnets", "blend"))
    ]
    found = elements(page.render(records))
    means = [at["id"] for at in found.all("table") if "data-over" in at]
    index = [(at["href"] or "")[1:] for at in found.all("a") if "href" in at]
    assert len(means) == 4
    assert {f"{name}-of" for name in means} < set(index)
    assert found.inside["h3"].count("poison rate 0.01") == 2
    assert len([at for at in found.all("table") if at["class"] == "heat"]) == 4
    assert "badnets" in found.inside["span"]
    assert sum("2 attacks ·" in text for text in found.inside["p"]) == 2
    alone = elements(page.render([r for r in records if r.cell.poison_rate == 0.01]))
    assert sum("2 attacks at poison rate 0.01 ·" in text for text in alone.inside["p"]) == 2


def test_a_citation_names_exactly_these_records() -> None:
    (all_of_them,), (fewer,) = rows.boards(SOUND), rows.boards(SOUND[:-1])
    assert page.bibtex(all_of_them, "k") == page.bibtex(rows.boards(SOUND[::-1])[0], "k")
    assert page.bibtex(all_of_them, "k") != page.bibtex(fewer, "k")
    (hostile,) = rows.boards(HOSTILE)
    assert page.bibtex(hostile, "k").count("{") == page.bibtex(hostile, "k").count("}")


def test_a_picture_is_embedded(tmp_path: Path) -> None:
    (tmp_path / "blend_trigger.png").write_bytes(PNG)
    (picture,) = page.pictures(tmp_path)
    (image,) = elements(page.render(SOUND, gallery=[picture])).all("img")
    assert image["alt"] == "blend trigger"
    assert base64.b64decode((image["src"] or "").partition("base64,")[2]) == PNG
    (tmp_path / "false.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(ValueError, match=r"false\.png: not a PNG file"):
        page.pictures(tmp_path)


# --- the published records ----------------------------------------------------------------------


def linked(text: str) -> list[str]:
    """Addresses that the script makes of what tables and rows hold."""
    found, base = [], ""
    for tag, at in elements(text).found:
        base = (at.get("data-base") or "") if tag == "table" else base
        for group in (at.get("data-at") or "").split("|") if "data-at" in at else ():
            head, *tails = group.split(" ")
            found += [f"{base}{head}-s{tail}.json" for tail in tails]
    return found


def test_the_published_page_is_small_and_its_links_lead_to_records(tmp_path: Path) -> None:
    file = tmp_path / "site" / "index.html"
    assert main(["leaderboard", str(PUBLISHED), "--page", str(file)]) == OK
    content = file.read_bytes()
    assert len(content) < 100_000
    places = {unquote(place) for place in linked(content.decode())}
    assert len(places) == len(read_records([PUBLISHED]))
    assert not any(place.startswith("/") for place in places)
    assert all((file.parent / place).resolve().is_file() for place in places)


def test_many_records_make_a_page_of_300_kilobytes() -> None:
    """15 attacks x 25 defenses x 3 seeds x 2 poison rates, and the undefended and the control."""
    many = list(islice(leaderboard.synthetic(benign=(0.05,)), 31 * 26 * 3))
    (made,) = rows.boards(many)
    assert len(made.conditions) == 2
    addresses = {found.fingerprint: f"records/{leaderboard.file_name(found)}" for found in many}
    text = page.render(many, addresses)
    assert len(linked(text)) == len(many) == 2418
    assert len(text.encode()) < 300_000


def test_records_of_two_folders_are_told_apart() -> None:
    records = [record("blend", "prune", 90, 4, seed=seed) for seed in range(2)]
    places = [
        f"{folder}/prune-s{found.cell.seed}-{found.fingerprint}.json"
        for folder, found in zip(("a", "b"), records, strict=True)
    ]
    given = dict(zip((found.fingerprint for found in records), places, strict=True))
    assert linked(page.render(records, given)) == places


@pytest.mark.parametrize("name", ["README.md", "a", "folder.html"])
def test_a_page_is_an_html_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "README.md").write_text("mine")
    assert main(["leaderboard", str(PUBLISHED), "--page", str(tmp_path / name)]) == USAGE
    assert f"{name}': a page is an .html file; name it so" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"


def test_triggers_need_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", str(PUBLISHED), "--triggers", "x"]) == USAGE
    assert "--triggers is for --page FILE.html" in capsys.readouterr().err


def test_without_jinja_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["leaderboard", str(PUBLISHED), "--page", str(tmp_path / "a.html")]) == USAGE
    assert "a page needs Jinja2: pip install 'purebench[page]'" in capsys.readouterr().err


# --- in a browser -------------------------------------------------------------------------------

NO_BROWSER = "no headless Chromium: apt install chromium chromium-driver; pip install selenium"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; without one the tests are skipped, and the summary says so."""
    driver = shutil.which("chromedriver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        driver = None
    if driver is None:
        warnings.warn(f"the page was not tried in a browser: {NO_BROWSER}", stacklevel=1)
        pytest.skip(NO_BROWSER)
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


def opened(browser: Any, folder: Path, records: list[Record], **more: Any) -> Path:
    file = folder / "index.html"
    file.write_text(page.render(records, **more), encoding="utf-8")
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # of what was open before
    browser.get(file.as_uri())
    return file


def names(browser: Any) -> list[str]:
    """Defenses of the first table, as they stand, those hidden left out."""
    script = """return [...document.querySelector(".sheet").querySelectorAll("tbody:not(.line) tr")]
        .filter(row => row.getClientRects().length).map(row => row.cells[0].textContent)"""
    found: list[str] = browser.execute_script(script)
    return found


def click(browser: Any, heading: str) -> str:
    """The order that the table then claims to have."""
    script = """const head = [...document.querySelectorAll(".sheet thead button")]
        .find(button => button.textContent.startsWith(arguments[0]));
        head.click(); return head.parentElement.getAttribute("aria-sort")"""
    order: str = browser.execute_script(script, heading)
    return order


def test_a_click_sorts_and_the_line_stays(browser: Any, tmp_path: Path) -> None:
    """Better first, then worse first; what lost too much accuracy stays below the line."""
    opened(browser, tmp_path, SOUND)
    assert names(browser) == ["none", "best", "even", "mid", "dear"]
    assert click(browser, "ASR") == "ascending"
    assert names(browser) == ["even", "best", "mid", "none", "dear"]
    assert click(browser, "ASR") == "descending"
    assert names(browser) == ["none", "mid", "best", "even", "dear"]
    assert click(browser, "ACC") == "descending"
    assert names(browser) == ["none", "best", "mid", "even", "dear"]
    assert click(browser, "defense") == "ascending"
    assert names(browser) == ["best", "even", "mid", "none", "dear"]
    assert click(browser, "rank") == "ascending"  # none has no rank: last
    assert names(browser) == ["best", "even", "mid", "none", "dear"]


def test_the_filter_leaves_what_matches(browser: Any, tmp_path: Path) -> None:
    opened(browser, tmp_path, SOUND)
    field = browser.find_element("css selector", "input[type=search]")
    field.send_keys("E")
    assert names(browser) == ["none", "best", "even", "dear"]
    assert browser.find_element("css selector", ".found").text == "4 of 5"
    field.send_keys("v")
    assert names(browser) == ["even"]
    field.clear()
    field.send_keys("?\b")
    assert len(names(browser)) == 5


def test_it_has_a_dark_side(browser: Any, tmp_path: Path) -> None:
    opened(browser, tmp_path, SOUND)
    colour = "return getComputedStyle(document.body).backgroundColor"
    before = browser.execute_script(colour)
    browser.find_element("id", "theme").click()
    assert browser.execute_script(colour) != before
    browser.find_element("id", "theme").click()
    assert browser.execute_script(colour) == before


def test_rows_link_to_their_records(browser: Any, tmp_path: Path) -> None:
    """In a mean's row, to those of every attack."""
    addresses = {found.fingerprint: f"r/x-s{found.cell.seed}-{found.fingerprint}.json"
                 for found in SOUND}  # fmt: skip
    file = opened(browser, tmp_path, SOUND, addresses=addresses)
    script = """const row = arguments[0] === "mean" ? document.querySelector(".sheet tbody tr")
            : document.querySelector("details.attack .sheet tbody tr");
        const details = row.querySelector("details");
        if (details) { details.open = true; details.dispatchEvent(new Event("toggle")); }
        return [...row.querySelectorAll("a")].map(link => [link.textContent, link.href])"""
    undefended = [found for found in SOUND if found.cell.defense["name"] == "none"]
    for table, attacks in (("attack", ["badnets"]), ("mean", ["badnets", "blend"])):
        expected = [
            [str(r.cell.seed), (file.parent / addresses[r.fingerprint]).as_uri()]
            for r in undefended
            if r.cell.attack["name"] in attacks
        ]
        assert browser.execute_script(script, table) == expected


def test_downloads_hold_the_tables(browser: Any, tmp_path: Path) -> None:
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
    slow = record("blend", "slow", 90, 0, status="failed", after=None, error="100 % & more")
    broken = Scores(500, 1000, 300, 0, 500, 100, 0)
    sound = [
        replace(r, reactivated=broken if r.cell.defense["name"] == "mid" else None) for r in SOUND
    ]
    text = opened(browser, tmp_path, [*HOSTILE[:3], *sound, slow]).read_text("utf-8")
    assert text.count('60.00<i>±0.00</i><sup class="mark">†</sup>') == 3
    browser.find_element("css selector", ".board:nth-of-type(2) [data-file$=csv]").click()
    browser.find_element("css selector", ".board:nth-of-type(2) [data-file$=tex]").click()
    stem = tmp_path / "shapes-small_cnn-5"
    files = [stem.with_name(f"{stem.name}{ending}") for ending in (".csv", ".tex")]
    wait: Any = import_module("selenium.webdriver.support.ui").WebDriverWait
    wait(browser, 60).until(lambda _: all(file.is_file() for file in files))
    lines = list(csv.DictReader(io.StringIO(files[0].read_text("utf-8"))))
    assert len(lines) == 4 * 5 + 2
    told = [line["remarks"] for line in lines if line["defense"] == "slow"]
    assert told[1] == "failed: 100 % & more"
    assert all(not line["remarks"] for line in lines if line["defense"] == "best")
    (line,) = [row for row in lines if "mean over" in row["table"] and row["defense"] == "best"]
    assert (line["ACC % ↑"], line["ASR % ↓"]) == ("89.00", "3.00")
    (line,) = [row for row in lines if "mean over" in row["table"] and row["defense"] == "mid"]
    assert (line["defense"], line["reactivated ASR % ↓"]) == ("mid", "60.00")
    latex = files[1].read_text("utf-8")
    assert latex.count("\\begin{table}") == latex.count("\\bottomrule") == 4
    assert "small\\_cnn" in latex
    assert r"best & \textbf{89.00 $\pm$ 0.00}" in latex
    assert r"\par $^{1}$ failed: 100 \% \& more" in latex
    assert "slow$^{1}$ & " in latex


@pytest.mark.parametrize("records", [SOUND, HOSTILE], ids=["sound", "hostile"])
def test_it_is_quiet_and_asks_for_nothing(
    browser: Any, tmp_path: Path, records: list[Record]
) -> None:
    """No line on the console, no request but for the file itself, no harm from names."""
    (tmp_path / "blend.png").write_bytes(PNG)
    file = opened(browser, tmp_path, records, gallery=page.pictures(tmp_path))
    click(browser, "ACC")
    browser.find_element("id", "theme").click()
    assert browser.get_log("browser") == []
    sent = [entry["message"] for entry in browser.get_log("performance")]
    asked = re.findall(r'"requestWillBeSent".*?"url":"(.*?)"', "\n".join(sent))
    asked = [url for url in asked if not url.startswith("data:")]
    assert set(asked) <= {file.as_uri()}
    assert browser.title == "Purebench leaderboard"
    shown = "return [...document.images].every(image => image.naturalWidth > 0)"
    assert browser.execute_script(shown)


@pytest.mark.parametrize("records", [SOUND, HOSTILE], ids=["sound", "hostile"])
def test_a_phone_scrolls_tables_and_not_the_page(
    browser: Any, tmp_path: Path, records: list[Record]
) -> None:
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        opened(browser, tmp_path, records)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_long_name_keeps_its_end() -> None:
    """Where the settings are, by which namesakes differ."""
    names = [plot.short(f"robust_recovery (budget={budget})") for budget in (0.01, 0.05)]
    assert names == ["robust_r…y (budget=0.01)", "robust_r…y (budget=0.05)"]
    assert {len(name) for name in names} == {plot.NAME_LENGTH}
    assert plot.short("activation_clustering") == "activation_clustering"
