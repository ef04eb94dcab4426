"""Settings come from text or YAML, strictly; what is refused is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from purebench import UsageError
from purebench.settings import (
    Located,
    build,
    canonical,
    changed,
    convert,
    describe,
    fingerprint,
    read_yaml,
)


@dataclass(frozen=True)
class Sample:
    """One setting of every kind."""

    title: ClassVar[str] = "no setting"
    alpha: float = 0.2
    steps: int = 4
    fast: bool = False
    mode: Literal["soft", "hard"] = "soft"
    label: str = "x"
    sizes: tuple[int, ...] = (1, 2)
    limit: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1,\n got {self.alpha}")


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("1e-3", float, 0.001),  # YAML reads it as a string
        ("-.5", float, -0.5),
        (2, float, 2.0),
        ("12", int, 12),
        (-3, int, -3),
        *((word, bool, True) for word in (True, "true", "Yes", "on")),
        *((word, bool, False) for word in (False, "FALSE", "no", "off")),
        ("text", str, "text"),
        ("none", str, "none"),
        ("", str, ""),
        ("hard", Literal["soft", "hard"], "hard"),
        ("2", Literal[1, 2], 2),
        (1, Literal[1, 2], 1),
        ("1,2 3", tuple[int, ...], (1, 2, 3)),
        ([1, "2"], tuple[int, ...], (1, 2)),
        (7, tuple[int, ...], (7,)),
        ("", tuple[int, ...], ()),
        ("a, b", tuple[str, ...], ("a, b",)),
        (["a", "b"], tuple[str, ...], ("a", "b")),
        (None, float | None, None),
        ("None", int | None, None),
        ("null", str | None, None),
        ("0.5", float | None, 0.5),
        ("x", None | str, "x"),
        ("yes", bool | None, True),
    ],
)
def test_convert(value: Any, annotation: Any, expected: Any) -> None:
    converted = convert(value, annotation, "where")
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (True, int, "a whole number"),
        (False, float, "a number"),
        (1, bool, "true or false"),
        ("1", bool, "true or false"),
        (1.5, int, "a whole number"),
        (2.0, int, "a whole number"),
        ("1e3", int, "a whole number"),
        ("", int, "a whole number"),
        ("nan", float, "a number"),
        ("-inf", float, "a number"),
        (float("nan"), float, "a number"),
        (float("inf"), float, "a number"),
        ("1e999", float, "a number"),
        (10**400, float, "a number"),
        ([0.1], float, "a number"),
        (None, float, "a number"),
        (3, str, "text"),
        (None, str, "text"),
        ("Soft", Literal["soft", "hard"], "one of soft, hard"),
        (["soft"], Literal["soft", "hard"], "one of soft, hard"),
        ("3", Literal[1, 2], "one of 1, 2"),
        ("1,x", tuple[int, ...], "a whole number"),
        ([True], tuple[int, ...], "a whole number"),
        ("half", float | None, "a number"),
        (False, int | None, "a whole number"),
    ],
)
def test_convert_refuses(value: Any, annotation: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=rf"^alpha must be {expected}, got ") as refusal:
        convert(value, annotation, "alpha")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "annotation", [Path, int | str, tuple[int, int], list[int], int | None | str]
)
def test_convert_knows_its_kinds_only(annotation: Any) -> None:
    with pytest.raises(UsageError, match=r"alpha: a setting of type .* cannot be given; use bool"):
        convert("1", annotation, "alpha")


def test_build() -> None:
    values = {"alpha": "0.5", "steps": "8", "fast": "yes", "mode": "hard", "sizes": "3 4"}
    assert build(Sample, values, "x") == Sample(0.5, 8, True, "hard", "x", (3, 4))
    assert build(Sample, {}, "x") == Sample()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alfa": 1}, "attack blend has no setting 'alfa'; did you mean 'alpha'?"),
        ({"ALPHA": 1}, "attack blend has no setting 'ALPHA'; did you mean 'alpha'?"),
        ({"title": "t"}, "attack blend has no setting 'title'"),
        (
            {"qqq": 1},
            "attack blend has no setting 'qqq'; "
            "known: alpha, fast, label, limit, mode, sizes, steps",
        ),
        ({"alpha": "big"}, "attack blend: alpha must be a number, got 'big'"),
        ({"alpha": 7}, "attack blend: alpha must lie between 0 and 1, got 7.0"),
        ({"label": "a\nb", "alpha": "a\nb"}, "attack blend: alpha must be a number, got 'a\\nb'"),
    ],
)
def test_build_refuses_in_one_line(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        build(Sample, values, "attack blend")
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["alpha", "alfa"])
def test_build_says_where_a_setting_stands(key: str) -> None:
    """On conversion, on refusal by the class, and for a setting that is not there."""
    places = {"steps": "run.yaml, line 8: ", key: "run.yaml, line 9: "}
    for value in ("big", 7):
        with pytest.raises(UsageError, match=r"^run\.yaml, line 9: attack blend"):
            build(Sample, Located({"steps": 1, key: value}, places), "attack blend")


def test_describe_is_data_in_the_order_of_the_fields() -> None:
    described = describe(Sample(sizes=(5, 6)))
    assert list(described) == ["alpha", "steps", "fast", "mode", "label", "sizes", "limit"]
    assert described["sizes"] == [5, 6]
    assert build(Sample, described, "x") == Sample(sizes=(5, 6))


def test_changed_settings_are_those_that_are_not_as_they_come() -> None:
    @dataclass(frozen=True)
    class Other:
        given: int
        made: tuple[int, ...] = field(default_factory=tuple)
        folder: str = field(default="", metadata={"location": True})

    assert changed(Sample()) == []
    assert changed(Sample(alpha=0.3, sizes=(1,))) == ["alpha", "sizes"]
    assert changed(Sample(alpha=0.3, steps=5), Sample(alpha=0.3)) == ["steps"]
    assert changed(Other(1, folder="here")) == ["given"]
    assert changed(Other(1, (2,))) == ["given", "made"]


def test_fingerprint_is_stable() -> None:
    """By hand, with sha256sum. Another value would orphan every cache and published record."""
    assert canonical({"b": [1, 2.5], "a": None}) == '{"a":null,"b":[1,2.5]}'
    assert fingerprint({"b": [1, 2.5], "a": None}) == "e57f5d37865437a8"
    assert fingerprint(describe(Sample())) == "f13ad0b48155192c"


def test_fingerprint_ignores_order_and_tuples() -> None:
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.2000000000000001},
        {"steps": 5},
        {"fast": True},
        {"mode": "hard"},
        {"label": "y"},
        {"sizes": (2, 1)},
        {"limit": 0.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_sees_every_setting(change: dict[str, Any]) -> None:
    changed = replace(Sample(), **change)
    assert fingerprint(describe(changed)) != fingerprint(describe(Sample()))


@pytest.mark.parametrize("content", [float("nan"), [float("inf")]])
def test_fingerprint_refuses_what_json_lacks(content: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        fingerprint(content)


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


NESTED = """\
# a comment
attack: [blend, badnets]

