"""Loads a model for training steps outside of the training loop, and makes random batches."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import numpy as np
import optax

from qlora_jax.api.load import QuantType
from qlora_jax.config import LoraArgs, ModelArgs, OptimArgs
from qlora_jax.config.methods import MergeInto
from qlora_jax.io.export.gguf_metadata import with_merge_types
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.loading.stored_codes import with_dense_layers
from qlora_jax.io.open_model import open_model
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.optim import make_optimizer
from qlora_jax.training.compiled_programs import CompiledGradients
from qlora_jax.training.step_spec import StepSpec
from scripts.bench.support.progress import phase


class LoadedStep(NamedTuple):
    """A quantized model with adapters on all linear layers, its optimizer at step 0, and its compiled gradients."""

    config: ModelConfig
    weights: WeightFormat
    gradients: CompiledGradients
    parts: ModelParts
    optimizer: optax.GradientTransformation
    state: optax.OptState


def load_step(
    path: str,
    *,
    rank: int,
    compute_dtype: Literal["auto", "bfloat16", "float32"],
    batch: tuple[int, int, int],
    remat: str,
    quant_type: QuantType = "nf4",
    merge_into: MergeInto | None = None,
    compiled: Callable[[], None] = lambda: None,
) -> LoadedStep:
    """Compiles the gradients, then loads and quantizes the model.

    Args:
      path: a GGUF file or a Hugging Face folder.
      batch: (micro-batches, rows, tokens).
      quant_type: as `model.quant_type`.
      merge_into: as `lora.merge_into`.
      compiled: called after compiling, before loading.
    """
    phase("compiling the step")
    source = open_model(path)
    config = model_config(source.config)
    adapters = with_merge_types(LoraArgs(rank=rank, merge_into=merge_into), source, config)
    asked = weight_format(ModelArgs(path=path, compute_dtype=compute_dtype, quant_type=quant_type), config)
    weights = with_dense_layers(asked, source, config)
    gradients = CompiledGradients(StepSpec(model=config, weights=weights, lora=adapters, batch=batch, remat=remat))
    gradients.compiled(batch)
    compiled()
    phase("loading the model")
    model = load_model(source, config, weights).model
    attach_method(model, adapters, jax.random.key(0))
    parts = partition(model)
    optimizer = make_optimizer(OptimArgs(max_grad_norm=1.0, warmup_ratio=0.0), 1000)
    return LoadedStep(config, weights, gradients, parts, optimizer, optimizer.init(parts.lora))


def random_batch(rng: np.random.Generator, vocabulary: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """Returns one micro-batch of `rows` x `length` random tokens, all supervised."""
    ids = rng.integers(3, vocabulary, (1, rows, length + 1)).astype(np.int32)
    return {"inputs": ids[..., :-1], "targets": ids[..., 1:], "weights": np.ones((1, rows, length), np.float32)}
