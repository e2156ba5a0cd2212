"""Builds the configuration of a run from keyword arguments and overrides, and finds where its progress is shown."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

from qlora_jax.config import Config, ConfigError, DataArgs, LoraArgs, ModelArgs, to_dict, validate
from qlora_jax.config.parse import from_dict
from qlora_jax.io.loading.progress import StageProgress, loading
from qlora_jax.terminal.console import Console

# Settings by dotted name, such as {"optim.name": "adamw_8bit"}, or a whole configuration.
Overrides = Mapping[str, object] | Config | None

# Sections that the model itself determines, and what sets them.
_FIXED = {"model": "qlora_jax.load", "lora": "qlora_jax.add_adapter", "output": "the argument output"}


def training_config(
    model: ModelArgs, lora: LoraArgs | None, settings: Mapping[str, object], overrides: Overrides, *, output: str
) -> Config:
    """The validated configuration of a run.

    Args:
      settings: keyword arguments by dotted name; None means not given.
      overrides: more settings; of a Config, all but its sections model and lora, and its output.

    Raises:
      ConfigError: an unknown setting, a wrong value, a setting given twice, or settings that contradict each other.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    start = Config(model=model, lora=lora or LoraArgs(), data=DataArgs(train="unused"), output=output)
    if isinstance(overrides, Config):
        start = dataclasses.replace(overrides, model=start.model, lora=start.lora, output=output)
    else:
        given |= _checked(overrides or {}, given)
    raw, sections = to_dict(start), [field.name for field in dataclasses.fields(Config)]
    for key, value in given.items():
        section, _, name = key.rpartition(".")
        inner = raw.setdefault(section, {}) if section in sections else None
        if isinstance(inner, dict):
            inner[name] = value
        else:
            raw[key] = value  # an unknown setting, which from_dict reports
    config = from_dict(Config, raw)
    validate(config)
    return config


def _checked(overrides: Mapping[str, object], given: Mapping[str, object]) -> Mapping[str, object]:
    problems = [f"{key}: given twice, as an argument and in config. Remove one" for key in overrides if key in given]
    problems += [
        f"{key}: cannot be set in config; it comes from {_FIXED[section]}"
        for key in overrides
        if (section := key.partition(".")[0]) in _FIXED
    ]
    if problems:
        raise ConfigError(problems)
    return overrides


def console_for(progress: bool) -> Console:
    """A console that prints, or one that discards everything."""
    return Console(quiet=not progress)


@contextlib.contextmanager
def loading_bar(progress: bool) -> Iterator[StageProgress]:
    """Yields a callback that shows how far loading is, or does nothing."""
    if not progress:
        yield lambda *done: None
        return
    with loading(Console(stderr=True)) as report:
        yield report
