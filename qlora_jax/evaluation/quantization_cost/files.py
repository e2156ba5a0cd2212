"""Prints the costs of layers in 4 bits as a table, and writes them as JSON and as settings of a training run."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import rich.box
import yaml
from rich.console import Console
from rich.table import Table

from qlora_jax.atomic_files import write_text
from qlora_jax.config.sizes import format_bytes
from qlora_jax.evaluation.quantization_cost.choose import Choice
from qlora_jax.evaluation.quantization_cost.measure import LayerCost
from qlora_jax.measures.metrics import RowScores, loss_change

PROGRESS_LINES = 20  # per measurement
COSTS_FILE, SETTINGS_FILE = "layer_costs.json", "keep_16bit.yaml"
SHOWN = 15  # layers of the table; the file has all
EXPERTS_TOGETHER = "a projection's experts of one layer count as one layer: all of them are in 4 bits, or in 16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The costs of layers in 4 bits, and the losses of whole models.

    Attributes:
      title: the file of rows, and how many are scored.
      dense: scores with everything in 16 bits.
      quantized: scores with all linear layers in 4 bits.
      base_bytes: bytes of the base with all linear layers in 4 bits.
      choice: the layers to keep under a budget; None without one.
      kept: scores with these in 16 bits.
      names: value of `model.keep_16bit` for them.
    """

    title: str
    costs: Sequence[LayerCost]
    dense: RowScores
    quantized: RowScores
    base_bytes: int
    choice: Choice | None = None
    kept: RowScores | None = None
    names: Sequence[str] = ()

    @property
    def losses(self) -> dict[str, RowScores]:
        """The scores of whole models by name."""
        kept = {} if self.kept is None else {"chosen": self.kept}
        return {"16 bits": self.dense, "4 bits": self.quantized, **kept}

    def to_dict(self) -> dict[str, object]:
        """Converts all numbers to plain dicts, lists and texts."""
        layers = [
            {
                "rank": rank,
                "layer": cost.name,
                "increase": cost.increase,
                "interval": cost.interval,
                "added_bytes": cost.added_bytes,
            }
            for rank, cost in enumerate(self.costs, start=1)
        ]
        losses = {name: scores.mean_nll for name, scores in self.losses.items()}
        change = None if self.kept is None else loss_change(self.quantized, self.kept)
        chosen = self.choice and {
            "keep_16bit": list(self.names),
            "predicted": -self.choice.saved,
            "gap": self.choice.gap,
            "added_bytes": self.choice.added_bytes,
            "change": change and change.difference,
            "interval": change and change.interval,
        }
        tokens = int(self.dense.tokens.sum())
        facts = {"rows": self.title, "tokens": tokens, "base_bytes": self.base_bytes, "loss per token": losses}
        return {**facts, "layers": layers, "chosen": chosen}


def write_files(folder: Path, measured: Measured, model: dict[str, object]) -> None:
    """Writes the costs, and with a choice the settings that `train --config` reads.

    Args:
      model: settings of section `model`.
    """
    write_text(folder / COSTS_FILE, json.dumps(measured.to_dict(), indent=1) + "\n")
    if measured.choice is not None:
        settings = {"model": {**model, "keep_16bit": list(measured.names)}}
        write_text(folder / SETTINGS_FILE, yaml.safe_dump(settings, sort_keys=False))


def print_costs(measured: Measured, console: Console) -> None:
    """Prints the costliest layers, the losses of whole models, and what the chosen layers change."""
    console.print(measured.title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table("", box=rich.box.SIMPLE_HEAD)
    table.add_column("in 4 bits", no_wrap=True)
    for column in ("loss", "95 % interval", "in 16 bits"):
        table.add_column(column, justify="right", no_wrap=True)
    for rank, cost in enumerate(measured.costs[:SHOWN], start=1):
        low, high = cost.interval
        interval = f"[{low:+.4f}, {high:+.4f}]"
        table.add_row(
            str(rank),
            cost.name.removeprefix("model."),
            f"{cost.increase:+.4f}",
            interval,
            f"+{format_bytes(cost.added_bytes)}",
        )
    console.print(table)
    for line in summary(measured):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def summary(measured: Measured) -> list[str]:
    """Returns lines with the losses of whole models, the sum of the layers' costs, and the choice."""
    losses = ", ".join(f"{name} {scores.mean_nll:.5f}" for name, scores in measured.losses.items())
    total = sum(cost.increase for cost in measured.costs)
    together = measured.quantized.mean_nll - measured.dense.mean_nll
    lines = [
        f"loss per token: {losses}",
        f"all {len(measured.costs)} layers in 4 bits: {together:+.5f}; the sum of their costs is {total:+.5f}",
        *([EXPERTS_TOGETHER] if any(".experts." in cost.name for cost in measured.costs) else []),
    ]
    if measured.choice is None or measured.kept is None:
        return lines
    choice, change = measured.choice, loss_change(measured.quantized, measured.kept)
    assert change.interval is not None
    low, high = change.interval
    best = "the best choice" if choice.gap == 0 else f"at most {choice.gap:.5f} from the best choice"
    return [
        *lines,
        f"in 16 bits: {len(choice.costs)} layers, {format_bytes(choice.added_bytes)} more than in 4 bits; by the sum "
        f"of costs {-choice.saved:+.5f}, {best}",
        f"measured against all in 4 bits: {change.difference:+.5f} [{low:+.5f}, {high:+.5f}]",
    ]


def check_choice(measured: Measured) -> None:
    """Raises ValueError if the chosen layers raise the loss of the base, beyond the interval over rows."""
    if measured.kept is None:
        return
    change = loss_change(measured.quantized, measured.kept)
    assert change.interval is not None
    if change.interval[0] > 0:
        low, high = change.interval
        raise ValueError(
            "measure: with the chosen layers in 16 bits the loss is higher (found "
            f"{change.difference:+.5f} [{low:+.5f}, {high:+.5f}], expected at most 0), so costs of single layers do "
            "not add up on these rows. Measure on more rows"
        )


def print_progress(console: Console, done: int, total: int, name: str) -> None:
    """Prints a line for every twentieth part of the evaluations."""
    if PROGRESS_LINES * done // total > PROGRESS_LINES * (done - 1) // total:
        text = f"measured {done} of {total} layers, the last {name}"
        console.print(text, style="dim", markup=False, highlight=False)
