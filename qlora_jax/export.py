"""`python -m qlora_jax.export RUN --format peft`: hands what a run has learned to the world."""

import argparse
from pathlib import Path

from rich.console import Console

from qlora_jax import allocator
from qlora_jax.config import run_main

# --dtype of each --format, the default first.
DTYPES = {
    "peft": (),
    "hf": ("bfloat16", "float16", "float32"),
    "gguf": ("float16", "bfloat16", "float32", "q8_0", "q4_0"),
    "gguf-lora": (),
}
PROG = "python -m qlora_jax.export"


def main(argv: list[str]) -> None:
    """Writes the adapter of a run, or its model with the adapter merged into the weights."""
    args = _parser().parse_args(argv)
    if DTYPES[args.format] and args.with_base:
        raise ValueError("--with-base is for --format peft and gguf-lora: a merged model has no base")
    if not DTYPES[args.format] and args.base:
        raise ValueError("--base is for --format hf and gguf: an adapter goes on any base")
    if args.dtype not in (None, *DTYPES[args.format]):
        possible = ", ".join(DTYPES[args.format]) or "none: an adapter keeps its own"
        raise ValueError(f"--dtype {args.dtype} is not for --format {args.format}; possible: {possible}")
    output = args.output or args.run / args.format
    # After the arguments: jax starts when this is imported, and a typing error should not wait for it.
    from qlora_jax import runtime
    from qlora_jax.io.export.gguf_lora import export_gguf_lora
    from qlora_jax.io.export.merged import export_merged
    from qlora_jax.io.export.peft import export_peft

    runtime.start()
    where = {"step": args.step, "model": args.model, "console": Console()}
    adapters = {"peft": export_peft, "gguf-lora": export_gguf_lora}
    if args.format in adapters:
        adapters[args.format](args.run, output, with_base=args.with_base, **where)
    else:
        dtype = args.dtype or DTYPES[args.format][0]
        export_merged(args.run, output, args.format, base=args.base, dtype=dtype, **where)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=main.__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--format",
        choices=list(DTYPES),
        default="peft",
        help="peft: a LoRA adapter for the peft library; hf: a whole model for transformers, the adapter merged into "
        "the dequantized weights that it was trained on; gguf: the same as one file for llama.cpp; gguf-lora: a LoRA "
        "for llama.cpp, which it puts on a GGUF file of the base",
    )
    parser.add_argument("--output", type=Path, help="a new folder (default: RUN/FORMAT)")
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the newest)")
    parser.add_argument("--model", help="where the base model lies now, if it was moved after training; or org/name")
    parser.add_argument(
        "--base",
        help="merge into the weights of this model, which the run's base was quantized from, instead of the "
        "dequantized ones that the adapter was trained on; tells what that costs",
    )
    dtypes = "; ".join(f"{name}: {', '.join(dtypes)}" for name, dtypes in DTYPES.items() if dtypes)
    parser.add_argument("--dtype", help=f"of a merged model's weights, the first by default; {dtypes}")
    parser.add_argument(
        "--with-base",
        action="store_true",
        help="also write the base, dequantized: over these weights peft, which loads no GGUF file, and llama.cpp "
        "compute what the run computed",
    )
    return parser


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
