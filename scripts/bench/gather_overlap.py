"""Share of the gathered weight bytes that products hide, by XLA's schedule for cards that need not be here.

python scripts/bench/gather_overlap.py --model llama-3-8b --card h100 --cards 8 [--option NAME=VALUE ...]
"""

import argparse
import os

from scripts.bench.support.progress import phase

GIB = 2**30


def main() -> None:
    """Compiles the step, and prints the shares and the memory of a card."""
    parser = argparse.ArgumentParser(description="Prints the share of gathered weight bytes that products hide")
    parser.add_argument("--model", default="llama-3-8b", help="a published model (qlora_jax.models.catalog)")
    parser.add_argument("--card", default="h100")
    parser.add_argument("--cards", type=int, default=8, help="devices along mesh.fsdp")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the one row on each card")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--option", action="append", default=[], help="of XLA, in place of a run's; NAME= removes it")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    report(args)


def report(args: argparse.Namespace) -> None:
    """Prints one line per direction, and the bytes of a card."""
    from pallas_kernels import aot
    from pallas_kernels.aot.overlap import hidden_share, read_gathers
    from qlora_jax.config import LoraArgs
    from qlora_jax.models.catalog import PUBLISHED
    from qlora_jax.models.config import WeightFormat
    from qlora_jax.models.families import model_config
    from qlora_jax.sharding import absent_mesh
    from qlora_jax.training.step_spec import StepSpec

    step = StepSpec(
        model=model_config(PUBLISHED[args.model]),
        weights=WeightFormat(platform="gpu"),
        lora=LoraArgs(rank=16),
        batch=(1, args.cards, args.length),
        remat=args.remat,
        mesh=absent_mesh(1, args.cards),
    )
    program = step.gradients()
    options = step.compiler_options | dict(option.split("=", 1) for option in args.option)
    options = {name: value for name, value in options.items() if value}
    phase(f"compiling the step for {args.cards} cards")
    compiled = aot.compile_for(args.card, program.function, *program.args, **program.kwargs, compiler_options=options)
    gathers = read_gathers(compiled.text)
    for name, backward in (("forward", False), ("backward", True)):
        share = hidden_share(gathers, backward=backward)
        print(f"{name}: {share.percent:.1f} % of {share.nbytes / GIB:.2f} GiB gathered while products run")
    print(f"gradients: {compiled.memory.device_total / GIB:.2f} GiB on each card")


if __name__ == "__main__":
    main()
