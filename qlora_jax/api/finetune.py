"""`finetune`: trains a model's adapter, with the same loop, files and results as the command `train`."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.api.data import BadRows, Columns, Data, rows_files, write_data
from qlora_jax.api.export import merge, save_peft
from qlora_jax.api.provenance import Provenance, attach, parts_of, provenance_of
from qlora_jax.api.settings import Overrides, console_for, training_config
from qlora_jax.config.exports import Dtype, ExportFormat
from qlora_jax.config.methods import METHODS
from qlora_jax.config.objectives import ObjectiveName
from qlora_jax.config.suggestions import suggests_arguments
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.io.export.result import ExportResult
from qlora_jax.io.head_file import read_head
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.training.metrics.metrics_file import METRICS_FILE, Record, read_metrics
from qlora_jax.training.reporters import Listener
from qlora_jax.training.run import lock_output, run_training
from qlora_jax.training.run_spec import PreparedModel

Callback = Callable[[Record], bool | None]  # receives a record; True stops the run


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """A run that has ended.

    Fields:
      model: the trained model; the model given to `finetune` is unchanged.
      folder: the run's folder, which `load` and all commands open.
      step: number of optimizer steps done.
      finished: False if Ctrl-C or SIGTERM stopped the run early; `finetune(..., resume=True)` continues it.
    """

    model: CausalLM
    folder: Path
    step: int
    finished: bool

    @property
    def metrics(self) -> list[Record]:
        """One record per step and per evaluation: "step", "loss", "eval_loss" and so on, as in metrics.jsonl."""
        return read_metrics(self.folder / METRICS_FILE)

    def save_peft(self, folder: str | Path, *, with_base: bool = False, progress: bool = False) -> ExportResult:
        """Writes the adapter to a new folder; see `qlora_jax.save_peft`."""
        return save_peft(self.model, folder, with_base=with_base, progress=progress)

    def merge(
        self,
        folder: str | Path,
        *,
        format: ExportFormat = "hf",
        dtype: Dtype | None = None,
        base: str | None = None,
        progress: bool = False,
    ) -> ExportResult:
        """Writes the model with the adapter merged to a new folder; see `qlora_jax.merge`."""
        return merge(self.model, folder, format=format, dtype=dtype, base=base, progress=progress)


@suggests_arguments
def finetune(
    model: nnx.Module,
    tokenizer: Tokenizer,
    data: Data,
    *,
    output: str | Path,
    objective: ObjectiveName | None = None,
    eval_data: Data | None = None,
    eval_fraction: float | None = None,
    columns: Columns | None = None,
    bad_rows: BadRows | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    micro_batch_size: int | None = None,
    accumulation: int | None = None,
    max_length: int | None = None,
    packing: bool | None = None,
    mesh: Mapping[Literal["data", "fsdp"], int] | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    seed: int | None = None,
    config: Overrides = None,
    on_step: Callback | None = None,
    on_evaluation: Callback | None = None,
    resume: bool = False,
    oversized: bool = False,
    accept_changed_reward: bool = False,
    progress: bool = False,
) -> FinetuneRun:
    """Trains the model's adapter and returns the run; the given model and its arrays stay valid.

    >>> run = q.finetune(q.add_adapter(model), tokenizer, "rows.jsonl", output="runs/first", steps=2, max_length=128)
    >>> run.step, run.finished, [record["step"] for record in run.metrics]
    (2, True, [1, 2])

    The run's folder is that of the command `train`: checkpoints, metrics.jsonl, report.html and config.yaml. With the
    same settings the losses are bit-identical to the command's. The first Ctrl-C stops after the current step, saves a
    checkpoint and returns; the second raises KeyboardInterrupt at once.

    Args:
      model: from `load` and `add_adapter`.
      tokenizer: the one that `load` returned with the model.
      data: a file of rows or hf://datasets/org/name; several files with weights, {"a.jsonl": 1.0, "b.jsonl": 0.5}; or a
        list of rows such as {"messages": [...]}. A list is written to OUTPUT/train.jsonl, which the run then reads.
      output: a new folder for the run.
      objective: the loss: "sft" by default, "dpo", "kto" and so on (docs/preferences.md, docs/heads.md). If it
        has a reference, that is the given model with its adapter. `config` takes the settings of the loss, such as
        {"preference.beta": 0.2}.
      eval_data: evaluation data, in the same forms; a list is written to OUTPUT/eval.jsonl.
      eval_fraction: without eval_data, the fraction of `data` to hold out.
      columns: column names in the data, where they differ from the format's: {"prompt": "question"}; for
        one of several files, {"b.jsonl": {"prompt": "question"}}.
      bad_rows: "error" for rows that cannot be used, or "drop", which counts and lists them in the data report.
      steps: optimizer steps; overrides `epochs`.
      epochs: passes over the data; 1 by default.
      learning_rate: peak learning rate; 2e-4 by default.
      micro_batch_size: rows per forward pass; 1 by default.
      accumulation: micro-batches per optimizer step; 16 by default.
      max_length: maximum tokens per row; 1024 by default.
      packing: pack several rows into one of max_length.
      mesh: the local devices to train on, {"data": 2, "fsdp": 4} for 2 x 4 of them (docs/distributed.md); by default
        one device. The given model stays whole on its own device too; `qlora-jax train` never has it whole anywhere.
      eval_every: steps between evaluations; 0, the default: only at the end.
      save_every: steps between checkpoints; 100 by default.
      seed: random seed of shuffling and dropout; 0 by default.
      config: more settings by dotted name, such as {"optim.name": "adamw_8bit"} (`qlora-jax train --help all`
        lists them); or a `Config`, whose sections model and lora are ignored.
      on_step: called after each step with its record, as metrics.jsonl has it. True stops the run after this step, with
        a checkpoint from which `resume` continues; an exception ends the run as an error does.
      on_evaluation: the same after each evaluation on held-out data or questions.
      resume: continue the run in `output` from its newest checkpoint.
      oversized: start even if the memory plan says that the run does not fit.
      accept_changed_reward: with `resume`, files of reward functions and tools may have changed (docs/rl.md).
      progress: print the data report, the memory plan and each step.

    Raises:
      ValueError: a setting is wrong, rows are malformed, the folder holds another run or another process
        trains in it, the run does not fit into memory, or a loss is not finite.
    """
    provenance = _check_trainable(provenance_of(model), tokenizer)
    settings = {
        "objective": objective,
        "data.chat_template": provenance.chat_template,
        "data.chat_template_kwargs": dict(provenance.chat_template_kwargs) or None,
        "data.eval_fraction": eval_fraction,
        "data.columns": columns,
        "data.bad_rows": bad_rows,
        "data.max_length": max_length,
        "data.packing": packing,
        "optim.learning_rate": learning_rate,
        "train.steps": steps,
        "train.epochs": epochs,
        **{f"mesh.{axis}": size for axis, size in (mesh or {}).items()},
        "train.micro_batch_size": micro_batch_size,
        "train.accumulation": accumulation,
        "train.eval_every": eval_every,
        "train.save_every": save_every,
        "train.seed": seed,
    }
    folder = Path(output)
    warn = functools.partial(warnings.warn, category=RuntimeWarning, stacklevel=2)
    with lock_output(folder, resume=resume, allowed=rows_files(folder), warn=warn) as lock:
        settings |= write_data(data, eval_data, folder, resume=resume)
        resolved = training_config(provenance.opened.args, provenance.lora_args, settings, config, output=str(folder))
        parts = parts_of(model)
        trained = run_training(
            resolved,
            lock,
            resume=resume,
            oversized=oversized,
            console=console_for(progress),
            model=_prepared(parts, provenance, tokenizer),
            accept_changed_reward=accept_changed_reward,
            listener=Listener(functools.partial(_asks_to_stop, on_step, on_evaluation)),
        )
    head = read_head(folder)
    parts = _with_head(parts, head)
    lora = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), trained.lora, parts.lora)
    return FinetuneRun(
        model=attach(
            combine(parts.with_lora(lora)), dataclasses.replace(provenance, head=head, rounded=trained.rounded)
        ),
        folder=folder,
        step=trained.step,
        finished=trained.finished,
    )


def _asks_to_stop(on_step: Callback | None, on_evaluation: Callback | None, record: Record) -> bool:
    call = on_step if "loss" in record else on_evaluation
    return call is not None and call(record) is True


def _with_head(parts: ModelParts, head: TrainedHead | None) -> ModelParts:
    """Returns the parts with the sequence head that a run added, if it added one."""
    model = combine(parts)
    if head is None or model.score is not None:
        return parts
    model.add_sequence_head(head.spec(), jax.random.key(0))
    return partition(model)


def _prepared(parts: ModelParts, provenance: Provenance, tokenizer: Tokenizer) -> PreparedModel:
    """Returns the model for a run that leaves the arrays of the given one valid."""
    return PreparedModel(
        source=provenance.opened.source,
        tokenizer=tokenizer,
        # Copied, because steps write the new parameters into the memory of the old ones.
        parts=parts.with_lora(jax.tree.map(jnp.copy, parts.lora)),
        fingerprint=provenance.fingerprint,
        initial=provenance.initial,
        head=provenance.head,
    )


def _check_trainable(provenance: Provenance, tokenizer: Tokenizer) -> Provenance:
    """Returns the record of a model that a run can train and resume; raises ValueError for any other."""
    if provenance.lora_args is None:
        raise ValueError("model: has no adapter to train. Add one with qlora_jax.add_adapter")
    if provenance.opened.run is not None and provenance.opened.run.tables:
        raise ValueError(
            f"model: {provenance.opened.run.path} replaces whole tables of the base. Load the base, and add the "
            'adapter with qlora_jax.LoRA(start="FOLDER")'
        )
    if provenance.opened.run is not None and (frozen := provenance.opened.run.frozen):
        raise ValueError(
            f"model: {provenance.opened.run.path} has a {' and '.join(frozen)} that are not those of its "
            f"{METHODS[provenance.lora_args.method].drawn_from}, so a run cannot restore them. Merge the adapter, and "
            "train the merged model"
        )
    if not _are_equal(tokenizer, provenance.opened.tokenizer):
        raise ValueError(
            "tokenizer: not the one that qlora_jax.load returned with this model. Pass that one; to change the chat "
            "template, pass chat_template to qlora_jax.load"
        )
    return provenance


def _are_equal(a: Tokenizer, b: Tokenizer) -> bool:
    """True if both encode and render alike; their backends have no equality."""
    names = ("exported", "chat_template", "chat_template_kwargs", "special_tokens", "add_bos_token", "new_ids", "rows")
    return all(getattr(a, name) == getattr(b, name) for name in names)
