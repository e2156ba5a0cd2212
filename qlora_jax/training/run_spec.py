"""A run before it reads weights: its settings, its checked inputs, and its compiled step."""

import dataclasses
import functools
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from pallas_kernels.devices import target_device
from qlora_jax.config import Config, ModelArgs
from qlora_jax.config.fields import TEMPLATE_CHOICES
from qlora_jax.config.sizes import parse_bytes
from qlora_jax.data.class_labels import check_format
from qlora_jax.data.dataset import Dataset, load_dataset, padding_id, with_template
from qlora_jax.data.formats.turn_fields import Tools
from qlora_jax.data.formats.unlabelled import learned_columns
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.registry import check_files
from qlora_jax.inference.lowering import ProgramMemory, lower_decoding, most_memory
from qlora_jax.inference.prompts import stop_ids
from qlora_jax.io.head_file import check_same_head
from qlora_jax.io.initial_file import InitialAdapter
from qlora_jax.io.loading.adapter_init import check_decomposable
from qlora_jax.io.loading.stored_codes import stored_types, with_dense_layers
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.start_adapter import read_start_adapter
from qlora_jax.io.pretrained import open_tokenizer
from qlora_jax.methods.attach import check_targets
from qlora_jax.model_source import ModelSource
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import AdapterArrays, ModelParts
from qlora_jax.models.precision import weight_format
from qlora_jax.objectives.head_objective import TrainedHead, head_of
from qlora_jax.objectives.make_objective import fit_to_data, make_objective
from qlora_jax.objectives.objective import Objective, needs_reference
from qlora_jax.optim import make_schedule
from qlora_jax.rewards.digests import code_digests
from qlora_jax.rollouts.inputs import RolloutInputs, row_lengths
from qlora_jax.rollouts.prompt_rows import read_prompt_rows
from qlora_jax.rollouts.tool_template import ToolTemplate
from qlora_jax.training.compiled_programs import CompiledGradients
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.data_replies import check_completions
from qlora_jax.training.device_mesh import mesh_size
from qlora_jax.training.metrics.mfu import Utilization, peak_flops, utilization
from qlora_jax.training.questions import Questions, Samples, open_questions, open_samples
from qlora_jax.training.step_spec import StepSpec
from qlora_jax.training.teacher.logprob_cache import TeacherSource
from qlora_jax.verifiers.process import is_address


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInputs:
    """The model's metadata and the data of a run, checked; no weight has been read yet.

    Attributes:
      objective: the loss.
      head: the sequence head that the objective trains, if any.
      new_ids: ids of the new tokens.
      start: LoRA parameters to start from.
      rollouts: the prompts, if the model learns from its own replies.
      teacher: the model whose predictions are learned, if the objective has one.
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
    rollouts: RolloutInputs | None = None
    teacher: TeacherSource | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Padded lengths of training batches, ascending."""
        return self.dataset.buckets if self.rollouts is None else self.rollouts.lengths

    @property
    def branching(self) -> bool:
        """True if rows of training batches may be trees."""
        return self.dataset.branching or self.rollouts is not None


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


