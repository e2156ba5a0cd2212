"""Declares the settings of `generate`, and the settings of models that it shares with other commands."""

import dataclasses
from pathlib import Path
from typing import Literal

from qlora_jax.config import ConfigError
from qlora_jax.config.fields import (
    AT_LEAST_ONE,
    NON_NEGATIVE,
    NOT_EMPTY,
    TEMPLATE_CHOICES,
    Bound,
    TemplateValue,
    setting,
)

QuantType = Literal["auto", "nf4", "fp4", "int4", "e2m1", "e3m0", "nvfp4", "stored", "none"]
ComputeDtype = Literal["auto", "bfloat16", "float32"]
ExpertPlace = Literal["auto", "device", "offload"]
HeadBits = Literal["auto", 16, 8, 4]
ABOVE_ZERO_UP_TO_ONE = Bound("more than 0 and at most 1", lambda value: 0 < value <= 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOrRunArgs:
    """The model to use: a base model, or a training run."""

    model: str | None = setting(
        "a Hugging Face folder, a GGUF file, or org/name on the Hub; with run: the path of the run's base, if it moved",
        None,
        common="folder, GGUF file, or org/name on the Hub",
    )
    run: str | None = setting(
        "folder of a training run: its base with its adapter", None, common="folder of a training run"
    )
    step: int | None = setting("checkpoint of the run (null: the newest)", None, NON_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalModelArgs:
    """A model that runs here: a base model, a training run, or a PEFT adapter."""

    path: str = setting(
        "a folder, a GGUF file, org/name on the Hub, or the folder of a run or adapter", bound=NOT_EMPTY
    )
    base: str | None = setting("path of a run's or adapter's base, if it moved", None, NOT_EMPTY)
    step: int | None = setting("checkpoint of the run (null: the newest)", None, NON_NEGATIVE)
    chat_template: str | None = setting(
        f"{TEMPLATE_CHOICES}, to use instead of the model's chat template", None, NOT_EMPTY
    )
    raw: bool = setting("use no chat template: the model continues the text of the prompt", False)
    quant_type: QuantType = setting("4-bit code of the base; auto: as in training, or nf4; none: 16 bit", "auto")
    compute_dtype: ComputeDtype = setting("auto: bfloat16 if the device computes it fast, else float32", "auto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateArgs(ModelOrRunArgs):
    """Replies to one prompt, to a file of prompts, or, with neither, in a chat."""

    prompt: str | None = setting(
        "one prompt; its reply is printed as it is generated", None, NOT_EMPTY, common="one prompt"
    )
    prompts: str | None = setting(
        "file of prompts: JSON or JSON Lines in a format of training data (an answer at the end is dropped), or else "
        "one prompt per line",
        None,
        NOT_EMPTY,
        common="file of prompts: JSON Lines, or one prompt per line",
    )
    output: str | None = setting(
        "JSON Lines file for the replies to prompts (null: standard output)",
        None,
        NOT_EMPTY,
        common="JSON Lines file for the replies",
    )
    system: str | None = setting("system message of the chat template (null: the template's default)", None)
    chat_template: str | None = setting(f"{TEMPLATE_CHOICES}, to use instead of the model's chat template", None)
    chat_template_kwargs: dict[str, TemplateValue] | None = setting(
        "variables for the chat template: {enable_thinking: false} (null: the run's)", None
    )
    max_new_tokens: int = setting("maximum tokens per reply", 256, AT_LEAST_ONE, common="maximum tokens per reply")
    temperature: float = setting(
        "0: always the likeliest token; 1: draw with the model's probabilities",
        0.0,
        NON_NEGATIVE,
        common="0: the likeliest token; 1: draw with the model's probabilities",
    )
    top_k: int = setting("draw only from the k likeliest tokens; 0: from all", 0, NON_NEGATIVE)
    top_p: float = setting(
        "draw only from the likeliest tokens whose probabilities reach this sum", 1.0, ABOVE_ZERO_UP_TO_ONE
    )
    seed: int = setting("seed of the draws; a reply depends only on it and on the prompt", 0, NON_NEGATIVE)
    quant_type: QuantType = setting(
        "4-bit code of the base; auto: as in training, or nf4; none: 16 bit",
        "auto",
        common="4-bit code of the base, or none",
    )
    keep_16bit: str | list[str] | None = setting(
        "linear layers of the base that stay in 16 bits, as for train --model.keep_16bit (null: as in training, or "
        "none)",
        None,
    )
    compute_dtype: ComputeDtype = setting("auto: bfloat16 if the device computes it fast, else float32", "auto")
    fast: bool = setting(
        "CPUs: round inputs of 4-bit layers to 8 bits while a reply is generated, which may change it (docs/cpu.md)",
        False,
    )
    head_bits: HeadBits = setting(
        "CPUs: bits of the language-model head's weights; fewer are faster. auto: 8 if fast, or if that changes no "
        "weight; else 16",
        "auto",
    )
    experts: ExpertPlace = setting(
        "where routed experts are; auto: as in training, or on the device; offload: in host memory", "auto"
    )


def check_generate(args: GenerateArgs) -> None:
    """Raises ConfigError if settings contradict each other; the message lists all contradictions."""
    problems = model_problems(args)
    if args.prompt is not None and args.prompts is not None:
        problems.append("prompt, prompts: found both, expected at most one. Remove one")
    if args.output is not None and args.prompts is None:
        problems.append("output: requires prompts, whose replies it stores. Set prompts too")
    problems += folder_problems("output", args.output)
    if problems:
        raise ConfigError(problems)


def model_problems(args: ModelOrRunArgs) -> list[str]:
    """Describes what is wrong with the choice of model, one line per problem."""
    problems = []
    if args.model is None and args.run is None:
        problems.append("model, run: found neither. Set model to a model's path, or run to a run's folder")
    if args.step is not None and args.run is None:
        problems.append("step: requires run, whose checkpoint it selects. Set run too")
    return problems


def folder_problems(key: str, path: str | None) -> list[str]:
    """Describes a missing parent folder of an output file, so that it is reported before minutes of work."""
    if path is None or Path(path).parent.is_dir():
        return []
    return [f"{key}: folder {str(Path(path).parent)!r} does not exist (found {path!r}). Create it"]
