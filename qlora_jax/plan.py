"""`python -m qlora_jax.plan`: what a finetune needs in memory, on a card that need not be here, before any download."""

import json
import os
import sys

from rich.console import Console

from qlora_jax.config import read_command_line, run_main

DOES_NOT_FIT = 1
PROG = "python -m qlora_jax.plan"
SWITCHES = {"json": "print every number as JSON instead of the table"}


def main(argv: list[str]) -> None:
    """Settings, compiles, table; exits with 1 where the run does not fit."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # whatever device is here, nothing is computed on it
    from qlora_jax.training.plan.settings import PlanArgs

    args, given = read_command_line(argv, PROG, SWITCHES, PlanArgs, lambda _: None)
    from qlora_jax import runtime
    from qlora_jax.training.plan.from_config import buckets_of, compiler_for, setting_of, title_of
    from qlora_jax.training.plan.plan import make_plan
    from qlora_jax.training.plan.settings import target_of
    from qlora_jax.training.plan.text import as_json, print_plan

    runtime.start()
    console = Console()
    target = target_of(args.card, args.memory)
    buckets, unknown = buckets_of(args)
    if unknown:
        print(f"every row counts as data.max_length, {args.data.max_length} tokens: {unknown}", file=sys.stderr)
    setting = setting_of(args, target, buckets)
    compile_step, why = compiler_for(target)
    if why:
        print(f"nothing is compiled, so every number is an estimate: {why}", file=sys.stderr)
    usable = float(runtime.USABLE_MEMORY) * target.memory_bytes  # the rest is for CUDA itself
    plan = make_plan(setting, int(usable), compile_step, buckets)
    if "json" in given:
        print(json.dumps(as_json(plan), indent=1))
    else:
        print_plan(plan, title_of(args, target, setting), console)
    if not plan.fits:
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    run_main(main)
