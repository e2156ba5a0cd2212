"""Plans and times steps of learning from rewards on a model of Qwen2.5-0.5B's shape, with rows like those of GSM8K.

    python -m scripts.bench.rollouts_qwen [--steps 2] [--length 64]

The weights are random, so nothing is learned: only memory and time mean something. The tokenizer is SmolLM2's. Prints
the plan of the command `plan`, then the peak of a run next to its own plan, and the seconds of each step's parts.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from qlora_jax.config import ModelArgs
from qlora_jax.io.pretrained import open_base
from qlora_jax.training.metrics.metrics_file import METRICS_FILE, read_metrics
from scripts.bench.support.random_model import make_random_model
from scripts.fetch_smollm2 import fetch_smollm2

ROWS = 16


def main() -> None:
    """Prints the plan, the peak and the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 2), ("length", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, rows, run = (Path(folder, name) for name in ("model", "rows.jsonl", "run"))
        write_model(model)
        rows.write_text("".join(json.dumps(row) + "\n" for row in questions(random.Random(0))))
        settings = ["--model", str(model), "--objective", "grpo", "--data.train", str(rows), "--data.max_length", "192"]
        settings += ["--rewards.functions", "[number]", "--rollouts.num_generations", "4", "--lora.rank", "16"]
        settings += ["--rollouts.max_completion_length", str(args.length), "--train.micro_batch_size", "2"]
        settings += ["--train.accumulation", "1"]
        subprocess.run([sys.executable, "-m", "qlora_jax.plan", *settings, "--card", "cpu"], check=True)
        settings += ["--train.steps", str(args.steps), "--output", str(run)]
        subprocess.run([sys.executable, "-m", "qlora_jax.train", *settings], check=True)
        found = json.loads((run / "report.json").read_text())["memory_plan"]
        sizes = {"planned": sum(found["device_bytes"].values()), "measured": found["peak_bytes"]}
        print(", ".join(f"{name} peak {size / 2**20:,.0f} MiB" for name, size in sizes.items()))
        for step in (each for each in read_metrics(run / METRICS_FILE) if "loss" in each):
            parts = {name: round(step[name], 2) for name in ("rollout_seconds", "reward_seconds", "seconds")}
            print(json.dumps({"step": step["step"], **parts, "rollout_tokens": step["rollout_tokens"]}))


def write_model(folder: Path) -> None:
    """Writes the model's folder: links to random weights, and a tokenizer."""
    source = make_random_model("qwen2-0.5b")
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(source / name)
    tokenizer = open_base(ModelArgs(path=str(fetch_smollm2()))).tokenizer
    (folder / "tokenizer.json").write_text(tokenizer.exported)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": tokenizer.chat_template}))


def questions(rng: random.Random) -> list[dict[str, str]]:
    """Returns questions with answers in GSM8K's format: the steps, and the result after ####."""
    found = []
    for _ in range(ROWS):
        bags, apples, eaten = rng.randint(2, 9), rng.randint(3, 12), rng.randint(1, 5)
        text = f"Mia buys {bags} bags with {apples} apples each. She eats {eaten} apples and gives the others away."
        total = bags * apples
        answer = f"Mia buys {bags} * {apples} = {total} apples.\nShe gives away {total} - {eaten} = {total - eaten}."
        question = f"{text} How many apples does she give away?"
        found.append({"prompt": question, "answer": f"{answer}\n#### {total - eaten}"})
    return found


if __name__ == "__main__":
    main()
