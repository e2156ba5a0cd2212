"""Reward functions with TRL's signature, called in processes with limits of time and memory.

A function is called once per step, with all replies, as in TRL. A call that fails is repeated reply by reply to find
the replies at fault, and then for all others together.

Dimension key: N replies, F functions.
"""

import atexit
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Float64

from qlora_jax.config.registry import load_implementation
from qlora_jax.config.rewards import REWARDS, RewardArgs, reward_names
from qlora_jax.config.sizes import parse_bytes
from qlora_jax.rewards.tool_calls import ENVIRONMENT, TOOL
from qlora_jax.rewards.tools import Tools
from qlora_jax.rewards.worker_process import Arguments, Call, Failed, Name, WorkerProcess, run_calls
from qlora_jax.untrusted_json import JsonObject
from qlora_jax.verifiers.process import Address, is_address

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL does not pass these columns either
MOST_ENDED = 4  # calls with one reply that end their process, after which the other replies are not tried
SHOWN = 10  # problems that an error lists

Messages = Sequence[Mapping[str, object]]


class GivenReward(NamedTuple):
    """The reward that an environment gave a reply, or the problem for which it gave none, and its metrics."""

    reward: float | None
    problem: str | None
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replies:
    """Replies to score, those of a prompt next to each other.

    Attributes:
      prompts: texts, or messages of conversations.
      completions: texts, or messages for conversations: the assistant's, and those of tools.
      completion_ids: the sampled ids.
      columns: every column of the rows, repeated for each reply.
      labels: file and line of each reply's prompt, for messages.
      step, steps: optimizer steps done, and those of the run.
      environments: number of each reply's environment; None without environments.
      given: of each reply, by an environment that rewards its replies itself; empty without one.
    """

    prompts: Sequence[str | Messages]
    completions: Sequence[str | Messages]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[object]]
    labels: Sequence[str]
    step: int = 0
    steps: int = 0
    environments: Sequence[int] | None = None
    given: Sequence[GivenReward] = ()

    def rows(self, rows: Sequence[int]) -> "Replies":
        """Returns some of the replies."""
        names = ("prompts", "completions", "completion_ids", "labels")
        picked = {name: [getattr(self, name)[row] for row in rows] for name in names}
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        environments = None if self.environments is None else [self.environments[row] for row in rows]
        return dataclasses.replace(self, **picked, columns=columns, environments=environments)

    def arguments(self) -> JsonObject:
        """Returns the keyword arguments of a reward function; the process adds the functions that log."""
        return {
            **{name: [*values] for name, values in self.columns.items() if name not in _NOT_COLUMNS},
            "prompts": [*self.prompts],
            "completions": [*self.completions],
            "completion_ids": [[*map(int, ids)] for ids in self.completion_ids],
            "trainer_state": {"global_step": self.step, "max_steps": self.steps},
            **({} if self.environments is None else {"environments": [*self.environments]}),
        }


class RewardProblem(NamedTuple):
    """A reply that a function failed on: its number among the replies, the function's name, and the reason."""

    row: int
    function: str
    text: str


class RewardTable(NamedTuple):
    """Rewards of replies.

    Fields:
      rewards_NF: nan where a function returned None or failed.
      names: of the functions.
      problems: replies without a reward because a function failed; empty unless rewards.on_error=drop.
      metrics: means of the values that functions gave to log_metric.
    """

    rewards_NF: Float64[np.ndarray, "N F"]
    names: tuple[str, ...]
    problems: list[RewardProblem]
    metrics: dict[str, float]


class RewardError(ValueError):
    """Replies without a reward, one line each."""


# (prompts, completions) -> a reward of each reply
InProcess = Callable[[Sequence[str | Messages], Sequence[str | Messages]], Sequence[float | None]]


