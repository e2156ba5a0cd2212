"""The compute dtype and weight format of a run: by its device, and by the layers that `model.keep_16bit` keeps."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Sequence

import jax
from jaxtyping import PyTree

from pallas_kernels.devices import target_device
from pallas_kernels.formats.ggml_blocks import PART
from pallas_kernels.native.library import fast_bfloat16
from qlora_jax.config import ModelArgs
from qlora_jax.config.sizes import format_bytes
from qlora_jax.models.abstract_init import frozen_expert_leaves, frozen_linear_leaves
from qlora_jax.models.config import NVFP4, ModelConfig, WeightFormat
from qlora_jax.regex import matches_end, matches_whole, pattern_problems
from qlora_jax.untrusted_json import shorten, shorten_key

# Selects the projections and layers that `model.keep_16bit` leaves in 16 bits, and counts the bytes that they add.
#
# Names are Hugging Face's. A list has the last parts of full names, as `lora.target_modules` has: `down_proj` for all
# layers, `layers.3.mlp.down_proj` for one. A string is one regular expression for full names.

BFLOAT16_CAPABILITY = (8, 0)  # compute capability from which NVIDIA's GPUs multiply bfloat16
SETTING = "model.keep_16bit"
NEVER_QUANTIZED = ("embed_tokens", "lm_head", "norm", "gate", "router")

Rows = tuple[int, ...]  # row numbers of a stack, which has a row per layer with the projection
Kept = tuple[tuple[str, Rows], ...]  # (projection's name within a layer, its rows in 16 bits, ascending)


def kept_layers(keep: str | Sequence[str], config: ModelConfig) -> Kept:
    """Returns the layers of each projection that stay in 16 bits, in the form of `WeightFormat.dense`.

    Raises:
      ValueError: names or patterns that match no projection; all are listed.
    """
    known = {full: place for place, full in full_names(config).items()}
    entries, matches = ([keep], matches_whole) if isinstance(keep, str) else ([*map(re.escape, keep)], matches_end)
    given = [keep] if isinstance(keep, str) else keep
    found: dict[str, set[int]] = {}
    problems = []
    for entry, pattern in zip(given, entries, strict=True):
        if wrong := pattern_problems(pattern):
            problems.append(f"{SETTING}: {shorten(entry)}: {wrong[0]}")
            continue
        places = [place for full, place in known.items() if matches(pattern, full)]
        if not places:
            problems.append(_unknown(entry, config))
        for name, row in places:
            found.setdefault(name, set()).add(row)
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return tuple((name, tuple(sorted(found[name]))) for name in projections(config) if name in found)


def keep_in_16_bits(weights: WeightFormat, keep: str | Sequence[str], config: ModelConfig) -> WeightFormat:
    """Returns the format with the layers of `keep` in 16 bits.

    Raises:
      ValueError: as `kept_layers`.
    """
    return dataclasses.replace(weights, dense=kept_layers(keep, config)) if keep else weights


def projections(config: ModelConfig) -> list[str]:
    """Returns the names within a layer of all projections that are quantized, those of experts included."""
    return [*config.linear_shapes(), *config.expert_shapes()]


def full_names(config: ModelConfig) -> dict[tuple[str, int], str]:
    """Returns {(projection's name within a layer, row): Hugging Face's full name}, without the numbers of experts."""
    return {
        (name, row): config.hugging_face_name(f"model.layers.{layer}.{name}")
        for name in projections(config)
        for row, layer in enumerate(config.layers_with(name))
    }


def names_of(kept: Kept, config: ModelConfig) -> list[str]:
    """Returns a list for `model.keep_16bit` that selects these layers; a projection of all layers has one name."""
    full, names = full_names(config), []
    for name, rows in kept:
        if len(rows) == len(config.layers_with(name)):
            names.append(config.hugging_face_name(name))
        else:
            names += [full[name, row] for row in rows]
    return names


def describe(kept: Kept, config: ModelConfig) -> str:
    """Returns the layers as text: `self_attn.q_proj of all layers; mlp.down_proj of layers 0-3, 7`."""
    texts = []
    for name, rows in kept:
        those_with = config.layers_with(name)
        some = f"layer{'s' * (len(rows) > 1)} {', '.join(_ranges([those_with[row] for row in rows]))}"
        which = "all layers" if len(rows) == len(those_with) else some
        texts.append(f"{config.hugging_face_name(name)} of {which}")
    return "; ".join(texts)


def layer_bytes(name: str, config: ModelConfig, weights: WeightFormat) -> tuple[int, int]:
    """Returns (bytes in 4 bits, bytes in 16 bits) of one layer of a projection, with all its experts and constants."""
    experts = config.expert_shapes().get(name)

    def leaves(weights: WeightFormat) -> tuple[PyTree, PyTree]:
        if experts is None or config.experts is None:
            return frozen_linear_leaves(name, 1, config.linear_shapes()[name][0], False, weights)
        return frozen_expert_leaves(name, (1, config.experts.count), experts, False, weights)

    def of(weights: WeightFormat) -> int:
        weight, _ = jax.eval_shape(lambda: leaves(weights))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))

    return of(dataclasses.replace(weights, dense=())), of(dataclasses.replace(weights, dense=((name, (0,)),)))


def added_bytes(kept: Kept, config: ModelConfig, weights: WeightFormat) -> int:
    """Returns the bytes that these layers take in 16 bits beyond those that they take in 4 bits."""
    sizes = {name: layer_bytes(name, config, weights) for name, _ in kept}
    return sum(len(rows) * (sizes[name][1] - sizes[name][0]) for name, rows in kept)


def kept_text(config: ModelConfig, weights: WeightFormat) -> str:
    """Returns the layers that stay in 16 bits, and the bytes that they add; empty without any."""
    if not weights.dense:
        return ""
    added = format_bytes(added_bytes(weights.dense, config, weights))
    return f"{describe(weights.dense, config)} ({added} more than in 4 bits)"


def _unknown(entry: str, config: ModelConfig) -> str:
    """Returns the message for a name or pattern that matches no projection."""
    shown, last = repr(shorten_key(entry)), entry.rpartition(".")[2]
    names = [config.hugging_face_name(name) for name in projections(config)]
    if last in NEVER_QUANTIZED or entry.endswith("norm"):
        return f"{SETTING}: {shown} is never quantized, so it needs no entry. Remove it"
    number = re.search(r"layers\.(\d{1,9})\.", entry)
    if number and int(number[1]) >= config.num_layers:
        return (
            f"{SETTING}: {shown} names layer {number[1]} (expected 0 to {config.num_layers - 1}, the layers of this "
            "model). Correct the number"
        )
    by_last = {name.rpartition(".")[2]: name for name in names}
    near = difflib.get_close_matches(last[:100], by_last, n=1)
    advice = f"; did you mean {by_last[near[0]]}?" if near else ". Correct the name"
    return f"{SETTING}: {shown} matches none of the linear layers: {', '.join(names)}{advice}"


def _ranges(layers: Sequence[int]) -> Iterator[str]:
    """Yields runs of consecutive numbers, such as 0-3 and 7."""
    start = last = layers[0]
    for layer in (*layers[1:], None):
        if layer is not None and layer == last + 1:
            last = layer
            continue
        yield str(start) if start == last else f"{start}-{last}"
        if layer is not None:
            start = last = layer


def platform() -> str:
    """Returns JAX's default platform: `cpu`, `gpu` or `tpu`."""
    return jax.default_backend()


def compute_dtype(asked: str, on: str | None = None, capability: tuple[int, int] | None = None) -> str:
    """Resolves `auto` to bfloat16 where the device multiplies it fast; else to float16 on a GPU, float32 on a CPU.

    Args:
      asked: `auto` or a dtype.
      on: the platform; None: JAX's default device.
      capability: compute capability of an NVIDIA GPU, if `on` names one that may be absent.
    """
    if asked != "auto":
        return asked
    if (on or platform()) == "cpu":
        return "bfloat16" if fast_bfloat16() else "float32"
    capability = target_device().compute_capability if on is None else capability
    return "float16" if capability is not None and capability < BFLOAT16_CAPABILITY else "bfloat16"


def check_whole_blocks(weights: WeightFormat, config: ModelConfig) -> None:
    """Raises ValueError if rows of linear layers are not whole blocks of NVFP4, which they are quantized to."""
    columns = {inputs for (_, inputs), _ in config.linear_shapes().values()}
    columns |= {inputs for _, inputs in config.expert_shapes().values()}
    if weights.quant_type == NVFP4 and (odd := sorted(each for each in columns if each % PART)):
        raise ValueError(
            f"quant_type: found 'nvfp4', but linear layers have {', '.join(map(str, odd))} inputs (expected multiples "
            f"of {PART}). Set nf4"
        )


def weight_format(
    args: ModelArgs, config: ModelConfig, on: str | None = None, capability: tuple[int, int] | None = None
) -> WeightFormat:
    """Returns the configured quantization of a model, with layout and dtype for a device; see `compute_dtype`.

    Raises:
      ValueError: `model.keep_16bit` names a layer that the model does not have, `model.experts` is offload and it has
        no experts, or rows are not whole blocks of NVFP4.
    """
    if args.experts == "offload" and config.experts is None:
        raise ValueError("model.experts: found 'offload', but the model has no routed experts. Remove this setting")
    weights = WeightFormat(
        quant_type=None if args.quant_type == "none" else args.quant_type,
        block_size=args.block_size,
        double_quant=args.double_quant,
        platform=on or platform(),
        dtype=compute_dtype(args.compute_dtype, on, capability),
        experts_on_host=args.experts == "offload",
    )
    check_whole_blocks(weights, config)
    return weights if weights.quant_type is None else keep_in_16_bits(weights, args.keep_16bit, config)