set:
  blend:
    alpha: 1e-3
  fine_tune: {lr: 0.01,
    epochs: 2}
seeds: [0, 1]
"""


def test_yaml_content_and_lines(tmp_path: Path) -> None:
    content, lines = read_yaml(written(tmp_path, NESTED))
    assert content == {
        "attack": ["blend", "badnets"],
        "set": {"blend": {"alpha": "1e-3"}, "fine_tune": {"lr": 0.01, "epochs": 2}},
        "seeds": [0, 1],
    }
    assert lines == {
        "attack": 2,
        "set": 4,
        "set.blend": 5,
        "set.blend.alpha": 6,
        "set.fine_tune": 7,
        "set.fine_tune.lr": 7,
        "set.fine_tune.epochs": 8,
        "seeds": 9,
    }


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n", "\ufeff"])
def test_yaml_empty(tmp_path: Path, text: str) -> None:
    assert read_yaml(written(tmp_path, text)) == ({}, {})


@pytest.mark.parametrize(
    ("text", "content", "lines"),
    [
        ("a: 2024-01-31", {"a": "2024-01-31"}, {"a": 1}),
        ("a: 2024-13-45", {"a": "2024-13-45"}, {"a": 1}),  # no date at all
        ("\ufeffa: 1", {"a": 1}, {"a": 1}),
        ("'1': 2", {"1": 2}, {"1": 1}),
        (
            "a: &x {b: 1}\nc: *x",
            {"a": {"b": 1}, "c": {"b": 1}},
            {"a": 1, "a.b": 1, "c": 2, "c.b": 1},
        ),
        ("<<: {a: 1,\n b: 2}\nb: 3", {"a": 1, "b": 3}, {"a": 1, "b": 3}),
        (  # a mapping merged before it is itself complete holds each key once
            "x: &x {a: 1}\no:\n  p: &p\n    <<: *x\n    a: 2\nq:\n  <<: *p",
            {"x": {"a": 1}, "o": {"p": {"a": 2}}, "q": {"a": 2}},
            {"x": 1, "x.a": 1, "o": 2, "o.p": 3, "o.p.a": 5, "q": 6, "q.a": 5},
        ),
    ],
)
def test_yaml_reads(
    tmp_path: Path, text: str, content: dict[str, Any], lines: dict[str, int]
) -> None:
    assert read_yaml(written(tmp_path, text)) == (content, lines)


def test_yaml_that_contains_itself(tmp_path: Path) -> None:
    content, _ = read_yaml(written(tmp_path, "a: &a\n  b: *a"))
    assert content["a"]["b"] is content["a"]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\nb: 2\na: 3", 3, "duplicate key 'a'"),
        ("a: 1\n'a': 3", 2, "duplicate key 'a'"),
        ("set:\n  blend:\n    alpha: 1\n    alpha: 1", 4, "duplicate key 'alpha'"),
        ("a: {b: 1,\n b: 2}", 2, "duplicate key 'b'"),
        ("<<: {a: 1}\n<<: {b: 1}", 2, "duplicate key '<<'"),
        ("a: 1\nb: !!python/object:os.system {}", 2, "tag .*python/object.* is not allowed"),
        ("a: !!python/name:os.system ''", 1, "tag .*python/name.* is not allowed"),
        ("a:\n- !!int x", 2, "tag .*int' is not allowed"),
        ("a: !mine 1", 1, "tag '!mine' is not allowed"),
        ("a: ! 1", 1, "tag '!' is not allowed"),
        ("!!set {a, b}", 1, "tag .* is not allowed"),
        ("a: 1\n!!str b: 1", 2, "tag .* is not allowed"),
        ("a: 1\n2: b", 2, "key '2' must be text"),
        ("yes: 1", 1, "key 'yes' must be text"),
        ("a: 1\n~: 1", 2, "key '~' must be text"),
        ("? [a, b]\n: 1", 1, r"key \[...\] must be text"),
        ("a:\n  ? {b: 1}\n  : 1", 2, r"key \[...\] must be text"),
        ("- a\n- b", 1, "expected 'key: value' lines"),
        ("just words", 1, "expected 'key: value' lines"),
        ("a: 1\n b: 2", 2, "mapping values are not allowed here"),
        ("a: 1\nb: [1, 2", 2, "expected ',' or ']'"),
        ("a: 1\n\tb: 2", 2, "found character '\\\\t' that cannot start any token"),
        ("a: 1\nb: *nowhere", 2, "undefined alias 'nowhere'"),
        ("a: 1\n<<: 3", 2, "expected a mapping or list of mappings for merging"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("a: 1\nb: =", 2, "could not determine a constructor"),
    ],
)
def test_yaml_refused_with_its_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as refusal:
        read_yaml(written(tmp_path, text))
    assert f"run.yaml, line {line}: " in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n\xff", "not UTF-8 text"),
        (b"a: \x00", "special characters are not allowed"),
        (b"\x1f\x8b\x08\x00", "not UTF-8 text"),
        (b"[" * 2000, "nested too deeply"),
    ],
)
def test_yaml_that_is_none(tmp_path: Path, text: bytes, reason: str) -> None:
    with pytest.raises(UsageError, match=rf"run\.yaml.*: .*{reason}") as refusal:
        read_yaml(written(tmp_path, text))
    assert "\n" not in str(refusal.value)


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*run\.yaml: No such file"):
        read_yaml(tmp_path / "run.yaml")
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        read_yaml(tmp_path)
