"""Suggests the argument that was probably meant in the TypeError for an unknown one: `LoRA(r=8)` asks for `rank`."""

import functools
import inspect
from collections.abc import Callable

from qlora_jax.config.suggestions import suggest_key


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
