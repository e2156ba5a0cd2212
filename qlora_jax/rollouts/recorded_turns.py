"""Records the turns that programs draw through an endpoint, each with its exact ids, and joins them to texts.

A turn's prompt is what the chat template writes. Where it continues the ids of an earlier turn, the two are one text.
Where it does not, as with a template that drops reasoning, the turn begins another text, and both are branches of the
training row. So each token is trained once, after the ids after which it was drawn.
"""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

from qlora_jax.config.rollouts import RolloutArgs
from qlora_jax.inference.engine.engine import Engine, Usage
from qlora_jax.inference.engine.request import EndReason, Request, Step
from qlora_jax.rollouts.reply import Text
from qlora_jax.rollouts.sampler import draw_seed, sampling_of

NO_ROOM = "context_length_exceeded"  # OpenAI's word, by which programs end a conversation instead of failing


@dataclasses.dataclass
class Turn:
    """A reply of the model to a prompt."""

    prompt: list[int]
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    end: EndReason | None = None


def join_turns(turns: Sequence[Turn]) -> list[Text]:
    """Returns the texts of turns, with their prompts; no order of the turns gives others."""
    texts: list[Text] = []
    for turn in sorted(turns, key=lambda turn: (len(turn.prompt), turn.prompt, turn.ids)):
        earlier = [text for text in texts if turn.prompt[: len(text.ids)] == text.ids]
        longest = max(earlier, key=lambda text: len(text.ids), default=Text([], [], []))
        added = turn.prompt[len(longest.ids) :]
        joined = Text(
            ids=[*longest.ids, *added, *turn.ids],
            logps=[*longest.logps, *([0.0] * len(added)), *turn.logps],
            drawn=[*longest.drawn, *([False] * len(added)), *([True] * len(turn.ids))],
        )
        texts = [text for text in texts if text is not longest]
        texts.append(joined)
    return texts


def shared_depth(turns: Sequence[Turn], texts: Sequence[Text]) -> int:
    """Returns the number of ids of the prompts with which all texts begin."""
    columns = zip(*[text.ids for text in texts], strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda ids: len({*ids}) == 1, columns))
    return min(common, *(len(turn.prompt) for turn in turns))


@dataclasses.dataclass
class Recorded:
    """The turns of a rollout.

    Attributes:
      seed: of its draws.
      turns: those that have ended.
      is_cut: True if a turn found no room.
      problem: why its first prompt cannot be answered.
    """

    seed: int
    turns: list[Turn] = dataclasses.field(default_factory=list)
    is_cut: bool = False
    problem: str | None = None


class _Running(NamedTuple):
    """A turn that is drawn, and the most tokens of it."""

    recorded: Recorded
    turn: Turn
    room: int


class RecordingEngine:
    """An engine whose requests have the number of their rollout as seed; it draws by the run's settings.

    A draw depends on the rollout's seed and the prompt, not on what is drawn beside it.

    Args:
      rollouts: whose turns are recorded.
      longest: most tokens of a prompt.
    """

    def __init__(self, engine: Engine, rollouts: Sequence[Recorded], settings: RolloutArgs, longest: int):
        self._engine, self._rollouts, self._settings, self._longest = engine, rollouts, settings, longest
        self._running: dict[int, _Running] = {}
        self.active = time.monotonic()  # when it last had work

    @property
    def busy(self) -> bool:
        """True while requests wait or run."""
        return self._engine.busy

    def prepare(self, request: Request) -> None:
        """Compiles the grammar of a request."""
        self._engine.prepare(request)

    def usage(self) -> Usage:
        """Returns the engine's state."""
        return self._engine.usage()

    def submit(self, request: Request) -> int:
        """Adds a request, with the settings of the run; returns its number.

        Raises:
          ValueError: the rollout has no room for it, or no rollout has the number.
        """
        if request.sampling.seed >= len(self._rollouts):
            raise ValueError("seed: not that of a rollout. Leave it to the run")
        recorded, turn = self._rollouts[request.sampling.seed], Turn([*request.prompt])
        others = [each for each in self._running.values() if each.recorded is recorded]
        earlier = [*recorded.turns, *(each.turn for each in others)]
        room = self._room(recorded, turn) - sum(each.room for each in others)
        if room < 1:
            recorded.is_cut = True
            raise ValueError(f"messages: {NO_ROOM}: the rollout has no room for another turn")
        digest = hashlib.sha256(repr(turn.prompt).encode()).digest()
        again = sum(each.prompt == turn.prompt for each in earlier)
        seed = draw_seed(recorded.seed, int.from_bytes(digest[:8]), again)
        room = min(room, request.max_new_tokens)
        own = {"keep_stop": True, "likeliest": 0, "score_draw": True, "repeat": 0, "max_new_tokens": room}
        number = self._engine.submit(dataclasses.replace(request, sampling=sampling_of(self._settings, seed), **own))
        self._running[number] = _Running(recorded, turn, room)
        return number

    def _room(self, recorded: Recorded, turn: Turn) -> int:
        if not recorded.turns:
            if len(turn.prompt) > self._longest:
                recorded.problem = (
                    f"found {len(turn.prompt)} tokens in its first prompt, expected at most {self._longest}. Raise "
                    "data.max_length"
                )
                return 0
            return self._settings.max_completion_length
        turns = [*recorded.turns, turn]
        texts = join_turns(turns)
        depth = shared_depth(turns, texts)
        return self._settings.max_completion_length - sum(len(text.ids) - depth for text in texts)

    def release(self) -> None:
        """Lets go of the engine with its cache; objects of the server may still hold this one."""
        del self._engine

    def cancel(self, number: int) -> None:
        """Drops a request; its turn does not count."""
        self._running.pop(number, None)
        self._engine.cancel(number)

    def step(self) -> list[Step]:
        """Runs the engine's next calls; returns the steps that they give."""
        steps = self._engine.step()
        self.active = time.monotonic()
        for step in steps:
            running = self._running[step.request]
            if step.token is not None and step.scored is not None:
                running.turn.ids.append(step.token)
                running.turn.logps.append(step.scored.log_p)
            if step.end is not None:
                running.turn.end = step.end
                running.recorded.turns.append(running.turn)
                del self._running[step.request]
        return [step._replace(scored=None) for step in steps]
