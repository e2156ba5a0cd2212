"""Pretrains a small Llama in 16 bits, from random weights, on the passages of examples/titles."""

import gzip
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from scripts.bench.support.environment import ROOT

PASSAGES = ROOT / "examples/titles/train.jsonl.gz"
QUESTION = "\n\nWhat is the title of this article?"
HELD_OUT = 10  # one passage of every ten
VOCABULARY, WIDTH, INNER, LAYERS, HEADS, LENGTH = 4096, 256, 704, 6, 4, 512
END = "<|end|>"

Command = Callable[..., None]


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Writes the passages as (rows to learn, a text held out)."""
    with gzip.open(PASSAGES, "rt", encoding="utf-8") as file:
        passages = [json.loads(line)["messages"][0]["content"].removesuffix(QUESTION) for line in file]
    train, heldout = folder / "train.jsonl", folder / "heldout.txt"
    learned = [passage for index, passage in enumerate(passages) if index % HELD_OUT]
    train.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in learned), encoding="utf-8")
    heldout.write_text("\n\n".join(passages[::HELD_OUT]), encoding="utf-8")
    return train, heldout


def pretrain(train: Path, folder: Path, seed: int, steps: int, command: Command) -> Path:
    """Returns the folder of a model that has learned the rows; trains it on the first call.

    Args:
      command: runs a command of the package: command("train", "--key", "value", ...).
    """
    result, run = folder.with_name(f"{folder.name}-pretrained"), folder / "run"
    if result.exists():
        return result
    if not run.exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_random_model(folder / "random", train, seed)
    command(
        "train", "--model", str(folder / "random"), "--model.quant_type", "none", "--lora.method", "full",
        "--data.train", str(train), "--data.format", "text", "--data.packing", "true", "--data.max_length", str(LENGTH),
        "--data.overlong", "truncate-right", "--train.steps", str(steps), "--train.micro_batch_size", "4",
        "--train.accumulation", "1", "--train.seed", str(seed), "--optim.learning_rate", "1e-3",
        "--optim.schedule", "cosine", "--optim.warmup_ratio", "0.1", "--optim.max_grad_norm", "1.0",
        "--optim.beta2", "0.95", "--output", str(run), *(["--resume"] if run.exists() else []),
    )  # fmt: skip
    command("export", "--run", str(run), "--format", "hf", "--output", str(result))
    return result


def write_random_model(folder: Path, train: Path, seed: int) -> None:
    """Writes a Llama with random weights, and a byte-level BPE tokenizer of the rows."""
    folder.mkdir(parents=True)
    texts = [json.loads(line)["text"] for line in train.read_text(encoding="utf-8").splitlines()]
    (folder / "tokenizer.json").write_text(tokenizer_json(texts), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "pad_token": END}))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": WIDTH,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "vocab_size": VOCABULARY, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "max_position_embeddings": 2048, "eos_token_id": 0, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(random_weights(np.random.default_rng(seed)), folder / "model.safetensors", metadata={"format": "pt"})


def tokenizer_json(texts: Sequence[str]) -> str:
    """Returns the tokenizer.json of a byte-level BPE that was trained on some texts."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def random_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns GPT-2's initial weights: normal, 0.02, and less for projections into the residual stream; norms are 1."""

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(0.02 * scale)

    into_residual = 1 / math.sqrt(2 * LAYERS)
    weights = {"model.embed_tokens.weight": normal(VOCABULARY, WIDTH), "model.norm.weight": np.ones(WIDTH, np.float32)}
    for layer in (f"model.layers.{index}" for index in range(LAYERS)):
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[f"{layer}.self_attn.{name}.weight"] = normal(WIDTH, WIDTH)
        weights[f"{layer}.self_attn.o_proj.weight"] = normal(WIDTH, WIDTH, scale=into_residual)
        weights[f"{layer}.mlp.gate_proj.weight"] = normal(INNER, WIDTH)
        weights[f"{layer}.mlp.up_proj.weight"] = normal(INNER, WIDTH)
        weights[f"{layer}.mlp.down_proj.weight"] = normal(WIDTH, INNER, scale=into_residual)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = np.ones(WIDTH, np.float32)
    return weights
