"""Builds a training session from a configuration: model, data, optimizer and compiled programs."""

import dataclasses
import math
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from pallas_kernels.devices import target_device
from qlora_jax.config import Config, LoraArgs, ModelArgs, TrainArgs
from qlora_jax.data.dataset import Dataset, load_dataset
from qlora_jax.data.formats.unlabelled import learned_columns
from qlora_jax.data.labels import check_format
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.registry import check_files
from qlora_jax.io.head_file import check_same_head
from qlora_jax.io.initial_file import InitialAdapter
from qlora_jax.io.loading.adapter_init import check_decomposable, subtract_initial
from qlora_jax.io.loading.loader import Loaded, Progress, load_model
from qlora_jax.io.loading.stored_codes import stored_types, with_dense_layers
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.start_adapter import read_start_adapter, starting_parameters
from qlora_jax.io.pretrained import load_for_training, open_tokenizer
from qlora_jax.methods.attach import add_lora, check_targets
from qlora_jax.methods.method import method_of
from qlora_jax.model_source import ModelSource
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.families.multimodal import text_config
from qlora_jax.models.partition import AdapterArrays, ModelParts, combine, partition, place_parts
from qlora_jax.models.precision import weight_format
from qlora_jax.models.trainable_embeddings import add_tables, rows_train
from qlora_jax.nn.linear import named_key
from qlora_jax.nn.sequence_head import INIT_STD, HeadSpec
from qlora_jax.objectives.head_objective import TrainedHead, head_of, head_spec
from qlora_jax.objectives.make_objective import fit_to_data, make_objective
from qlora_jax.objectives.objective import Objective
from qlora_jax.optim import make_schedule
from qlora_jax.training.abstract_step import abstract_step
from qlora_jax.training.compiled_step import CompiledGradients
from qlora_jax.training.corrected_state import CorrectedStateManager
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.metrics.mfu import Utilization, peak_flops, utilization
from qlora_jax.training.optimizer_state import OptimizerStateManager, make_state_manager
from qlora_jax.training.questions import Questions, open_questions
from qlora_jax.training.reference_parameters import ReferenceParameters
from qlora_jax.training.run_mesh import mesh_size, replicate
from qlora_jax.training.samples import Samples, open_samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A model, its optimizer, its data, and its compiled programs, before the first step.

    Attributes:
      objective: the loss.
      head: the sequence head that the objective trains, if any.
      gradients: the gradient program, compiled for the longest batches.
      state_manager: the optimizer's update, resident or paged.
      utilization: computes the device's utilization per step.
      fingerprint: of the base, from io.loading.base_fingerprint.
      total_steps: optimizer steps of the whole run.
      dropout_key: base PRNG key, folded with step, row index, layer and module name; None without dropout and noise.
      initial: the initial adapter, if it is a part of the weights (PiSSA, LoftQ).
      mesh: the devices that share the model and the rows; None: one device.
      not_loaded: parts of the files that are not loaded, as text; empty if there are none.
      stored_types: types of the codes that the files have of linear layers, as text; empty if they have none.
      initial_digest: of the initial adapter, with an objective that has a reference (reference_session.py).
      reference: the initial adapter, if held-out rows are compared with it.
    """

    config: Config
    model: ModelConfig
    weights: WeightFormat
    dataset: Dataset
    objective: Objective
    head: TrainedHead | None
    parts: ModelParts
    gradients: CompiledGradients
    state_manager: OptimizerStateManager
    utilization: Utilization
    schedule: optax.Schedule
    fingerprint: str
    total_steps: int
    dropout_key: jax.Array | None
    initial: InitialAdapter | None
    samples: Samples | None
    questions: Questions | None
    mesh: Mesh | None
    not_loaded: str
    stored_types: str
    initial_digest: str | None = None
    reference: ReferenceParameters | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The model's metadata and the data of a run, checked; no weight has been read yet.

    Attributes:
      objective: the loss.
      head: the sequence head that the objective trains, if any.
      new_ids: ids of the new tokens.
      start: LoRA parameters to start from.
    """

    source: ModelSource
    model: ModelConfig
    dataset: Dataset
    objective: Objective
    head: TrainedHead | None
    new_ids: tuple[int, ...]
    start: AdapterArrays | None
    samples: Samples | None
    questions: Questions | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model in memory, ready to train: a base with an adapter.

    Attributes:
      fingerprint: of the base, from io.loading.base_fingerprint.
      initial: the initial adapter, if it is a part of the weights (PiSSA, LoftQ).
      head: the sequence head, if the model has one.
    """

    source: ModelSource
    tokenizer: Tokenizer
    parts: ModelParts
    fingerprint: str
    initial: InitialAdapter | None
    head: TrainedHead | None = None


def open_inputs(config: Config, prepared: PreparedModel | None = None) -> Inputs:
    """Opens the model's files, or those of a model in memory, and reads the data.

    Raises:
      ValueError: the model's files or the data are missing, malformed or not supported.
    """
    source = open_model(config.model.path, lambda: _check_files(config)) if prepared is None else prepared.source
    model = model_config(source.config, source.config_name)
    if config.data.max_length > model.max_positions:
        raise ValueError(
            f"data.max_length: found {config.data.max_length}, expected at most {model.max_positions}, the number of "
            f"positions of {source.path}. Lower it"
        )
    check_targets(model, config.lora)
    check_decomposable(source, config.lora)
    tokenizer = open_tokenizer(source, config.model, model.vocab_size) if prepared is None else prepared.tokenizer
    objective = make_objective(config)
    dataset = load_dataset(
        config.data,
        tokenizer,
        seed=config.train.seed,
        micro_batch_size=config.train.micro_batch_size,
        accumulation=config.train.accumulation,
        objective=config.objective,
        labels=config.head.labels or (),
        kl_pairs=objective.kl_pairs,
    )
    columns = learned_columns(side.form for side, _ in dataset.report.sources)
    head = head_of(config.objective, dataset.labels, config.head.pooling, columns)
    if prepared is not None:
        check_same_head("model", prepared.head, head)
    objective = fit_to_data(objective, head, sequences=dataset.sequences)
    path, ids = config.lora.start, tokenizer.new_ids
    start = None if path is None else read_start_adapter(Path(path), model, config.lora, ids, head)
    reads = dataset.tokenizer, source, model.max_positions
    return Inputs(
        source=source,
        model=model,
        dataset=dataset,
        objective=objective,
        head=head,
        new_ids=ids,
        start=start,
        samples=open_samples(config.train, *reads),
        questions=open_questions(config.questions, *reads),
    )


def _check_files(config: Config) -> None:
    """Checks the beginning of files of rows, and that those of questions and prompts exist.

    Raises:
      ValueError: a file is missing, or its rows are not those that the objective trains on.
    """
    data = config.data
    for path in [*([data.train] if isinstance(data.train, str) else data.train), *filter(None, [data.eval])]:
        check_format(data, path, config.objective)
    check_files(config.questions)


def _initializer_range(source: ModelSource) -> float:
    """Returns the standard deviation with which transformers initializes a new head."""
    found = text_config(source.config).get("initializer_range")
    return float(found) if isinstance(found, int | float) and found > 0 else INIT_STD


def headed_parts(config: Config, inputs: Inputs, parts: ModelParts) -> ModelParts:
    """Returns the parts of a model in memory with the sequence head that the objective trains, unless it has one."""
    spec = head_spec(inputs.objective)
    if spec is None:
        return parts
    model = combine(parts)
    if model.score is None:
        model.add_sequence_head(spec, _adapter_key(config), _initializer_range(inputs.source))
    return partition(model)


def compile_gradients(config: Config, inputs: Inputs, mesh: Mesh | None = None) -> CompiledGradients:
    """Compiles the run's gradient program for its longest batches, before `prepare` takes memory."""
    shape = (config.train.accumulation, config.train.micro_batch_size, max(inputs.dataset.buckets))
    step = abstract_step(
        inputs.model,
        weights_of(config, inputs),
        config.lora,
        batch=shape,
        new_ids=inputs.new_ids,
        packed=inputs.dataset.packed,
        branching=inputs.dataset.branching,
        remat=config.train.remat,
        neftune_noise_alpha=config.train.neftune_noise_alpha,
        objective=inputs.objective,
        router=config.router,
        mesh=mesh,
    )
    gradients = CompiledGradients(step)
    gradients.compiled(shape)
    return gradients


