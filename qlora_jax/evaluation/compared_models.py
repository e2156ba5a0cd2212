"""Opens the models that `evaluate` scores side by side: unquantized base, quantized base, and runs' checkpoints."""

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.registry import build_tasks, check_files
from qlora_jax.evaluation.score import ScoredModel
from qlora_jax.evaluation.settings import EvaluateArgs
from qlora_jax.evaluation.task import AnyTask, ReferenceTask, TaskContext
from qlora_jax.inference.result_cache import digest
from qlora_jax.io.pretrained import (
    OpenedModel,
    TemplateKwargs,
    apply_adapter,
    apply_adapter_with_reference,
    load_base,
    open_pretrained,
    parts_before_training,
    weight_settings,
)
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.io.run_folder.start_parameters import FILE as START_FILE
from qlora_jax.progress_reporter import ProgressReporter


def check_same_inputs(
    tasks: Sequence[AnyTask], others: Sequence[AnyTask], names: tuple[str, str], tokenizers: tuple[Tokenizer, Tokenizer]
) -> None:
    """Raises ValueError unless two runs' tasks, built from the same files, have the same inputs.

    Args:
      names: names of the two runs, for the error.
      tokenizers: tokenizers of the two runs, without a template where none is used.
    """
    pairs = zip(tasks, others, strict=True)
    problems = [f"{task.name}: {problem}" for task, other in pairs if (problem := _difference(task, other))]
    if problems:
        first, second = names
        raise ValueError(
            f"{first} and {second}: not comparable, because their questions differ:"
            + "".join(f"\n  {problem}" for problem in problems)
            + f"\n{_fix(*tokenizers)}"
        )


def _difference(task: AnyTask, other: AnyTask) -> str | None:
    """Describes which rows differ; None if all are equal."""
    pairs = list(itertools.zip_longest(task.inputs, other.inputs))
    differing = [
        number for number, (a, b) in enumerate(pairs, start=1) if a is None or b is None or digest(a) != digest(b)
    ]
    if not differing:
        return None
    if task.size is None:  # the rows are known only when they are scored
        return "different tokenizers or maximum lengths"
    return f"different tokens or stop tokens in {len(differing)} of {len(pairs)}; the first is number {differing[0]}"


def _fix(a: Tokenizer, b: Tokenizer) -> str:
    if a.chat_template != b.chat_template:
        return "Their chat templates differ. Use one template for both (--chat_template), or none (--raw)."
    if a.chat_template_kwargs != b.chat_template_kwargs:
        return "Their variables for the template differ. Set the same for both (--chat_template_kwargs)."
    return "Their tokenizers, maximum lengths or stop tokens differ. Evaluate each run separately, without --against."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """A model to score.

    Attributes:
      opened: its base, and its run if it has one.
      tasks: the tasks, with the ids of its tokenizer.
      quant_type: 4-bit code of its base, or "none".
      label: description for people.
      adapted: True if the run's adapter is applied.
    """

    opened: OpenedModel
    tasks: Sequence[AnyTask]
    quant_type: str
    label: str
    adapted: bool


def open_compared(args: EvaluateArgs, *, raw: bool) -> dict[str, ComparedModel]:
    """Opens the models that the settings describe, by column name, in the order to show them; loads no weights.

    Args:
      raw: use no chat template.

    Raises:
      ValueError: a model or a task's file cannot be used, or two runs are not comparable.
    """
    check_files(args)
    opened = open_pretrained(model=args.model, run=args.run, step=args.step, **_template(args))
    tasks = _tasks(args, opened, raw=raw)
    compared = _base_and_run(args, opened, tasks)
    if args.against is not None:
        other = open_pretrained(model=args.model, run=args.against, step=args.against_step, **_template(args))
        other_tasks = _tasks(args, other, raw=raw)
        names = (f"run {args.run}", f"against {args.against}")
        check_same_inputs(tasks, other_tasks, names, (_tokenizer(opened, raw=raw), _tokenizer(other, raw=raw)))
        quant_type = _quant_type(args, other)
        base = "" if _share_base(opened, other) else f", on {Path(other.source.path).name}"
        label = _run_label(args, other, quant_type) + base
        compared["against"] = ComparedModel(
            opened=other, tasks=other_tasks, quant_type=quant_type, label=label, adapted=True
        )
    return {name: one for name, one in compared.items() if args.columns is None or name in args.columns}


