"""Reads the adapter from which training starts (`lora.start`), and checks that it fits the run's settings."""

from pathlib import Path

import jax
import jax.numpy as jnp

from qlora_jax.config import LoraArgs
from qlora_jax.config.methods import METHODS
from qlora_jax.io.head_file import check_same_head
from qlora_jax.io.peft.reader import read_adapter
from qlora_jax.methods.method import method_of
from qlora_jax.methods.peft_form import setting_differences
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import SCORE
from qlora_jax.models.partition import AdapterArrays, Lora, is_table
from qlora_jax.models.trainable_embeddings import trainable_table_names
from qlora_jax.objectives.head_objective import TrainedHead


def read_start_adapter(
    folder: Path, model: ModelConfig, args: LoraArgs, new_ids: tuple[int, ...], head: TrainedHead | None = None
) -> AdapterArrays:
    """Reads the parameters of an adapter from which training starts (lora.start).

    Args:
      args: the settings of the new run.
      new_ids: ids of the run's new tokens.
      head: the run's sequence head, if it has one.

    Raises:
      ValueError: settings, new tokens or sequence head differ from the adapter's (with both values), or the adapter has
        whole tables that the run does not train, or frozen matrices that no seed gives.
    """
    adapter = read_adapter(folder, model)
    if adapter.head is not None and (adapter.head.outputs or (head is not None and not head.outputs)):
        check_same_head(f"lora.start={folder}", adapter.head, head)
    if missing := adapter.tables.keys() - set(trainable_table_names(model, args)):
        raise ValueError(
            f"lora.start={folder}: it contains all of {' and '.join(sorted(missing))}. Add them to "
            "lora.modules_to_save to train them further; or merge it (qlora-jax export --run FOLDER --format "
            "hf) and train that model"
        )
    if adapter.new_ids not in ((), new_ids):
        raise ValueError(
            f"lora.start={folder}: its new tokens differ from model.new_tokens (found {list(adapter.new_ids)}, "
            f"expected {list(new_ids) or 'none'}). Set model.new_tokens to the adapter's tokens in order"
        )
    if adapter.frozen:
        source = METHODS[adapter.args.method].drawn_from
        raise ValueError(
            f"lora.start={folder}: its {' and '.join(adapter.frozen)} are not those of {source} "
            f"{getattr(adapter.args, source)}, which a run would use. Merge it (qlora-jax export --run "
            "FOLDER --format hf) and train that model"
        )
    wrong, form = [], method_of(args.method).peft
    if (METHODS[args.method].stored_as or args.method) != adapter.args.method:
        wrong += setting_differences(["method"], args, adapter.args)
    if form is not None and form is method_of(adapter.args.method).peft:
        wrong += form.differences(args, adapter.args, model)
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(
            f"lora.start={folder}: settings differ from the adapter's. Use those it was trained with:\n  {lines}"
        )
    return {**adapter.lora, **{name: {"weight": table} for name, table in adapter.tables.items()}}


def check_shapes(path: Path, lora: AdapterArrays, expected: AdapterArrays) -> None:
    """Checks that an adapter has the expected projections and shapes.

    Raises:
      ValueError: names every projection that differs.
    """
    found, wanted = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (lora, expected))
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if names:
        lines = "\n".join(f"  {name}: found {found.get(name)}, expected {wanted.get(name)}" for name in names)
        raise ValueError(f"{path}: the adapter does not fit the model:\n{lines}")


def starting_parameters(start: AdapterArrays, fresh: Lora, path: Path) -> Lora:
    """Returns the parameters of the adapter in `path`; fresh ones for rows and tables of embeddings that it lacks.

    Raises:
      ValueError: the adapter does not fit the model.
    """
    added = {name: leaves for name, leaves in fresh.items() if name not in start and (is_table(name) or name == SCORE)}
    started = {**added, **start}
    check_shapes(path, started, fresh)
    return jax.tree.map(lambda values, like: jnp.asarray(values, like.dtype), started, fresh)
