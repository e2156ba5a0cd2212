"""Dispatch: chooses the implementation of a product from each one's capabilities and the device's preference.

The choice is a function of (device, call), so a report for an absent card uses the same code. Dimension key: M rows,
N out, K in.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.typing import DTypeLike

from pallas_kernels.devices import Device
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.frozen_product import Direction
from pallas_kernels.frozen_product import Layer as Layer

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The properties of a product that are known during tracing and that an implementation may not support.

    Attributes:
      rows: M.
      dtype: name of the rows' dtype, such as `bfloat16`.
      shape: (N, K) of the weight.
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
    def of(cls, direction: Direction, rows: int, dtype: DTypeLike, weights: QTensor) -> "Call":
        """Describes a product of `rows` rows with a weight, or with one layer of a stack."""
        of_weight = {name: getattr(weights, name) for name in ("shape", "layout", "quant_type", "block_size")}
        return cls(direction=direction, rows=rows, dtype=str(dtype), double_quant=weights.double_quant, **of_weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """The calls that an implementation supports; None: no restriction.

    Attributes:
      devices: supported names, as in `Device.names`.
      layouts, dtypes, quant_types, block_sizes, directions: supported values of the call's attribute.
      rows: (minimum, maximum) M.
      most_rows_on: the maximum M on devices where it is another, by name.
      row_multiple: factor that must divide M.
      multiples: factors that must divide N and K.
      least: minimum N and K.
    """

    devices: tuple[str, ...] | None = None
    layouts: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    quant_types: tuple[str, ...] | None = None
    block_sizes: tuple[int, ...] | None = None
    directions: tuple[Direction, ...] | None = None
    rows: tuple[int, int] | None = None
    most_rows_on: Mapping[str, int] = dataclasses.field(default_factory=dict)
    row_multiple: int = 1
    multiples: tuple[int, int] = (1, 1)
    least: tuple[int, int] = (1, 1)


class Implementation(NamedTuple):
    """One way to run an op, and the calls that it supports.

    Attributes:
      forward, backward: functions [M, K] x weight -> [M, N], and [M, N] x weight -> [M, K]. They take one weight (layer
        None) or a whole stack, and the layer: (rows, weights, layer); grouped ones (rows, weights, groups, layer).
      fused: True if weights are dequantized inside the product; otherwise a whole weight is written and read again.
      missing: returns why this installation cannot use it, or None if it can.
    """

    forward: Callable[..., jax.Array]
    backward: Callable[..., jax.Array]
    capabilities: Capabilities
    fused: bool = False
    missing: Callable[[], str | None] = lambda: None


class Choice(NamedTuple):
    """The implementation of a call (None: none supports it), and why each one before it in the order does not."""

    name: str | None
    refusals: dict[str, str]


def refusal(capabilities: Capabilities, device: Device, call: Call) -> str | None:
    """Returns all reasons why the capabilities do not cover a call, or None if they do."""
    return "; ".join(_problems(capabilities, device, call)) or None


def _problems(capabilities: Capabilities, device: Device, call: Call) -> Iterator[str]:
    if capabilities.devices is not None and not set(capabilities.devices) & set(device.names):
        yield f"runs on {', '.join(capabilities.devices)}, not on {device}"
    for one, many in (
        ("layout", capabilities.layouts),
        ("dtype", capabilities.dtypes),
        ("quant_type", capabilities.quant_types),
        ("block_size", capabilities.block_sizes),
        ("direction", capabilities.directions),
    ):
        given = getattr(call, one)
        if many is not None and given not in many:
            yield f"takes {one} {' or '.join(map(str, many))}, not {given}"
    if capabilities.rows is not None:
        least, most = capabilities.rows
        most = min(
            [most, *(capabilities.most_rows_on[name] for name in device.names if name in capabilities.most_rows_on)]
        )
        if not least <= call.rows <= most:
            yield f"takes {least} to {most} rows, not {call.rows}"
    sizes = zip("NK", call.shape, capabilities.multiples, capabilities.least, strict=True)
    for axis, size, multiple, least in (("M", call.rows, capabilities.row_multiple, 1), *sizes):
        if size % multiple:
            yield f"takes {axis} that is a multiple of {multiple}, not {size}"
        if size < least:
            yield f"takes {axis} of at least {least}, not {size}"


# Name of a device (Device.names: a compute capability before its platform) -> implementations, the fastest first.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "sm_75": ("skinny", "ampere", "reference"),  # neither runs there: the choice says why
    "sm_80": ("skinny", "ampere", "reference"),
    "sm_86": ("skinny", "ampere", "reference"),
    "sm_89": ("skinny", "ampere", "reference"),
    "sm_90": ("skinny", "hopper", "reference"),
    "sm_100": ("skinny", "ampere", "reference"),
    "sm_120": ("skinny", "ampere", "reference"),
    "sm_121": ("skinny", "ampere", "reference"),
    "any": ("reference",),
}


def preference(device: Device, table: Mapping[str, tuple[str, ...]] = PREFERENCE) -> tuple[str, ...]:
    """Returns a device's implementations, the most preferred first; `table` is that of another op."""
    return next(table[name] for name in (*device.names, "any") if name in table)


def choose(device: Device, call: Call, implementations: Mapping[str, Implementation], order: Sequence[str]) -> Choice:
    """Returns the first implementation of `order` that supports the call on the device."""
    refusals: dict[str, str] = {}
    for name in order:
        reason = refusal(implementations[name].capabilities, device, call) or implementations[name].missing()
        if reason is None:
            return Choice(name, refusals)
        refusals[name] = reason
    return Choice(None, refusals)
