"""Declares the settings of `arena`: the tournament, its systems and its judges."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from qlora_jax.config import ConfigError
from qlora_jax.config.fields import AT_LEAST_ONE, NON_NEGATIVE, NOT_EMPTY, POSITIVE, WEB_ADDRESS, setting
from qlora_jax.config.parse import find_problems, from_dict
from qlora_jax.inference.settings import ABOVE_ZERO_UP_TO_ONE, LocalModelArgs
from qlora_jax.terminal.visible import without_passwords

Value = str | int | float | bool | None
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SystemArgs(LocalModelArgs):
    """A system whose replies are generated here; null stands for the tournament's setting."""

    system: str | None = setting("system message", None)
    max_new_tokens: int | None = setting("maximum tokens per reply", None, AT_LEAST_ONE)
    temperature: float | None = setting("0: always the likeliest token", None, NON_NEGATIVE)
    top_k: int | None = setting("draw only from the k likeliest tokens; 0: from all", None, NON_NEGATIVE)
    top_p: float | None = setting(
        "draw only from the likeliest tokens whose probabilities reach this sum", None, ABOVE_ZERO_UP_TO_ONE
    )
    seed: int | None = setting("seed of the draws", None, NON_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedRepliesArgs:
    """A system whose replies lie in a file."""

    replies: str = setting("file of rows with the id of a prompt and the reply to it", bound=NOT_EMPTY)
    reply_column: str = setting("column of the reply", "reply", NOT_EMPTY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointArgs:
    """A judge behind an OpenAI-compatible endpoint."""

    url: str = setting("address up to /v1, such as https://api.openai.com/v1", bound=WEB_ADDRESS)
    model: str = setting("the endpoint's name of the model", bound=NOT_EMPTY)
    prompts: str = setting("file of the judge's prompts", bound=NOT_EMPTY)
    key_variable: str | None = setting("environment variable that holds the key (null: no key)", None, NOT_EMPTY)
    temperature: float = setting("temperature of the review", 0.2, NON_NEGATIVE)
    max_tokens: int = setting("maximum tokens per review", 1024, AT_LEAST_ONE)
    timeout: float = setting("seconds until a request counts as failed", 120.0, POSITIVE)
    retries: int = setting("further attempts after a failure, a timeout or an unreadable review", 5, NON_NEGATIVE)
    backoff: float = setting("seconds before the first further attempt; each wait is twice the last", 2.0, NON_NEGATIVE)
    concurrency: int = setting("requests at the same time", 4, AT_LEAST_ONE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelJudgeArgs(LocalModelArgs):
    """A judge that runs here."""

    prompts: str = setting("file of the judge's prompts", bound=NOT_EMPTY)
    reads: Literal["review", "likelihood"] = setting(
        "review: generates a review and reads its last line; likelihood: the likeliest reply of 1, 2 and 3",
        "review",
    )
    temperature: float = setting("review: its temperature", 0.2, NON_NEGATIVE)
    max_tokens: int = setting("review: its maximum tokens", 1024, AT_LEAST_ONE)
    retries: int = setting("review: further attempts if it is unreadable, each with another seed", 2, NON_NEGATIVE)
    seed: int = setting("review: seed of the first attempt", 0, NON_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerdictFileArgs:
    """Recorded verdicts."""

    path: str = setting("file of rows with question_id, model_a, model_b and verdict (1, 2, 3 or -1)", bound=NOT_EMPTY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersonArgs:
    """A person, who judges on a page."""

    answers: str | None = setting("the file that the page exported", None, NOT_EMPTY)
    limit: int | None = setting("show only this many pairs, drawn at random", None, AT_LEAST_ONE)
    both_orders: bool = setting("show each pair twice, in both orders; false: once, in a random order", False)


AnySystemArgs = SystemArgs | RecordedRepliesArgs
AnyJudgeArgs = EndpointArgs | ModelJudgeArgs | VerdictFileArgs | PersonArgs

JUDGE_SETTINGS: dict[str, type[AnyJudgeArgs]] = {
    "endpoint": EndpointArgs,
    "model": ModelJudgeArgs,
    "verdicts": VerdictFileArgs,
    "person": PersonArgs,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArenaArgs:
    """A tournament between systems, decided by judges."""

    output: str = setting(
        "folder of the tournament; an interrupted tournament resumes from it",
        bound=NOT_EMPTY,
        common="folder of the tournament",
    )
    systems: dict[str, str | dict[str, Value]] = setting(
        "name to a path of a model or run, or to settings: {mine: runs/mine, other: {path: models/other, top_p: 0.9}, "
        "gpt4: {replies: gpt4.jsonl}}; none if all judges are verdict files",
        {},
        common="name to model, run, or file of replies",
    )
    prompts: str | None = setting(
        "file of prompts: JSON or JSON Lines in a format of training data (an answer at the end is dropped), or else "
        "one prompt per line",
        None,
        NOT_EMPTY,
        common="file of prompts: JSON Lines, or one prompt per line",
    )
    judges: dict[str, dict[str, Value]] = setting(
        f"name to settings, which begin with a kind of {', '.join(JUDGE_SETTINGS)}: "
        "{gpt: {kind: endpoint, url: https://api.openai.com/v1, model: gpt-4o, key_variable: OPENAI_API_KEY, prompts: "
        "judge.jsonl}}; none: only generates replies",
        {},
        common="name to settings of a judge",
    )
    prompt_column: str | None = setting("column of a prompt's text (null: as in training data)", None, NOT_EMPTY)
    id_column: str = setting(
        "column of a prompt's id; without it, the number of the row from 1", "question_id", NOT_EMPTY
    )
    category_column: str = setting(
        "column of a prompt's category, which chooses the judge's prompt", "category", NOT_EMPTY
    )
    max_prompts: int | None = setting("use only the first prompts; null: all", None, AT_LEAST_ONE)
    system: str | None = setting("replies: system message (null: the template's default)", None)
    max_new_tokens: int = setting("replies: maximum tokens", 256, AT_LEAST_ONE, common="maximum tokens per reply")
    temperature: float = setting(
        "replies: 0: always the likeliest token; 1: draw with the model's probabilities", 0.0, NON_NEGATIVE
    )
    top_k: int = setting("replies: draw only from the k likeliest tokens; 0: from all", 0, NON_NEGATIVE)
    top_p: float = setting(
        "replies: draw only from the likeliest tokens whose probabilities reach this sum", 1.0, ABOVE_ZERO_UP_TO_ONE
    )
    seed: int = setting("seed of replies, orderings, bootstraps and examples", 0, NON_NEGATIVE)
    orderings: int = setting("Elo: random orders of the comparisons", 10_000, AT_LEAST_ONE)
    prior_sd: float | None = setting(
        "Bradley-Terry: standard deviation, in Elo points, of a prior on ratings; null: none, which refuses systems "
        "that win or lose everything",
        None,
        POSITIVE,
    )


def check_arena(args: ArenaArgs) -> None:
    """Raises ConfigError if settings contradict each other; the message lists all contradictions."""
    problems = [*_name_problems(args), *_system_problems(args), *_judge_problems(args)]
    if args.systems and args.prompts is None:
        problems.append("prompts: missing, because there are systems. Set it to the file of their prompts")
    if len(args.systems) == 1:
        problems.append(f"systems: found 1 ({next(iter(args.systems))}), expected 2 or more. Add another")
    if problems:
        raise ConfigError(problems)


def system_settings(given: str | Mapping[str, Value]) -> AnySystemArgs:
    """The settings of a system; a text alone is its path.

    Raises:
      ConfigError: unknown settings, or values of a wrong type or out of bounds.
    """
    values = {"path": given} if isinstance(given, str) else given
    return from_dict(_system_schema(values), values)


def judge_settings(given: Mapping[str, Value]) -> AnyJudgeArgs:
    """The settings of a judge without its kind, which `check_arena` accepts."""
    return from_dict(JUDGE_SETTINGS[str(given["kind"])], _without_kind(given))


def judge_problems(where: str, given: Mapping[str, Value], kinds: Sequence[str]) -> list[str]:
    """The problems of a judge's settings; `kinds` are those that it may have."""
    kind = given.get("kind")
    if kind not in kinds:
        return [f"{where}.kind: found {kind!r}, expected one of {', '.join(kinds)}. Set it"]
    return [f"{where}.{problem}" for problem in find_problems(JUDGE_SETTINGS[str(kind)], _without_kind(given), {})]


def public_settings(args: ArenaArgs) -> dict[str, object]:
    """The settings as JSON values, without the passwords in addresses of judges."""
    judges = {name: public_judge(given) for name, given in args.judges.items()}
    return dataclasses.asdict(dataclasses.replace(args, judges=judges))


def public_judge(given: Mapping[str, Value]) -> dict[str, Value]:
    """The settings of a judge without a password in its address."""
    return {key: without_passwords(str(value)) if key == "url" else value for key, value in given.items()}


def _system_schema(values: Mapping[str, Value]) -> type[SystemArgs] | type[RecordedRepliesArgs]:
    return RecordedRepliesArgs if "replies" in values else SystemArgs


def _without_kind(given: Mapping[str, Value]) -> dict[str, Value]:
    return {key: value for key, value in given.items() if key != "kind"}


def _name_problems(args: ArenaArgs) -> list[str]:
    return [
        f"{key}.{name}: not a name for a file (found {name!r}, expected letters, digits, '.', '_' and '-'). Rename it"
        for key, names in (("systems", args.systems), ("judges", args.judges))
        for name in names
        if not _FILE_NAME.fullmatch(name)
    ]


def _system_problems(args: ArenaArgs) -> list[str]:
    problems = []
    for name, given in args.systems.items():
        values = {"path": given} if isinstance(given, str) else given
        problems += [f"systems.{name}.{problem}" for problem in find_problems(_system_schema(values), values, {})]
    return problems


def _judge_problems(args: ArenaArgs) -> list[str]:
    problems = []
    for name, given in args.judges.items():
        problems += judge_problems(f"judges.{name}", given, [*JUDGE_SETTINGS])
        kind = given.get("kind")
        if not args.systems and kind in JUDGE_SETTINGS and kind != "verdicts":
            problems.append(f"judges.{name}: a judge of kind {kind} needs replies (found no systems). Set systems")
    if not args.systems and not args.judges:
        problems.append("systems, judges: found neither. Set systems to models, or judges to files of verdicts")
    return problems
