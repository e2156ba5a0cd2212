"""Declares the settings of distillation: section `distillation`, with TRL's names of losses."""

import dataclasses
from typing import Literal

from qlora_jax.config.fields import AT_LEAST_ONE, NOT_EMPTY, POSITIVE, UP_TO_ONE, WEB_ADDRESS, setting
from qlora_jax.config.objectives import OBJECTIVES, unused_settings

OWN_BASE = "base"  # the teacher that is the run's own base, without its 4-bit codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationArgs:
    """The teacher whose predictions a model learns, and the divergence from them (docs/distill.md)."""

    teacher: str | None = setting(
        "the teacher: base (the run's own base in 16 bits), or a folder, GGUF file, org/name on the Hub, run folder or "
        "address of an OpenAI-compatible endpoint up to /v1, with the same tokenizer",
        None,
        NOT_EMPTY,
    )
    teacher_quant_type: Literal["nf4", "fp4", "int4", "e2m1", "e3m0", "nvfp4", "stored", "none"] = setting(
        "4-bit data type of the teacher's linear layers; none: 16 bits. A run as teacher has that of its base", "none"
    )
    teacher_model: str | None = setting("endpoint: its name of the model", None, NOT_EMPTY, later=True)
    teacher_key_variable: str | None = setting(
        "endpoint: environment variable of the key; null: no key", None, NOT_EMPTY, later=True
    )
    teacher_timeout: float = setting(
        "endpoint: seconds until a request, which has one text, counts as failed", 120.0, POSITIVE, later=True
    )
    beta: float = setting(
        "divergence from the teacher. 0: forward KL; 1: reverse KL; between: generalized Jensen-Shannon", 0.0, UP_TO_ONE
    )
    temperature: float = setting("logits of both models are divided by it in the loss", 1.0, POSITIVE)
    lmbda: float = setting(
        "gkd: probability that a step learns replies which the model samples; otherwise it learns the completions of "
        "the data",
        1.0,
        UP_TO_ONE,
        later=True,
    )
    loss_top_k: int = setting(
        "the teacher's likeliest tokens that the loss compares one by one; at most the vocabulary", 64, AT_LEAST_ONE
    )
    loss_add_tail: bool = setting(
        "compare the probability of all other tokens, too; false: both models are normalized over the likeliest tokens",
        True,
    )


def is_endpoint(teacher: str | None) -> bool:
    """Returns True if a teacher is behind an endpoint."""
    return teacher is not None and WEB_ADDRESS.holds(teacher)


def distillation_problems(args: DistillationArgs, objective: str) -> list[str]:
    """Reports settings that the objective ignores, and a teacher that is missing."""
    if not OBJECTIVES[objective].distillation:
        return unused_settings("distillation", args, (), objective)
    problems = []
    if args.teacher is None:
        problems.append(
            f"distillation.teacher: missing, expected a model for objective={objective}. Set it to base, for example"
        )
    problems += _endpoint_problems(args)
    if args.lmbda != 1 and OBJECTIVES[objective].rows != "prompt":
        problems.append(
            f"distillation.lmbda: found {args.lmbda:g}, but objective={objective} samples no replies. Set objective to "
            "gkd, or remove this setting"
        )
    if args.teacher == OWN_BASE and args.teacher_quant_type != "none":
        problems.append(
            f"distillation.teacher_quant_type: found {args.teacher_quant_type!r}, but distillation.teacher=base is in "
            "16 bits. Remove this setting"
        )
    if args.loss_top_k == 1 and not args.loss_add_tail:
        problems.append(
            "distillation.loss_add_tail: found false with distillation.loss_top_k=1, whose divergence is always 0. "
            "Remove this setting"
        )
    return problems


def _endpoint_problems(args: DistillationArgs) -> list[str]:
    """Reports settings of endpoints without one, and those that contradict one."""
    plain, problems = DistillationArgs(), list[str]()
    if not is_endpoint(args.teacher):
        return [
            f"distillation.{name}: found {value!r}, but distillation.teacher={args.teacher} is not an address. Remove "
            "this setting"
            for name in ("teacher_model", "teacher_key_variable", "teacher_timeout")
            if (value := getattr(args, name)) != getattr(plain, name)
        ]
    if args.teacher_model is None:
        problems.append("distillation.teacher_model: missing, expected the endpoint's name of the model. Set it")
    if args.teacher_quant_type != plain.teacher_quant_type:
        problems.append(
            f"distillation.teacher_quant_type: found {args.teacher_quant_type!r}, but the endpoint has loaded its "
            "model already. Remove this setting"
        )
    if args.temperature != 1:
        problems.append(
            f"distillation.temperature: found {args.temperature:g}, but an endpoint gives probabilities at temperature "
            "1, from which that of all other tokens at another temperature cannot be computed. Remove this setting"
        )
    return problems
