"""Computes the bytes of a training step on a GPU that need not be present: compiled, and by formula."""

import argparse
import dataclasses
import re
from collections.abc import Iterable

from rich.console import Console

from pallas_kernels import aot
from qlora_jax.config import LoraArgs
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.training.cost import memory_use
from qlora_jax.training.cost.memory_use import activation_bytes
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.step_spec import StepSpec
from scripts.bench.profile.parts import direction_of, part_of, short, without_layout
from scripts.bench.profile.tables import Row, number, table
from scripts.bench.support.progress import phase

GIB, MIB = 2**30, 2**20
ALL = 1 << 30  # temporary buffers
READ_BY = {
    "layer input": "norm",
    "attention_residual": "norm",
    "attention_normed and mlp_normed": "norm",
    "before queries' and keys' norms": "norm",
    "attention's input": "lora",
    "o_proj's input": "lora",
    "mlp's input": "lora",
    "mlp's inner activation": "lora",
    "lora_xa": "lora",
    "unscaled": "lora",
    "dora_norms": "dora",
    "bottleneck_in and bottleneck_narrow": "bottleneck",
    "mlp_gate and mlp_up": "swiglu",
    "query": "attention",
    "key and value": "attention",
    "attention_out": "attention",
    "attention_lse": "attention",
    "router_logits and shared_expert_out": "router",
    "shared expert's inner activation": "lora",
    "experts' inner activation": "router",
    "experts' inputs": "lora",
}  # name in saved_bytes -> the part whose backward pass reads it
PLACES = ("arguments", "outputs", "aliases", "temporaries", "total")
MEMORY_COLUMNS = {
    "program": ("program", str),
    "memory": ("memory", str),
    **{place: (place, number(1, 1 / MIB)) for place in PLACES},
}
FORMULA_COLUMNS = {"part": ("part", str), "what": ("what", str), "MiB": ("bytes", number(2, 1 / MIB))}
PASS_ON = re.compile(r"(while|conditional|call|arg_tuple|tuple)\b")  # instructions that only pass buffers on
TEMPORARY_COLUMNS = {
    "MiB": ("bytes", number(1, 1 / MIB)),
    "memory": ("memory", str),
    "operation": ("operation", str),
    "shape": ("shape", str),
    "part": ("part", str),
    "direction": ("direction", str),
    "source": ("source", str),
}


def step_for(args: argparse.Namespace) -> tuple[StepSpec, StepShape]:
    """Returns the step from shapes alone, twice: abstract, and for the formulas. `auto` is bfloat16, as on any GPU."""
    model = model_config(open_model(args.model).config)
    dtype = "bfloat16" if args.compute_dtype == "auto" else args.compute_dtype
    weights, shape = WeightFormat(platform="gpu", dtype=dtype), (1, args.batch, args.seq)
    lora = LoraArgs(rank=args.rank)
    step = StepSpec(model=model, weights=weights, lora=lora, batch=shape, remat=args.remat)
    return step, StepShape(model=model, weights=weights, lora=lora, batch=shape, remat=args.remat)


def memory_rows(name: str, compiled: aot.CompiledFor) -> list[Row]:
    """Returns the bytes of one program in each memory that it uses."""
    memories = {"device": compiled.memory.device, "host": compiled.memory.host}
    return [
        {"program": name, "memory": memory, **dataclasses.asdict(used), "total": used.total}
        for memory, used in memories.items()
        if used.total
    ]


def formula_rows(step: StepShape) -> list[Row]:
    """Returns the bytes of the step by part, by formula."""
    frozen, lora = memory_use.frozen_bytes(step), memory_use.lora_bytes(step)
    rows = [("frozen", f"weights: {name}", frozen[name]) for name in ("codes", "constants")]
    rows += [("router", "weights: routers", frozen["routers"])]
    rows += [("head", "weights: embedding and head", frozen["tables"]), ("norm", "weights, biases", frozen["vectors"])]
    rows += [("lora", "weights: of adapters", frozen["adapters"])]
    rows += [("lora", "parameters", lora), ("lora", "gradients", lora)]
    rows += [
        ("optimizer", "state", memory_use.optimizer_bytes(step)),
        ("other", "batch", memory_use.batch_bytes(step)),
    ]
    rows += [(READ_BY[name], f"saved: {name}", size) for name, size in activation_bytes(step).items()]
    rows += [("head", "one tile's logits and their exponentials", memory_use.logits_bytes(step))]
    return [{"part": part, "what": what, "bytes": size} for part, what, size in rows]


def temporary_rows(temporaries: Iterable[aot.Temporary]) -> list[Row]:
    """Returns one row per temporary buffer, with the operation that computes it."""
    return [
        {"bytes": each.bytes, "memory": each.memory, "operation": each.instruction, "shape": without_layout(each.shape)}
        | {"part": part_of(each.operation), "direction": direction_of(each.operation), "source": short(each.operation)}
        for each in temporaries
        if not PASS_ON.match(each.instruction)
    ]


def bytes_on(args: argparse.Namespace, console: Console) -> Row:
    """Compiles, prints, and returns the contents of --json.

    Raises:
      SystemExit: compiling for absent cards does not work here.
    """
    if problem := aot.problem():
        raise SystemExit(f"--card: cannot compile for a card that is absent: {problem}")
    step, counted = step_for(args)
    programs = {"gradients": step.gradients(), "optimizer": step.update()}
    phase(f"compiling for {args.card}")
    made = {name: aot.compile_for(args.card, p.function, *p.args, **p.kwargs) for name, p in programs.items()}
    found = {
        "memory": [row for name, compiled in made.items() for row in memory_rows(name, compiled)],
        "formula": formula_rows(counted),
        "dequantized_traffic": memory_use.dequantized_traffic(counted),
        "temporaries": temporary_rows(made["gradients"].largest_temporaries(ALL)),
        "fits": all(compiled.fits for compiled in made.values()),
    }
    card = made["gradients"].card
    console.print(table(f"compiled for {card.description}, MiB", found["memory"], MEMORY_COLUMNS))
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    console.print(f"{verdict} {card.memory_bytes / GIB:,.1f} GiB", highlight=False)
    console.print(table("by formula, MiB", found["formula"], FORMULA_COLUMNS))
    traffic = f"{found['dequantized_traffic'] / GIB:,.2f} GiB"
    console.print(f"dequantized weights written and read per step, if any: {traffic}", highlight=False)
    title = "largest temporary buffers of the gradients (they share memory, so sizes do not add up), MiB"
    console.print(table(title, found["temporaries"][: args.top], TEMPORARY_COLUMNS))
    return found