def weights_of(config: Config, inputs: Inputs) -> WeightFormat:
    """The run's weight format."""
    return weights_for(config.model, inputs.source, inputs.model)


def weights_for(args: ModelArgs, source: ModelSource, features: ModelConfig) -> WeightFormat:
    """The weight format for `args`; layers that a 4-bit checkpoint leaves in 16 bits stay in 16 bits."""
    return with_dense_layers(weight_format(args, features), source, features)


def prepare(
    config: Config,
    inputs: Inputs,
    gradients: CompiledGradients,
    progress: Progress,
    initial: InitialAdapter | None = None,
    fingerprint: str | None = None,
) -> Session:
    """Loads and quantizes the base, adds the adapter, and returns the session at step 0.

    Args:
      initial: for a resumed run, what its adapters started with, if that is a part of the weights.
      fingerprint: for a resumed run, that of its base, which the new one is compared with.

    Raises:
      ValueError: settings of paging that cannot be, before a weight is read; or files that do not fit the model.
    """
    state_manager = make_manager(config, inputs, gradients)
    loaded, initial = load_base(config, inputs, gradients.mesh, progress, initial, fingerprint)
    parts = training_parts(
        loaded.model,
        config.lora,
        _adapter_key(config),
        new_ids=inputs.new_ids,
        initial=initial,
        start=inputs.start,
        head=head_spec(inputs.objective),
        head_std=_initializer_range(inputs.source),
        mesh=gradients.mesh,
    )
    found = {"fingerprint": loaded.fingerprint, "initial": initial}
    return make_session(config, inputs, gradients, parts, state_manager, **found)


