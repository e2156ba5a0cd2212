"""The conditions of a study: the fixed one, and for each factor one per level that differs only in that factor."""

import dataclasses
from collections.abc import Mapping

from qlora_jax.config.parse import from_dict
from qlora_jax.studies.variance.settings import ConditionArgs, VarianceArgs, level_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """The conditions of a study.

    Attributes:
      fixed: the condition around which one thing varies at a time.
      factors: {factor: {level: condition}}.
    """

    fixed: ConditionArgs
    factors: Mapping[str, Mapping[str, ConditionArgs]]

    def conditions(self) -> list[ConditionArgs]:
        """All conditions, each once; those of the same base in the same format follow each other."""
        levels = (condition for of_factor in self.factors.values() for condition in of_factor.values())
        conditions = dict.fromkeys([self.fixed, *levels])
        return sorted(conditions, key=lambda condition: condition.quant_type or "")


def design_of(args: VarianceArgs) -> Design:
    """Returns the design of a study whose settings `check_variance` accepts."""
    return Design(
        fixed=args.fixed,
        factors={
            factor: {
                level: dataclasses.replace(args.fixed, **_typed(settings))
                for level, settings in level_settings(factor, given).items()
            }
            for factor, given in args.vary.items()
        },
    )


def _typed(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings as the types of `ConditionArgs`: YAML's 1 is 1.0 where a number is expected."""
    typed = from_dict(ConditionArgs, settings)
    return {key: getattr(typed, key) for key in settings}
