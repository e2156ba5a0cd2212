"""`qlora-jax compare STUDY.yaml`: methods, tasks and seeds with equal budgets, and tests between methods."""

from qlora_jax import allocator
from qlora_jax.config import Command, run_main
from qlora_jax.studies.comparison.settings import CompareArgs

COMMAND = Command(
    name="compare",
    summary="Compares finetuning methods on your data: equal budgets, several seeds, intervals and tests.",
    example="--study configs/studies/first_sweep.yaml --model ~/models/Llama --output runs/first_sweep",
    schema=CompareArgs,
    common=("study", "output", "model", "launcher", "processes"),
    positional="study",
    flags={"dry_run": "check the study, print its runs and their trainable parameters, then stop"},
)


def main(argv: list[str]) -> None:
    """Performs the unfinished runs of a study, and writes its page and its table; raises ValueError for bad input."""
    args, flags = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax.studies.comparison.run_study import compare

    compare(args, dry_run="dry_run" in flags)


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
