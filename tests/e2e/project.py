"""Writes a tiny model folder and a data set, and returns the settings of a run with them."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import qlora_jax as q
from qlora_jax.config import Config, DataArgs, LoraArgs, MeshArgs, ModelArgs, OptimArgs, QuestionArgs, TrainArgs
from tests.io.tiny_models import random_weights, tiny_config, write_folder

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def byte_tokenizer_json() -> str:
    """Returns a tokenizer.json with one token per byte, and the special tokens <s> and </s>."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend.to_str()


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes a random Llama of 2 layers with a byte tokenizer."""
    sizes = dict(vocab_size=258, max_position_embeddings=256, bos_token_id=256, eos_token_id=257)
    config = tiny_config(**sizes | changes)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": TEMPLATE}
    folder = write_folder(folder, config, random_weights(config, seed))
    (folder / "tokenizer.json").write_text(byte_tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def write_rows(path: Path, count: int = 40) -> Path:
    """Writes learnable rows of two lengths: the answer repeats the question's word."""
    words = ["sun", "moon", "a much longer word that fills another bucket of its own, more than sixty-four bytes"]
    rows = [{"prompt": f"say {words[i % 3]} {i}", "completion": f"{words[i % 2]}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextlib.contextmanager
def served_teacher(model: Path) -> Iterator[str]:
    """Serves a model in float32; yields the address."""
    settings = {"port": 0, "cache": "16MiB", "quant_type": "none", "compute_dtype": "float32"}
    with q.serve_models(str(model), background=True, **settings) as server:
        yield f"{server.url}/v1"


def stop_after(patch: pytest.MonkeyPatch, config: Config, steps: int) -> None:
    """Makes the run behave as if a signal came when it has recorded `steps` steps."""
    metrics = Path(config.output) / "metrics.jsonl"

    def stop() -> bool:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return sum('"loss"' in line for line in lines) >= steps

    def on_signals(report: Callable[[str], None]) -> contextlib.AbstractContextManager[Callable[[], bool]]:
        return contextlib.nullcontext(stop)

    patch.setattr("qlora_jax.training.run.stop_on_signals", on_signals)


def project(folder: Path, layers: int = 2, base: dict[str, Any] | None = None, **changes: Any) -> Config:
    """Returns the settings of a run of 10 steps; `changes` as section=dict(...), `base` for the model's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, dict[str, Any]] = {
        "model": dict(
            path=str(write_model(folder / "model", num_hidden_layers=layers, **(base or {}))), compute_dtype="float32"
        ),
        "lora": dict(rank=4, dropout=0.1),
        "data": dict(train=str(write_rows(folder / "rows.jsonl")), eval_fraction=0.2, max_length=160, buckets=2),
        "optim": dict(learning_rate=1e-2, schedule="cosine"),
        "train": dict(steps=10, micro_batch_size=2, accumulation=2, save_every=3, eval_every=5),
        "questions": {},
        "mesh": {},
    }
    for section, values in changes.items():
        sections[section] |= values
    return Config(
        model=ModelArgs(**sections["model"]),
        lora=LoraArgs(**sections["lora"]),
        data=DataArgs(**sections["data"]),
        optim=OptimArgs(**sections["optim"]),
        train=TrainArgs(**sections["train"]),
        questions=QuestionArgs(**sections["questions"]),
        mesh=MeshArgs(**sections["mesh"]),
        output=str(folder / "run"),
    )
