"""4-bit layers with adapters for any Flax NNX model, chosen by rules over module paths."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from flax import nnx

from qlora_jax.config import LoraArgs
from qlora_jax.nn.nf4_linear import NF4Linear, NF4LinearGeneral, linear_problems, lora_problems
from qlora_jax.nn.random_keys import named_key
from qlora_jax.quant import QuantSettings
from qlora_jax.regex import matches_whole, pattern_problems

Linear = nnx.Linear | nnx.LinearGeneral


@dataclasses.dataclass(frozen=True)
class QuantRule:
    """Says how the linear layers whose paths match `pattern` are quantized.

    Attributes:
      pattern: regular expression that must match the whole dotted path of a layer, such as `layers.0.mlp.up`, as a
        `target_modules` expression does: `.*` matches all layers, `.*\\.(query|value)` two in every attention.
      quant_type: nf4, fp4, int4, e2m1 or e3m0; None leaves the matched layers as they are.
      block_size: weights that share one scale, a power of two from 32 to 4096.
      double_quant: True quantizes the scales to 8 bits too.
      lora: settings of the adapter; only rank, alpha, dropout, use_rslora and dtype apply. None adds none.
    """

    pattern: str
    quant_type: str | None = "nf4"
    block_size: int = 64
    double_quant: bool = True
    lora: LoraArgs | None = None


def quantize_model[Model: nnx.Module](
    model: Model, rules: Sequence[QuantRule], *, rngs: nnx.Rngs | None = None
) -> Model:
    """A copy of `model` whose `nnx.Linear` and `nnx.LinearGeneral` layers hold 4-bit weights and adapters.

    >>> layer = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    >>> small = q.quantize_model(layer, [q.QuantRule(pattern=".*", lora=q.LoRA(rank=4))])
    >>> small(jnp.ones((1, 64))).shape
    (1, 32)

    The first rule that matches a layer applies; layers that no rule matches stay dense. Stacks of layers that
    `nnx.vmap` created become stacks of 4-bit layers, which `nnx.scan` runs as before. `model` itself stays usable: its
    arrays are neither changed nor donated. Adapters are `nnx.LoRAParam`s, so only they train with
    `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)`; their initial values do not depend on the other rules.

    Args:
      rngs: draws the adapters' initial values and dropout masks; None: nnx.Rngs(0).

    Raises:
      TypeError: `rules` is not a sequence of QuantRule.
      ValueError: every problem at once: a pattern that is not a regular expression or matches no layer that an
        earlier rule left, settings that are not possible, matched layers that cannot be quantized, and parameters that
        a matched layer shares with the rest of the model. A layer that is shared as a whole stays shared.
    """
    _check_types(rules)
    layers = _linear_layers(model)
    chosen = {path: rule for path in layers if (rule := _first_match(rules, path)) is not None}
    tied = _tied_problems(model, chosen)
    if problems := [*_rule_problems(rules, layers, chosen), *_layer_problems(layers, chosen), *tied]:
        raise ValueError("\n  ".join(["the model cannot be quantized:", *problems]))
    key = (nnx.Rngs(0) if rngs is None else rngs).params()

    def convert(parts: tuple[object, ...], node: object) -> object:
        path = _dotted(parts)
        rule = chosen.get(path) if isinstance(node, Linear) else None
        if rule is None or rule.quant_type is None or not isinstance(node, Linear):
            return node
        return _quantized(path, node, rule, nnx.Rngs(named_key(key, path)))

    return nnx.recursive_map(convert, nnx.clone(model))


def _check_types(rules: object) -> None:
    """Raises TypeError for rules in another form, such as one rule without its list."""
    if not isinstance(rules, Sequence) or not all(isinstance(rule, QuantRule) for rule in rules):
        raise TypeError(f"rules: found {rules!r}, expected a list such as [QuantRule('.*')]")
    for rule in rules:
        if not isinstance(rule.lora, LoraArgs | None):
            raise TypeError(f"QuantRule({rule.pattern!r}): lora: found {rule.lora!r}, expected qlora_jax.LoRA(...)")


def _linear_layers(model: nnx.Module) -> dict[str, Linear]:
    """Each dense linear layer by its path; a shared layer once, by its first path."""
    layers: dict[str, Linear] = {}

    def collect(parts: tuple[object, ...], node: object) -> object:
        if isinstance(node, Linear):
            layers[_dotted(parts)] = node
        return node

    nnx.recursive_map(collect, model)
    return layers


def _dotted(parts: tuple[object, ...]) -> str:
    return ".".join(map(str, parts))


def _first_match(rules: Sequence[QuantRule], path: str) -> QuantRule | None:
    return next((rule for rule in rules if _matches(rule.pattern, path)), None)


def _matches(pattern: str, path: str) -> bool:
    return not pattern_problems(pattern) and matches_whole(pattern, path)


def _rule_problems(
    rules: Sequence[QuantRule], layers: Mapping[str, Linear], chosen: Mapping[str, QuantRule]
) -> list[str]:
    used = {id(rule) for rule in chosen.values()}
    problems = [] if rules else ["rules: found none, expected at least one. Give one, such as QuantRule('.*')."]
    for number, rule in enumerate(rules):
        place = f"rules[{number}] {rule.pattern!r}"
        problems += [f"{place}: {problem}" for problem in _own_problems(rule)]
        if id(rule) not in used and not pattern_problems(rule.pattern):
            matched = [path for path in layers if _matches(rule.pattern, path)]
            problems.append(f"{place}: {_unused(matched, layers)}")
    return problems


def _unused(matched: list[str], layers: Mapping[str, Linear]) -> str:
    if matched:
        return f"earlier rules match all of its layers ({', '.join(matched)}). Put the more specific rule first."
    known = ", ".join(layers) or "the model has none"
    return f"matches no nnx.Linear or nnx.LinearGeneral (found {known}). A pattern matches a whole dotted path."


def _own_problems(rule: QuantRule) -> list[str]:
    """Reports what is wrong with a rule, whatever the model."""
    problems = pattern_problems(rule.pattern)
    if rule.quant_type is None:
        if rule.lora is not None:
            problems.append("lora: an adapter needs a 4-bit layer (found quant_type=None). Set a quant_type.")
        return problems
    try:
        QuantSettings(quant_type=rule.quant_type, block_size=rule.block_size, double_quant=rule.double_quant)
    except ValueError as error:
        problems.append(str(error))
    return problems + ([] if rule.lora is None else [f"lora.{problem}" for problem in lora_problems(rule.lora)])


def _layer_problems(layers: Mapping[str, Linear], chosen: Mapping[str, QuantRule]) -> list[str]:
    problems = []
    for path, rule in chosen.items():
        layer = layers[path]
        if rule.quant_type is None:
            continue
        if type(layer) not in (nnx.Linear, nnx.LinearGeneral):
            problems.append(
                f"{path}: a subclass of nnx.Linear may compute something else (found {type(layer).__name__}). "
                "Leave it dense with a rule of quant_type=None before this one."
            )
        problems += [f"{path}.{problem}" for problem in linear_problems(layer)]
    return problems


def _tied_problems(model: nnx.Module, chosen: Mapping[str, QuantRule]) -> list[str]:
    """Reports the parameters of layers to quantize that have other paths, too: each would get its own copy."""
    quantized = {path for path, rule in chosen.items() if rule.quant_type is not None}
    return [
        f"{first}: one parameter with {', '.join(others)}, from which a 4-bit layer would untie it. Share the whole "
        "layer, so that it stays one with one adapter, or leave all of them dense with a rule of quant_type=None."
        for paths in nnx.find_duplicates(model, only=nnx.Variable)
        if quantized & {_dotted(parts[:-1]) for parts in paths}
        for first, *others in [list(map(_dotted, paths))]
    ]


def _quantized(path: str, layer: Linear, rule: QuantRule, rngs: nnx.Rngs) -> NF4Linear | NF4LinearGeneral:
    assert rule.quant_type is not None
    quantize = functools.partial(
        NF4Linear.from_linear if isinstance(layer, nnx.Linear) else NF4LinearGeneral.from_linear,
        quant_type=rule.quant_type,
        block_size=rule.block_size,
        double_quant=rule.double_quant,
    )
    try:
        return quantize(layer, lora=rule.lora, rngs=rngs)
    except ValueError as error:  # the quantizer does not know the layer's path
        raise ValueError(f"{path}: {error}") from error
