"""Values by name: built in, registered in this process, or declared by an entry point of an installed package.

Commands run in processes of their own, so they find only what entry points declare:

    [project.entry-points."qlora_jax.methods"]
    hra = "my_package.hra:METHOD_DECLARATION"
"""

import functools
import importlib
import importlib.metadata
import typing
import warnings
from collections.abc import Mapping

type EntryPoints = Mapping[str, importlib.metadata.EntryPoint]


class Registry[T]:
    """Named values of one kind, for a setting of type `Annotated[str, REGISTRY]`.

    Args:
      group: of the entry points, such as "qlora_jax.methods".
      kind: the type of the values.
      builtin: the package's own values, in the order in which help and errors list them.
    """

    def __init__(self, group: str, kind: type[T], builtin: Mapping[str, T]):
        self.group, self._kind, self._values = group, kind, {**builtin}

    @functools.cached_property
    def _found(self) -> EntryPoints:
        """Entry points by name: asked for only when a name is unknown, because that reads every installed package."""
        found = {point.name: point for point in importlib.metadata.entry_points(group=self.group)}
        for name in found.keys() & self._values.keys():
            warnings.warn(
                f"{self.group}: {name!r} of {_package(found[name])} is ignored, because the name is taken. Rename it",
                stacklevel=2,
            )
        return found

    def names(self) -> tuple[str, ...]:
        """Returns the names that are built in or registered, and those of entry points that were looked for."""
        found = self._found if "_found" in self.__dict__ else {}
        return tuple(dict.fromkeys([*self._values, *found]))

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._found

    def __getitem__(self, name: str) -> T:
        """Returns a value.

        Raises:
          ValueError: no value has the name, or its entry point cannot be loaded.
        """
        if name not in self._values:
            self._values[name] = self._load(name)
        return self._values[name]

    def items(self) -> list[tuple[str, T]]:
        """Returns the names that are built in or registered, with their values."""
        return [*self._values.items()]

    def load_all(self) -> None:
        """Adds the values of all entry points; one that cannot be loaded is a warning."""
        for name in self._found.keys() - self._values.keys():
            try:
                self._values[name] = self._load(name)
            except ValueError as error:
                warnings.warn(str(error), stacklevel=2)

    def register(self, name: str, value: T) -> None:
        """Adds a value.

        Raises:
          ValueError: the name is taken.
        """
        if name in self:
            raise ValueError(f"{self.group}: {name!r} is taken. Choose another name")
        self._values[name] = value

    def _load(self, name: str) -> T:
        if name not in self._found:
            raise ValueError(
                f"{self.group}: unknown name (found {name!r}, expected one of {', '.join(self.names())}). "
                "Install the package whose entry point declares it; another process does not see a registration"
            )
        point = self._found[name]
        package = _package(point)
        try:
            value = point.load()
        except Exception as error:
            raise ValueError(
                f"{self.group}: {name!r} of {package} cannot be loaded ({type(error).__name__}: {error}). Repair or "
                "uninstall the package"
            ) from error
        if not isinstance(value, self._kind):
            raise ValueError(
                f"{self.group}: {name!r} of {package} is not a declaration (found {type(value).__name__}, expected "
                f"{self._kind.__name__}). Repair or uninstall the package"
            )
        return value


def _package(point: importlib.metadata.EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"package {point.dist.name}"


def choices_of(hint: object) -> tuple[str, ...] | None:
    """Returns the names of the values that an annotation allows, a Literal or `Annotated[str, Registry]`, or None."""
    if typing.get_origin(hint) is typing.Literal:
        return tuple(map(str, typing.get_args(hint)))
    registry = registry_of(hint)
    return None if registry is None else registry.names()


def registry_of(hint: object) -> Registry | None:
    """Returns the registry of an annotation."""
    found = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
    return next((each for each in found if isinstance(each, Registry)), None)


def load_implementation(setting: str, name: str, place: str) -> object:
    """Returns what a declaration names as "module:attribute".

    Args:
      setting: the setting whose value `name` is, for messages.

    Raises:
      ValueError: the module cannot be imported, or lacks the attribute.
    """
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ValueError(
            f"{setting}: {name!r} is declared as {place}, which cannot be loaded ({type(error).__name__}: {error}). "
            "Repair or uninstall its package"
        ) from error
