"""`python -m qlora_jax.export RUN --format peft`: hands the adapter of a run to the world."""

import argparse
from pathlib import Path

from rich.console import Console

from qlora_jax import allocator
from qlora_jax.config import run_main

PROG = "python -m qlora_jax.export"


def main(argv: list[str]) -> None:
    """Writes the adapter of a run, and with --with-base the base it was trained on, dequantized."""
    args = _parser().parse_args(argv)
    output = args.output or args.run / args.format
    # After the arguments: jax starts when this is imported, and a typing error should not wait for it.
    from qlora_jax import runtime
    from qlora_jax.io.export_run import export_peft

    runtime.start()
    export_peft(args.run, output, step=args.step, model=args.model, with_base=args.with_base, console=Console())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=main.__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--format", choices=["peft"], default="peft", help="peft: a LoRA adapter for the peft library")
    parser.add_argument("--output", type=Path, help="a new folder (default: RUN/FORMAT)")
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the newest)")
    parser.add_argument("--model", help="where the base model lies now, if it was moved after training")
    parser.add_argument(
        "--with-base",
        action="store_true",
        help="also write the base, dequantized, to OUTPUT/base: peft loads no GGUF file, and over these weights it "
        "computes what the run computed",
    )
    return parser


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
