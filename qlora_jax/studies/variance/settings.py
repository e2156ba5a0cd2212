"""Declares the settings of `variance`: the models, the prompts, what stays fixed, and what varies."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from qlora_jax.config import ConfigError
from qlora_jax.config.fields import AT_LEAST_ONE, AT_LEAST_TWO, NON_NEGATIVE, NOT_EMPTY, setting
from qlora_jax.config.parse import find_problems, from_dict
from qlora_jax.inference.settings import ABOVE_ZERO_UP_TO_ONE, LocalModelArgs, QuantType
from qlora_jax.regex import text_pattern_problems
from qlora_jax.studies.tournament.settings import judge_problems

Value = str | int | float | bool | None
Measure = Literal["answer", "likelihood", "length", "judge"]
JUDGES = ("endpoint", "model")
PROMPT = "{prompt}"  # stands for the prompt in a paraphrase


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionArgs:
    """A condition under which replies are generated."""

    temperature: float = setting(
        "0: always the likeliest token; 1: draw with the model's probabilities", 0.0, NON_NEGATIVE
    )
    top_k: int = setting("draw only from the k likeliest tokens; 0: from all", 0, NON_NEGATIVE)
    top_p: float = setting(
        "draw only from the likeliest tokens whose probabilities reach this sum", 1.0, ABOVE_ZERO_UP_TO_ONE
    )
    seed: int = setting("seed of the draws", 0, NON_NEGATIVE)
    max_new_tokens: int = setting("maximum tokens per reply", 256, AT_LEAST_ONE)
    system: str | None = setting("system message (null: the template's default)", None)
    paraphrase: str = setting("text of the user's turn, in which {prompt} stands for the prompt", PROMPT, NOT_EMPTY)
    example_order: int | None = setting(
        "seed of the order of the examples (null: as in their file)", None, NON_NEGATIVE
    )
    quant_type: QuantType | None = setting("4-bit code of the base, or none for 16 bits (null: as in models)", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarianceArgs:
    """The models, the prompts, and what varies between replies, one thing at a time."""

    output: str = setting(
        "folder of replies, results and page; an interrupted study resumes from it",
        bound=NOT_EMPTY,
        common="folder of replies, results and page",
    )
    models: dict[str, str | dict[str, Value]] = setting(
        "name to a path of a model or run, or to settings: {base: models/base, mine: {path: runs/mine, step: 9}}; each "
        "is compared with the first",
        bound=NOT_EMPTY,
        common="name to model or run; each is compared with the first",
    )
    prompts: str = setting(
        "file of rows with the columns prompt and, for answer and likelihood, answer: a text, or a list of right texts",
        bound=NOT_EMPTY,
        common="file of rows with the columns prompt and answer",
    )
    vary: dict[str, list[Value] | dict[str, dict[str, Value]]] = setting(
        "settings that vary, one at a time: {seed: [0, 1, 2], decoding: {greedy: {temperature: 0}, sampled: "
        "{temperature: 1}}}; the name of a setting of fixed takes a list of its values",
        bound=NOT_EMPTY,
        common="settings that vary, one at a time",
    )
    measures: list[Measure] = setting(
        "scores of a reply: answer: 1 if it is a right answer; likelihood: log likelihood per token of the first "
        "answer as the reply; length: tokens; judge: the judge's preference for it over the first model's reply; the "
        "first chooses the extreme examples",
        ["answer", "likelihood", "length"],
        NOT_EMPTY,
    )
    judge: dict[str, Value] = setting(
        f"the judge, as in arena, of the kind {' or '.join(JUDGES)}: {{kind: model, path: models/judge, prompts: "
        "judge.jsonl}",
        {},
    )
    answer_pattern: str | None = setting("regular expression that finds the answer in a reply", None, NOT_EMPTY)
    examples: str | None = setting("file of solved examples, shown before each prompt", None, NOT_EMPTY)
    prompt_column: str = setting("column of a row's prompt", "prompt", NOT_EMPTY)
    answer_column: str = setting("column of a row's answer", "answer", NOT_EMPTY)
    max_prompts: int | None = setting("use only the first prompts; null: all", None, AT_LEAST_TWO)
    random_examples: int = setting("number of prompts on the page that are drawn at random", 3, NON_NEGATIVE)
    extreme_examples: int = setting(
        "number of prompts on the page with the largest differences, of each sign", 2, NON_NEGATIVE
    )
    example_seed: int = setting("seed of the random prompts on the page", 0, NON_NEGATIVE)
    fixed: ConditionArgs = dataclasses.field(default_factory=ConditionArgs)


def check_variance(args: VarianceArgs) -> None:
    """Raises ConfigError if settings contradict each other; the message lists all contradictions."""
    problems = [*_model_problems(args), *_factor_problems(args), *_judge_problems(args)]
    if len({*args.measures}) < len(args.measures):
        problems.append(f"measures: found {', '.join(args.measures)}, expected each once. Remove the repeated ones")
    if args.examples is None and "example_order" in _varied(args):
        problems.append("vary: example_order needs examples (found none). Set examples to their file")
    if args.answer_pattern is not None:
        wrong = text_pattern_problems(args.answer_pattern)
        problems += [f"answer_pattern: {problem} (found {args.answer_pattern!r})" for problem in wrong]
    if problems := problems or _same_problems(args):
        raise ConfigError(problems)


def model_settings(given: str | Mapping[str, Value]) -> LocalModelArgs:
    """The settings of a model; a text alone is its path."""
    return from_dict(LocalModelArgs, _as_mapping(given))


def level_settings(factor: str, levels: list[Value] | dict[str, dict[str, Value]]) -> dict[str, dict[str, Value]]:
    """{name of a level: its settings}."""
    if isinstance(levels, dict):
        return levels
    return {"default" if value is None else str(value): {factor: value} for value in levels}


def effective(condition: ConditionArgs) -> ConditionArgs:
    """The condition without settings that greedy decoding does not read."""
    if condition.temperature:
        return condition
    return dataclasses.replace(condition, top_k=0, top_p=1.0, seed=0)


def _as_mapping(given: str | Mapping[str, Value]) -> Mapping[str, Value]:
    return {"path": given} if isinstance(given, str) else given


def _model_problems(args: VarianceArgs) -> list[str]:
    problems = [
        f"models.{name}.{problem}"
        for name, given in args.models.items()
        for problem in find_problems(LocalModelArgs, _as_mapping(given), {})
    ]
    if len(args.models) < 2:
        problems.append(f"models: found {len(args.models)}, expected 2 or more to compare. Add another")
    return problems


def _judge_problems(args: VarianceArgs) -> list[str]:
    if "judge" in args.measures:
        return judge_problems("judge", args.judge, JUDGES)
    return ["judge: found a judge, but no measure judge. Add it to measures, or remove the judge"] if args.judge else []


def _factor_problems(args: VarianceArgs) -> list[str]:
    known = {field.name for field in dataclasses.fields(ConditionArgs)}
    problems = [*_paraphrase_problems("fixed", {"paraphrase": args.fixed.paraphrase})]
    for factor, given in args.vary.items():
        if isinstance(given, list) and factor not in known:
            found = f"found a list for {factor!r}, which is not a setting of fixed ({', '.join(sorted(known))})"
            problems.append(f"vary: {found}. Give levels: {{name: {{setting: value}}}}")
            continue
        levels = level_settings(factor, given)
        if len(levels) < 2 or (isinstance(given, list) and len(levels) < len(given)):
            problems.append(f"vary.{factor}: found {given}, expected 2 or more different levels. Add another")
        for level, settings in levels.items():
            where = f"vary.{factor}.{level}"
            problems += [f"{where}.{problem}" for problem in find_problems(ConditionArgs, settings, {})]
            problems += _paraphrase_problems(where, settings)
    return problems


def _same_problems(args: VarianceArgs) -> list[str]:
    """Levels of one factor that generate the same replies, such as several seeds of greedy decoding."""
    problems = []
    for factor, given in args.vary.items():
        conditions = [
            effective(dataclasses.replace(args.fixed, **settings))
            for settings in level_settings(factor, given).values()
        ]
        if len({*conditions}) < len(conditions):
            greedy = " with temperature 0" if any(one.temperature == 0 for one in conditions) else ""
            problems.append(
                f"vary.{factor}: levels do the same{greedy} (found {given}). Set fixed.temperature or levels"
            )
    return problems


def _paraphrase_problems(where: str, settings: Mapping[str, Value]) -> list[str]:
    text = settings.get("paraphrase", PROMPT)
    if isinstance(text, str) and PROMPT not in text:
        return [f"{where}.paraphrase: found {text!r}, expected a text with {PROMPT}. Add it"]
    return []


def _varied(args: VarianceArgs) -> set[str]:
    return {
        key
        for factor, given in args.vary.items()
        for settings in level_settings(factor, given).values()
        for key in settings
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """The conditions of a study.

    Attributes:
      fixed: the condition around which one thing varies at a time.
      factors: {factor: {level: condition}}.
    """

    fixed: ConditionArgs
    factors: Mapping[str, Mapping[str, ConditionArgs]]

    def conditions(self) -> list[ConditionArgs]:
        """All conditions, each once; those of the same base in the same format follow each other."""
        levels = (condition for of_factor in self.factors.values() for condition in of_factor.values())
        conditions = dict.fromkeys([self.fixed, *levels])
        return sorted(conditions, key=lambda condition: condition.quant_type or "")


def design_of(args: VarianceArgs) -> Design:
    """Returns the design of a study whose settings `check_variance` accepts."""
    return Design(
        fixed=args.fixed,
        factors={
            factor: {
                level: dataclasses.replace(args.fixed, **_typed(settings))
                for level, settings in level_settings(factor, given).items()
            }
            for factor, given in args.vary.items()
        },
    )


def _typed(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings as the types of `ConditionArgs`: YAML's 1 is 1.0 where a number is expected."""
    typed = from_dict(ConditionArgs, settings)
    return {key: getattr(typed, key) for key in settings}