def open_inputs(config: Config, prepared: PreparedModel | None = None, tools: Tools = ()) -> RunInputs:
    """Opens the model's files, or those of a model in memory, and reads the data.

    Args:
      tools: schemas of the functions of --tool and --environment.

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
    has_tools = bool(tools) or not (config.environment is None or is_address(config.environment))
    if is_address(config.environment) and with_template(tokenizer, config.data).chat_template is None:
        raise ValueError(
            f"--environment: found a model without a chat template. Set data.chat_template to {TEMPLATE_CHOICES}"
        )
    template = _tool_template(config, tokenizer, source, tools) if has_tools else None
    dataset = read_dataset(config, tokenizer, tools)
    columns = learned_columns(side.form for side, _ in dataset.report.sources)
    head = head_of(config.objective, dataset.labels, config.head.pooling, columns)
    if prepared is not None:
        check_same_head("model", prepared.head, head)
    objective = fit_to_data(objective, head, sequences=dataset.sequences)
    if config.lora.merge_from and (needs_reference(objective) or objective.row_kind == "prompt"):
        raise ValueError(
            f"lora.merge_from: found {config.lora.merge_from} with objective={config.objective}, whose reference or "
            "sampler has rounded weights in all steps. Remove one of these settings"
        )
    path, ids = config.lora.start, tokenizer.new_ids
    start = None if path is None else read_start_adapter(Path(path), model, config.lora, ids, head)
    reads = dataset.tokenizer, source, model.max_positions
    return RunInputs(
        source=source,
        model=model,
        dataset=dataset,
        objective=objective,
        head=head,
        new_ids=ids,
        start=start,
        samples=open_samples(config.train, *reads),
        questions=open_questions(config.questions, *reads),
        rollouts=_open_rollouts(config, dataset, source, template) if objective.row_kind == "prompt" else None,
    )


def read_dataset(config: Config, tokenizer: Tokenizer, tools: Tools = ()) -> Dataset:
    """Reads the rows that a run trains on; `tools` are the schemas of its functions."""
    objective = make_objective(config)
    return load_dataset(
        config.data,
        tokenizer,
        seed=config.train.seed,
        micro_batch_size=config.train.micro_batch_size,
        accumulation=config.train.accumulation,
        objective=config.objective,
        labels=config.head.labels or (),
        kl_pairs=objective.kl_pairs,
        reply_tokens=config.rollouts.max_completion_length if objective.row_kind == "prompt" else 0,
        tools=tools,
    )


def _tool_template(config: Config, tokenizer: Tokenizer, source: ModelSource, tools: Tools) -> ToolTemplate:
    tokenizer = with_template(tokenizer, config.data)
    return ToolTemplate(tokenizer, tools, stop_ids(tokenizer, source.tokenizer["stop_token_ids"], chat=True))


def _open_rollouts(
    config: Config, dataset: Dataset, source: ModelSource, template: ToolTemplate | None
) -> RolloutInputs:
    """Reads the rows' other columns; raises ValueError if several processes train."""
    if jax.process_count() > 1:
        raise ValueError(
            f"objective: {config.objective} trains in one process, on any number of its devices (found "
            f"{jax.process_count()} processes). Start one process"
        )
    data, settings, tokenizer = config.data, config.rollouts, dataset.tokenizer
    forms = {split.path: split.form for split, _ in dataset.report.sources}
    prompts = read_prompt_rows(data, dataset.train.files, forms)
    if config.distillation.lmbda < 1:
        check_completions(prompts)
    held_out = None
    if dataset.eval is not None and dataset.report.eval is not None:
        forms |= {} if data.eval is None else {data.eval: dataset.report.eval.form}
        held_out = read_prompt_rows(data, dataset.eval.files, forms)
    # Environments add text to prompts during the run.
    longest = dataset.buckets[-1]
    if config.environment is not None:
        longest = max(data.max_length - settings.max_completion_length, dataset.eval_buckets[-1])
    train, held = config.train, 0 if dataset.eval is None else len(dataset.eval)
    asked = train.micro_batch_size * train.accumulation * config.policy.steps_per_generation
    stops = stop_ids(tokenizer, source.tokenizer["stop_token_ids"], chat=tokenizer.chat_template is not None)
    return RolloutInputs(
        prompts=prompts,
        held_out=held_out,
        longest_prompt=max(longest, dataset.eval_buckets[-1]),
        most_replies=max(asked * settings.num_generations, held),
        lengths=row_lengths(longest, settings.max_completion_length, settings.num_generations, data.buckets),
        stop_ids=stops if template is None else template.stop_ids,
        pad_id=padding_id(tokenizer),
        template=template,
        code=code_digests(config),
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


def weights_of(config: Config, inputs: RunInputs) -> WeightFormat:
    """The run's weight format."""
    return weights_for(config.model, inputs.source, inputs.model)


def weights_for(args: ModelArgs, source: ModelSource, features: ModelConfig) -> WeightFormat:
    """The weight format for `args`; layers that a 4-bit checkpoint leaves in 16 bits stay in 16 bits."""
    return with_dense_layers(weight_format(args, features), source, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run before it reads weights.

    Attributes:
      gradients: the gradient programs, compiled for the longest batches.
    """

    config: Config
    inputs: RunInputs
    gradients: CompiledGradients

    @property
    def step(self) -> StepSpec:
        """The step for the longest batches."""
        return self.gradients.step

    @property
    def mesh(self) -> Mesh | None:
        """The devices that share the model and the rows; None: one device."""
        return self.gradients.mesh

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        train, passes = self.config.train, self.config.policy.num_iterations
        return train.steps or passes * train.total_steps(self.inputs.dataset.steps_per_epoch)

    @property
    def first_rounded(self) -> int:
        """The number of steps before the first with rounded weights (`lora.merge_from`); the last step has them."""
        return min(round(self.config.lora.merge_from * self.total_steps), self.total_steps - 1)

    @functools.cached_property
    def schedule(self) -> optax.Schedule:
        """The learning rate by step."""
        return make_schedule(self.config.optim, self.total_steps)

    @functools.cached_property
    def utilization(self) -> Utilization:
        """Computes the devices' utilization per step."""
        weights, new, remat = self.step.weights, len(self.inputs.new_ids), self.config.train.remat
        step = StepShape(
            model=self.inputs.model,
            weights=weights,
            lora=self.config.lora,
            batch=(1, 1, 1),
            remat=remat,
            new_tokens=new,
        )
        return utilization(step, peak_flops(target_device(), weights), mesh_size(self.mesh).devices)

    @functools.cached_property
    def rollout_memory(self) -> ProgramMemory | None:
        """The memory of sampling replies; compiles the programs on first use. None for a run that samples none."""
        settings, inputs = self.config.rollouts, self.inputs.rollouts
        if inputs is None:
            return None
        prompts = [range(inputs.longest_prompt)] * inputs.most_replies
        limits = settings.max_completion_length, parse_bytes(settings.cache)
        return most_memory("rollouts", lower_decoding(self.gradients.parts, prompts, *limits))

    @functools.cached_property
    def stored_types(self) -> str:
        """Types of the codes that the files have of linear layers, as text; empty if they have none."""
        return stored_types(self.inputs.source, self.inputs.model)