def load_compared(
    args: EvaluateArgs, compared: Mapping[str, ComparedModel], reporter: ProgressReporter
) -> Iterator[ScoredModel]:
    """Loads the models one at a time; models of one run and one quant_type share their base.

    A run has its reference if a task compares with it. A warning reports a reference that is not known.
    """
    by_base = itertools.groupby(compared, key=lambda name: (id(compared[name].opened), compared[name].quant_type))
    for names in ([*group] for _, group in by_base):
        opened, quant_type = compared[names[0]].opened, compared[names[0]].quant_type
        with reporter.loading() as progress:
            settings = weight_settings(opened, quant_type, args.compute_dtype, args.keep_16bit, args.experts)
            model = load_base(opened, settings, progress)
        for name in names:
            run = opened.run if compared[name].adapted else None
            if run is None:
                yield ScoredModel(name, parts_before_training(model, opened.run))
            elif any(isinstance(task, ReferenceTask) for task in compared[name].tasks):
                parts, reference = apply_adapter_with_reference(model, run)
                if reference is None:
                    warnings.warn(_without_reference(run), stacklevel=2)
                yield ScoredModel(name, parts, reference)
            else:
                yield ScoredModel(name, apply_adapter(model, run))
        del model  # before the next one is loaded


def _without_reference(run: Run) -> str:
    return (
        f"{run.path}: no rewards are reported, because the parameters that it started with are not known (lora.start="
        f"{run.lora_args.start}). Restore that adapter, or {START_FILE} in the run's folder, as they were"
    )


class _Template(TypedDict):
    """The settings of the chat template."""

    chat_template: str | None
    chat_template_kwargs: TemplateKwargs | None


def _template(args: EvaluateArgs) -> _Template:
    return {"chat_template": args.chat_template, "chat_template_kwargs": args.chat_template_kwargs}


def _tokenizer(opened: OpenedModel, *, raw: bool) -> Tokenizer:
    return dataclasses.replace(opened.tokenizer, chat_template=None) if raw else opened.tokenizer


def _tasks(args: EvaluateArgs, opened: OpenedModel, *, raw: bool) -> list[AnyTask]:
    context = TaskContext(
        tokenizer=_tokenizer(opened, raw=raw),
        max_positions=opened.features.max_positions,
        stop_ids=opened.source.tokenizer["stop_token_ids"],
        head=None if opened.run is None else opened.run.head,
    )
    return build_tasks(args, context)


def _base_and_run(args: EvaluateArgs, opened: OpenedModel, tasks: Sequence[AnyTask]) -> dict[str, ComparedModel]:
    """Returns the models of the base and of the run."""

    def compared_model(quant_type: str, label: str, adapted: bool = False) -> ComparedModel:
        return ComparedModel(opened=opened, tasks=tasks, quant_type=quant_type, label=label, adapted=adapted)

    quant_type = _quant_type(args, opened)
    compared = {"unquantized": compared_model("none", "unquantized")}
    if quant_type != "none":
        compared["quantized"] = compared_model(quant_type, quant_type)
    if opened.run is not None and opened.run.head is not None:
        compared = {}  # the base has no such head
    if opened.run is not None:
        compared["checkpoint"] = compared_model(quant_type, _run_label(args, opened, quant_type), adapted=True)
    missing = set(args.columns or []) - {*compared, "against"}
    if missing:
        has_head = opened.run is not None and opened.run.head is not None
        why = "the base has no sequence head" if has_head else "the base is not quantized"
        raise ValueError(f"columns: {', '.join(sorted(missing))} does not exist, because {why}")
    return compared


def _share_base(opened: OpenedModel, other: OpenedModel) -> bool:
    """True if both have the same base: by the runs' fingerprints, or for PEFT adapters by its path."""
    assert opened.run is not None and other.run is not None
    equal = opened.run.fingerprint is not None and opened.run.fingerprint == other.run.fingerprint
    return equal or opened.source.path == other.source.path


def _quant_type(args: EvaluateArgs, opened: OpenedModel) -> str:
    return opened.args.quant_type if args.quant_type == "auto" else args.quant_type


def _run_label(args: EvaluateArgs, opened: OpenedModel, quant_type: str) -> str:
    run, trained = opened.run, opened.args.quant_type
    assert run is not None
    same_name = args.against is not None and Path(str(args.run)).name == Path(args.against).name
    name = str(run.path.parent / run.label) if same_name else run.label
    return name if quant_type == trained else f"{name}, on {quant_type} (trained on {trained})"
