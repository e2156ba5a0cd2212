"""Bytes of a training step on a GPU that need not be here: as compiled for it, and by formula. For train_step.py."""

import argparse
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from pallas_kernels import aot
from pallas_kernels.gpu_specs import Card
from qlora_jax.config import LoraArgs
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.training.abstract_step import AbstractStep, abstract_step
from qlora_jax.training.cost import flops, memory_use
from qlora_jax.training.cost.activations import saved_bytes
from scripts.bench.profile.parts import direction_of, part_of, short, without_layout
from scripts.bench.profile.tables import number, table

GIB, MIB = 2**30, 2**20
ALL = 1 << 30  # temporary buffers
KEPT_BY = {
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
    "mlp_gate and mlp_up": "swiglu",
    "query": "attention",
    "key and value": "attention",
    "attention_out": "attention",
    "attention_lse": "attention",
}  # of saved_bytes -> whose backward pass reads them
PLACES = ("arguments", "outputs", "aliases", "temporaries", "total")
MEMORY_COLUMNS = {
    "program": ("program", str),
    "memory": ("memory", str),
    **{place: (place, number(1, 1 / MIB)) for place in PLACES},
}
FORMULA_COLUMNS = {"part": ("part", str), "what": ("what", str), "MiB": ("bytes", number(2, 1 / MIB))}
PASS_ON = re.compile(r"(while|conditional|call|arg_tuple|tuple)\b")  # what hands buffers of others along
TEMPORARY_COLUMNS = {
    "MiB": ("bytes", number(1, 1 / MIB)),
    "memory": ("memory", str),
    "operation": ("operation", str),
    "shape": ("shape", str),
    "part": ("part", str),
    "direction": ("direction", str),
    "source": ("source", str),
}


def step_for(args: argparse.Namespace) -> tuple[AbstractStep, flops.Step]:
    """The step from shapes alone, of the model's config; `--compute-dtype auto` is bfloat16, as on any GPU."""
    model = model_config(open_model(args.model).config)
    dtype = "bfloat16" if args.compute_dtype == "auto" else args.compute_dtype
    weights, shape = WeightFormat(platform="gpu", dtype=dtype), (1, args.batch, args.seq)
    lora = LoraArgs(rank=args.rank)
    step = abstract_step(model, weights, lora, batch=shape, remat=args.remat)
    return step, flops.Step(model=model, weights=weights, lora=lora, batch=shape, remat=args.remat)


def memory_rows(name: str, compiled: aot.CompiledFor) -> list[dict[str, Any]]:
    """Bytes of one program in each memory that it uses."""
    memories = {"device": compiled.memory.device, "host": compiled.memory.host}
    return [
        {"program": name, "memory": memory, **dataclasses.asdict(used), "total": used.total}
        for memory, used in memories.items()
        if used.total
    ]


def formula_rows(step: flops.Step) -> list[dict[str, Any]]:
    """What the step holds, by part."""
    frozen, lora = memory_use.frozen_bytes(step), memory_use.lora_bytes(step)
    rows = [("frozen", f"weights: {name}", frozen[name]) for name in ("codes", "constants")]
    rows += [("head", "weights: embedding and head", frozen["tables"]), ("norm", "weights, biases", frozen["vectors"])]
    rows += [("lora", "parameters", lora), ("lora", "gradients", lora)]
    rows += [
        ("optimizer", "state", memory_use.optimizer_bytes(step)),
        ("other", "batch", memory_use.batch_bytes(step)),
    ]
    rows += [(KEPT_BY[name], f"kept: {name}", size) for name, size in saved_bytes(step).items()]
    rows += [("head", "one tile's logits and their exponentials", memory_use.logits_bytes(step))]
    return [{"part": part, "what": what, "bytes": size} for part, what, size in rows]


def temporary_rows(temporaries: Iterable[aot.Temporary]) -> list[dict[str, Any]]:
    """What computes each temporary buffer."""
    return [
        {"bytes": each.bytes, "memory": each.memory, "operation": each.instruction, "shape": without_layout(each.shape)}
        | {"part": part_of(each.operation), "direction": direction_of(each.operation), "source": short(each.operation)}
        for each in temporaries
        if not PASS_ON.match(each.instruction)
    ]


def bytes_on(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Compiles, shows, and returns what --json writes. SystemExit where compiling for absent cards can't work."""
    if why := aot.problem():
        raise SystemExit(f"--card compiles for a GPU that is not here, which does not work yet: {why}")
    step, counted = step_for(args)
    programs = {"gradients": step.gradients(), "optimizer": step.update()}
    made = {name: aot.compile_for(args.card, p.function, *p.args, **p.kwargs) for name, p in programs.items()}
    told = {
        "memory": [row for name, compiled in made.items() for row in memory_rows(name, compiled)],
        "formula": formula_rows(counted),
        "dequantized_traffic": memory_use.dequantized_traffic(counted),
        "temporaries": temporary_rows(made["gradients"].largest_temporaries(ALL)),
        "fits": all(compiled.fits for compiled in made.values()),
    }
    show_bytes(console, told, made["gradients"].card, args.top)
    return told


def show_bytes(console: Console, told: dict[str, Any], card: Card, top: int) -> None:
    """Three tables and whether the step fits."""
    console.print(table(f"compiled for {card.description}, MiB", told["memory"], MEMORY_COLUMNS))
    verdict = "fits" if told["fits"] else "DOES NOT FIT"
    console.print(f"{verdict} {card.memory_bytes / GIB:,.1f} GiB", highlight=False)
    console.print(table("by formula, MiB", told["formula"], FORMULA_COLUMNS))
    traffic = f"{told['dequantized_traffic'] / GIB:,.2f} GiB"
    console.print(f"dequantized weights written and read in a step, where they are: {traffic}", highlight=False)
    title = "largest temporary buffers of gradients (they share bytes: sizes do not add up), MiB"
    console.print(table(title, told["temporaries"][:top], TEMPORARY_COLUMNS))
