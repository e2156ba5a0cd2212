"""Plays environments of the package `verifiers`: they reach the model that is trained through an endpoint."""

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from qlora_jax.config.registry import load_implementation
from qlora_jax.config.rollouts import RolloutArgs
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.engine.engine import Engine
from qlora_jax.rewards.functions import GivenReward, RewardError
from qlora_jax.rollouts.prompt_rows import PromptRows
from qlora_jax.rollouts.recorded_turns import Recorded, RecordingEngine, join_turns, shared_depth
from qlora_jax.rollouts.reply import Reply, Text
from qlora_jax.rollouts.sampler import draw_seed
from qlora_jax.rollouts.started_prompts import Asked
from qlora_jax.untrusted_json import JsonObject
from qlora_jax.verifiers.process import (
    ADDRESS_COLUMN,
    START_SECONDS,
    TASK_COLUMN,
    Address,
    Stopped,
    verifiers_process,
)


class Endpoint(NamedTuple):
    """A running endpoint; `failure` returns the error that ended its engine, if any."""

    url: str
    key: str
    model: str
    failure: Callable[[], BaseException | None]


Serve = Callable[[RecordingEngine, Tokenizer, frozenset[int], int], contextlib.AbstractContextManager[Endpoint]]


def open_endpoint() -> Serve:
    """Returns the function that serves an engine; raises ValueError without the packages of `serve`."""
    place = "qlora_jax.server.rollout_endpoint:serve_rollouts"  # named, because a server stands above training
    return cast(Serve, load_implementation("--environment", "verifiers", place))


class Phase(NamedTuple):
    """The settings that all rollouts of a phase share.

    Fields:
      longest: most tokens of a prompt.
      longest_row: most ids of a training row.
      positions: of the model.
    """

    tokenizer: Tokenizer
    settings: RolloutArgs
    stop_ids: frozenset[int]
    longest: int
    longest_row: int
    positions: int


def play_episodes(
    engine: Engine,
    phase: Phase,
    asked: Sequence[Asked],
    prompts: PromptRows,
    *,
    seeds: Sequence[int],
    count: int,
    where: Callable[[int], str],
    go_on: Callable[[int], None],
) -> list[tuple[Asked, list[Reply]]]:
    """Returns each prompt as its replies continue it, with the replies, whose outcomes have the rewards.

    Args:
      seeds: of the draws of each prompt.
      count: replies to each prompt.
      where: returns file and line of a row.
      go_on: called often, with the number of complete replies; it raises to end the phase.

    Raises:
      RewardError: the texts of the replies to a prompt are too long for a training row.
    """
    asked = [each._replace(prompt=prompts.prompt(each.number)) for each in asked]
    rollouts = [Recorded(draw_seed(seed, repeat)) for seed in seeds for repeat in range(count)]
    tasks = [prompts.others(each.number) for each in asked for _ in range(count)]
    recording = RecordingEngine(engine, rollouts, phase.settings, phase.longest)
    with open_endpoint()(recording, phase.tokenizer, phase.stop_ids, phase.positions) as endpoint:
        outcomes = _play(recording, endpoint, tasks, phase.settings, go_on)
    recording.release()
    groups = zip(asked, itertools.batched(rollouts, count), itertools.batched(outcomes, count), strict=True)
    return [_group(each, recorded, own, phase, where(each.number)) for each, recorded, own in groups]


def _play(
    engine: RecordingEngine,
    endpoint: Endpoint,
    tasks: Sequence[JsonObject],
    settings: RolloutArgs,
    go_on: Callable[[int], None],
) -> list[JsonObject]:
    """Returns the outcome of each rollout as the process sends it."""
    found: dict[int, JsonObject] = {}
    began = latest = time.monotonic()

    def tick() -> None:
        go_on(len(found))
        if (failure := endpoint.failure()) is not None:
            raise failure
        if engine.busy:
            return
        is_first = engine.active < began and not found
        seconds = max(START_SECONDS * is_first, settings.tool_timeout)
        if time.monotonic() - max(latest, engine.active) > seconds:
            raise Stopped(f"took more than {seconds:g} s (rollouts.tool_timeout is {settings.tool_timeout:g})")

    most = settings.max_tool_calling_iterations
    command = {"kind": "play", "url": endpoint.url, "key": endpoint.key, "model": endpoint.model}
    command |= {"turns": None if most is None else most + 1, "rollouts": [_task(each) for each in tasks]}
    late = {"problem": "the environment gave no result"}
    results = verifiers_process().results(command, tick)
    try:
        for result in results:
            if "rollout" not in result:
                late = result if result.get("problem") else late
                break
            found[result["rollout"]] = result
            latest = time.monotonic()
            go_on(len(found))
    except Stopped as error:
        late = {"problem": f"the environment {error}"}
    finally:
        results.close()
    return [found.get(number, late) for number in range(len(tasks))]


def _task(columns: JsonObject) -> JsonObject:
    address = Address.parse(str(columns[ADDRESS_COLUMN]))
    return {"task": columns[TASK_COLUMN], "size": address.size, "settings": address.settings}


def _group(
    asked: Asked, recorded: Sequence[Recorded], outcomes: Sequence[JsonObject], phase: Phase, place: str
) -> tuple[Asked, list[Reply]]:
    """Returns a prompt as all replies continue it, with the replies."""
    texts = [join_turns(each.turns) for each in recorded]
    turns = [turn for each in recorded for turn in each.turns]
    depth = shared_depth(turns, [text for own in texts for text in own]) if turns else 0
    prompt = turns[0].prompt[:depth] if turns else asked.ids
    row = depth + sum(len(text.ids) - depth for own in texts for text in own)
    if turns and (not depth or row - 1 > phase.longest_row):
        raise RewardError(
            f"{place}: the replies to a prompt continue it after {depth} tokens (found {row} tokens in a training row, "
            f"expected at most {phase.longest_row}). Begin all rollouts of a task with the same messages, or raise "
            "rollouts.max_completion_length"
        )
    together = zip(recorded, texts, outcomes, strict=True)
    return asked._replace(ids=prompt), [_reply(*each, depth, phase) for each in together]


def _reply(recorded: Recorded, texts: Sequence[Text], outcome: JsonObject, depth: int, phase: Phase) -> Reply:
    problem = recorded.problem or outcome["problem"] or (None if texts else "found no turn of the model")
    last = max(recorded.turns, key=lambda turn: len(turn.prompt), default=None)
    is_cut = recorded.is_cut or outcome.get("is_cut") or last is None or last.end != "stop"
    # A rollout without turns still has a branch, of one token that does not train.
    first, *others = [text.after(depth) for text in texts] or [Text([min(phase.stop_ids)], [0.0], [False])]
    said = [token for text in (first, *others)[-1:] for token in text.ids]
    return Reply(
        *first,
        text=phase.tokenizer.decode(said[:-1] if said[-1] in phase.stop_ids else said),
        end="length" if is_cut else "stop",
        messages=cast(list[Message], outcome.get("messages", [])),
        others=tuple(others),
        given=GivenReward(outcome.get("reward"), problem, outcome.get("metrics", {})),
    )
