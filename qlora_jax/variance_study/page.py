"""Writes the results of a study: results.json, and an HTML page that loads no script, font or image.

Prompts, replies and settings are untrusted text. jinja2 escapes all of it, and the page's Content-Security-Policy keeps
a browser from running scripts.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlora_jax.atomic_files import write_text
from qlora_jax.page_template import page_template
from qlora_jax.variance_study.analysis import Split
from qlora_jax.variance_study.conditions import Design
from qlora_jax.variance_study.measures import TITLES, score
from qlora_jax.variance_study.picked import Picked, pick
from qlora_jax.variance_study.questions import Questions
from qlora_jax.variance_study.replies import Observations, StoredReply
from qlora_jax.variance_study.settings import ConditionArgs, VarianceArgs

PAGE_FILE, RESULTS_FILE = "variance.html", "results.json"


class Study(NamedTuple):
    """All that the page shows."""

    args: VarianceArgs
    design: Design
    questions: Questions
    observations: Observations
    splits: Sequence[Split]


class Example(NamedTuple):
    """One prompt with all replies.

    Fields:
      fixed: {model: reply} under the fixed condition.
      factors: {factor: {level: {model: reply}}}.
    """

    rule: str
    prompt: str
    answers: Sequence[str]
    fixed: Mapping[str, StoredReply]
    factors: Mapping[str, Mapping[str, Mapping[str, StoredReply]]]


def write_study(study: Study) -> Path:
    """Writes both files into the study's folder; returns the page's path."""
    folder = Path(study.args.output)
    results = {
        "settings": dataclasses.asdict(study.args),
        "prompts": len(study.questions.asked),
        "splits": [dataclasses.asdict(split) for split in study.splits],
        "examples": [picked._asdict() | {"row": study.questions.asked[picked.index].id} for picked in picks(study)],
    }
    texts = {RESULTS_FILE: json.dumps(results, indent=1) + "\n", PAGE_FILE: page(study)}
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder / PAGE_FILE


def page(study: Study) -> str:
    """Returns the page as HTML."""
    args = study.args
    first, *others = args.models
    return page_template(__package__, "variance.html.jinja").render(
        first=first,
        others=others,
        prompts=len(study.questions.asked),
        fixed=dataclasses.asdict(args.fixed),
        factors={factor: list(levels) for factor, levels in study.design.factors.items()},
        measures=[(TITLES[measure], _groups(study, measure)) for measure in args.measures],
        examples=[_example(study, picked) for picked in picks(study)],
        first_measure=TITLES[args.measures[0]],
    )


def picks(study: Study) -> list[Picked]:
    """The prompts to show; extremes are of the first measure's mean difference over all conditions."""
    args, measure = study.args, study.args.measures[0]
    means = {
        model: np.mean(
            [score(measure, one, study.questions.asked, args.answer_pattern) for one in of_model.values()], axis=0
        )
        for model, of_model in study.observations.items()
    }
    first, *others = means
    return pick(
        [(f"{other} - {first}", means[other] - means[first]) for other in others],
        random=args.random_examples,
        extreme=args.extreme_examples,
        seed=args.example_seed,
    )


def _groups(study: Study, measure: str) -> list[tuple[str, list[Split]]]:
    """[(a difference or a model, its split for each factor)]."""
    groups: dict[str, list[Split]] = {}
    for split in study.splits:
        if split.measure == measure:
            groups.setdefault(" - ".join(reversed(split.models)), []).append(split)
    return sorted(groups.items(), key=lambda group: -len(group[1][0].models))


def _example(study: Study, picked: Picked) -> Example:
    def replies(condition: ConditionArgs) -> dict[str, StoredReply]:
        return {model: of_model[condition].replies[picked.index] for model, of_model in study.observations.items()}

    question = study.questions.asked[picked.index]
    return Example(
        rule=picked.rule,
        prompt=question.prompt,
        answers=question.answers,
        fixed=replies(study.design.fixed),
        factors={
            factor: {level: replies(condition) for level, condition in levels.items()}
            for factor, levels in study.design.factors.items()
        },
    )
