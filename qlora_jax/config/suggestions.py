"""Suggests the setting or value that was probably meant: the nearest name, or ours for another trainer's name.

Suggestions appear in error messages only; no other name is ever accepted.
"""

import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

# Names in transformers' TrainingArguments, peft's LoraConfig, trl, axolotl and the QLoRA reference.
SYNONYMS = {
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "revision": "model.path",
    "model_id": "model.path",
    "model_name": "model.path",
    "tokens": "model.new_tokens",
    "add_tokens": "model.new_tokens",
    "trainable_token_indices": "model.new_tokens",
    "lora_modules_to_save": "lora.modules_to_save",
    "special_tokens": "model.new_special_tokens",
    "additional_special_tokens": "model.new_special_tokens",
    "load_in_4bit": "model.quant_type",
    "bits": "model.quant_type",
    "bnb_4bit_quant_type": "model.quant_type",
    "bnb_4bit_use_double_quant": "model.double_quant",
    "use_double_quant": "model.double_quant",
    "bnb_4bit_compute_dtype": "model.compute_dtype",
    "bf16": "model.compute_dtype",
    "fp16": "model.compute_dtype",
    "tf32": "model.compute_dtype",
    "precision": "model.compute_dtype",
    "torch_dtype": "model.compute_dtype",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules",
    "adapter": "lora.method",
    "lora_model_dir": "lora.start",
    "use_dora": "lora.method",
    "peft_use_dora": "lora.method",
    "peft_type": "lora.method",
    "init_lora_weights": "lora.init",
    "pissa_init": "lora.init",
    "pissa_iter": "lora.svd_niter",
    "loftq_config": "lora.loftq_iterations",
    "loftq_iter": "lora.loftq_iterations",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "validation_file": "data.eval",
    "eval_file": "data.eval",
    "test_datasets": "data.eval",
    "dataset_format": "data.format",
    "eval_dataset_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "source_max_len": "data.source_max_length",
    "target_max_len": "data.target_max_length",
    "train_on_source": "data.learn",
    "train_on_inputs": "data.learn",
    "excess_length_strategy": "data.overlong",
    "group_by_length": "data.buckets",
    "dataset_prepared_path": "data.cache",
    "streaming": "data.window",
    "interleave_probs": "data.train",
    "sample_packing": "data.packing",
    "optim": "optim.name",
    "optimizer": "optim.name",
    "optimiser": "optim.name",
    "lr": "optim.learning_rate",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "warmup_steps": "optim.warmup_ratio",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "is_paged": "optim.paging",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_checkpointing": "train.remat",
    "eval_steps": "train.eval_every",
    "evals_per_epoch": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "early_stopping_patience": "train.patience",
    "load_best_model_at_end": "train.keep_best",
    "save_steps": "train.save_every",
    "saves_per_epoch": "train.save_every",
    "save_strategy": "train.save_every",
    "save_total_limit": "train.keep",
    "logging_steps": "train.log_every",
    "report_to": "train.track",
    "wandb_project": "train.track",
    "use_tensorboard": "train.track",
    "output_dir": "output",
}

# Other trainers' names of our optimizers, data formats and choices.
CHOICES = {
    "adamw": "adamw_32bit",
    "adamw_hf": "adamw_32bit",
    "adamw_torch": "adamw_32bit",
    "adamw_torch_fused": "adamw_32bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit",
    "lion": "lion_32bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_lion": "paged_lion_32bit",
    "alpaca-clean": "alpaca",
    "self-instruct": "completion",
    "longform": "input-output",
    "oasst1": "guanaco",
    "vicuna": "sharegpt",
    "openai": "messages",
    "fp16": "bfloat16",
    "half": "bfloat16",
    "fp32": "float32",
    "truncate": "truncate-right",
    "raise": "error",
}


def suggest_key(key: str, known: Sequence[str]) -> str:
    """The end of the message for an unknown key: the known key that was probably meant, or where all are listed.

    Keys are compared by their last part: two keys of one section are not similar because of the section.
    """
    last = key.rpartition(".")[2].replace("-", "_")
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    synonym = [SYNONYMS[last]] if SYNONYMS.get(last) in known else []
    by_last = {name.rpartition(".")[2]: name for name in known}
    near = same_name or synonym or [by_last[word] for word in difflib.get_close_matches(last, by_last, n=1)]
    return f"; did you mean {near[0]}?" if near else "; --help all lists all settings"


def suggest_value(hint: Any, value: object) -> str:
    """The end of the message for a value that the annotation `hint` does not allow; empty if nothing is near."""
    near = _near_choices(str(value), _choices(hint))
    if isinstance(value, str) and any(typing.get_origin(arm) is list for arm in (hint, *typing.get_args(hint))):
        near = [f"[{(near or [value])[0]}]"]
    if near:
        return f"; did you mean {near[0]}?"
    return "; this setting has no settings below it" if isinstance(value, Mapping) else ""


def _near_choices(value: str, choices: Sequence[str]) -> list[str]:
    value = value.lower()
    synonym = CHOICES.get(value)
    return [synonym] if synonym is not None and synonym in choices else difflib.get_close_matches(value, choices, n=1)


def _choices(hint: Any) -> tuple[str, ...]:
    """The choices of a Literal, alone or in a union."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return next((_choices(arm) for arm in typing.get_args(hint) if typing.get_origin(arm) is Literal), ())
