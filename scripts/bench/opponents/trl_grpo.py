"""The opponent of bench/rollouts.py: TRL's GRPOTrainer with LoRA on a dense model, generating by transformers.

    .oracle/bin/python scripts/bench/opponents/trl_grpo.py --model GGUF --rows FILE --steps 4

Prints one line of JSON: the seconds of each step after the first, tokens per reply, and the peak of resident memory.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch_qlora_cpu import load_dense, load_tokenizer, peak_rss_mib
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """Records the end of each step."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def parity(completions, **columns):
    """Returns a reward that differs between replies."""
    return [float(sum(map(ord, one[0]["content"])) % 2) for one in completions]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--rows", type=Path, required=True)
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--prompts", type=int, default=8, help="per step")
    p.add_argument("--generations", type=int, default=8)
    p.add_argument("--length", type=int, default=64)
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = p.parse_args()
    model = load_dense(str(args.model), getattr(torch, args.dtype))
    model.config.use_cache = True
    # Settings of the file, whose weights are dense now.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    rows = [json.loads(line)["prompt"] for line in args.rows.read_text().splitlines()]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=args.prompts * args.generations,
            gradient_accumulation_steps=1,
            num_generations=args.generations,
            max_completion_length=args.length,
            max_steps=args.steps + 1,
            learning_rate=1e-6,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            processing_class=load_tokenizer(str(args.model)),
            reward_funcs=parity,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in rows]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[clock],
        )
        trainer.train()
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log]
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    print(json.dumps({"seconds": seconds, "tokens": lengths[1:], "peak_mib": peak_rss_mib()}))


if __name__ == "__main__":
    main()
