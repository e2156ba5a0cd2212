"""A run with its model on the devices: loads the base, adds the adapter, and makes the optimizer's state manager."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from qlora_jax.config import Config, LoraArgs
from qlora_jax.io.initial_file import InitialAdapter
from qlora_jax.io.loading.adapter_init import subtract_initial
from qlora_jax.io.loading.loader import Loaded, Progress, load_model
from qlora_jax.io.peft.start_adapter import starting_parameters
from qlora_jax.io.pretrained import load_for_training
from qlora_jax.methods.attach import attach_method
from qlora_jax.methods.method import method_of
from qlora_jax.model_source import ModelSource
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families.multimodal import text_config
from qlora_jax.models.partition import AdapterArrays, Lora, ModelParts, combine, partition, place_parts
from qlora_jax.models.trainable_embeddings import add_tables, rows_train
from qlora_jax.nn.random_keys import named_key
from qlora_jax.nn.sequence_head import INIT_STD, HeadSpec
from qlora_jax.objectives.head_objective import head_spec
from qlora_jax.optim.page_pool import Memory, memory_of
from qlora_jax.rewards.functions import RewardFunctions
from qlora_jax.training.device_mesh import replicate
from qlora_jax.training.optimizer_state import CorrectedStateManager, OptimizerStateManager, make_state_manager
from qlora_jax.training.run_spec import RunSpec
from qlora_jax.training.teacher.logprob_cache import DistilledBatches


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceParameters:
    """The adapter of the reference, with which held-out evaluation compares the model.

    Attributes:
      on_host: its arrays; on a mesh they are cut like those of the model.
    """

    on_host: Lora
    memory: Memory

    @classmethod
    def of(cls, lora: Lora, mesh: Mesh | None) -> "ReferenceParameters":
        """Copies parameters from the devices."""
        memory, (leaves, structure) = memory_of(mesh), jax.tree.flatten(lora)
        return cls(on_host=structure.unflatten(memory.to_host(tuple(leaves))), memory=memory)

    def on_devices(self) -> Lora:
        """Returns a copy on the devices, for one evaluation."""
        return jax.tree.map(self.memory.put, self.on_host)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A run with its model on the devices, before the first step.

    Attributes:
      state_manager: the optimizer's update, resident or paged.
      dropout_key: base PRNG key, folded with step, row index, layer and module name; None without dropout and noise.
      fingerprint: of the base, from io.loading.base_fingerprint.
      initial: the initial adapter, if it is a part of the weights (PiSSA, LoftQ).
      initial_digest: of the initial adapter, with an objective that has a reference (reference_logps.py).
      reference: the initial adapter, if held-out rows are compared with it, or each step reads it.
      rewards: the reward functions, if the model learns from rewards of the replies that it samples.
      teacher: gives batches a teacher's predictions, if the model learns them.
    """

    run: RunSpec
    parts: ModelParts
    state_manager: OptimizerStateManager
    dropout_key: jax.Array | None
    fingerprint: str
    initial: InitialAdapter | None
    initial_digest: str | None = None
    reference: ReferenceParameters | None = None
    rewards: RewardFunctions | None = None
    teacher: DistilledBatches | None = None


def _initializer_range(source: ModelSource) -> float:
    """Returns the standard deviation with which transformers initializes a new head."""
    found = text_config(source.config).get("initializer_range")
    return float(found) if isinstance(found, int | float) and found > 0 else INIT_STD


def headed_parts(run: RunSpec, parts: ModelParts) -> ModelParts:
    """Returns the parts of a model in memory with the sequence head that the objective trains, unless it has one."""
    spec = head_spec(run.inputs.objective)
    if spec is None:
        return parts
    model = combine(parts)
    if model.score is None:
        model.add_sequence_head(spec, _adapter_key(run.config), _initializer_range(run.inputs.source))
    return partition(model)


def prepare(
    run: RunSpec, progress: Progress, initial: InitialAdapter | None = None, fingerprint: str | None = None
) -> Session:
    """Loads and quantizes the base, adds the adapter, and returns the session at step 0.

    Args:
      initial: for a resumed run, what its adapters started with, if that is a part of the weights.
      fingerprint: for a resumed run, that of its base, which the new one is compared with.

    Raises:
      ValueError: settings of paging that cannot be, before a weight is read; or files that do not fit the model.
    """
    state_manager = make_manager(run)
    loaded, initial = load_base(run, progress, initial, fingerprint)
    parts = training_parts(
        loaded.model,
        run.config.lora,
        _adapter_key(run.config),
        new_ids=run.inputs.new_ids,
        initial=initial,
        start=run.inputs.start,
        head=head_spec(run.inputs.objective),
        head_std=_initializer_range(run.inputs.source),
        mesh=run.mesh,
    )
    return make_session(run, parts, state_manager, fingerprint=loaded.fingerprint, initial=initial)


def load_base(
    run: RunSpec, progress: Progress, initial: InitialAdapter | None, fingerprint: str | None
) -> tuple[Loaded, InitialAdapter | None]:
    """Loads and quantizes the base of a new or resumed run: (the base, what its adapters start with).

    Args:
      initial: for a resumed run, what its adapters started with, if that is a part of the weights.
      fingerprint: for a resumed run, that of its base.
    """
    inputs, lora = run.inputs, run.config.lora
    model = inputs.source, inputs.model, run.step.weights
    if initial is None:
        key = _adapter_key(run.config)
        found = {"mesh": run.mesh, "new_ids": inputs.new_ids, "fingerprint": fingerprint}
        return load_for_training(*model, lora, key, progress, **found)
    transform = subtract_initial(initial, inputs.model, lora)
    whole = rows_train(inputs.model, lora, inputs.new_ids)
    loaded = load_model(*model, progress, transform, mesh=run.mesh, whole_tables=whole, fingerprint=fingerprint)
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
    attach_method(model, lora, key, None if initial is None else initial.factors, mesh)
    if head is not None:
        model.add_sequence_head(head, key, head_std)
    add_tables(model, new_ids, lora)
    parts = partition(model)
    return parts if start is None else parts.with_lora(starting_parameters(start, parts.lora, Path(str(lora.start))))


def make_manager(run: RunSpec) -> OptimizerStateManager:
    """Returns the manager of the run's optimizer state.

    Raises:
      ValueError: settings of paging that cannot be.
    """
    manager = make_state_manager(run.config.optim, run.total_steps, run.gradients)
    correction = method_of(run.config.lora.method).correction(run.inputs.model, run.config.lora)
    return manager if correction is None else CorrectedStateManager(manager, correction, run.gradients)


def make_session(
    run: RunSpec,
    parts: ModelParts,
    state_manager: OptimizerStateManager,
    *,
    fingerprint: str,
    initial: InitialAdapter | None,
) -> Session:
    """The session of a run at step 0, from a model in memory, which is placed on the run's devices."""
    key = named_key(jax.random.key(run.config.train.seed), "dropout")
    return Session(
        run=run,
        parts=parts if run.mesh is None else place_parts(parts, run.mesh),
        state_manager=state_manager,
        dropout_key=replicate(key, run.mesh) if run.gradients.is_random else None,
        fingerprint=fingerprint,
        initial=initial,
    )
