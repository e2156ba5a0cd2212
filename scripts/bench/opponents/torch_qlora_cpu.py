"""The opponent: QLoRA on a CPU with torch, transformers, peft and bitsandbytes, by default as fast as it can be.

    .oracle/bin/python scripts/bench/opponents/torch_qlora_cpu.py --model SmolLM2-135M-Instruct.Q4_1.gguf

Loads a model (a GGUF file or a Hugging Face folder), quantizes every linear layer but the head to NF4 with
double-quantized constants, adds LoRA, trains for a few steps and times them. The last line is JSON. --no_quant runs
LoRA on an unquantized base, and --full trains every parameter.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import sys
import time

import bitsandbytes as bnb
import peft
import torch
import transformers

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a GGUF file or a Hugging Face folder")
    p.add_argument("--text", help="training text, .txt or .txt.gz (default: random tokens)")
    p.add_argument("--no_quant", action="store_true", help="LoRA on an unquantized base")
    p.add_argument("--full", action="store_true", help="train every parameter; implies --no_quant")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--alpha", type=float, default=32.0)
    p.add_argument("--lr", type=float, default=2e-4)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--seq", type=int, default=512)
    p.add_argument("--steps", type=int, default=12, help="timed steps")
    p.add_argument("--warmup", type=int, default=3, help="untimed steps before the timed ones")
    p.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    p.add_argument(
        "--dtype",
        choices=["fp32", "autocast", "mixed", "bf16"],
        default="mixed",
        help="fp32: all fp32; autocast: fp32 parameters, bf16 matmuls; mixed: bf16 base, "
        "fp32 adapters, bf16 matmuls; bf16: everything bf16",
    )
    p.add_argument(
        "--compile",
        choices=["model", "layers", "none"],
        default="model",
        help="torch.compile of the whole model, or of each decoder layer (which checkpointing can wrap)",
    )
    p.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--in_turns", action="store_true", help="take one step and print one line of JSON per line of standard input"
    )
    return p.parse_args(argv)


def param_dtype(dtype: str) -> torch.dtype:
    return torch.bfloat16 if dtype in ("bf16", "mixed") else torch.float32


def matmul_dtype(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == "fp32" else torch.bfloat16


def load_dense(path: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> torch.nn.Module:
    """Returns the model of a GGUF file or a Hugging Face folder, with weights in `dtype`."""
    folder, file = (path, None) if os.path.isdir(path) else os.path.split(os.path.abspath(path))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=dtype, attn_implementation=attention
    )
    model.config.use_cache = False
    return model


def load_tokenizer(path: str):
    """Returns the tokenizer of a GGUF file or a Hugging Face folder."""
    folder, file = (path, None) if os.path.isdir(path) else os.path.split(os.path.abspath(path))
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def quantize_nf4(model: torch.nn.Module, compute_dtype: torch.dtype) -> None:
    """Replaces each linear layer but the head by a bitsandbytes NF4 layer, in place.

    transformers does not accept a BitsAndBytesConfig together with gguf_file, so this does the work of
    `load_in_4bit`.
    """
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or name.split(".")[-1] not in LINEAR_LAYERS:
            continue
        new = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            device="meta",
            compute_dtype=compute_dtype,
            quant_type="nf4",
            compress_statistics=True,
        )
        new.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
        )
        new.bias = layer.bias
        new.to("cpu")  # quantizes
        assert new.weight.dtype == torch.uint8 and new.weight.quant_state.nested
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    model.is_loaded_in_4bit = True  # peft and transformers read this


def build(
    path, dtype="mixed", quant=True, full=False, rank=16, alpha=32.0, checkpointing=False, attention="sdpa", seed=0
):
    """Returns a trainable model."""
    torch.manual_seed(seed)
    model = load_dense(path, param_dtype(dtype), attention)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if full:
        return model.train()
    if quant:
        quantize_nf4(model, matmul_dtype(dtype))
    model.requires_grad_(False)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM"
    )
    # By default peft stores bf16 adapters in fp32, and so runs their matmuls in fp32.
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    return model.train()


def random_batches(vocab, batch, seq, seed):
    """Yields endless batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(3, vocab, (batch, seq), generator=generator)


def text_batches(text, tokenizer, batch, seq, seed):
    """Yields endless batches of `seq`-token windows at random positions of the text."""
    generator = torch.Generator().manual_seed(seed)
    opener = gzip.open if text.endswith(".gz") else open
    with opener(text, "rt", encoding="utf-8") as f:
        ids = torch.tensor(tokenizer(f.read())["input_ids"])
    while True:
        starts = torch.randint(0, len(ids) - seq, (batch,), generator=generator)
        yield torch.stack([ids[s : s + seq] for s in starts])


def compiled(model, how):
    """Compiles the whole model ("model"), each layer ("layers"), or nothing ("none")."""
    if how == "layers":
        for name, module in model.named_modules():
            if name.endswith("model.layers"):
                for layer in module:
                    layer.compile()
    return torch.compile(model) if how == "model" else model


def make_step(model, dtype, lr, compile="none"):
    """Returns (step function, optimizer): forward, backward, clip, AdamW."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, fused=True)
    forward = compiled(model, compile)

    def step(**inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype in ("autocast", "mixed")):
            loss = forward(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, optimizer


def timed(step, ids):
    """Takes one step on these rows; returns its seconds and its loss."""
    began = time.perf_counter()
    loss = step(input_ids=ids, labels=ids)
    return {"seconds": time.perf_counter() - began, "loss": loss}


def summary(args, model, load_s, load_rss, records):
    """Returns the contents of the last line: settings, and medians over the steps after the warm-up."""
    seconds = [record["seconds"] for record in records[args.warmup :]]
    settings = ("dtype", "compile", "attention", "checkpointing", "batch", "seq", "rank", "lr", "threads", "seed")
    return {
        "mode": "full" if args.full else "lora" if args.no_quant else "qlora",
        **{name: getattr(args, name) for name in settings},
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "load_s": round(load_s, 2),
        "first_step_s": round(records[0]["seconds"], 2),
        "step_s_median": round(statistics.median(seconds), 4),
        "step_s_min": round(min(seconds), 4),
        "tokens_per_s": round(args.batch * args.seq / statistics.median(seconds), 1),
        "load_rss_mib": round(load_rss),
        "peak_rss_mib": round(peak_rss_mib()),
        "losses": [round(record["loss"], 4) for record in records],
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, bnb)},
    }


def peak_rss_mib() -> float:
    """Returns the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    quant = not (args.no_quant or args.full)
    began = time.perf_counter()
    model = build(
        args.model, args.dtype, quant, args.full, args.rank, args.alpha, args.checkpointing, args.attention, args.seed
    )
    load_s, load_rss = time.perf_counter() - began, peak_rss_mib()
    step, _ = make_step(model, args.dtype, args.lr, args.compile)
    sizes = (args.batch, args.seq, args.seed)
    if args.text is None:
        batches = random_batches(model.config.vocab_size, *sizes)
    else:
        batches = text_batches(args.text, load_tokenizer(args.model), *sizes)
    if args.in_turns:  # for scripts/bench/train.py, where programs take turns
        for _ in sys.stdin:
            print(json.dumps(timed(step, next(batches))), flush=True)
        return
    records = [timed(step, next(batches)) for _ in range(args.warmup + args.steps)]
    print(json.dumps(summary(args, model, load_s, load_rss, records)))


if __name__ == "__main__":
    main()
