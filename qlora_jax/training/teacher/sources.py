"""Opens the teacher that the settings name, without its weights."""

import dataclasses

import jax

from qlora_jax.config import Config, ModelArgs
from qlora_jax.config.distillation import OWN_BASE, is_endpoint
from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.io.pretrained import OpenedModel, is_finetuned, open_base, open_finetuned
from qlora_jax.models.config import ModelConfig
from qlora_jax.openai_client import Endpoint, read_key
from qlora_jax.training.teacher.endpoint import EndpointSource
from qlora_jax.training.teacher.local import LocalSource
from qlora_jax.training.teacher.logprob_cache import TeacherSource


def open_teacher(config: Config, tokenizer: Tokenizer, student: ModelConfig) -> TeacherSource | None:
    """Returns the teacher, or None for an objective without one.

    Args:
      tokenizer, student: of the model that learns.

    Raises:
      ValueError: the teacher cannot be opened, has another tokenizer, or fewer tokens than `distillation.loss_top_k`;
        or several processes train.
    """
    if not OBJECTIVES[config.objective].distillation:
        return None
    if jax.process_count() > 1:
        raise ValueError(
            f"objective: {config.objective} trains in one process, on any number of its devices (found "
            f"{jax.process_count()} processes). Start one process"
        )
    args = config.distillation
    assert args.teacher is not None, "the settings are checked"
    if is_endpoint(args.teacher):
        _check_count(args.loss_top_k, student.vocab_size)
        key = read_key(args.teacher_key_variable, "distillation.teacher_key_variable")
        assert args.teacher_model is not None, "the settings are checked"
        return EndpointSource(
            endpoint=Endpoint(args.teacher, args.teacher_model, key, args.teacher_timeout),
            count=args.loss_top_k,
            tokenizer=tokenizer,
            tokens=student.vocab_size,
        )
    opened = open_finetuned(args.teacher) if is_finetuned(args.teacher) else open_base(teacher_args(config))
    _check_tokens(opened, args.teacher, tokenizer)
    _check_count(args.loss_top_k, min(opened.features.vocab_size, student.vocab_size))
    weights = dataclasses.replace(opened.args, compute_dtype=config.model.compute_dtype)
    return LocalSource(
        opened=opened,
        args=weights,
        count=args.loss_top_k,
        temperature=args.temperature,
        tokens=student.vocab_size,
    )


def teacher_args(config: Config) -> ModelArgs:
    """Returns path and weight format of a teacher that is a base model."""
    args = config.distillation
    own = dataclasses.replace(config.model, quant_type="none", keep_16bit=[], new_tokens=[], new_special_tokens=[])
    if args.teacher in (OWN_BASE, None):
        return own
    return dataclasses.replace(own, path=args.teacher, quant_type=args.teacher_quant_type)


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise ValueError(
            f"distillation.loss_top_k: found {count}, expected at most {most}, the rows of the smaller embedding. "
            "Lower it"
        )


def _check_tokens(opened: OpenedModel, name: str, tokenizer: Tokenizer) -> None:
    """Raises ValueError unless the teacher gives every token of the student the same id."""
    ours, theirs = tokenizer.backend.get_vocab(), opened.tokenizer.backend.get_vocab()
    differing = sorted((number, token) for token, number in ours.items() if theirs.get(token) != number)
    if differing:
        number, token = differing[0]
        raise ValueError(
            f"distillation.teacher: {name} has another tokenizer: {len(differing):,} of {len(ours):,} tokens differ "
            f"(found id {theirs.get(token)} for {token!r}, expected {number}). Choose a teacher with the same tokenizer"
        )
