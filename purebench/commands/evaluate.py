"""evaluate: ACC, ASR and RA of a model of your own, for who has the trigger."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from ..errors import UsageError
from . import OK, _own_model


def main(words: list[str]) -> int:
    parser = _own_model.parser(
        "evaluate",
        "ACC, ASR and RA of a model on a dataset's test split, with an attack's trigger (as "
        "--seed draws it), an artifact's, or a picture's.",
        ("dataset", "target", "all_to_all"),
    )
    parser.add_argument("--attack", metavar="NAME", help="one whose trigger is fixed")
    text = "a folder of results/models, or a picture whose alpha says how far it covers"
    parser.add_argument("--trigger", metavar="PATH", help=text)
    options = parser.read(words)
    given = {key: options.pop(key) for key in ("attack", "trigger") if key in options}
    given |= {"trigger": Path(given["trigger"])} if "trigger" in given else {}
    if {"target", "all_to_all"} & set(options) and "trigger" in given and given["trigger"].is_dir():
        raise UsageError("--target and --all-to-all: an artifact's trigger has its own aim")

    from ..examination import Question, examine
    from ..progress import Progress

    question = Question(**given, **_own_model.settings(options))
    scores, told = examine(question, Progress(question.config.quiet))
    interval = import_module("purebench.leaderboards.intervals").binomial_interval
    print(f"{question.config.dataset}: {told}")
    for name, right, count in (
        ("ACC", scores.clean_correct, scores.clean_count),
        ("ASR", scores.triggered_as_target, scores.triggered_count),
        ("RA", scores.triggered_as_true, scores.triggered_count),
    ):
        low, high = interval(right, count)
        print(f"{name:<9} {right / count:.2%}  {right} of {count} images, {low:.2%} to {high:.2%}")
    return OK
