"""Exports a run as a LoRA for llama.cpp: a GGUF file that it puts on a GGUF file of the base.

llama.cpp computes W x + alpha / rank * B (A x), one alpha for all modules and each module's own rank.

Dimension key: L layers, K in, R rank, N out.
"""

import collections
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from qlora_jax.io.atomic import staged_folder
from qlora_jax.io.checkpoint import Run
from qlora_jax.io.export.gguf_metadata import frame_without_tokenizer, framed
from qlora_jax.io.export.original_delta import as_exported
from qlora_jax.io.gguf.reader import Change
from qlora_jax.io.gguf.writer import Frame, Target, keys_of, write_gguf
from qlora_jax.io.hf.model_writer import dense_tensors
from qlora_jax.io.peft.writer import Lora, effective_alphas
from qlora_jax.io.pretrained import Opened, load_base, open_base_or_run
from qlora_jax.io.progress import loading
from qlora_jax.io.tensor_map import layer_name, slots_of

FILE = "adapter.gguf"
PLAIN = {"lora_a", "lora_b"}


def export_gguf_lora(
    path: Path, output: Path, *, step: int | None, model: str | None, with_base: bool, console: Console
) -> None:
    """Writes the adapter of the run at `path` to the new folder `output`, and with `with_base` the dequantized base.

    Args:
      model: where the run's base lies now, if elsewhere than in training.

    Raises:
      ValueError: no run or no such step, an output that is there already, an adapter that is no LoRA, a model that a
        GGUF file can't hold, or (with_base) another base than the run's.
    """
    opened = open_base_or_run(model, str(path), step=step)
    run = opened.run
    assert run is not None
    trained = as_exported(run, with_base)
    named = {opened.features.hugging_face_name(name): matrices for name, matrices in trained.lora.items()}
    check_plain(run, named)
    base = framed(opened) if with_base else None
    scaled = shared_alpha(effective_alphas(named, trained.args))
    frame = lora_frame(frame_without_tokenizer(opened), named, scaled.alpha)
    with staged_folder(output) as folder:
        write_gguf(folder / FILE, frame, list(frame.targets), lora_tensors(named, scaled.factors), "float32")
        if base:
            _write_base(folder, base.frame, opened, console)
    told = [_told(scaled), *trained.notes, *(base.notes if base else [])]
    lines = [f"LoRA of {run.label} for llama.cpp: {output / FILE}", *told]
    if not base:
        lines.append("llama.cpp puts it on a GGUF file of the base; --with_base writes the one that it was trained on")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def check_plain(run: Run, lora: Lora) -> None:
    """Passes an adapter that is nothing but A and B.

    Raises:
      ValueError: names every module that has something else, which llama.cpp does not read.
    """
    other = {name: sorted(leaves) for name, leaves in lora.items() if leaves.keys() != PLAIN}
    other |= {name: ["the whole table"] for name in run.tables}
    if other:
        raise ValueError(
            f"{run.label} is no plain LoRA, the only adapter that llama.cpp reads: it trains "
            f"{'; '.join(f'{name}: {leaves}' for name, leaves in other.items())}. Export with --format gguf, merged"
        )


class Scaled(NamedTuple):
    """The file's alpha, and by module what its B is multiplied with so that its own scaling comes out."""

    alpha: float
    factors: dict[str, float]


def shared_alpha(alphas: Mapping[str, float]) -> Scaled:
    """The alpha that most modules have."""
    (alpha, _), *_ = collections.Counter(alphas.values()).most_common(1)
    return Scaled(alpha, {name: each / alpha for name, each in alphas.items()})


def lora_frame(base: Frame, lora: Lora, alpha: float) -> Frame:
    """Keys and tensors of the file: NAME.lora_a [R, K] and NAME.lora_b [N, R], rows of B as the base's are in GGUF."""
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    targets = {}
    for name, matrices in lora.items():
        for layer in range(len(matrices["lora_a"])):
            weight = layer_name(f"{name}.weight", layer)
            there, rank = base.targets[weight], matrices["lora_a"].shape[-1]
            n, k = there.shape
            targets[f"{weight}.lora_a"] = Target(f"{there.name}.lora_a", (rank, k), Change())
            targets[f"{weight}.lora_b"] = Target(f"{there.name}.lora_b", (n, rank), there.change)
    return Frame(base.architecture, keys_of(keys), targets, {})


def lora_tensors(lora: Lora, factors: Mapping[str, float]) -> Iterator[np.ndarray]:
    """A and B of each layer of each module in f32, in the order of `lora_frame`'s targets."""
    for name, matrices in lora.items():
        for a_KR, b_RN in zip(matrices["lora_a"], matrices["lora_b"], strict=True):
            yield np.asarray(a_KR, np.float32).T
            yield np.asarray(b_RN, np.float32).T * np.float32(factors[name])


def _write_base(folder: Path, frame: Frame, opened: Opened, console: Console) -> None:
    """The base as the run saw it: quantized, and dequantized again."""
    with loading(console) as progress:
        model = load_base(opened, opened.args, progress)
    slots, computed = slots_of(model), model.model.embed_tokens.weight[...].dtype
    names = [name for slot in slots for name in slot.names]
    values = (np.asarray(tensor) for tensor in dense_tensors(slots, computed, {}))
    write_gguf(folder / f"base-{computed.name}.gguf", frame, names, values, computed.name)


def _told(scaled: Scaled) -> str:
    folded = {name: factor for name, factor in scaled.factors.items() if factor != 1}
    text = f"alpha {scaled.alpha:g}, over each module's rank"
    if not folded:
        return text
    return f"{text}; {len(folded)} modules were scaled otherwise, which is in their B: {', '.join(folded)}"
