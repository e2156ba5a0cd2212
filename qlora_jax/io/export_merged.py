"""Exports a run as one model: the adapter merged into the dequantized weights that it was trained on.

Merged weights are rounded once, to 16 bits, and an adapter's share of a weight may be smaller than that rounding. So
the merged model is read back, and its logits are compared with those of base and adapter.

Dimension key: B prompts, T tokens of the longest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int32
from rich.console import Console

from qlora_jax.config import ModelArgs
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.io.dense_folder import dense_tensors, write_dense_folder, write_tokenizer
from qlora_jax.io.folders import staged_folder
from qlora_jax.io.gguf_frame import framed
from qlora_jax.io.gguf_writer import Frame, write_gguf
from qlora_jax.io.inventory import layer_name
from qlora_jax.io.loader import load_model
from qlora_jax.io.opened import Opened, adapted, load_base, open_base_or_run
from qlora_jax.io.progress import loading
from qlora_jax.io.slots import Slot, slots_of, with_tables
from qlora_jax.io.source import open_model
from qlora_jax.models.adapt import linears
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import Lora, combine, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.models.vocabulary import whole_tables
from qlora_jax.nn.linear import Adapter

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Frage: Wie viele Beine haben drei Spinnen? Antwort:",
)
QUANTIZED = ("q8_0", "q4_0")  # what their rounding costs is told, not refused
# A merge is refused where it is off by more than this share of what the adapter does, and of the logits themselves;
# 16-bit computation alone makes some 2^-6 of the latter.
OF_ADAPTER, OF_LOGITS = 1 / 4, 1 / 16


class Difference(NamedTuple):
    """Of logits, over all tokens of the prompts: how far the merge is off, and what there is to be off from.

    Fields:
      largest: of the merge's, from those of base and adapter; rms likewise.
      adapter_largest, adapter_rms: of what the adapter adds to the base's.
      spread: standard deviation of the logits.
    """

    largest: float
    rms: float
    adapter_largest: float
    adapter_rms: float
    spread: float

    @property
    def is_small(self) -> bool:
        """Whether the merge does what base and adapter do."""
        return self.rms <= max(OF_ADAPTER * self.adapter_rms, OF_LOGITS * self.spread)

    def __str__(self) -> str:
        return (
            f"largest difference of its logits from those of base and adapter, on {len(PROMPTS)} prompts: "
            f"{self.largest:.3g} (rms {self.rms:.2g}); the adapter itself moves them by up to "
            f"{self.adapter_largest:.3g} (rms {self.adapter_rms:.2g})"
        )


def export_merged(
    path: Path, output: Path, form: str, *, step: int | None, model: str | None, dtype: str, console: Console
) -> None:
    """Writes the run at `path` to the new folder `output` as one model, its weights in `dtype`.

    Args:
      form: "hf", a folder for transformers; or "gguf", a file for llama.cpp.
      model: where the run's base lies now, if elsewhere than in training.

    Raises:
      ValueError: no run or no such step, an output that is there already, another base than the run's, a model
        that a GGUF file can't hold, or a merge in 16 bits or more whose logits are not those of base and adapter.
    """
    opened = open_base_or_run(model, str(path), step=step)
    run = opened.run
    assert run is not None
    file = framed(opened) if form == "gguf" else None
    with staged_folder(output) as folder:
        with loading(console) as progress:
            base = load_base(opened, opened.args, progress)
        slots, computed = slots_of(base), base.model.embed_tokens.weight[...].dtype
        new = [*opened.args.new_tokens, *opened.args.new_special_tokens]
        prompts = tokens_of(opened.tokenizer, (*PROMPTS, *([" ".join(new)] if new else [])))
        graphdef, lora, frozen = adapted(base, run)
        # `base` has fresh adapters now, which change nothing.
        none, whole = partition(base)[1], combine(graphdef, lora, frozen)
        with_adapter, without = (_logits(graphdef, each, frozen, prompts) for each in (lora, none))
        slots, config = with_tables(slots, opened.source.config, whole_tables(whole))
        tensors = {"computed": computed, "adapters": _adapters(whole)}
        written = (
            _write_file(folder, file.frame, slots, dtype, **tensors)
            if file
            else _write_folder(folder, opened, slots, config, dtype, **tensors)
        )
        del base, slots, frozen, whole, tensors  # what is read back may leave no room for them
        found = difference(_logits(*_read_back(written, computed.name), prompts), with_adapter, without)
        if not found.is_small and dtype not in QUANTIZED:
            raise ValueError(f"the merge of {run.label} is not what was trained: {found}. Try --dtype float32")
    lines = [f"{run.label}, merged: {output}", str(found), *(file.notes if file else [])]
    if not found.is_small:
        lines.append(f"{dtype} rounds away more than the adapter adds: --dtype q8_0 or float16 keeps what was learned")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _write_folder(
    folder: Path, opened: Opened, slots: Sequence[Slot], config: dict[str, Any], dtype: str, **tensors: Any
) -> Path:
    write_dense_folder(folder, slots, config, dtype=jnp.dtype(dtype), **tensors)
    write_tokenizer(folder, opened.tokenizer, opened.source.tokenizer["stop_token_ids"])
    return folder


def _write_file(folder: Path, frame: Frame, slots: Sequence[Slot], dtype: str, **tensors: Any) -> Path:
    path = folder / f"model-{dtype}.gguf"
    names = [name for slot in slots for name in slot.names]
    write_gguf(path, frame, names, (np.asarray(tensor) for tensor in dense_tensors(slots, **tensors)), dtype)
    return path


class Prompts(NamedTuple):
    """Prompts in one array, and which of its places hold a token: the others are to their right."""

    tokens_BT: Int32[np.ndarray, "B T"]
    real_BT: Bool[np.ndarray, "B T"]


def tokens_of(tokenizer: Tokenizer, texts: Sequence[str]) -> Prompts:
    """The texts' tokens."""
    ids = [tokenizer.encode(text) for text in texts]
    lengths = np.array([len(row) for row in ids])
    real_BT = np.arange(lengths.max())[None] < lengths[:, None]
    tokens_BT = np.zeros(real_BT.shape, np.int32)
    tokens_BT[real_BT] = np.concatenate(ids)
    return Prompts(tokens_BT, real_BT)


