"""Compares 4-bit formats by perplexity, on small models that are pretrained here in 16 bits, and on other files.

    python -m scripts.study_formats --output DIR [--seeds 0 1 2] [--models FILE ...] [--text FILE] [--tokens N]

The question is the QLoRA paper's: is NF4 better than E3M0, E2M1 and Int4? Published files that this project can fetch
are in 4 bits already, so a second rounding lies on top of the first. The models pretrained here have none. They are
Llamas of 6M parameters that learn the passages of examples/titles, one per seed, scored on passages held out from
training. The models of --models are scored on --text. All formats have double quantization.

Prints a table for each: the loss in nats per token of each format, and its difference from NF4 with a 95 % interval
over seeds and windows of text (qlora_jax/studies/statistics.py). Finished steps are not repeated.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qlora_jax.studies.statistics import crossed_mean, ratio_scores
from scripts.study_formats.pretraining import pretrain, write_texts

FORMATS = ("none", "nf4", "fp4", "int4", "e2m1", "e3m0")  # "none": 16 bits
REFERENCE = "nf4"
STEPS, TOKENS = 600, 65536

Losses = Mapping[str, tuple[np.ndarray, np.ndarray]]  # format -> (sums [models, windows], tokens [windows])


def command(module: str, *words: str) -> None:
    """Runs a command of the package.

    Raises:
      SystemExit: it failed; it has printed why.
    """
    done = subprocess.run([sys.executable, "-m", f"qlora_jax.{module}", *words], check=False)
    if done.returncode:
        raise SystemExit(f"qlora_jax.{module} {' '.join(words)}: failed. Start the study again to continue.")


def windows(model: Path, text: Path, tokens: int, quant_type: str, scores: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns -log p and the number of tokens of each window of the first tokens of a text, in one format."""
    if not scores.exists():
        column = "unquantized" if quant_type == "none" else "quantized"
        words = ["--columns", f"[{column}]", *(() if quant_type == "none" else ("--quant_type", quant_type))]
        partial = scores.with_suffix(".partial")
        command("evaluate", "--model", str(model), "--text", str(text), "--max_tokens", str(tokens), *words,
                "--json", str(partial), "--json_rows", "true")  # fmt: skip
        partial.rename(scores)
    (column,) = json.loads(scores.read_text())["tasks"]["text"]["rows"].values()
    (loss,) = column.values()
    return np.array(loss["values"]), np.array(loss["weights"])


def losses(models: Sequence[Path], text: Path, tokens: int, output: Path) -> Losses:
    """Returns the windows of each format over models that have one tokenizer."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for quant_type in FORMATS:
        each = [
            windows(model, text, tokens, quant_type, output / f"{model.stem} {tokens} {quant_type}.json")
            for model in models
        ]
        found[quant_type] = np.stack([sums for sums, _ in each]), each[0][1]
    return found


def table(name: str, losses: Losses) -> str:
    """Returns one table: each format's loss and perplexity, and its difference from NF4."""
    reference, tokens = losses[REFERENCE]
    lines = [f"| {name} | nats per token | perplexity | minus {REFERENCE} | 95 % interval |", "|---|---|---|---|---|"]
    for quant_type, (sums, _) in losses.items():
        loss = sums.sum() / (len(sums) * tokens.sum())
        difference = crossed_mean(ratio_scores(sums - reference, tokens))
        low, high = difference.interval
        cells = "| |" if quant_type == REFERENCE else f"{difference.value:+.4f} | {low:+.4f} to {high:+.4f} |"
        shown = "16 bits" if quant_type == "none" else quant_type
        lines.append(f"| {shown} | {loss:.4f} | {np.exp(loss):.2f} | {cells}")
    return "\n".join(lines)


def main() -> None:
    """Pretrains, scores and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of pretraining")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="other models: GGUF files or folders")
    parser.add_argument(
        "--text", type=Path, help="the text on which --models are scored (default: the held-out passages)"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help="first tokens of --text that count")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train, heldout = write_texts(args.output)
    ours = [pretrain(train, args.output / f"seed-{seed}", seed, args.steps, command) for seed in args.seeds]
    print(table(f"pretrained here, {len(ours)} seeds", losses(ours, heldout, TOKENS, args.output)), flush=True)
    for model in args.models:
        print("\n" + table(model.stem, losses([model], args.text or heldout, args.tokens, args.output)), flush=True)


if __name__ == "__main__":
    main()