class RewardFunctions:
    """The reward functions of a run, and its tools. A context manager: its end stops the processes.

    With an environment, all of them are in one process, so that functions get the environments themselves.

    Args:
      args: settings that `reward_problems` accepts.
      rewards, tools, environment: the values of --reward, --tool and --environment.
      tool_timeout: seconds of a call of a tool.

    Attributes:
      tools: the tools and environments; None without them.

    Raises:
      ValueError: functions cannot be imported or called; the message lists them.
    """

    def __init__(
        self,
        args: RewardArgs,
        rewards: Sequence[str],
        tools: Sequence[str] = (),
        environment: str | None = None,
        tool_timeout: float = 10.0,
    ):
        self.names = tuple(reward_names(args, rewards))
        self.weights = np.array(args.reward_weights or [1.0] * len(self.names))
        self._stops = args.on_error == "stop"
        here = [REWARDS[name].in_process for name in args.functions]
        self._in_process = {n: _open_here(args, args.functions[n]) for n, is_here in enumerate(here) if is_here}
        places = [*(REWARDS[name].implementation for name in args.functions), *rewards]
        self._places = {number: place for number, place in enumerate(places) if number not in self._in_process}
        # Functions of one file share a process, as they may share variables.
        files: dict[str, list[tuple[Name, str, Arguments]]] = {}
        for n, place in self._places.items():
            settings = _settings(args, self.names[n]) if n < len(args.functions) else {}
            files.setdefault(place.rpartition(":")[0], []).append((n, place, settings))
        shares = [[*files.values()][first :: args.workers] for first in range(min(args.workers, len(files)))]
        sources = [[*itertools.chain.from_iterable(share)] for share in shares]
        called: list[tuple[Name, str, Arguments]] = [(TOOL, place, {}) for place in tools]
        limits = args.timeout, parse_bytes(args.memory)
        played, environment = (environment, None) if is_address(environment) else (None, environment)
        if environment is None:
            self._workers = [WorkerProcess(own, *limits) for own in sources]
            callers = [WorkerProcess(called, *limits) for _ in range(args.workers if tools else 0)]
            self._workers += callers
        else:
            own = (len(places), "qlora_jax.rewards.tool_calls:get_reward", {})
            called = [(ENVIRONMENT, environment, {}), *called, *itertools.chain(*sources), own]
            self._workers = callers = [WorkerProcess(called, *limits, repeats=True)]
        atexit.register(self.close)
        self._required: dict[int, JsonObject] = {}
        schemas = self._load(environment)
        self._played = None
        if played is not None:
            self._played = len(self.names)
            self._add_reward(played, Address.parse(played).name)
        self.tools = None
        if callers:
            self.tools = Tools(schemas=schemas, workers=callers, seconds=tool_timeout, environment=environment)

    def __enter__(self) -> "RewardFunctions":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.stop()

    def _load(self, environment: str | None) -> list[JsonObject]:
        """Starts the processes; returns the schemas of the tools, which are the same in all."""
        problems: list[str] = []
        schemas: dict[str, list[JsonObject]] = {}
        for worker in self._workers:
            for (name, place, _), found in zip(worker.sources, worker.load(), strict=False):
                if isinstance(found, Failed):
                    problems.append(found.text)
                elif isinstance(name, str):
                    schemas[place] = found["schemas"]
                    if found.get("has_reward"):
                        self._add_reward(place, found["name"])
                elif name in self._places:
                    self._required[name] = found
        named = Counter(schema["function"]["name"] for own in schemas.values() for schema in own)
        problems += [
            f"{', '.join(schemas)}: found {count} tools with the name {name!r}, expected unique names. Rename one"
            for name, count in named.items()
            if count > 1
        ]
        if environment is not None and not (problems or self.names):
            problems.append(f"{environment}: found no method get_reward, and no reward function. Add one of them")
        if problems:
            self.close()
            raise ValueError("\n  ".join(["functions cannot be used:", *dict.fromkeys(problems)]))
        return [*itertools.chain.from_iterable(schemas.values())]

    def _add_reward(self, environment: str, name: str) -> None:
        """Adds the reward that environments give, after those of functions, with weight 1."""
        self._places[len(self.names)] = environment
        self.names, self.weights = (*self.names, name), np.append(self.weights, 1.0)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises ValueError for functions that need an argument which the rows do not have as a column."""
        given = [name for name in columns if name not in _NOT_COLUMNS]
        has_environments = self.tools is not None and self.tools.environment is not None
        arguments = [*ARGUMENTS, *(["environments"] if has_environments else [])]
        problems = [f"column {name!r} has the name of an argument. Rename it" for name in given if name in arguments]
        for number, found in self._required.items():
            file, _, name = self._places[number].rpartition(":")
            is_ours = not file.endswith(".py")
            where = f"rewards.functions: {name}" if is_ours else f"{file}:{found['line']}: {name}"
            fix = "Rename or add the column" if is_ours else "Rename the argument or the column"
            columns_found = f"the columns {', '.join(given)}" if given else "no columns"
            problems += [
                f"{where} needs the argument {each!r} (found {columns_found}, besides {', '.join(arguments)}). {fix}"
                for each in found["required"]
                if each not in (*given, *arguments)
            ]
        if problems:
            raise ValueError("\n  ".join(["reward functions do not fit the rows:", *problems]))

    def score(self, replies: Replies) -> RewardTable:
        """Calls every function.

        Raises:
          RewardError: a function failed, and rewards.on_error=stop; the message has file and line of the replies.
        """
        table = RewardTable(np.full((len(replies.prompts), len(self.names)), np.nan), self.names, [], {})
        found = self._call(dict.fromkeys(range(len(self.names)), replies))
        metrics: dict[str, list[float]] = {}
        for number, name in enumerate(self.names):
            outcome = found[number]
            if isinstance(outcome, Failed):
                outcome = self._by_reply(number, replies, outcome)
            for row, value in enumerate(outcome["values"]):
                if isinstance(value, str):
                    table.problems.append(RewardProblem(row, name, value))
                elif value is not None:
                    table.rewards_NF[row, number] = value
            for key, value in outcome["metrics"]:
                metrics.setdefault(key, []).append(value)
        if table.problems and self._stops:
            raise self._error(table.problems, replies)
        table.metrics.update({key: float(np.mean(values)) for key, values in metrics.items()})
        return table

    def _score_here(self, number: int, replies: Replies) -> JsonObject | Failed:
        """Returns the outcome of a function of this process, or why its call failed."""
        try:
            values = self._in_process[number](replies.prompts, replies.completions)
        except ValueError as error:
            return Failed(str(error))
        return {"values": [*values], "metrics": []}

    def _call(self, calls: Mapping[int, Replies]) -> dict[int, JsonObject | Failed]:
        """Returns the outcome of each function, or why its call failed as a whole."""
        outcomes = run_calls(
            {
                worker: [
                    (name, Call(name, calls[name].arguments()))
                    for name, *_ in worker.sources
                    if isinstance(name, int) and name in calls
                ]
                for worker in self._workers
            }
        )
        outcomes |= {number: self._score_here(number, calls[number]) for number in self._in_process.keys() & calls}
        if self._played is not None and self._played in calls:
            outcomes[self._played] = _as_outcome(calls[self._played].given)
        for number, outcome in outcomes.items():
            expected = len(calls[number].prompts)
            if not isinstance(outcome, Failed) and (count := len(outcome["values"])) != expected:
                outcomes[number] = Failed(f"found {count} rewards, expected {expected}")
        return outcomes

    def _by_reply(self, number: int, replies: Replies, failed: Failed) -> JsonObject:
        """Returns the outcome of a function whose call failed: a text for each reply at fault, and other rewards."""
        count = len(replies.prompts)
        values: list[float | str | None] = [None] * count
        good: list[int] = []
        ended = 0
        for row in range(count):
            if ended == MOST_ENDED:
                values[row] = f"not tried after {MOST_ENDED} calls that ended their process: {failed.text}"
                continue
            alone = self._call({number: replies.rows([row])})[number]
            if not isinstance(alone, Failed):
                good.append(row)
                continue
            values[row] = alone.text
            ended += alone.ended
            if self._stops:
                return {"values": values, "metrics": []}
        outcome = self._call({number: replies.rows(good)})[number] if 0 < len(good) < count else failed
        if isinstance(outcome, Failed):
            text = f"{outcome.text} (in a call with {len(good)} replies)"
            outcome = {"values": [text] * len(good), "metrics": []}
        for row, value in zip(good, outcome["values"], strict=True):
            values[row] = value
        return {"values": values, "metrics": outcome["metrics"]}

    def _error(self, problems: Sequence[RewardProblem], replies: Replies) -> RewardError:
        places = {name: self._places.get(number, name) for number, name in enumerate(self.names)}
        each = (f"{replies.labels[row]}: {places[function]}: {text}" for row, function, text in problems)
        lines = [*dict.fromkeys(each)]  # replies to one prompt may fail alike
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        fix = "Correct the function or the rows, or set rewards.on_error=drop"
        return RewardError("\n  ".join(["reward functions failed:", *lines[:SHOWN], *more, fix]))


def _as_outcome(given: Sequence[GivenReward]) -> JsonObject:
    """Returns the rewards and metrics of an environment as the outcome of a function."""
    values = [each.reward if each.problem is None else each.problem for each in given]
    return {"values": values, "metrics": [pair for each in given for pair in each.metrics.items()]}


def _open_here(args: RewardArgs, name: str) -> InProcess:
    """Returns the function of a reward that this process computes."""
    made = load_implementation("rewards.functions", name, REWARDS[name].implementation)
    return cast(Callable[..., InProcess], made)(**_settings(args, name))


def _settings(args: RewardArgs, name: str) -> dict[str, object]:
    return {each: value for each in REWARDS[name].settings if (value := getattr(args, each)) is not None}
