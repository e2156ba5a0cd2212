"""`qlora-jax predict`: labels, numbers, rewards or embeddings of new texts, by a run's sequence head."""

import json
import sys
from pathlib import Path

from qlora_jax import allocator
from qlora_jax.atomic_files import write_named_text
from qlora_jax.config import Command, run_main
from qlora_jax.evaluation.heads.predict_settings import PredictArgs, check_predict
from qlora_jax.terminal.console import Console
from qlora_jax.terminal.visible import visible_json

COMMAND = Command(
    name="predict",
    summary="Predicts labels, numbers, rewards or embeddings with a trained head.",
    example="--run runs/sst2 --rows new.jsonl --output predicted.jsonl",
    schema=PredictArgs,
    check=check_predict,
)


def main(argv: list[str]) -> None:
    """Writes one line of JSON per row; raises ValueError or OSError for bad input."""
    args, _ = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.api.predict import predict_rows

    runtime.start()
    messages = Console(stderr=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in predict_rows(args, messages)]
    if args.output is not None:
        write_named_text(Path(args.output), "".join(lines))
        messages.print(f"{len(lines):,} predictions: {args.output}", markup=False, highlight=False, soft_wrap=True)
        return
    for line in lines:
        print(visible_json(line) if sys.stdout.isatty() else line, end="")


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
