"""Compares what a dtype costs on a run's held-out rows with what the adapter gained there."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qlora_jax.config.exports import MIXTURES
from qlora_jax.measures.metrics import Comparison, RowScores, loss_change

MAX_SHARE = 1 / 10  # a dtype that costs less than this share of the adapter's effect is suggested
LADDER = (*MIXTURES, "q8_0")  # dtypes that are tried for a suggestion, from the smallest


class TrainedScores(NamedTuple):
    """The scores of the held-out rows, by base and adapter and by the base alone."""

    adapted: RowScores
    base: RowScores


class HeldOutCost(NamedTuple):
    """The loss per token of a written file, less that of base and adapter; and the adapter's effect. Nats, paired.

    Attributes:
      perplexities: of the base, of base and adapter, and of the file.
    """

    dtype: str
    cost: Comparison
    effect: Comparison
    perplexities: tuple[float, float, float]
    rows: int

    @classmethod
    def of(cls, dtype: str, trained: TrainedScores, written: RowScores) -> "HeldOutCost":
        """Compares the scores of the same rows."""
        perplexities = trained.base.perplexity, trained.adapted.perplexity, written.perplexity
        cost, effect = loss_change(trained.adapted, written), loss_change(trained.base, trained.adapted)
        return cls(dtype, cost, effect, perplexities, len(written.nll))

    @property
    def is_small(self) -> bool:
        """True if the upper end of the cost's interval is below MAX_SHARE of the adapter's effect."""
        assert self.cost.interval is not None
        return self.cost.interval[1] < MAX_SHARE * abs(self.effect.difference)

    def lines(self) -> list[str]:
        """Returns lines for the user."""
        base, adapted, written = self.perplexities
        return [
            f"held-out perplexity on {self.rows} rows: base {base:.4g}, trained {adapted:.4g}, this file {written:.4g}",
            f"held-out loss per token: {_change(self.cost)} by {self.dtype}, {_change(self.effect)} by the adapter",
        ]


def _change(change: Comparison) -> str:
    assert change.interval is not None
    low, high = change.interval
    return f"{change.difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def suggest_dtype(
    found: HeldOutCost,
    folder: Path,
    trained: TrainedScores,
    quantize: Callable[[Path, str], None],
    score_file: Callable[[Path], RowScores],
) -> str:
    """Returns a line: the dtype is small enough, or the smallest larger one that is, measured.

    Args:
      found: the cost of a dtype in MIXTURES.
      folder: holds one larger file at a time.
      quantize: writes the new file at a path in a dtype.
      score_file: scores the held-out rows with a GGUF file.
    """
    if found.is_small:
        return f"{found.dtype} costs less than a tenth of the adapter's effect"
    for dtype in LADDER[LADDER.index(found.dtype) + 1 :]:
        trial = folder / f"trial-{dtype}.gguf"
        quantize(trial, dtype)
        cost, size = HeldOutCost.of(dtype, trained, score_file(trial)), trial.stat().st_size
        trial.unlink()
        if cost.is_small:
            return (
                f"{found.dtype} costs a tenth of the adapter's effect or more; the smallest that costs less: "
                f"--dtype {dtype} ({_change(cost.cost)}, {size / 1e6:,.0f} MB)"
            )
    return f"{found.dtype} and larger dtypes cost a tenth of the adapter's effect or more: use --dtype float16"
