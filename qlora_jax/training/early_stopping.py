"""Early stopping: the best evaluation so far, and the decision to stop after evaluations without improvement."""

import dataclasses

from qlora_jax.training.metrics.metrics_file import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestEvaluation:
    """The lowest held-out loss of a run.

    Attributes:
      loss: the loss of the objective, in nats per token for sft; None before the first evaluation.
      step: the step at which it was measured.
      since: the number of later evaluations.
    """

    loss: float | None = None
    step: int = 0
    since: int = 0

    def updated(self, step: int, loss: float) -> "BestEvaluation":
        """Returns the best after one more evaluation; an equal loss is not an improvement."""
        if self.loss is None or loss < self.loss:
            return BestEvaluation(loss=loss, step=step)
        return dataclasses.replace(self, since=self.since + 1)

    def should_stop(self, patience: int) -> bool:
        """Returns True after `patience` evaluations in a row without improvement; never if `patience` is 0."""
        return 0 < patience <= self.since

    @classmethod
    def from_checkpoint(cls, state: Record) -> "BestEvaluation":
        """Reads the best evaluation from a checkpoint's JSON state."""
        best = state["best"]
        return cls(loss=best["loss"], step=best["step"], since=best["since"])
