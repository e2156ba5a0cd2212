"""The tools and environments of a run, called in processes with limits; tool_calls.py runs there."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qlora_jax.rewards.tool_calls import ENVIRONMENT, TOOL, error_text
from qlora_jax.rewards.worker_process import Arguments, Call, Failed, Limit, WorkerProcess, run_calls
from qlora_jax.untrusted_json import JsonObject


class ToolCall(NamedTuple):
    """A call that a model wrote."""

    name: str
    arguments: Mapping[str, object]


class ToolAnswer(NamedTuple):
    """The text that the model reads; `failed` if it is an error."""

    text: str
    failed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
    """Functions that a model may call.

    Attributes:
      schemas: of the functions, as chat templates write them.
      workers: processes with all functions; one alone with an environment, whose objects stay there.
      seconds: of one call.
      environment: "FILE.py:NAME" of what makes an environment for each reply; None: there is none.
    """

    schemas: Sequence[JsonObject]
    workers: Sequence[WorkerProcess]
    seconds: float
    environment: str | None

    def reset(self, columns: Sequence[Arguments], seeds: Sequence[int]) -> list[str | Failed | None]:
        """Makes the environment of each reply; returns the text that it adds to the prompt, or why it failed."""
        (worker,) = self.workers
        worker.forget()
        calls = [
            (reply, self._call(ENVIRONMENT, {"reply": reply, "columns": own, "seed": str(seed)}))
            for reply, (own, seed) in enumerate(zip(columns, seeds, strict=True))
        ]
        found = run_calls({worker: calls})
        return [each if isinstance(each, Failed) else each["text"] for _, each in sorted(found.items())]

    def answer(self, calls: Mapping[int, Sequence[ToolCall]], seeds: Mapping[int, int]) -> dict[int, list[ToolAnswer]]:
        """Answers the calls of replies, those of a reply in their order."""
        queues: dict[WorkerProcess, list[tuple[tuple[int, int], Call]]] = {worker: [] for worker in self.workers}
        for (reply, own), worker in zip(calls.items(), itertools.cycle(self.workers), strict=False):
            for place, call in enumerate(own):
                content = {"reply": reply, "seed": f"{seeds[reply]} {place}", **call._asdict()}
                queues[worker].append(((reply, place), self._call(TOOL, content)))
        found = run_calls(queues)
        return {reply: [_answer(found[reply, place]) for place in range(len(own))] for reply, own in calls.items()}

    def _call(self, kind: str, arguments: Arguments) -> Call:
        return Call(kind, arguments, Limit(self.seconds, f"rollouts.tool_timeout is {self.seconds:g}"))


def _answer(found: JsonObject | Failed) -> ToolAnswer:
    return ToolAnswer(error_text(found.text), True) if isinstance(found, Failed) else ToolAnswer(**found)
