"""Everything a run holds before its first step, built from the configuration alone."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import target_device
from qlora_jax.config import Config
from qlora_jax.data.dataset import Dataset, load_dataset
from qlora_jax.io.adapter_init import Initial, Splits, check_source, rest_by
from qlora_jax.io.loader import Loaded, Progress, as_held, load_model
from qlora_jax.io.model_source import ModelSource
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.reader import check_shapes, read_start
from qlora_jax.io.pretrained import open_tokenizer
from qlora_jax.models.add_adapters import add_lora
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import Lora, ModelParts, is_table, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.models.trainable_embeddings import add_tables
from qlora_jax.nn.linear import named_key
from qlora_jax.optim import make_schedule
from qlora_jax.training.abstract_step import abstract_step
from qlora_jax.training.compiled_step import Gradients
from qlora_jax.training.cost.flops import Step
from qlora_jax.training.mfu import Utilization, peak_of, utilization
from qlora_jax.training.optimizer_state import Updates, make_updates
from qlora_jax.training.questions import Questions, open_questions
from qlora_jax.training.samples import Samples, open_samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A model in three parts, its optimizer, its data, and its compiled programs.

    Attributes:
      gradients: compiled for the longest batches.
      updates: what is done with the optimizer's state.
      utilization: of the device, by steps.
      fingerprint: of the base, as io.loader makes it.
      total_steps: optimizer steps of the whole run.
      dropout_key: folded with step, micro-batch, layer and name; None where there is no dropout.
      initial: what adapters begin with, where that is a part of the weights.
    """

    config: Config
    model: ModelConfig
    weights: WeightFormat
    dataset: Dataset
    parts: ModelParts
    gradients: Gradients
    updates: Updates
    utilization: Utilization
    schedule: Callable[[Any], Any]
    fingerprint: str
    total_steps: int
    dropout_key: jax.Array | None
    initial: Initial | None
    samples: Samples | None
    questions: Questions | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads, checked; no weight has been read yet.

    Attributes:
      new_ids: of the new tokens.
      start: LoRA parameters to go on from.
    """

    source: ModelSource
    model: ModelConfig
    dataset: Dataset
    new_ids: tuple[int, ...]
    start: Mapping[str, Mapping[str, Any]] | None
    samples: Samples | None
    questions: Questions | None


def open_inputs(config: Config) -> Inputs:
    """The model's metadata and the data set.

    Raises:
      ValueError: whatever is wrong with the model's files, its config, or the data.
    """
    source = open_model(config.model.path)
    model = model_config(source.config)
    if config.data.max_length > model.max_positions:
        raise ValueError(
            f"data.max_length={config.data.max_length} is longer than the model allows: {source.path} was made for "
            f"{model.max_positions} positions; set data.max_length to at most that"
        )
    tokenizer = open_tokenizer(source, config.model, model.vocab_size)
    dataset = load_dataset(
        config.data,
        tokenizer,
        seed=config.train.seed,
        micro_batch_size=config.train.micro_batch_size,
        accumulation=config.train.accumulation,
    )
    check_source(source, config.lora)
    path, ids = config.lora.start, tokenizer.new_ids
    start = None if path is None else read_start(Path(path), model, config.lora, ids)
    asked = dataset.tokenizer, source, model.max_positions
    return Inputs(
        source=source,
        model=model,
        dataset=dataset,
        new_ids=ids,
        start=start,
        samples=open_samples(config.train, *asked),
        questions=open_questions(config.questions, *asked),
    )


def compile_gradients(config: Config, inputs: Inputs) -> Gradients:
    """The run's step, compiled for its longest batches; done before `prepare`, when memory is still free."""
    weights, remat = weights_of(config, inputs), config.train.remat
    shape = (config.train.accumulation, config.train.micro_batch_size, max(inputs.dataset.buckets))
    step = abstract_step(
        inputs.model,
        weights,
        config.lora,
        batch=shape,
        new_ids=inputs.new_ids,
        packed=inputs.dataset.packed,
        remat=remat,
    )
    gradients = Gradients(step)
    gradients.compiled(shape)
    return gradients


def weights_of(config: Config, inputs: Inputs) -> WeightFormat:
    """How the run holds its frozen weights: layers that the files leave in 16 bit beside 4-bit ones stay so."""
    return as_held(weight_format(config.model), inputs.source, inputs.model)


def prepare(
    config: Config, inputs: Inputs, gradients: Gradients, progress: Progress, initial: Initial | None = None
) -> Session:
    """Loads, quantizes and adapts: the session of a run at step 0.

    Args:
      initial: what the run's adapters began with, where it goes on and that is a part of the weights.
    """
    dataset = inputs.dataset
    weights = weights_of(config, inputs)
    total_steps = config.train.steps or math.ceil(config.train.epochs * dataset.steps_per_epoch)
    updates = make_updates(config.optim, total_steps, gradients)
    key = jax.random.key(config.train.seed)
    loaded, initial = _loaded(config, inputs, weights, progress, initial, named_key(key, "lora"))
    add_lora(loaded.model, config.lora, named_key(key, "lora"), None if initial is None else initial.factors)
    add_tables(loaded.model, inputs.new_ids, config.lora)
    parts = partition(loaded.model)
    if inputs.start is not None:
        parts = parts.with_lora(_started(inputs.start, parts.lora, Path(str(config.lora.start))))
    return Session(
        config=config,
        model=inputs.model,
        weights=weights,
        dataset=dataset,
        parts=parts,
        gradients=gradients,
        updates=updates,
        utilization=_utilization(config, inputs, weights),
        schedule=make_schedule(config.optim, total_steps),
        fingerprint=loaded.fingerprint,
        total_steps=total_steps,
        dropout_key=named_key(key, "dropout") if config.lora.dropout else None,
        initial=initial,
        samples=inputs.samples,
        questions=inputs.questions,
    )


def _started(start: Mapping[str, Mapping[str, Any]], fresh: Lora, path: Path) -> Lora:
    """The parameters of the adapter in `path`; fresh ones where it may lack some: new tokens, and tables that train
    whole, may be added to an adapter that has none."""
    added = {name: leaves for name, leaves in fresh.items() if name not in start and is_table(name)}
    started = {**added, **start}
    check_shapes(path, started, fresh)
    return jax.tree.map(lambda values, like: jnp.asarray(values, like.dtype), started, fresh)


def _utilization(config: Config, inputs: Inputs, weights: WeightFormat) -> Utilization:
    new, remat = len(inputs.new_ids), config.train.remat
    step = Step(model=inputs.model, weights=weights, lora=config.lora, batch=(1, 1, 1), remat=remat, new_tokens=new)
    return utilization(step, peak_of(target_device(), weights))


def _loaded(
    config: Config, inputs: Inputs, weights: WeightFormat, progress: Progress, initial: Initial | None, key: jax.Array
) -> tuple[Loaded, Initial | None]:
    """The base, and what of it the adapters begin with: found as it is loaded, or given."""
    load = functools.partial(load_model, inputs.source, inputs.model, weights, progress)
    if config.lora.init == "default":
        return load(), None
    if initial is not None:
        return load(rest_by(initial, inputs.model, config.lora)), initial
    splits = Splits(inputs.model, weights, config.lora, key)
    return load(splits), splits.initial()