def difference(
    merged: Float[np.ndarray, "real V"], with_adapter: Float[np.ndarray, "real V"], without: Float[np.ndarray, "real V"]
) -> Difference:
    """How far a merge's logits are from those of base and adapter."""
    off, added = merged - with_adapter, with_adapter - without
    largest, rms = (lambda x: float(np.max(np.abs(x)))), (lambda x: float(np.sqrt(np.mean(np.square(x)))))
    return Difference(largest(off), rms(off), largest(added), rms(added), float(np.std(with_adapter)))


def _logits(graphdef: nnx.GraphDef, lora: Lora, base: nnx.State, prompts: Prompts) -> np.ndarray:
    """[real tokens, V] in f32."""

    @jax.jit
    def logits(lora: Lora, base: nnx.State, tokens_BT: jax.Array) -> jax.Array:
        model = combine(graphdef, lora, base)
        return model.head.logits(model.hidden(tokens_BT))

    return np.asarray(logits(lora, base, prompts.tokens_BT))[prompts.real_BT.reshape(-1)]


def _adapters(model: CausalLM) -> dict[str, Adapter]:
    """By the name of the first layer's module."""
    return {layer_name(name, 0): linear.adapter for name, linear in linears(model) if linear.adapter}


def _read_back(path: Path, computed: str) -> tuple[nnx.GraphDef, Lora, nnx.State]:
    args: dict[str, Any] = {"path": str(path), "quant_type": "none", "compute_dtype": computed}
    source = open_model(path)
    return partition(load_model(source, model_config(source.config), weight_format(ModelArgs(**args))).model)
