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
from qlora_jax.studies.tournament.settings import public_judge
from qlora_jax.studies.variance.analysis import TITLES, Split, score
from qlora_jax.studies.variance.questions import ChosenPrompt, Questions, choose_prompts
from qlora_jax.studies.variance.replies import Observations, ObservedReply
from qlora_jax.studies.variance.settings import ConditionArgs, Design, VarianceArgs

PAGE_FILE, RESULTS_FILE = "variance.html", "results.json"


class PageContent(NamedTuple):
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
    fixed: Mapping[str, ObservedReply]
    factors: Mapping[str, Mapping[str, Mapping[str, ObservedReply]]]


def write_results(content: PageContent) -> Path:
    """Writes both files into the study's folder; returns the page's path."""
    folder = Path(content.args.output)
    results = {
        "settings": dataclasses.asdict(content.args) | {"judge": public_judge(content.args.judge)},
        "prompts": len(content.questions.asked),
        "splits": [dataclasses.asdict(split) for split in content.splits],
        "examples": [
            chosen._asdict() | {"row": content.questions.asked[chosen.index].id} for chosen in chosen_prompts(content)
        ],
    }
    texts = {RESULTS_FILE: json.dumps(results, indent=1) + "\n", PAGE_FILE: page(content)}
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder / PAGE_FILE


def page(content: PageContent) -> str:
    """Returns the page as HTML."""
    args = content.args
    first, *others = args.models
    return page_template(__package__, "variance.html.jinja").render(
        first=first,
        others=others,
        prompts=len(content.questions.asked),
        fixed=dataclasses.asdict(args.fixed),
        factors={factor: list(levels) for factor, levels in content.design.factors.items()},
        measures=[(TITLES[measure], _groups(content, measure)) for measure in args.measures],
        examples=[_example(content, chosen) for chosen in chosen_prompts(content)],
        first_measure=TITLES[args.measures[0]],
    )


def chosen_prompts(content: PageContent) -> list[ChosenPrompt]:
    """The prompts to show; extremes are of the first measure's mean difference over all conditions."""
    args, measure = content.args, content.args.measures[0]
    means = {
        model: np.mean(
            [score(measure, one, content.questions.asked, args.answer_pattern) for one in of_model.values()], axis=0
        )
        for model, of_model in content.observations.items()
    }
    first, *others = means
    return choose_prompts(
        [(f"{other} - {first}", means[other] - means[first]) for other in others],
        random=args.random_examples,
        extreme=args.extreme_examples,
        seed=args.example_seed,
    )


def _groups(content: PageContent, measure: str) -> list[tuple[str, list[Split]]]:
    """[(a difference or a model, its split for each factor)]."""
    groups: dict[str, list[Split]] = {}
    for split in content.splits:
        if split.measure == measure:
            groups.setdefault(" - ".join(reversed(split.models)), []).append(split)
    return sorted(groups.items(), key=lambda group: -len(group[1][0].models))


def _example(content: PageContent, chosen: ChosenPrompt) -> Example:
    def replies(condition: ConditionArgs) -> dict[str, ObservedReply]:
        return {model: of_model[condition].replies[chosen.index] for model, of_model in content.observations.items()}

    question = content.questions.asked[chosen.index]
    return Example(
        rule=chosen.rule,
        prompt=question.prompt,
        answers=question.answers,
        fixed=replies(content.design.fixed),
        factors={
            factor: {level: replies(condition) for level, condition in levels.items()}
            for factor, levels in content.design.factors.items()
        },
    )
