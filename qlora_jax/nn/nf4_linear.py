"""4-bit drop-ins for `nnx.Linear` and `nnx.LinearGeneral`, with an optional LoRA adapter.

Dimension key: K in, N out, R rank; `*stack` leading axes of layers that `nnx.vmap` created.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NoReturn

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.devices import target_device
from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.nf4_matmul.preferred_layout import preferred_layout
from qlora_jax.config import LoraArgs
from qlora_jax.nn.linear import FrozenLayer
from qlora_jax.nn.lora import LoRA, initial_factors, lora_scaling
from qlora_jax.nn.variables import Frozen
from qlora_jax.quant import QuantSettings, dequantize, quantize, quantize_traceable

# Attributes of the dense layer that change what it computes, and the values that a 4-bit product honours.
HONOURED_VALUES: Mapping[str, tuple[object, ...]] = {
    "precision": (None,),
    "dot_general": (None, jax.lax.dot_general),
    "dot_general_cls": (None,),
    "promote_dtype": (promote_dtype,),
    "preferred_element_type": (None,),
    "batch_axis": (FrozenDict(),),
}
LORA_SETTINGS = ("rank", "alpha", "dropout", "use_rslora", "dtype")  # the fields of LoraArgs that a layer honours


def linear_problems(linear: nnx.Linear | nnx.LinearGeneral) -> list[str]:
    """Reports the attributes of a dense layer that its 4-bit form cannot honour, one line each."""
    return [
        f"{name}: a 4-bit layer cannot honour it (found {getattr(linear, name)!r}). Leave it at its default, or leave "
        "the layer dense."
        for name, values in HONOURED_VALUES.items()
        if hasattr(linear, name) and getattr(linear, name) not in values
    ]


def lora_problems(lora: LoraArgs) -> list[str]:
    """Reports the adapter settings that a single layer cannot honour, one line each."""
    default = LoraArgs()
    return [
        f"{field.name}: a layer's adapter cannot honour it (found {getattr(lora, field.name)!r}). Leave it at its "
        f"default; a layer honours {', '.join(LORA_SETTINGS)}."
        for field in dataclasses.fields(LoraArgs)
        if field.name not in LORA_SETTINGS and getattr(lora, field.name) != getattr(default, field.name)
    ]


class _NF4Module(nnx.Module):
    """The parts of a 4-bit layer, and its product on flattened features; subclasses give inputs their shape.

    Attributes:
      weight: `Frozen` QTensor of shape (N, K), its leaves with `*stack` leading axes.
      bias: `Frozen` [*stack, N], or None.
      lora: LoRA with `lora_a` [*stack, K, R] and `lora_b` [*stack, R, N], or None.
      dtype: dtype of the computation; None infers it from the input and the parameters.
      param_dtype: dtype of the kernel before quantization.
      deterministic: True turns the adapter's dropout off; `train()`, `eval()` and `nnx.view` set it.
    """

    def __init__(
        self,
        weight: QTensor,
        bias: Float[Array, "*stack N"] | None = None,
        *,
        dtype: DTypeLike | None = None,
        lora: LoraArgs | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        self.weight = Frozen(weight)
        self.bias = None if bias is None else Frozen(bias)
        self.use_bias = bias is not None
        self.dtype = dtype
        self.param_dtype = jnp.dtype(weight.dtype)
        self.deterministic = False
        self.lora = None if lora is None else _new_lora(weight, lora, rngs)
        has_dropout = lora is not None and lora.dropout > 0
        self.rngs = rngs.dropout.split(weight.stack_shape) if has_dropout and rngs is not None else None

    @property
    def kernel(self) -> NoReturn:
        """Raises AttributeError: the kernel exists in 4 bits only."""
        raise AttributeError(
            "kernel: a 4-bit layer has none. Call dequantized_kernel() for a copy in the dtype before quantization."
        )

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets `deterministic`, for `nnx.view`.

        Args:
          deterministic: if True, disables the adapter's dropout.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _dequantized(self) -> Float[Array, "*stack K N"]:
        return jnp.swapaxes(dequantize(self.weight.get_value()), -1, -2)

    def _product(self, x: Float[Array, "*batch K"], out_sharding: object) -> Float[Array, "*batch N"]:
        if out_sharding is not None:
            raise ValueError(
                f"out_sharding: a 4-bit layer cannot honour it (found {out_sharding}). "
                "Constrain the result with jax.lax.with_sharding_constraint instead."
            )
        weight = self.weight.get_value()
        if weight.stack_shape:
            raise ValueError(
                f"a stack of {weight.stack_shape} 4-bit layers was called as one layer. "
                "Call its layers inside nnx.scan or nnx.vmap."
            )
        bias = None if self.bias is None else self.bias[...]
        x = x.astype(canonicalize_dtype(x, jnp.zeros((), self.param_dtype), bias, dtype=self.dtype))
        x_MK, frozen = x.reshape(-1, x.shape[-1]), FrozenLayer(weight, bias, None)
        if self.lora is None:
            y_MN = frozen(x_MK)
        else:
            (y_MN,) = LoRA.apply([self.lora], x_MK, [frozen], [self._dropout_keys()])
        return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])

    def _dropout_keys(self) -> jax.Array | None:
        """Returns one key, so that all of x is one row."""
        return None if self.rngs is None or self.deterministic else self.rngs()[None]


class NF4Linear(_NF4Module):
    """y = x W + b + scaling * dropout(x) A B, with W frozen in 4 bits: a drop-in for `nnx.Linear`.

    Only A and B train (`nnx.LoRAParam`). The backward pass saves the packed codes, never a dequantized weight.
    The dtype of the result is promoted as `nnx.Linear` does. Products are accumulated in f32.

    Args:
      weight: QTensor of shape (N, K), the transpose of an nnx kernel; `qlora_jax.quantize_array(kernel.T)` returns one.
      bias: [N]; frozen.
      dtype: dtype of the computation; None infers it from the input and the parameters.
      lora: adapter settings; only rank, alpha, dropout, use_rslora and dtype apply. None adds no adapter.
      rngs: required with `lora`: `params` draws A, `dropout` the masks.

    Raises:
      ValueError: `lora` without `rngs`, or with a setting that a layer cannot honour.
    """

    def __init__(
        self,
        weight: QTensor,
        bias: Float[Array, "*stack N"] | None = None,
        *,
        dtype: DTypeLike | None = None,
        lora: LoraArgs | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(weight, bias, dtype=dtype, lora=lora, rngs=rngs)
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        lora: LoraArgs | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> "NF4Linear":
        """Quantizes a layer, or a stack of layers that `nnx.vmap` created; `linear` itself stays as it is.

        The codes are bit-identical to bitsandbytes' for `kernel.T`. Inside a trace, as in `nnx.eval_shape`, values
        are not checked, and blocks of subnormal weights may differ from bitsandbytes'.

        Raises:
          ValueError: an attribute or a setting that a 4-bit layer cannot honour, or a weight that is not finite.
        """
        _raise_if(linear_problems(linear))
        settings = QuantSettings(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        weight = quantize_kernel(linear.kernel[...], settings)
        bias = None if linear.bias is None else linear.bias[...]
        return cls(weight, bias, dtype=linear.dtype, lora=lora, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch K"], out_sharding: object = None) -> Float[Array, "*batch N"]:
        """Returns the layer's result [..., N] for inputs [..., K]; `out_sharding` must be None."""
        return self._product(x, out_sharding)

    def dequantized_kernel(self) -> Float[Array, "*stack K N"]:
        """The kernel [*stack, in, out] that the codes stand for, in `param_dtype`; without the adapter."""
        return self._dequantized()


