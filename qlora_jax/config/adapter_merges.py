"""Declares the settings of a merge of adapters."""

import dataclasses
import math
from typing import Literal

from qlora_jax.config.fields import AT_LEAST_ONE, NON_NEGATIVE, NOT_EMPTY, Bound, setting
from qlora_jax.config.parse import ConfigError

SHARE = Bound("more than 0, up to 1", lambda value: 0 < value <= 1)
FINITE = Bound("finite numbers", lambda values: all(map(math.isfinite, values)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterMergeArgs:
    """The adapters to merge into one, and the method."""

    run: list[str] = setting(
        "folders of runs and PEFT adapters of one base. Give --run once for each", bound=NOT_EMPTY, repeated=True
    )
    output: str = setting("a new folder, for the merged adapter in PEFT's format", bound=NOT_EMPTY)
    weights: list[float] | None = setting(
        "a factor for each adapter, in the order of --run: [0.7, 0.3]. null: equal ones, so that the result is a mean: "
        "of all adapters, or for ties and dare_ties of those that agree",
        None,
        FINITE,
    )
    method: Literal["linear", "ties", "dare_linear", "dare_ties"] = setting(
        "linear: the weighted sum of the changes of weights. ties: their largest elements, and of these the ones with "
        "the sign of the sum. dare_linear, dare_ties: random elements instead of the largest",
        "linear",
    )
    density: float | None = setting(
        "ties and dare: share of each change's elements that is kept, such as 0.2", None, SHARE
    )
    rank: int | None = setting(
        "rank of the merged adapter, by singular values; null: the sum of the adapters' ranks, with which linear is "
        "exact",
        None,
        AT_LEAST_ONE,
    )
    last: int | None = setting(
        "merge the newest checkpoints of each run, this many (train.keep); null: the newest one", None, AT_LEAST_ONE
    )
    seed: int = setting("dare: seed of the choice of elements", 0, NON_NEGATIVE)
    model: str | None = setting("the base model, if it moved after training: a path or org/name", None, NOT_EMPTY)


def check_adapter_merge(args: AdapterMergeArgs) -> None:
    """Raises ConfigError if settings contradict each other; the message lists all contradictions."""
    problems, adapters = [], len(args.run) * (args.last or 1)
    if args.weights is not None and len(args.weights) != adapters:
        problems.append(
            f"weights: found {len(args.weights)} for {adapters} adapters, expected one for each. Correct the list"
        )
    if args.method == "linear" and args.density is not None:
        problems.append("density: requires method ties, dare_linear or dare_ties (found linear). Remove it")
    if args.method != "linear" and args.density is None:
        problems.append(f"density: missing, and method={args.method} requires it. Set it, such as 0.2")
    if problems:
        raise ConfigError(problems)
