"""`python -m pallas_kernels.kernel_report`: the kernel that would run each product on each card, and its cost.

It also reports which implementation would multiply with the codes of files, by their type. The same for attention, and
attention over pages when decoding, by head dim.

No card has to be present: the report uses the op's own dispatch. Dimension key: M rows, N out, K in.
"""

import argparse
import dataclasses
import fnmatch
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from pallas_kernels import aot
from pallas_kernels.attention.dispatch import choose as choose_attention
from pallas_kernels.attention.dispatch import choose_decoding
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import DIRECTIONS, Call, Choice, Direction, preference
from pallas_kernels.formats.ggml_tensor import GgmlTensor, block_layout, held_bytes, split_problem
from pallas_kernels.formats.layouts import LAYOUTS
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.ggml_matmul import api as ggml
from pallas_kernels.gpu_specs import CARDS, Card, find_card
from pallas_kernels.nf4_matmul.api import IMPLEMENTATIONS, choose_implementation, nf4_matmul
from pallas_kernels.nf4_matmul.costs import dequantized_bytes, roofline, weight_bytes
from pallas_kernels.nf4_matmul.mosaic.capabilities import MOST_ROWS
from pallas_kernels.nf4_matmul.preferred_layout import choose_layout
from pallas_kernels.nf4_matmul.shapes import SHAPES, Shape

