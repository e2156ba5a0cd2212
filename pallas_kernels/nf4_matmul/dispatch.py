"""Which implementation does a product: each one's abilities, each device's order of preference, and the choice.

All of it is a function of (device, call), so that a report says what would run on a card that is not there, by the very
code that chooses. Dimension key: M rows, N out, K in.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
from jaxtyping import Array, Int

from pallas_kernels.devices import Device
from pallas_kernels.formats.qtensor import QTensor

Layer = Int[Array, ""] | int | None

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What an implementation may refuse by: everything of a product that is known while it is traced.

    Attributes:
      rows: M.
      dtype: of the rows, as `bfloat16`.
      shape: (N, K).
    """

    direction: Direction
    rows: int
    dtype: str
    shape: tuple[int, ...]
    layout: str
    quant_type: str
    block_size: int
    double_quant: bool

    @classmethod
    def of(cls, direction: Direction, rows: int, dtype: Any, weights: QTensor) -> "Call":
        """The call of `rows` rows on a weight, or on one layer of a stack."""
        held = {name: getattr(weights, name) for name in ("shape", "layout", "quant_type", "block_size")}
        return cls(direction=direction, rows=rows, dtype=str(dtype), double_quant=weights.double_quant, **held)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Abilities:
    """What an implementation can do; None: whatever there is.

    Attributes:
      devices: names of `Device.names`.
      layouts, dtypes, quant_types, block_sizes, directions: values of the call's attribute of that name.
      rows: (least, most) M.
      multiples: (of N, of K) that a weight's shape must be.
    """

    devices: tuple[str, ...] | None = None
    layouts: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    quant_types: tuple[str, ...] | None = None
    block_sizes: tuple[int, ...] | None = None
    directions: tuple[Direction, ...] | None = None
    rows: tuple[int, int] | None = None
    multiples: tuple[int, int] = (1, 1)


class Product(Protocol):
    """[M, K] x weight -> [M, N] (forward), or [M, N] x weight -> [M, K] (backward).

    One weight (`layer` None), or a whole stack and the index of the layer that is meant.
    """

    def __call__(self, rows: jax.Array, weights: QTensor, layer: Layer, /) -> jax.Array: ...


class Implementation(NamedTuple):
    """One way to run the op, and what it can do.

    Fields:
      fused: a weight is dequantized inside the product; otherwise a whole one is written to memory and read again.
      missing: why it cannot be used in this installation; None: it can.
    """

    forward: Product
    backward: Product
    abilities: Abilities
    fused: bool = False
    missing: Callable[[], str | None] = lambda: None


class Choice(NamedTuple):
    """The implementation that does a call (None: none can), and why each one before it in the order does not."""

    name: str | None
    refusals: dict[str, str]


def refusal(abilities: Abilities, device: Device, call: Call) -> str | None:
    """Everything of a call that is beyond the abilities: what was given and what is possible. None: it can be done."""
    return "; ".join(_problems(abilities, device, call)) or None


def _problems(abilities: Abilities, device: Device, call: Call) -> Iterator[str]:
    if abilities.devices is not None and not set(abilities.devices) & set(device.names):
        yield f"runs on {', '.join(abilities.devices)}, not on {device}"
    for one, many in (
        ("layout", abilities.layouts),
        ("dtype", abilities.dtypes),
        ("quant_type", abilities.quant_types),
        ("block_size", abilities.block_sizes),
        ("direction", abilities.directions),
    ):
        given = getattr(call, one)
        if many is not None and given not in many:
            yield f"takes {one} {' or '.join(map(str, many))}, not {given}"
    if abilities.rows is not None and not abilities.rows[0] <= call.rows <= abilities.rows[1]:
        yield f"takes {abilities.rows[0]} to {abilities.rows[1]} rows, not {call.rows}"
    for axis, size, multiple in zip("NK", call.shape, abilities.multiples, strict=True):
        if size % multiple:
            yield f"takes {axis} that is a multiple of {multiple}, not {size}"


def choose(device: Device, call: Call, implementations: Mapping[str, Implementation], order: Sequence[str]) -> Choice:
    """The first implementation of `order` that can do the call on the device."""
    refusals: dict[str, str] = {}
    for name in order:
        reason = refusal(implementations[name].abilities, device, call) or implementations[name].missing()
        if reason is None:
            return Choice(name, refusals)
        refusals[name] = reason
    return Choice(None, refusals)