class NF4LinearGeneral(_NF4Module):
    """`NF4Linear` over several axes: a drop-in for `nnx.LinearGeneral`, as in `nnx.MultiHeadAttention`.

    K and N are the products of the input and output features. The adapter is on the flattened features, as PEFT has
    it: `lora_a` [K, R], `lora_b` [R, N].

    Args:
      weight: QTensor of shape (N, K).
      bias: [N]; frozen.
      in_features, out_features: the shape of the contracted axes, and of those that replace them.
      axis: the contracted axes of the input; their order does not matter.
      dtype, lora, rngs: as for NF4Linear.
    """

    def __init__(
        self,
        weight: QTensor,
        bias: Float[Array, "*stack N"] | None = None,
        *,
        in_features: tuple[int, ...],
        out_features: tuple[int, ...],
        axis: tuple[int, ...] = (-1,),
        dtype: DTypeLike | None = None,
        lora: LoraArgs | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(weight, bias, dtype=dtype, lora=lora, rngs=rngs)
        self.in_features = in_features
        self.out_features = out_features
        self.axis = axis

    @classmethod
    def from_linear(
        cls,
        linear: nnx.LinearGeneral,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        lora: LoraArgs | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> "NF4LinearGeneral":
        """Quantizes a layer or a stack of layers, as `NF4Linear.from_linear` does.

        Raises:
          ValueError: also where the layer has a `batch_axis`.
        """
        _raise_if(linear_problems(linear))
        settings = QuantSettings(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        kernel, features = linear.kernel[...], (linear.in_features, linear.out_features)
        stack = kernel.shape[: kernel.ndim - sum(map(len, features))]
        k, n = map(math.prod, features)
        return cls(
            quantize_kernel(kernel.reshape(*stack, k, n), settings),
            None if linear.bias is None else linear.bias[...].reshape(*stack, n),
            in_features=linear.in_features,
            out_features=linear.out_features,
            axis=linear.axis,
            dtype=linear.dtype,
            lora=lora,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "..."], out_sharding: object = None) -> Float[Array, "..."]:
        """Replaces the axes `axis` of the input by `out_features` at its end; `out_sharding` must be None."""
        axes = sorted(axis % x.ndim for axis in self.axis)
        x = jnp.moveaxis(x, axes, range(-len(axes), 0))
        batch = x.shape[: x.ndim - len(axes)]
        y = self._product(x.reshape(*batch, math.prod(self.in_features)), out_sharding)
        return y.reshape(*batch, *self.out_features)

    def dequantized_kernel(self) -> Float[Array, "..."]:
        """The kernel [*stack, *in_features, *out_features] that the codes stand for, in `param_dtype`."""
        kernel = self._dequantized()
        return kernel.reshape(*kernel.shape[:-2], *self.in_features, *self.out_features)


def quantize_kernel(kernel: Float[Array, "*stack K N"], settings: QuantSettings) -> QTensor:
    """The QTensor of shape (N, K) of an nnx kernel or a stack of them, in the layout that the device reads fastest.

    Raises:
      ValueError: the dtype or a value cannot be quantized.
    """
    *stack, k, n = kernel.shape
    layers = [_quantize_layer(layer_KN.T, settings) for layer_KN in kernel.reshape(-1, k, n)]
    weight = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(*stack, *leaves[0].shape), *layers)
    return repack(weight, preferred_layout(target_device().platform, (n, k), settings.block_size))


def _quantize_layer(weight_NK: jax.Array, settings: QuantSettings) -> QTensor:
    if isinstance(weight_NK, jax.core.Tracer):
        return quantize_traceable(weight_NK, settings)
    return quantize(weight_NK, **dataclasses.asdict(settings))


def _new_lora(weight: QTensor, lora: LoraArgs, rngs: nnx.Rngs | None) -> LoRA:
    """A new adapter for a weight (N, K): A random, B zero."""
    missing = [] if rngs is not None else ["rngs: required to draw lora_a (found None). Pass nnx.Rngs(0)."]
    _raise_if([*lora_problems(lora), *missing])
    assert rngs is not None
    out_features, in_features = weight.shape
    count = math.prod(weight.stack_shape)
    factors = initial_factors(rngs.params(), count, (out_features, in_features), lora.rank, lora.dtype)
    lora_a, lora_b = (factor.reshape(*weight.stack_shape, *factor.shape[1:]) for factor in factors)
    return LoRA(lora_a, lora_b, lora_scaling(lora.rank, lora.alpha, lora.use_rslora), lora.dropout)


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join(["the layer cannot be quantized:", *problems]))
