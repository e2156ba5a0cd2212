"""Which evaluation was the best so far, and whether further ones are worth waiting for."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestEvaluation:
    """The least held-out loss of a run.

    Attributes:
      loss: in nats a token; None before the first evaluation.
      step: after which it was found.
      since: evaluations after that one.
    """

    loss: float | None = None
    step: int = 0
    since: int = 0

    def after(self, step: int, loss: float) -> "BestEvaluation":
        """With one more evaluation; an equal loss is no better one."""
        if self.loss is None or loss < self.loss:
            return BestEvaluation(loss=loss, step=step)
        return dataclasses.replace(self, since=self.since + 1)

    def should_stop(self, patience: int) -> bool:
        """Whether `patience` evaluations in a row found nothing better; 0: never."""
        return 0 < patience <= self.since

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "BestEvaluation":
        """What a checkpoint's state says of it."""
        return cls(**state["best"])
