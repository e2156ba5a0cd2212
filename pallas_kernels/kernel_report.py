"""`python -m pallas_kernels.kernel_report`: the kernel that would run each product on each card, and its cost.

No card has to be here: what is shown is what the op itself would choose. Dimension key: M rows, N out, K in.
"""

import argparse
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from pallas_kernels import aot
from pallas_kernels.devices import Device
from pallas_kernels.formats.layouts import LAYOUTS
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.gpu_specs import CARDS, Card, find_card
from pallas_kernels.nf4_matmul.api import IMPLEMENTATIONS, chosen, nf4_matmul, preference
from pallas_kernels.nf4_matmul.costs import dequantized_bytes, held, roof
from pallas_kernels.nf4_matmul.dispatch import DIRECTIONS, Call, Direction
from pallas_kernels.nf4_matmul.mosaic.capabilities import MOST_ROWS
from pallas_kernels.nf4_matmul.preferred_layout import chosen_layout
from pallas_kernels.nf4_matmul.shapes import SHAPES, Shape

DESCRIPTION = "What would run each product on each card, why, and what it costs by arithmetic."
CPU = "cpu"
ROWS = (1, 16, 512, 2048)
BLOCK, NESTED = 64, 256
MIB = 2**20
NOTE = (
    "Sizes, FLOP a byte and roofs are arithmetic on shapes and data sheets; nothing here was measured. Kernels are "
    "taken up to M = " + ", ".join(f"{most.rows} ({name}, by {most.by})" for name, most in MOST_ROWS.items())
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One product on one device: what would run it, and what it costs.

    Attributes:
      runs: implementation by direction; None where none can.
      refused: why not what the device would rather have: layouts and implementations, by name.
      codes, constants, dequantized: bytes of the weight as held, and of a whole one in bfloat16.
      intensity: FLOP a byte of memory traffic.
      bound, roof_seconds: which roof is the lower one, and the time under it; None where the card's are not known.
      compiled: by direction, what the compiler made of it, where that was asked for.
    """

    device: str
    shape: str
    n: int
    k: int
    m: int
    layout: str
    runs: dict[str, str | None]
    refused: dict[str, str]
    codes: int
    constants: int
    dequantized: int
    intensity: float
    bound: str | None
    roof_seconds: float | None
    compiled: dict[str, dict[str, int]]


def device_of_card(name: str) -> tuple[Device, Card | None]:
    """The device that a card is, and its numbers; `cpu` is this machine's, whose roofs nobody knows.

    Raises:
      ValueError: an unknown card.
    """
    if name == CPU:
        return Device(platform="cpu", kind="cpu"), None
    card = find_card(name)
    return Device(platform="gpu", kind=card.description, compute_capability=card.compute_capability), card


def abstract_weight(shape: tuple[int, int], layout: str) -> QTensor:
    """An NF4 weight with double quantization, its leaves shapes alone."""
    blocks = LAYOUTS[layout].constants_shape(shape, BLOCK)
    constants = shape[0] * shape[1] // BLOCK
    return QTensor(
        codes=jax.ShapeDtypeStruct(LAYOUTS[layout].codes_shape(shape), jnp.uint8),
        absmax_codes=jax.ShapeDtypeStruct(blocks, jnp.uint8),
        nested_absmax=jax.ShapeDtypeStruct((-(-constants // NESTED),), jnp.float32),
        nested_offset=jax.ShapeDtypeStruct((), jnp.float32),
        quant_type="nf4",
        block_size=BLOCK,
        nested_block_size=NESTED,
        shape=shape,
        dtype="bfloat16",
        layout=layout,
    )


def line(name: str, shape: Shape, m: int, *, compiled: bool = False) -> Line:
    """What one product of M rows would be on a card, compiled for it or not."""
    device, card = device_of_card(name)
    layout, refused = chosen_layout(device.platform, shape.nk, BLOCK)
    weight = abstract_weight(shape.nk, layout)
    choices = {way: chosen(device, Call.of(way, m, "bfloat16", weight)) for way in DIRECTIONS}
    for way, choice in choices.items():
        refused |= {f"{runs} {way}": reason for runs, reason in choice.refusals.items()}
    runs = choices["forward"].name
    fused = runs is not None and IMPLEMENTATIONS[runs].fused
    # Roofs of 1 FLOP and 1 byte a second leave the intensity as it is.
    peak, bandwidth = (card.bf16_flops, card.bandwidth) if card else (1.0, 1.0)
    under = roof(m, shape.nk, layout, fused=fused, peak=peak, bandwidth=bandwidth)
    kept = held(shape.nk, layout, block_size=BLOCK, nested_block_size=NESTED)
    return Line(
        device=name,
        shape=shape.name,
        n=shape.n,
        k=shape.k,
        m=m,
        layout=layout,
        runs={way: choice.name for way, choice in choices.items()},
        refused=refused,
        codes=kept.codes,
        constants=kept.constants,
        dequantized=0 if fused else dequantized_bytes(shape.nk),
        intensity=under.intensity,
        bound=under.bound if card else None,
        roof_seconds=under.seconds if card else None,
        compiled={way: compile_product(name, weight, m, way) for way in DIRECTIONS} if compiled and card else {},
    )


def compile_product(card: str, weight: QTensor, m: int, direction: Direction) -> dict[str, int]:
    """Registers, spills, tensor-core instructions and temporaries of one product compiled for a card."""

    def forward(x, weight):
        return nf4_matmul(x, weight)

    def backward(dy, weight):
        x = jnp.zeros((m, weight.shape[1]), dy.dtype)
        return jax.vjp(lambda x: nf4_matmul(x, weight), x)[1](dy)[0]

    function, width = (forward, weight.shape[1]) if direction == "forward" else (backward, weight.shape[0])
    compiled = aot.compile_for(card, function, jax.ShapeDtypeStruct((m, width), jnp.bfloat16), weight)
    return {
        "registers": max((kernel.registers for kernel in compiled.kernels), default=0),
        "spilling kernels": len(compiled.spilled),
        "tensor-core instructions": compiled.tensor_core_instructions,
        "temporary bytes": compiled.memory.device.temporaries,
    }


# Output


def print_table(name: str, lines: Sequence[Line], console: Console) -> None:
    """One device's table: a row for each shape, a column for each M."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for title in ("weight", "N x K", "layout"):
        table.add_column(title, no_wrap=True)
    rows = sorted({line.m for line in lines})
    for title in ("codes\nMiB", "const\nMiB", "whole\nMiB", *(f"M={m}\nF/B" for m in rows)):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("runs")
    for same in _by_shape(lines):
        first = same[0]
        sizes = (f"{size / MIB:.2f}" for size in (first.codes, first.constants, first.dequantized))
        names = (first.shape, f"{first.n}x{first.k}", first.layout)
        table.add_row(*names, *sizes, *map(_intensity, sorted(same, key=lambda line: line.m)), _runs(same))
    for text in _heading(name):
        console.print(text, highlight=False, markup=False)
    console.print(table)
    reasons = dict.fromkeys(f"  not {what}: {why}" for line in lines for what, why in line.refused.items())
    for text in [*reasons, *_compiled_texts(lines)]:
        console.print(text, highlight=False, markup=False)


def _heading(name: str) -> Iterator[str]:
    """What the device is, its roofs, and what it would rather run."""
    device, card = device_of_card(name)
    yield f"{name}: {device}"
    if card is not None:
        peak, bandwidth = card.bf16_flops / 1e12, card.bandwidth / 1e9
        ridge = card.bf16_flops / card.bandwidth
        yield f"  {peak:,.0f} TFLOP/s in bf16, {bandwidth:,.0f} GB/s, ridge {ridge:,.0f} FLOP/byte"
    order = preference(device)
    yield f"  prefers: {', '.join(order)}"
    if not any(IMPLEMENTATIONS[runs].fused for runs in order):
        yield "  no fused kernel for it: a whole weight is dequantized before each product"


def _by_shape(lines: Sequence[Line]) -> list[list[Line]]:
    names = dict.fromkeys(line.shape for line in lines)
    return [[line for line in lines if line.shape == name] for name in names]


def _intensity(line: Line) -> str:
    """FLOP a byte, and by its first letter the roof that it stands under."""
    digits = 1 if line.intensity < 10 else 0
    return f"{line.intensity:.{digits}f}" + (f" {line.bound[0]}" if line.bound else "")


def _runs(lines: Sequence[Line]) -> str:
    """The implementation, by M and direction where they differ."""
    names = {name or "none" for line in lines for name in line.runs.values()}
    if len(names) == 1:
        return names.pop()
    return ", ".join(f"{line.m}: {'/'.join(name or 'none' for name in line.runs.values())}" for line in lines)


def _compiled_texts(lines: Sequence[Line]) -> Iterator[str]:
    for line in lines:
        for way, facts in line.compiled.items():
            told = ", ".join(f"{value:,} {what}" for what, value in facts.items())
            yield f"  compiled {line.shape} M={line.m} {way}: {told}"


def plain(line: Line) -> str:
    """All of a line, for a pipe."""
    bound = f", {line.bound} bound, not under {line.roof_seconds * 1e6:.1f} us" if line.roof_seconds else ""
    runs = ", ".join(f"{way} {name or 'none'}" for way, name in line.runs.items())
    refused = "".join(f"; not {what}: {why}" for what, why in line.refused.items())
    held_text = f"codes {line.codes} B, constants {line.constants} B, dequantized {line.dequantized} B"
    return (
        f"{line.device}: {line.shape} {line.n}x{line.k} M={line.m}: {runs}; layout {line.layout}; {held_text}; "
        f"{line.intensity:.1f} FLOP/byte{bound}{refused}"
    )


# Command line


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pallas_kernels.kernel_report", description=DESCRIPTION)
    parser.add_argument("--card", nargs="+", default=[CPU, *CARDS], help=f"of: {CPU}, {', '.join(CARDS)}")
    parser.add_argument("--m", nargs="+", type=_positive, default=list(ROWS), help="rows of x")
    parser.add_argument("--shape", nargs="+", default=["*"], help="names or patterns, such as 'llama-2-7b/*'")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--compile", action="store_true", help="compile for the cards: takes seconds a product")
    return parser.parse_args(argv)


def _shapes(patterns: Sequence[str]) -> list[Shape]:
    for pattern in patterns:
        if not fnmatch.filter(SHAPES, pattern):
            raise ValueError(f"shape {pattern!r} matches none of: {', '.join(SHAPES)}")
    return [shape for name, shape in SHAPES.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def report(args: Any, console: Console) -> None:
    """Prints what the arguments ask for.

    Raises:
      ValueError: an unknown card or shape.
      CompilerUnavailableError: `--compile` where that can not be done.
    """
    shapes = _shapes(args.shape)
    for name in args.card:
        device_of_card(name)  # all names are read before anything is printed
    if args.compile:
        jax.config.update("jax_platforms", "cpu")  # the cards are absent; JAX shall not look for them
        if problem := aot.problem():
            raise aot.CompilerUnavailableError(f"--compile: {problem}")
    by_card = {name: [line(name, s, m, compiled=args.compile) for s in shapes for m in args.m] for name in args.card}
    if args.json:
        lines = [dataclasses.asdict(line) for lines in by_card.values() for line in lines]
        print(json.dumps({"note": NOTE, "lines": lines}, indent=1))
        return
    for name, lines in by_card.items():
        if console.is_terminal:
            print_table(name, lines, console)
        else:
            print("\n".join([*map(plain, lines), *_compiled_texts(lines)]))
    wrap = not console.is_terminal
    console.print(f"F/B: FLOP a byte, m: bandwidth bounds it, c: the peak. {NOTE}.", highlight=False, soft_wrap=wrap)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    try:
        report(_arguments(argv), Console())
    except (ValueError, aot.CompilerUnavailableError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
