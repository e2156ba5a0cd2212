"""Declares the reward functions that have names, and the settings of all reward functions: section `rewards`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from qlora_jax.config.fields import AT_LEAST_ONE, NON_NEGATIVE, NOT_EMPTY, POSITIVE, setting
from qlora_jax.config.registry import Registry
from qlora_jax.config.sizes import parse_bytes
from qlora_jax.regex import text_pattern_problems
from qlora_jax.verifiers.process import is_address


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardDeclaration:
    """A reward function with a name.

    Attributes:
      implementation: a function with TRL's signature, as "module:attribute"; it is imported in processes of rewards.
      settings: names of settings in section `rewards` that it gets as arguments, where they are set.
      required: those of them without which it cannot run.
      in_process: the training process computes it, because it holds a model; the implementation returns the function
        of replies for these settings.
    """

    implementation: str
    settings: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    in_process: bool = False


_ANSWERS = "qlora_jax.rewards.answers:"
REWARDS: Registry[RewardDeclaration] = Registry(
    "qlora_jax.rewards",
    RewardDeclaration,
    {
        "exact": RewardDeclaration(implementation=f"{_ANSWERS}exact", settings=("answer_pattern",)),
        "number": RewardDeclaration(implementation=f"{_ANSWERS}number", settings=("answer_pattern",)),
        "math": RewardDeclaration(implementation="qlora_jax.rewards.math_answer:math_answer"),
        "regex": RewardDeclaration(implementation=f"{_ANSWERS}regex", settings=("pattern",)),
        "json": RewardDeclaration(implementation="qlora_jax.rewards.json_reply:json_reply", settings=("schema",)),
        "length": RewardDeclaration(
            implementation=f"{_ANSWERS}length",
            settings=("max_completion_len", "soft_punish_cache"),
            required=("max_completion_len",),
        ),
        "reasoning_gym": RewardDeclaration(
            implementation="qlora_jax.rewards.reasoning_task:reasoning_gym", settings=("answer_pattern",)
        ),
        "programs": RewardDeclaration(implementation="qlora_jax.rewards.programs:programs"),
        "model": RewardDeclaration(
            implementation="qlora_jax.evaluation.heads.reward_model:open_scorer",
            settings=("run",),
            required=("run",),
            in_process=True,
        ),
        "judge": RewardDeclaration(
            implementation="qlora_jax.rewards.judge:judge",
            settings=("judge_url", "judge_model", "judge_prompt", "judge_key_variable", "judge_timeout"),
            required=("judge_url", "judge_model"),
        ),
    },
)
RewardName = Annotated[str, REWARDS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardArgs:
    """Rewards of sampled replies (docs/rl.md). The functions of files are given by --reward FILE.py:NAME."""

    functions: list[RewardName] = setting(
        "reward functions by name: exact, number, math, regex, json, length, reasoning_gym, programs, model, judge, or "
        "those of installed packages. Functions of --reward follow them",
        [],
    )
    reward_weights: list[float] | None = setting(
        "weight of each function, in the order of functions and --reward; null: 1 each", None, NOT_EMPTY
    )
    on_error: Literal["stop", "drop"] = setting(
        "treatment of replies for which a function raises, is late, or returns no finite number: stop the run with an "
        "error, or drop the reward. The step counts them",
        "stop",
    )
    timeout: float = setting("seconds of one call of a function, which scores all replies of a step", 60.0, POSITIVE)
    memory: str = setting("memory of each process of reward functions and tools", "4GiB")
    workers: int = setting(
        "processes of reward functions, and as many of tools; functions of one file share one. No reward depends on it",
        2,
        AT_LEAST_ONE,
    )
    answer_pattern: str | None = setting(
        "exact, number, reasoning_gym: regular expression whose last match is the answer in a reply; for exact and "
        "number also in the column answer, where it occurs there. null: the whole text for exact, the last number for "
        "number, the last <answer> tags for reasoning_gym",
        None,
        NOT_EMPTY,
    )
    pattern: str | None = setting(
        "regex: regular expression that good replies contain; null: the column pattern", None, NOT_EMPTY
    )
    schema: str | None = setting("json: file of a JSON schema; null: the column schema", None, NOT_EMPTY)
    max_completion_len: int | None = setting(
        "length: tokens after which the reward is -1, as in TRL's soft overlong punishment", None, AT_LEAST_ONE
    )
    soft_punish_cache: int = setting(
        "length: tokens up to max_completion_len over which the reward falls from 0 to -1", 0, NON_NEGATIVE
    )
    run: str | None = setting("model: folder of a run with objective=reward", None, NOT_EMPTY)
    judge_url: str | None = setting("judge: address of an OpenAI-compatible endpoint up to /v1", None, NOT_EMPTY)
    judge_model: str | None = setting("judge: the endpoint's name of the model", None, NOT_EMPTY)
    judge_prompt: str | None = setting(
        "judge: file of a message with {prompt} and {completion}, which asks for a last line `Score: N` with N from 0 "
        "to 10; null: a general one",
        None,
        NOT_EMPTY,
    )
    judge_key_variable: str | None = setting("judge: environment variable of the key; null: no key", None, NOT_EMPTY)
    judge_timeout: float = setting("judge: seconds until a request counts as failed", 30.0, POSITIVE)


def split_code(place: str, flag: str = "--reward") -> tuple[str, str]:
    """Returns the file and the name of `FILE.py:NAME`; raises ValueError for another form."""
    file, _, name = place.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        is_reward = flag == "--reward" and place in REWARDS
        fix = f"Write --rewards.functions '[{place}]'" if is_reward else "Name a function or class in a Python file"
        raise ValueError(f"{flag}: found {place!r}, expected FILE.py:NAME. {fix}")
    return file, name


def reward_names(args: RewardArgs, rewards: Sequence[str]) -> list[str]:
    """Returns the names of all functions in order; `rewards` are the values of --reward."""
    return [*args.functions, *(split_code(each)[1] for each in rewards)]


def check_rewards_given(args: RewardArgs, rewards: Sequence[str], user: str, environment: str | None = None) -> None:
    """Raises ValueError without a function or an environment, or with another number of weights.

    It is checked when rewards are needed: the settings of a finished run lack --reward.

    Args:
      user: name of the feature that needs rewards, such as `objective=grpo`.
    """
    names = reward_names(args, rewards)
    if not names and environment is None:
        fix = "Add --reward FILE.py:NAME, or set rewards.functions"
        raise ValueError(f"--reward: missing, expected at least one function for {user}. {fix}")
    if args.reward_weights is not None and len(args.reward_weights) != len(names):
        raise ValueError(
            f"rewards.reward_weights: found {len(args.reward_weights)}, expected {len(names)} for the functions "
            f"{', '.join(names)}. Set one per function"
        )


def reward_problems(args: RewardArgs, rewards: Sequence[str], objective: str, *, used: bool) -> list[str]:
    """Reports values of --reward and settings of section `rewards` that cannot be used.

    Args:
      used: the objective learns from rewards.
    """
    plain = RewardArgs()
    given = [each.name for each in dataclasses.fields(args) if getattr(args, each.name) != getattr(plain, each.name)]
    if not used:
        found = [*(["--reward"] if rewards else []), *(f"rewards.{name}" for name in given)]
        return [f"{name}: found with objective={objective}, which does not use it. Remove it" for name in found]
    try:
        names = reward_names(args, rewards)
        parse_bytes(args.memory)
    except ValueError as error:
        return [str(error) if str(error).startswith("--") else f"rewards.memory: {error}"]
    problems = [
        f"--reward: found {names.count(name)} functions with the name {name!r}, expected unique names. Rename one"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    declared = {name: REWARDS[name] for name in args.functions}
    problems += [
        f"rewards.{needed}: missing, but the function {name} uses it. Set it"
        for name, each in declared.items()
        for needed in each.required
        if getattr(args, needed) is None
    ]
    unread = {name for _, each in REWARDS.items() for name in each.settings}
    unread -= {name for each in declared.values() for name in each.settings}
    problems += [
        f"rewards.{name}: found {getattr(args, name)!r}, but no function in rewards.functions uses it. Remove it"
        for name in given
        if name in unread
    ]
    patterns = {"pattern": args.pattern, "answer_pattern": args.answer_pattern}
    return problems + [
        f"rewards.{name}: {problem}"
        for name, pattern in patterns.items()
        if pattern is not None
        for problem in text_pattern_problems(pattern)
    ]


def tool_problems(
    tools: Sequence[str], environment: str | None, objective: str, *, used: bool, sources: Sequence[str]
) -> list[str]:
    """Reports values of --tool and --environment that cannot be used.

    Args:
      used: as in `reward_problems`.
      sources: files of the run's data, or other names of rows.
    """
    given = {"--tool": tools, "--environment": [] if environment is None else [environment]}
    if not used:
        return [
            f"{flag}: found with objective={objective}, which does not use it. Remove it"
            for flag, values in given.items()
            if values
        ]
    problems: list[str] = []
    if is_address(environment):
        given["--environment"] = []
        problems += ["--tool: found with an environment of verifiers, which has its own. Remove it"] if tools else []
        problems += [
            f"data: found {path!r}, expected {environment!r}, with settings after a question mark. Change data.train "
            "and data.eval, or --environment, which has no settings"
            for path in sources
            if path.partition("?")[0] != environment
        ]
    for flag, values in given.items():
        try:
            names = [split_code(each, flag)[1] for each in values]
        except ValueError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{flag}: found {names.count(name)} functions with the name {name!r}, expected unique names. Rename one"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
    return problems