def load_base(
    config: Config,
    inputs: Inputs,
    mesh: Mesh | None,
    progress: Progress,
    initial: InitialAdapter | None,
    fingerprint: str | None,
) -> tuple[Loaded, InitialAdapter | None]:
    """Loads and quantizes the base of a new or resumed run: (the base, what its adapters start with).

    Args:
      initial: for a resumed run, what its adapters started with, if that is a part of the weights.
      fingerprint: for a resumed run, that of its base.
    """
    model = inputs.source, inputs.model, weights_of(config, inputs)
    if initial is None:
        return load_for_training(
            *model,
            *(config.lora, _adapter_key(config), progress),
            mesh=mesh,
            new_ids=inputs.new_ids,
            fingerprint=fingerprint,
        )
    transform = subtract_initial(initial, inputs.model, config.lora)
    whole = rows_train(inputs.model, config.lora, inputs.new_ids)
    loaded = load_model(*model, progress, transform, mesh=mesh, whole_tables=whole, fingerprint=fingerprint)
    return loaded, initial


def _adapter_key(config: Config) -> jax.Array:
    """The key of the adapter's initial values."""
    return named_key(jax.random.key(config.train.seed), "lora")


def training_parts(
    model: CausalLM,
    lora: LoraArgs,
    key: jax.Array,
    *,
    new_ids: tuple[int, ...],
    initial: InitialAdapter | None,
    start: AdapterArrays | None,
    head: HeadSpec | None = None,
    head_std: float = INIT_STD,
    mesh: Mesh | None = None,
) -> ModelParts:
    """Adds an adapter to the base, in place, and returns the model's parts.

    Args:
      key: of the adapter's initial values.
      new_ids: ids of new tokens, whose rows train.
      initial: values to start with, with PiSSA and LoftQ.
      start: LoRA parameters to start from.
      head: the sequence head to add, if any.
      head_std: standard deviation of its initial values.
      mesh: the devices that the base is on; None for the default device.

    Raises:
      ValueError: the parameters to start from do not fit the model.
    """
    add_lora(model, lora, key, None if initial is None else initial.factors, mesh)
    if head is not None:
        model.add_sequence_head(head, key, head_std)
    add_tables(model, new_ids, lora)
    parts = partition(model)
    return parts if start is None else parts.with_lora(starting_parameters(start, parts.lora, Path(str(lora.start))))


def steps_of_run(train: TrainArgs, steps_per_epoch: int) -> int:
    """Returns the number of optimizer steps of a run."""
    return train.steps or math.ceil(train.epochs * steps_per_epoch)


def make_manager(config: Config, inputs: Inputs, gradients: CompiledGradients) -> OptimizerStateManager:
    """Returns the manager of the run's optimizer state.

    Raises:
      ValueError: settings of paging that cannot be.
    """
    total_steps = steps_of_run(config.train, inputs.dataset.steps_per_epoch)
    manager = make_state_manager(config.optim, total_steps, gradients)
    correction = method_of(config.lora.method).correction(inputs.model, config.lora)
    return manager if correction is None else CorrectedStateManager(manager, correction, gradients)


def make_session(
    config: Config,
    inputs: Inputs,
    gradients: CompiledGradients,
    parts: ModelParts,
    state_manager: OptimizerStateManager,
    *,
    fingerprint: str,
    initial: InitialAdapter | None,
) -> Session:
    """The session of a run at step 0, from a model in memory, which is placed on the run's devices."""
    dataset, mesh, weights = inputs.dataset, gradients.mesh, weights_of(config, inputs)
    total_steps = steps_of_run(config.train, dataset.steps_per_epoch)
    key = jax.random.key(config.train.seed)
    return Session(
        config=config,
        model=inputs.model,
        weights=weights,
        dataset=dataset,
        objective=inputs.objective,
        head=inputs.head,
        parts=parts if mesh is None else place_parts(parts, mesh),
        gradients=gradients,
        state_manager=state_manager,
        utilization=_utilization(config, inputs, weights, mesh_size(mesh).devices),
        schedule=make_schedule(config.optim, total_steps),
        fingerprint=fingerprint,
        total_steps=total_steps,
        dropout_key=replicate(named_key(key, "dropout"), mesh) if gradients.is_random else None,
        initial=initial,
        samples=inputs.samples,
        questions=inputs.questions,
        mesh=mesh,
        not_loaded=inputs.source.not_loaded,
        stored_types=stored_types(inputs.source, inputs.model),
    )


def _utilization(config: Config, inputs: Inputs, weights: WeightFormat, devices: int) -> Utilization:
    new, remat = len(inputs.new_ids), config.train.remat
    step = StepShape(
        model=inputs.model, weights=weights, lora=config.lora, batch=(1, 1, 1), remat=remat, new_tokens=new
    )
    return utilization(step, peak_flops(target_device(), weights), devices)