DESCRIPTION = "Prints which kernel would run each product on each card, why, and its cost by arithmetic."
CPU = "cpu"
ROWS = (1, 16, 512, 2048)
PAGE_DTYPES = ("bfloat16", "int8")
CODES_OF_FILES = ("Q4_0", "IQ4_NL", "MXFP4", "NVFP4_256", "Q4_K", "Q6_K", "Q8_0", "INT4_128", "FP8_128")
HEAD_DIMS = (64, 80, 96, 100, 128, 256)  # 100: OpenLLaMA 3B
BLOCK, NESTED = 64, 256
MIB = 2**20
NOTE = (
    "Sizes, FLOP per byte and rooflines are arithmetic on shapes and data sheets; nothing here was measured. Kernels "
    "are used up to M = " + ", ".join(f"{most.rows} ({name}, by {most.by})" for name, most in MOST_ROWS.items())
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One product on one device: the implementation that would run it, and its cost.

    Attributes:
      runs: the implementation by direction; None if none can run it.
      refused: reasons by name, for each layout and implementation that the device prefers but that cannot be used.
      codes: bytes of the weight's codes.
      constants: bytes of its block constants.
      dequantized: bytes of a whole weight in bfloat16; 0 if the implementation is fused.
      intensity: FLOP per byte of memory traffic.
      bound: `compute` or `memory`, whichever limits the product; None if the device's rates are unknown.
      roof_seconds: the least time under that limit; None if the device's rates are unknown.
      compiled: compiler statistics by direction, with `--compile`.
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
    """Returns (the device, the card's specifications); for `cpu`, this machine, the specifications are None.

    Raises:
      ValueError: an unknown card.
    """
    if name == CPU:
        return Device(platform="cpu", kind="cpu"), None
    card = find_card(name)
    return Device(platform="gpu", kind=card.description, compute_capability=card.compute_capability), card


def abstract_weight(shape: tuple[int, int], layout: str) -> QTensor:
    """Returns an abstract NF4 weight with double quantization: its leaves are ShapeDtypeStructs."""
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


def report_row(name: str, shape: Shape, m: int, *, compiled: bool = False) -> ReportRow:
    """Describes one product of M rows on a card; with `compiled`, also compiles it."""
    device, card = device_of_card(name)
    layout, refused = choose_layout(device.platform, shape.nk, BLOCK)
    weight = abstract_weight(shape.nk, layout)
    choices = {way: choose_implementation(device, Call.of(way, m, "bfloat16", weight)) for way in DIRECTIONS}
    for way, choice in choices.items():
        refused |= {f"{runs} {way}": reason for runs, reason in choice.refusals.items()}
    runs = choices["forward"].name
    fused = runs is not None and IMPLEMENTATIONS[runs].fused
    # Rates of 1 FLOP/s and 1 byte/s, where the card has none, do not change the intensity.
    peak, bandwidth = (card.bf16_flops, card.bandwidth) if card else (1.0, 1.0)
    under = roofline(m, shape.nk, layout, fused=fused, peak=peak, bandwidth=bandwidth)
    stored = weight_bytes(shape.nk, layout, block_size=BLOCK, nested_block_size=NESTED)
    return ReportRow(
        device=name,
        shape=shape.name,
        n=shape.n,
        k=shape.k,
        m=m,
        layout=layout,
        runs={way: choice.name for way, choice in choices.items()},
        refused=refused,
        codes=stored.codes,
        constants=stored.constants,
        dequantized=0 if fused else dequantized_bytes(shape.nk),
        intensity=under.intensity,
        bound=under.bound if card else None,
        roof_seconds=under.seconds if card else None,
        compiled={way: compile_product(name, weight, m, way) for way in DIRECTIONS} if compiled and card else {},
    )


def compile_product(card: str, weight: QTensor, m: int, direction: Direction) -> dict[str, int]:
    """Compiles one product for a card; returns its registers, spills, tensor-core instructions and temporaries."""

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


def abstract_blocks(ggml_type: str, shape: tuple[int, int], platform: str) -> GgmlTensor:
    """Returns an abstract weight in blocks, in the layout of a platform."""
    layout = block_layout(platform, ggml_type, shape)
    codes = jax.ShapeDtypeStruct((shape[0], held_bytes(layout, ggml_type, shape[1])), jnp.uint8)
    return GgmlTensor(codes=codes, ggml_type=ggml_type, shape=shape, dtype="bfloat16", layout=layout)


def codes_of_files_texts(name: str, rows: Sequence[int]) -> list[str]:
    """Returns which implementation multiplies with the codes of files on a card, and why others do not, by type.

    The weights are 4096 x 4096.
    """
    device, _ = device_of_card(name)
    types: dict[str, list[str]] = {}
    for ggml_type in CODES_OF_FILES:
        types.setdefault(_choices_text(device, ggml_type, rows), []).append(ggml_type)
    return [f"codes of files, {', '.join(those)}: {text}" for text, those in types.items()]


def _choices_text(device: Device, ggml_type: str, rows: Sequence[int]) -> str:
    weight = abstract_blocks(ggml_type, (4096, 4096), device.platform)
    names: dict[str, list[str]] = {}
    refused: dict[str, None] = {}
    for way, m in itertools.product(DIRECTIONS, rows):
        choice = ggml.choose_implementation(device, ggml.call_of(way, m, "bfloat16", weight))
        names.setdefault(str(choice.name), []).append(f"{way} M={m}")
        refused |= dict.fromkeys(f"not {other} {way}: {reason}" for other, reason in choice.refusals.items())
    runs = [*names] if len(names) == 1 else [f"{name} {', '.join(calls)}" for name, calls in names.items()]
    if device.platform == "gpu" and (problem := split_problem(ggml_type, weight.shape)):
        return f"{runs[0]}; {problem.removeprefix(f'{ggml_type} is ')}"
    return "; ".join([*runs, *refused])


def attention_texts(name: str) -> list[str]:
    """Returns which implementation computes attention in bfloat16 on a card, and why others do not, by head dim.

    Then the same of decoding over pages, by their dtype.
    """
    device, _ = device_of_card(name)
    found = _by_head_dim("attention", lambda head_dim: choose_attention(device, "bfloat16", head_dim))
    if device.platform != "gpu":
        return found
    for pages in PAGE_DTYPES:
        choose = functools.partial(choose_decoding, device, "bfloat16", cache_dtype=pages)
        found += _by_head_dim(f"decoding over pages in {pages}", lambda head_dim, choose=choose: choose(head_dim))
    return found


def _by_head_dim(what: str, choose: Callable[[int], Choice]) -> list[str]:
    dims: dict[str, list[str]] = {}
    for head_dim in HEAD_DIMS:
        choice = choose(head_dim)
        text = "; ".join([str(choice.name), *choice.refusals.values()])
        dims.setdefault(text, []).append(str(head_dim))
    return [f"{what}, head dim {', '.join(those)}: {text}" for text, those in dims.items()]


# Output


def print_table(name: str, lines: Sequence[ReportRow], console: Console) -> None:
    """Prints one device's table: a row per shape, a column per M."""
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
    for text in _heading(name, rows):
        console.print(text, highlight=False, markup=False)
    console.print(table)
    reasons = dict.fromkeys(f"  not {what}: {why}" for line in lines for what, why in line.refused.items())
    for text in [*reasons, *_compiled_texts(lines)]:
        console.print(text, highlight=False, markup=False)


def _heading(name: str, rows: Sequence[int]) -> Iterator[str]:
    """Yields the device, its rates, and its preferred implementations."""
    device, card = device_of_card(name)
    yield f"{name}: {device}"
    if card is not None:
        peak, bandwidth = card.bf16_flops / 1e12, card.bandwidth / 1e9
        ridge = card.bf16_flops / card.bandwidth
        yield f"  {peak:,.0f} TFLOP/s in bf16, {bandwidth:,.0f} GB/s, ridge {ridge:,.0f} FLOP/byte"
    yield from (f"  {text}" for text in [*codes_of_files_texts(name, rows), *attention_texts(name)])
    order = preference(device)
    yield f"  prefers: {', '.join(order)}"
    if not any(IMPLEMENTATIONS[runs].fused for runs in order):
        yield "  no fused kernel: a whole weight is dequantized before each product"


def _by_shape(lines: Sequence[ReportRow]) -> list[list[ReportRow]]:
    names = dict.fromkeys(line.shape for line in lines)
    return [[line for line in lines if line.shape == name] for name in names]


def _intensity(line: ReportRow) -> str:
    """Formats FLOP per byte, and the first letter of its bound."""
    digits = 1 if line.intensity < 10 else 0
    return f"{line.intensity:.{digits}f}" + (f" {line.bound[0]}" if line.bound else "")


def _runs(lines: Sequence[ReportRow]) -> str:
    """Formats the implementation, by M and direction if they differ."""
    names = {name or "none" for line in lines for name in line.runs.values()}
    if len(names) == 1:
        return names.pop()
    return ", ".join(f"{line.m}: {'/'.join(dict.fromkeys(n or 'none' for n in line.runs.values()))}" for line in lines)


def _compiled_texts(lines: Sequence[ReportRow]) -> Iterator[str]:
    for line in lines:
        for way, facts in line.compiled.items():
            text = ", ".join(f"{value:,} {name}" for name, value in facts.items())
            yield f"  compiled {line.shape} M={line.m} {way}: {text}"


def row_text(line: ReportRow) -> str:
    """Formats all of a row as one line, for a pipe."""
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
        raise argparse.ArgumentTypeError(f"found {text}, expected 1 or more")
    return number


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pallas_kernels.kernel_report", description=DESCRIPTION)
    parser.add_argument("--card", nargs="+", default=[CPU, *CARDS], help=f"cards: {CPU}, {', '.join(CARDS)}")
    parser.add_argument("--m", nargs="+", type=_positive, default=list(ROWS), help="rows of x")
    parser.add_argument("--shape", nargs="+", default=["*"], help="names or patterns, such as 'llama-2-7b/*'")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--compile", action="store_true", help="compile for the cards: takes seconds per product")
    return parser.parse_args(argv)


def report(args: argparse.Namespace, console: Console) -> None:
    """Prints the report that the arguments describe.

    Raises:
      ValueError: an unknown card or shape.
      CompilerUnavailableError: this installation does not support `--compile`.
    """
    for pattern in args.shape:
        if not fnmatch.filter(SHAPES, pattern):
            raise ValueError(f"shape {pattern!r} matches none of: {', '.join(SHAPES)}.")
    shapes = [shape for name, shape in SHAPES.items() if any(fnmatch.fnmatchcase(name, p) for p in args.shape)]
    for name in args.card:
        device_of_card(name)  # raises before anything is printed
    if args.compile:
        jax.config.update("jax_platforms", "cpu")  # the cards are absent, so JAX must not look for them
        if problem := aot.problem():
            raise aot.CompilerUnavailableError(f"--compile: {problem}")
    by_card = {
        name: [report_row(name, s, m, compiled=args.compile) for s in shapes for m in args.m] for name in args.card
    }
    if args.json:
        lines = [dataclasses.asdict(line) for lines in by_card.values() for line in lines]
        attention = {name: attention_texts(name) for name in args.card}
        codes = {name: codes_of_files_texts(name, args.m) for name in args.card}
        print(json.dumps({"note": NOTE, "lines": lines, "codes of files": codes, "attention": attention}, indent=1))
        return
    for name, lines in by_card.items():
        if console.is_terminal:
            print_table(name, lines, console)
        else:
            of_card = [f"{name}: {text}" for text in [*codes_of_files_texts(name, args.m), *attention_texts(name)]]
            print("\n".join([*map(row_text, lines), *_compiled_texts(lines), *of_card]))
    wrap = not console.is_terminal
    console.print(
        f"F/B: FLOP per byte, m: bound by memory bandwidth, c: by peak compute. {NOTE}.",
        highlight=False,
        soft_wrap=wrap,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        report(_arguments(argv), Console())
    except (ValueError, aot.CompilerUnavailableError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
