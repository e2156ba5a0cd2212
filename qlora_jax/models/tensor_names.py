"""Names of tensors: of one layer, of one expert, and of many on one line of an error."""

import re
from collections.abc import Collection, Iterable

MAX_LINES, MAX_WIDTH = 100, 300  # lines of an error, and characters per line
LAYER, EXPERT = re.compile(r"\.layers\.(\d+)\."), re.compile(r"\.experts\.(\d+)\.")


def layer_name(stacked: str, layer: int) -> str:
    """The name of one layer's tensor: ("model.layers.mlp.up_proj.weight", 3) -> "model.layers.3.mlp.up_proj.weight"."""
    return stacked.replace(".layers.", f".layers.{layer}.", 1)


def expert_name(stacked: str, expert: int) -> str:
    """The name of one expert's tensor: ("mlp.experts.up_proj.weight", 3) -> "mlp.experts.3.up_proj.weight"."""
    return stacked.replace(".experts.", f".experts.{expert}.", 1)


def lines_by_layer(problem: str, names: Iterable[str]) -> list[str]:
    """Describes tensors with a problem, one line for the same tensor in several layers and experts."""
    groups: dict[str, list[tuple[list[str], list[str]]]] = {}
    for name in names:
        group = EXPERT.sub(".experts.*.", LAYER.sub(".layers.*.", name, count=1), count=1)
        groups.setdefault(group, []).append((LAYER.findall(name)[:1], EXPERT.findall(name)[:1]))
    lines = []
    for group, places in sorted(groups.items()):
        layers, experts = (
            {int(number) for numbers in each for number in numbers} for each in zip(*places, strict=True)
        )
        line = f"{problem}: {group}" + (f" in layers {_numbers(layers)}" if layers else "")
        lines.append(line + (f", experts {_numbers(experts)}" if experts else ""))
    return lines


def _numbers(numbers: Collection[int]) -> str:
    """Writes 2, 4, 5; or 2 to 20 for many consecutive numbers."""
    found = sorted(numbers)
    first, last = found[0], found[-1]
    if len(found) > 4 and last - first == len(found) - 1:
        return f"{first} to {last}"
    return ", ".join(map(str, found))
