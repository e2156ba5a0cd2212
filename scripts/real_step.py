"""What bench_step.py and profile_train.py both start from: a model on disk as a training step holds it, and a batch."""

from typing import Any, NamedTuple

import jax
import numpy as np

from qlora_jax.config import LoraArgs, ModelArgs, OptimArgs
from qlora_jax.io.loader import load_model
from qlora_jax.io.source import open_model
from qlora_jax.models.adapt import add_lora
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import partition
from qlora_jax.models.precision import weight_format
from qlora_jax.optim import make_optimizer


class Held(NamedTuple):
    """A model in NF4 with adapters on all linear layers, and its optimizer at step 0."""

    config: ModelConfig
    weights: WeightFormat
    graphdef: Any
    lora: Any
    base: Any
    optimizer: Any
    state: Any


def hold(path: str, *, rank: int, compute_dtype: str) -> Held:
    """Loads and quantizes the model at `path`, a GGUF file or a Hugging Face folder."""
    source = open_model(path)
    weights = weight_format(ModelArgs(path=path, compute_dtype=compute_dtype))
    model = load_model(source, model_config(source.config), weights).model
    add_lora(model, LoraArgs(rank=rank), jax.random.key(0))
    graphdef, lora, base = partition(model)
    optimizer = make_optimizer(OptimArgs(max_grad_norm=1.0, warmup_ratio=0.0), 1000)
    return Held(model.config, weights, graphdef, lora, base, optimizer, optimizer.init(lora))


def random_batch(rng: np.random.Generator, vocabulary: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """One micro-batch, every token supervised."""
    ids = rng.integers(3, vocabulary, (1, rows, length + 1)).astype(np.int32)
    return {"inputs": ids[..., :-1], "targets": ids[..., 1:], "weights": np.ones((1, rows, length), np.float32)}
