"""Declares the settings of distillation: section `distillation`, with TRL's names of losses."""

import dataclasses
from typing import Literal

from qlora_jax.config.fields import AT_LEAST_ONE, NOT_EMPTY, POSITIVE, UP_TO_ONE, setting
from qlora_jax.config.objectives import OBJECTIVES, unused_settings

OWN_BASE = "base"  # the teacher that is the run's own base, without its 4-bit codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationArgs:
    """The teacher whose predictions a model learns, and the divergence from them (docs/distill.md)."""

    teacher: str | None = setting(
        "the teacher: base (the run's own base in 16 bits), or a folder, GGUF file, org/name on the Hub or run folder "
        "with the same tokenizer",
        None,
        NOT_EMPTY,
        common="the teacher: base (the own base in 16 bits), or a model or run with the same tokenizer",
    )
    teacher_quant_type: Literal["nf4", "fp4", "int4", "e2m1", "e3m0", "nvfp4", "stored", "none"] = setting(
        "4-bit data type of the teacher's linear layers; none: 16 bits. A run as teacher has that of its base", "none"
    )
    teacher_url: str | None = setting(
        "in place of teacher: address of an OpenAI-compatible endpoint up to /v1, whose completions echo token ids "
        "with log-probabilities",
        None,
        NOT_EMPTY,
    )
    teacher_model: str | None = setting("teacher_url: the endpoint's name of the model", None, NOT_EMPTY)
    teacher_key_variable: str | None = setting(
        "teacher_url: environment variable of the key; null: no key", None, NOT_EMPTY
    )
    teacher_timeout: float = setting("teacher_url: seconds until a request counts as failed", 120.0, POSITIVE)
    beta: float = setting(
        "divergence from the teacher. 0: forward KL; 1: reverse KL; between: generalized Jensen-Shannon", 0.0, UP_TO_ONE
    )
    temperature: float = setting("logits of both models are divided by it in the loss", 1.0, POSITIVE)
    loss_top_k: int = setting(
        "the teacher's likeliest tokens that the loss compares one by one; at most the vocabulary", 64, AT_LEAST_ONE
    )
    loss_add_tail: bool = setting(
        "compare the probability of all other tokens, too; false: both models are normalized over the likeliest tokens",
        True,
    )


ENDPOINT = ("teacher_model", "teacher_key_variable", "teacher_timeout")  # settings of an endpoint


def distillation_problems(args: DistillationArgs, objective: str) -> list[str]:
    """Reports settings that the objective ignores, and a teacher that is missing or given twice."""
    if not OBJECTIVES[objective].distillation:
        return unused_settings("distillation", args, (), objective)
    problems, plain = [], DistillationArgs()
    if (args.teacher is None) == (args.teacher_url is None):
        found = "neither" if args.teacher is None else "both"
        problems.append(
            f"distillation.teacher, distillation.teacher_url: found {found}, expected one of them for "
            f"objective={objective}. Set distillation.teacher to base, for example"
        )
    unused = {name: "distillation.teacher_url=null" for name in ENDPOINT if args.teacher_url is None}
    if args.teacher_url is not None or args.teacher == OWN_BASE:
        unused["teacher_quant_type"] = "this teacher"
    problems += [
        f"distillation.{name}: found {getattr(args, name)!r}, but {why} does not use it. Remove this setting"
        for name, why in unused.items()
        if getattr(args, name) != getattr(plain, name)
    ]
    if args.teacher_url is not None and args.teacher_model is None:
        problems.append("distillation.teacher_model: missing, but distillation.teacher_url requires it. Set it")
    if args.teacher_url is not None and args.temperature != 1:
        problems.append(
            f"distillation.temperature: found {args.temperature:g} with distillation.teacher_url, expected 1, because "
            "an endpoint gives log-probabilities at temperature 1. Remove this setting"
        )
    if args.loss_top_k == 1 and not args.loss_add_tail:
        problems.append(
            "distillation.loss_add_tail: found false with distillation.loss_top_k=1, whose divergence is always 0. "
            "Remove this setting"
        )
    return problems
