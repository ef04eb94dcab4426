"""Submissions and boards: what is packed is read back, and whatever was touched is refused."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from purebench.cli import FAILED, OK, USAGE, main
from purebench.commands import verify
from purebench.record import Record, read_record, read_records
from purebench.submission import FORMAT, Refused, differences, foreign_files, missing, pack, unpack

ROOT = Path(__file__).parent.parent
board: Any = import_module("purebench.leaderboards.board")
SMALL = [
    *("--dataset", "shapes", "--quiet", "--set"),
    *("shapes.train_count=200", "shapes.test_count=60", "small_cnn.width=2", "mnist_fast.epochs=1"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two defenses against one attack, three seeds, on toy data."""
    folder = tmp_path_factory.mktemp("results")
    words = ["--attack", "badnets", "--defense", "none", "prune", "--seeds", "0", "1", "2"]
    assert main([*words, "--output", str(folder), *SMALL]) == OK
    return folder


@pytest.fixture
def archive(results: Path, tmp_path: Path) -> Path:
    file = tmp_path / "submission.zip"
    assert main(["submit", str(results), "--by", "A. Nother", "--output", str(file)]) == OK
    return file


def files(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def rewrite(archive: Path, content: dict[str, bytes]) -> None:
    with zipfile.ZipFile(archive, "w") as opened:
        for name, text in content.items():
            opened.writestr(name, text)


def test_what_is_packed_is_read_back(archive: Path, results: Path) -> None:
    sent = unpack(archive)
    assert sent.by == "A. Nother"
    told = {path.name: read_record(path) for path in results.rglob("records/*/*.json")}
    assert {name.removeprefix("records/"): record for name, record in sent.records.items()} == told
    contents = {path.name: path.read_bytes() for path in results.rglob("records/*/*.json")}
    assert pack(contents, "A. Nother") == pack(contents, "A. Nother") == archive.read_bytes()


def test_an_incomplete_submission_is_not_packed(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = read_records([results])
    part = tmp_path / "part" / "records"
    for index, record in enumerate(records):
        if (record.cell.defense["name"], record.cell.seed) != ("none", 2):
            record.write(part / f"{index}.json")
    file = tmp_path / "s.zip"
    assert main(["submit", str(part.parent), "--by", "me", "--output", str(file)]) == USAGE
    assert "shapes, small_cnn, badnets at 0.1, none: seed 2" in capsys.readouterr().err
    assert not file.exists()
    assert missing(records) == []


@pytest.mark.parametrize(
    ("by", "output", "message"),
    [
        ("", "s.zip", "--by must be a name of at most 200 characters"),
        (" ", "s.zip", "--by must be a name of at most 200 characters"),
        ("x" * 201, "s.zip", "--by must be a name of at most 200 characters"),
        ("me", "s.txt", r"--output '.*s\.txt': written is a \.zip file; name it so"),
        ("me", "folder.zip", r"--output .*folder\.zip is a folder"),
        ("me", "taken/s.zip", "cannot write to the output folder .*taken: File exists"),
        ("me", "taken/deep/s.zip", "cannot write to the output folder .*deep: Not a directory"),
    ],
    ids=str,
)
def test_what_is_not_packed(
    results: Path,
    tmp_path: Path,
    by: str,
    output: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "folder.zip").mkdir()
    words = ["submit", str(results), "--by", by, "--output", str(tmp_path / output)]
    assert main(words) == USAGE
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.zip", "taken"]


@pytest.mark.parametrize("limit", ["RECORD_COUNT", "RECORD_BYTES", "MANIFEST_BYTES"])
def test_what_is_packed_is_within_the_limits(
    results: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {path.name: path.read_bytes() for path in results.rglob("records/*/*.json")}
    assert pack(contents, "x" * 200)
    monkeypatch.setattr(f"purebench.submission.{limit}", 5)
    with pytest.raises(Refused, match="are read"):
        pack(contents, "me")


Tamper = Callable[[dict[str, bytes]], None]


def edit(key: str, change: Callable[[dict[str, Any]], None]) -> Tamper:
    """Change a JSON file of the archive: the manifest, or the first record."""

    def apply(content: dict[str, bytes]) -> None:
        name = next(name for name in sorted(content) if name.startswith(key))
        parsed = json.loads(content[name])
        change(parsed)
        content[name] = json.dumps(parsed).encode()

    return apply


def edit_with_digest(change: Callable[[dict[str, Any]], None]) -> Tamper:
    """Change the first record and put its new digest into the manifest."""

    def apply(content: dict[str, bytes]) -> None:
        edit("records/", change)(content)
        name = min(name for name in content if name.startswith("records/"))
        manifest = json.loads(content["manifest.json"])
        manifest["records"][name]["sha256"] = (
            import_module("hashlib").sha256(content[name]).hexdigest()
        )
        content["manifest.json"] = json.dumps(manifest).encode()

    return apply


def first(manifest: dict[str, Any]) -> Any:
    return manifest["records"][min(manifest["records"])]


@pytest.mark.parametrize(
    ("tamper", "field"),
    [
        (edit("records/", lambda r: r["after"].update(clean_correct=1)), "sha256"),
        (edit_with_digest(lambda r: r["after"].update(clean_correct=1)), "metrics"),
        (edit_with_digest(lambda r: r["after"].update(clean_correct=10**6)), "clean counts"),
        (edit_with_digest(lambda r: r["cell"].update(seed=9)), "fingerprint"),
        (edit_with_digest(lambda r: r["cell"].update(seed="9")), "cell.seed"),
        (edit_with_digest(lambda r: r["cell"].update(attack="blend")), "not a record"),
        (edit_with_digest(lambda r: r["cell"]["attack"].pop("name")), "not a record"),
        (edit_with_digest(lambda r: r["cell"].update(poison_rate=2)), "cell.poison_rate"),
        (edit_with_digest(lambda r: r["cell"].update(clean_label=1)), "cell.clean_label"),
        (edit_with_digest(lambda r: r["cell"]["attack"].update(settings=[])), "cell.attack"),
        (edit_with_digest(lambda r: r["notes"].update(x=float("nan"))), "NaN"),
        (edit_with_digest(lambda r: r.update(provenance="verified")), "provenance"),
        (edit_with_digest(lambda r: r.update(schema=99)), "schema 99"),
        (edit("manifest", lambda m: first(m)["metrics"].update(der=1.0)), "metrics"),
        (edit("manifest", lambda m: first(m).pop("sha256")), "expected sha256"),
        (edit("manifest", lambda m: m.update(format="other")), "format"),
        (edit("manifest", lambda m: m.update(protocol="pb-0")), "protocol"),
        (edit("manifest", lambda m: m.update(by="")), "by"),
        (edit("manifest", lambda m: m["records"].pop(min(m["records"]))), "not in manifest"),
        (lambda c: c.pop(max(c)), "not in the archive"),
        (lambda c: c.pop("manifest.json"), "manifest.json is missing"),
        (lambda c: c.update({"manifest.json": b"[" * 10**5}), "manifest.json"),
        (lambda c: c.update({"records/../../evil.json": b"{}"}), "neither"),
        (lambda c: c.update({"/etc/evil.json": b"{}"}), "neither"),
        (lambda c: c.update({"records\\evil.json": b"{}"}), "neither"),
        (lambda c: c.update({"weights.pt": b"{}"}), "neither"),
        (lambda c: c.update({"records/large.json": b" " * (2**20 + 1)}), "larger"),
    ],
)
def test_a_touched_archive_is_refused(
    archive: Path, tamper: Tamper, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = files(archive)
    tamper(content)
    rewrite(archive, content)
    with pytest.raises(Refused, match=field):
        unpack(archive)
    assert main(["verify", str(archive), "--no-run"]) == USAGE
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_cell_counts_once_in_an_archive(results: Path) -> None:
    """Else copies of what is true could hide what is not."""
    contents = {path.name: path.read_bytes() for path in results.rglob("records/*/*.json")}
    contents["again.json"] = contents[min(contents)]
    with pytest.raises(Refused, match=r"records/\S+ is of the same cell as records/again.json"):
        pack(contents, "me")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("records/\x1b[2Jverdict   verified.json", zipfile.ZIP_STORED, "is no name of a file"),
        ("records/a.json", zipfile.ZIP_LZMA, "is neither stored nor deflated"),
    ],
)
def test_entries_of_another_kind_are_refused(
    tmp_path: Path, name: str, kind: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.zip"
    with zipfile.ZipFile(file, "w", kind) as written:
        written.writestr(name, b"{}")
    assert main(["verify", str(file)]) == USAGE
    told = capsys.readouterr().err
    assert message in told
    assert told.rstrip("\n").isprintable()


def test_files_that_a_record_names_are_not_opened(results: Path, tmp_path: Path) -> None:
    record = next(r for r in read_records([results]) if r.cell.defense["name"] == "prune")
    secret = tmp_path / "secret.npz"  # which is not there: opening it would raise

    def found(**parts: Any) -> list[str]:
        return list(foreign_files(replace(record, cell=replace(record.cell, **parts))))

    assert not found()
    npz = {"name": "npz", "settings": {"path": str(secret)}, "digest": "0"}
    assert found(dataset=npz) == ["cell.dataset.settings.path: a file of the sender's"]
    blend = {"name": "blend", "settings": {"pattern": str(secret)}, "revision": 1}
    assert found(attack=blend) == ["cell.attack.settings.pattern: a file of the sender's"]
    blend["settings"] = {"pattern": None}
    assert not found(attack=blend)


def test_a_cut_archive_is_refused(archive: Path) -> None:
    whole = archive.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        archive.write_bytes(whole[:length])
        with pytest.raises(Refused):
            unpack(archive)


def test_a_lying_size_is_refused(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip may claim any size for what it unpacks to: reading stops at the limit."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("records/bomb.json", b"0" * (50 * 2**20))
    archive.write_bytes(content.getvalue())
    with pytest.raises(Refused, match="larger"):
        unpack(archive)
    monkeypatch.setattr("purebench.submission.ARCHIVE_BYTES", 100)
    with pytest.raises(Refused, match="at most 100"):
        unpack(archive)


def test_verify_runs_a_cell_again(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(name for name in unpack(archive).records if "prune" in name)
    short = Path(name).stem  # as a table's address, and the files of a run, have it
    assert main(["verify", str(archive), "--cell", short, "--quiet"]) == OK
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("sound     6 records by A. Nother")
    assert re.fullmatch(rf"again     {re.escape(name)} \(it took its sender \d+ s\)", told[-2])
    assert told[-1] == "verdict   verified"


def test_verify_runs_the_cell_that_is_named_or_none(
    archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(archive), "--cell", "x", "--no-run"]) == USAGE
    found = capsys.readouterr()
    assert (found.out, "--no-run runs nothing again" in found.err) == ("", True)


def test_verify_runs_what_says_something_of_a_defense(archive: Path) -> None:
    """Whatever an undefended cell comes to, nothing is known of the defenses."""
    records = unpack(archive).records
    told = verify._telling(records)
    assert len(told) == 3
    assert {records[name].cell.defense["name"] for name in told} == {"prune"}
    bare = {name: record for name, record in records.items() if name not in told}
    assert verify._telling(bare) == sorted(bare)


def test_verify_flags_what_does_not_come_out(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts, digests and metrics agree with one another; only measuring tells."""
    contents = {path.name: path.read_bytes() for path in results.rglob("records/*/*.json")}
    name = next(name for name in contents if "prune-s1" in name)
    record = json.loads(contents[name])
    after = record["after"]
    after["triggered_as_target"] = (after["triggered_as_target"] + 20) % 40
    after["triggered_as_true"] = 0
    contents[name] = json.dumps(record).encode()
    file = tmp_path / "s.zip"
    file.write_bytes(pack(contents, "me"))
    assert main(["verify", str(file), "--cell", f"records/{name}", "--quiet"]) == FAILED
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "verdict   flagged"
    assert any(line.startswith("differs   after.asr") for line in told)


def test_differences_are_beyond_what_machines_differ_by(results: Path) -> None:
    record = next(r for r in read_records([results]) if r.after is not None)
    assert record.after is not None
    counts = record.after.clean_count
    near = replace(record.after, clean_correct=max(0, record.after.clean_correct - counts // 100))
    assert not list(differences(record, replace(record, after=near)))
    failed = replace(record, status="failed", after=None)
    assert list(differences(record, failed)) == ["status: ok, measured failed"]
    (silent,) = differences(replace(record, changed={}), record)
    assert silent.startswith("changed: {}, measured {'dataset': ['train_count', 'test_count']")


def test_differences_are_in_every_column(results: Path) -> None:
    record = next(r for r in read_records([results]) if r.after is not None)
    assert record.after is not None
    counts = record.after
    assert list(differences(replace(record, benign_count=99), record)) == [
        f"benign_count: 99, measured {record.benign_count}"
    ]
    without = replace(record, reactivated=None)
    (found,) = differences(replace(record, reactivated=counts), without)
    assert found == "reactivated: told, not measured"
    lumped = replace(counts, most_predicted_count=counts.clean_count)
    spread = replace(counts, most_predicted_count=counts.clean_count // 2)
    (found,) = differences(replace(record, after=spread), replace(record, after=lumped))
    assert found.startswith("after.most_predicted_count: 0.5")
    forged = replace(counts, clean_count=1, clean_correct=1, most_predicted_count=1)
    assert f"after.clean_count: 1, measured {counts.clean_count}" in list(
        differences(replace(record, after=forged), record)
    )
    none, all_ = (replace(counts, triggered_as_target=n, triggered_as_true=0) for n in (0, 50))
    (found,) = differences(replace(record, reactivated=none), replace(record, reactivated=all_))
    assert found.startswith("reactivated.asr: 0.0000, measured ")


def test_records_that_contradict_one_another_are_flagged(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is before the defense is the same for every defense."""
    contents = {path.name: path.read_bytes() for path in results.rglob("records/*/*.json")}
    name = next(name for name in contents if "prune-s1" in name)
    record = json.loads(contents[name])
    record["before"]["clean_correct"] -= 1
    contents[name] = json.dumps(record).encode()
    file = tmp_path / "s.zip"
    file.write_bytes(pack(contents, "me\nverdict   verified"))
    assert main(["verify", str(file), "--no-run"]) == FAILED
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("sound     6 records by me verdict")
    assert told[1:] == [
        "differs   badnets, seed 1: before: its records do not agree",
        "verdict   flagged",
    ]


def test_a_foreign_victim_is_refused(results: Path) -> None:
    path = next(iter(results.rglob("records/*/*.json")))
    record = {**json.loads(path.read_bytes()), "victim": "0" * 16}
    with pytest.raises(Refused, match="victim: '0000000000000000', not"):
        pack({path.name: json.dumps(record).encode()}, "me")


def test_seeds_at_other_settings_are_missing(results: Path) -> None:
    """Three seeds, each at a setting of its own, are not a defense on three seeds."""
    records = [
        replace(
            r, cell=replace(r.cell, defense={"name": "prune", "settings": {"budget": r.cell.seed}})
        )
        if r.cell.defense["name"] == "prune"
        else r
        for r in read_records([results])
    ]
    assert missing(records) == [
        f'shapes, small_cnn, badnets at 0.1, prune {{"budget":{n}}}: seed {rest}'
        for n, rest in enumerate(("1, 2", "0, 2", "0, 1"))
    ]


def test_a_cell_in_two_folders_counts_once(results: Path, tmp_path: Path) -> None:
    records = read_records([results])
    records[0].write(tmp_path / "b" / "records" / "x.json")
    assert read_records([results, tmp_path / "b"]) == records


def publish(*words: str, boards: Path) -> int:
    return main(["publish", *words, "--boards", str(boards)])


def test_publish_and_render_again(results: Path, archive: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    boards = tmp_path / "boards"
    assert publish("toy", str(results), "--defense", "none", "prune", boards=boards) == OK
    folder = boards / "toy"
    assert len(list((folder / "records").iterdir())) == 6
    first = {path: path.read_bytes() for path in board.render(folder)}
    assert first == board.render(folder)
    (folder / "about.md").write_text("# A board of toys\n")
    assert publish("toy", boards=boards) == OK
    text = (folder / "README.md").read_text()
    assert text.startswith("# A board of toys\n")
    assert "self-reported" not in text
    sent = (str(archive), "--provenance", "self-reported")
    assert publish("theirs", *sent, boards=boards) == OK
    assert "self-reported" in (boards / "theirs" / "README.md").read_text()
    told = {record.provenance for record in read_records([boards / "theirs"])}
    assert told == {"self-reported"}


def test_a_board_says_what_has_changed_since(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    folder = tmp_path / "toy"
    records = read_records([results])
    board.add(folder, records)
    readme = folder / "README.md"
    assert b"Measured before" not in board.render(folder)[readme]
    for record in records:
        sides = (record.cell.attack, record.cell.defense)
        old = [{**side, "revision": 0} if side["name"] != "none" else side for side in sides]
        cell = replace(record.cell, attack=old[0], defense=old[1])
        board.add(folder, [replace(record, cell=cell)])
    told = "badnets (revision 0, now 1), prune (revision 0, now 1)."
    assert told in board.render(folder)[readme].decode()


def test_what_others_report_does_not_replace_what_was_measured(
    results: Path, archive: Path, tmp_path: Path
) -> None:
    ours = read_records([results])
    theirs = [replace(record, provenance="verified") for record in unpack(archive).records.values()]
    assert (board.add(tmp_path, ours), board.add(tmp_path, theirs)) == (6, 0)
    assert read_records([tmp_path]) == ours
    assert (board.add(tmp_path / "b", theirs), board.add(tmp_path / "b", ours)) == (6, 6)
    assert read_records([tmp_path / "b"]) == ours


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["../up", "R"], "one folder"),
        (["", "R"], "one folder"),
        ([" ", "R"], "one folder"),
        (["a b", "R"], "one folder"),
        (["toy"], "no record there"),
        (
            ["toy", "R", "--defense", "fine_tune"],
            "--defense fine_tune: no record of it; known: none",
        ),
        (["toy", "R", "--attack", "badnet"], "did you mean 'badnets'"),
        (["toy", "R", "--provenance", "verified"], "--provenance is for a submission"),
        (["toy", "nowhere"], "no such folder"),
        (["toy", "A"], "--provenance"),
    ],
)
def test_publish_refuses(
    results: Path,
    archive: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"R": str(results), "A": str(archive)}
    boards = tmp_path / "boards"
    assert publish(*(places.get(word, word) for word in words), boards=boards) == USAGE
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.md"))
    assert not boards.exists()


def test_records_that_give_no_board_leave_the_board_as_it_was(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2")
    boards = tmp_path / "boards"
    assert publish("toy", str(results), "--defense", "none", boards=boards) == OK
    before = {path: path.read_bytes() for path in boards.rglob("*.*") if path.is_file()}
    capsys.readouterr()
    record = replace(read_records([results])[0], protocol="pb-0", fingerprint="f" * 16)
    record.write(tmp_path / "old" / "records" / "a.json")
    for name in ("toy", "fresh"):
        words = (name, str(results), str(tmp_path / "old"))
        assert publish(*words, boards=boards) == USAGE
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path: path.read_bytes() for path in boards.rglob("*.*") if path.is_file()} == before
    assert [path.name for path in boards.iterdir() if path.is_dir()] == ["toy"]


def test_names_of_foreign_records_stay_in_their_folder(results: Path, tmp_path: Path) -> None:
    record: Record = read_records([results])[0]
    hostile = replace(record.cell, attack={**record.cell.attack, "name": "../../evil"})
    board.add(tmp_path / "toy", [replace(record, cell=hostile, fingerprint="../" * 9)])
    assert [path.parent for path in tmp_path.rglob("*.json")] == [tmp_path / "toy" / "records"]


def test_committed_boards_are_what_their_records_give() -> None:
    pytest.importorskip("jinja2")
    folders = sorted(
        path.parent for path in (ROOT / "leaderboards" / "published").glob("*/records")
    )
    assert folders
    for folder in folders:
        for path, content in board.render(folder).items():
            assert path.read_bytes() == content, f"python bench.py publish {folder.name}"
    boards = ROOT / "leaderboards" / "published"
    assert (boards / "README.md").read_bytes() == board.index(boards)


def test_the_format_is_named() -> None:
    assert FORMAT.startswith("purebench-submission-")
