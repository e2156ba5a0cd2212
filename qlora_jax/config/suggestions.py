"""Suggests the setting or value that was probably meant: the nearest name, or ours for another trainer's name."""

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence

from qlora_jax.config.other_trainers import REPLACEMENTS, Replacement
from qlora_jax.config.registry import choices_of, registry_of

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
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "truncate": "truncate-right",
    "raise": "error",
}

# Names of our sections that are not similar to them.
SECTIONS = {
    **dict.fromkeys(("dataset", "datasets"), "data"),
    **dict.fromkeys(("optimizer", "optimiser"), "optim"),
    **dict.fromkeys(("adapter", "peft"), "lora"),
    **dict.fromkeys(("training_args", "training_arguments"), "train"),
    "quantization": "model",
}

# Settings to which mappings are given that another setting takes.
MAPPINGS = {"columns": "file_columns"}


def replacement_of(key: str, known: Sequence[str]) -> Replacement | None:
    """Returns what replaces another trainer's setting; None if that is not known, or not among the known keys."""
    found = REPLACEMENTS.get(key.rpartition(".")[2].replace("-", "_"))
    if found is None:
        return None
    found = Replacement(found) if isinstance(found, str) else found
    if found.key is None:
        return found if "data.train" in known else None
    section, _, last = found.key.rpartition(".")
    ours = next((name for name in (found.key, last, section) if name in known), None)  # commands without sections
    return found._replace(key=ours) if ours else None


def suggest_key(key: str, known: Sequence[str], otherwise: str = "; --help all lists all settings") -> str:
    """The end of the message for an unknown key: the known key that was probably meant, or `otherwise`.

    Keys are compared by their last part: two keys of one section are not similar because of the section.
    """
    if replaced := replacement_of(key, known):
        return _describe(replaced)
    last = key.rpartition(".")[2].replace("-", "_")
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    by_last = {name.rpartition(".")[2]: name for name in known}
    near = same_name or [by_last[word] for word in difflib.get_close_matches(last, by_last, n=1)]
    return f"; did you mean {near[0]}?" if near else otherwise


def suggest_section(key: str, known: Sequence[str]) -> str:
    """The end of the message for an unknown key with settings below it: the section that was probably meant, if any."""
    sections = [*dict.fromkeys(name.partition(".")[0] for name in known if "." in name)]
    near = [SECTIONS[key]] if key in SECTIONS else difflib.get_close_matches(key, sections, n=1)
    return f"; did you mean the section {near[0]}?" if near and near[0] in sections else suggest_key(key, known)


def _describe(replacement: Replacement) -> str:
    if replacement.key is None:
        return f"; {replacement.note}"
    note = f" ({replacement.note})" if replacement.note else ""
    return f"; did you mean {replacement.key}{note}?"


def suggest_section_key(section: str, known: Sequence[str]) -> str:
    """The end of the message for a section that was given a value: the setting that was probably meant, if known."""
    replaced = replacement_of(section, known)
    return _describe(replaced) if replaced else ""


def suggest_value(key: str, hint: object, value: object) -> str:
    """The end of the message for a value that the annotation `hint` does not allow; empty if nothing is near."""
    if isinstance(value, Mapping):
        meant = MAPPINGS.get(key)
        return f"; did you mean {meant}?" if meant else "; this setting has no settings below it"
    near = _near_choices(str(value), _choices(hint))
    if not near and (registry := registry_of(hint)) is not None:
        return f"; other names come from installed packages, by entry points of the group {registry.group}"
    if isinstance(value, str) and any(typing.get_origin(arm) is list for arm in (hint, *typing.get_args(hint))):
        near = [f"[{(near or [value])[0]}]"]
    return f"; did you mean {near[0]}?" if near else ""


def _near_choices(value: str, choices: Sequence[str]) -> list[str]:
    value = value.lower()
    synonym = CHOICES.get(value)
    return [synonym] if synonym is not None and synonym in choices else difflib.get_close_matches(value, choices, n=1)


def _choices(hint: object) -> tuple[str, ...]:
    """The names that an annotation allows, alone or in a union."""
    arms = map(choices_of, (hint, *typing.get_args(hint)))
    return next((choices for choices in arms if choices is not None), ())


def suggests_arguments[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Returns the function with suggestions for unknown keyword arguments, by our names and other trainers'."""
    names = [*inspect.signature(function).parameters]
    otherwise = "; config={...} takes the settings that are not arguments" if "config" in names else ""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                meant = suggest_key(name, names, otherwise)
                raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}{meant}")
        return function(*args, **kwargs)

    return checked


def suggests_settings[Class: type](settings: Class) -> Class:
    """Returns the dataclass, whose constructor suggests arguments."""
    settings.__init__ = suggests_arguments(settings.__init__)
    return settings
