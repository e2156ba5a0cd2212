"""The opponent of bench/classification.py: transformers' model for sequence classification, peft and bitsandbytes.

    .oracle/bin/python scripts/bench/opponents/torch_classification.py --job FILE [--compile none] [--dtype mixed]

Takes one step, or scores the held-out texts after a run's last step, per line on standard input, and prints one line of
JSON. The adapter and the head start with the values in the job's files. Rows are padded on the right, to the longest of
their step.
"""

import argparse
import json
import os
import sys
import time

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch_qlora_cpu import LINEAR_LAYERS, matmul_dtype, param_dtype, quantize_nf4

SCORED_TOKENS = 4096  # positions of a batch of held-out texts, padding included


def build(job, dtype):
    """Returns the trainable model, its layers in NF4.

    Weights are quantized in f32, as ours are: from values in bf16, 0.5 % of the bytes of codes differ.
    """
    path = job["model"]
    folder, file = (path, None) if os.path.isdir(path) else os.path.split(os.path.abspath(path))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, gguf_file=file, num_labels=len(job["labels"]), dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache, model.config.pad_token_id = False, job["pad"]
    quantize_nf4(model, matmul_dtype(dtype))
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(param_dtype(dtype))
    config = peft.LoraConfig(
        r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules=LINEAR_LAYERS, task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def restart(model, path):
    """Gives the adapter and the head their initial values."""
    found = peft.set_peft_model_state_dict(model, load_file(path))
    assert not found.unexpected_keys and not [name for name in found.missing_keys if "lora_" in name], found


def padded(rows, pad):
    """Returns (ids, attention mask), padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outputs(model, texts, pad, autocast):
    """Returns the logits of each text, from batches of similar lengths.

    Without model.eval(): it makes bitsandbytes repack weights for inference permanently, and the model has no dropout.
    """
    longest_first = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    found = {}
    while longest_first:
        size = max(1, SCORED_TOKENS // len(texts[longest_first[0]]))
        members, longest_first = longest_first[:size], longest_first[size:]
        with autocast():
            logits = model(**padded([texts[row] for row in members], pad)).logits
        found |= dict(zip(members, logits.float().tolist(), strict=True))
    return [found[row] for row in range(len(texts))]


def works(job, model, autocast):
    """Yields the record of each step of each run, and after its last step the outputs for the held-out texts."""
    optim = job["optim"]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for run in job["runs"]:
        restart(model, run["initial"])
        betas = (optim["beta1"], optim["beta2"])
        optimizer = torch.optim.AdamW(
            trainable, betas=betas, eps=optim["eps"], weight_decay=optim["weight_decay"], fused=True
        )
        for rate, rows in zip(job["rates"], run["steps"], strict=True):
            began = time.perf_counter()
            texts, labels = zip(*rows, strict=True)
            optimizer.param_groups[0]["lr"] = rate
            with autocast():
                loss = model(**padded(texts, job["pad"]), labels=torch.tensor(labels)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, optim["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield {"seconds": time.perf_counter() - began, "loss": loss.item()}
        began = time.perf_counter()
        found = outputs(model, job["held_out"], job["pad"], autocast)
        yield {"seconds": time.perf_counter() - began, "outputs": found}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--job", required=True)
    p.add_argument("--compile", choices=["none", "layers"], default="none", help="layers: each, for rows of any length")
    p.add_argument("--dtype", choices=["fp32", "mixed"], default="mixed")
    args = p.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with open(args.job, encoding="utf-8") as file:
        job = json.load(file)
    model = build(job, args.dtype)
    if args.compile == "layers":
        for layer in model.base_model.model.model.layers:
            layer.compile(dynamic=True)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "mixed")

    for _, record in zip(sys.stdin, works(job, model, autocast), strict=False):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
