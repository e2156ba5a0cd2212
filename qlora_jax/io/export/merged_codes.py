"""Exports of runs that trained with merged weights (`lora.merge_into`): their file has the codes of training.

Dimension key: N out, K in.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.config import LoraArgs
from qlora_jax.config.exports import EXPORTS, Dtype, ExportOptions
from qlora_jax.config.methods import MERGED_FOLDERS
from qlora_jax.io.hf.model_writer import dense_tensor
from qlora_jax.io.hf.quantized_folder import FORMS
from qlora_jax.io.open_model import open_model
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.io.tensor_map import Slot, slots_of
from qlora_jax.methods.merge_into import file_kinds, is_coded, replace_by_codes, tables
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.frozen_weight import ops_of
from qlora_jax.quant.encoders import ENCODERS

ALONE = "adapter_alone"  # the flag that exports an adapter without the rounding that it was trained with
EXAMPLES = 5  # tensors that an error names


def merged_dtype(run: Run, form: str, options: ExportOptions) -> Dtype | None:
    """Returns the dtype of an export, by default that of training if the format has it; None: the format's default.

    Raises:
      ValueError: the export would not be the model that was trained; with all reasons.
    """
    merge_into, declared = run.lora_args.merge_into, EXPORTS[form]
    if options.dtype in MERGED_FOLDERS and options.dtype != merge_into:
        offered = FORMS[options.dtype].quantize is not None
        raise ValueError(
            f"--dtype: found {options.dtype} for a run with lora.merge_into={merge_into}. Train with lora.merge_into="
            f"{options.dtype}" + ", or export in bfloat16 with --base, and use `qlora-jax quantize`" * offered
        )
    if merge_into is None:
        return options.dtype
    problems = []
    if not (run.rounded or options.adapter_alone):
        problems.append(
            f"--step: no step up to {run.label} computed with rounded weights, because lora.merge_from="
            f"{run.lora_args.merge_from} begins later. Choose a later step, or train on"
        )
    trained = f"a run with lora.merge_into={merge_into}"
    if not declared.merged and not options.adapter_alone:
        problems.append(
            f"--format {form}: the adapter alone is not the model, because {trained} computed with rounded merged "
            f"weights. Use {_whole(merge_into)}, or --{ALONE}"
        )
    if options.base is not None:
        problems.append(f"--base: found {options.base!r} for {trained}, whose codes belong to its own base. Remove it")
    if form == "gguf" and merge_into not in declared.dtypes:
        problems.append(f"--format gguf: it cannot hold the weights of {trained}. Use {_whole(merge_into)}")
    elif form == "gguf" and options.dtype not in (None, merge_into):
        problems.append(f"--dtype: found {options.dtype} for {trained}. Remove it, since only {merge_into} is exact")
    if problems:
        raise ValueError("; ".join(problems))
    return options.dtype or (merge_into if declared.merged and merge_into in declared.dtypes else None)


def _whole(merge_into: str) -> str:
    return "--format hf" if merge_into in MERGED_FOLDERS else "--format gguf"


def _stored_code(entry: TensorEntry) -> GgmlTensor | QTensor | None:
    if entry.read_quantized is not None:
        return entry.read_quantized()
    return None if entry.read_stored is None else entry.read_stored(0, entry.rows)


def _kind(code: GgmlTensor | QTensor) -> str:
    return code.ggml_type if isinstance(code, GgmlTensor) else code.quant_type


class TrainedCodes:
    """The tensors of a model that trained with merged weights, in codes where its file has codes.

    Args:
      model: the model with its adapters, which are replaced by codes, in place.
      base: slots of the model before it was prepared for training.
      lora: the settings of training.

    Attributes:
      types: the type of each tensor that the file has in codes.
    """

    def __init__(self, model: CausalLM, base: Sequence[Slot], lora: LoraArgs):
        replace_by_codes(model)
        self.slots = slots_of(model)
        self._dtype = model.model.embed_tokens.weight[...].dtype
        self._places = {name: (slot, at) for slot in self.slots for at, name in enumerate(slot.names)}
        self._tables = {slot.names[0]: slot for slot in base if slot.module in tables(model)}
        kinds = file_kinds(model.config, lora)
        self.types = {
            name: kinds[slot.module][slot.place(at)[0] if slot.stacked else 0]
            for name, (slot, at) in self._places.items()
            if slot.path[-1] == "weight" and is_coded(kinds.get(slot.module, ()))
        }

    def code(self, slot: Slot, index: int) -> GgmlTensor | QTensor | None:
        """Returns the codes of the tensor at `index` in `slot.names`; None: the file has none."""
        table, kind = self._tables.get(slot.names[index]), self.types.get(slot.names[index])
        if kind is None:
            return None
        if table is not None:
            return ENCODERS[kind](jnp.asarray(table.leaf).astype(jnp.float32))
        layer, *expert = slot.place(index)
        part, row = ops_of(slot.leaf).part(slot.leaf, layer)
        code = jax.tree.map(lambda leaf: leaf[(row, *expert)], part)
        return repack(code, "bnb") if isinstance(code, QTensor) else code

    def tensor(self, slot: Slot, index: int) -> GgmlTensor | QTensor | np.ndarray:
        """Returns the tensor at `index` in `slot.names`; the slot may be that of a model with the same tensors."""
        slot, index = self._places[slot.names[index]]
        code = self.code(slot, index)
        return np.asarray(dense_tensor(slot, index, self._dtype, {}, {})) if code is None else code

    def tensors(self) -> Iterator[GgmlTensor | np.ndarray]:
        """Yields all tensors in order, for a GGUF file."""
        for slot, index in self._places.values():
            yield cast(GgmlTensor | np.ndarray, self.tensor(slot, index))

    def check(self, path: Path) -> int:
        """Compares every code of a written model with those of training, and returns the number of weights in codes.

        Raises:
          ValueError: a code differs, or other tensors are in codes; names them.
        """
        stored, weights, wrong = open_model(path).tensors, 0, []
        for name, (slot, index) in self._places.items():
            found, code = _stored_code(stored[name]), self.code(slot, index)
            if code is None or found is None or _kind(code) != _kind(found):
                if code is not None or found is not None:
                    wrong.append(f"{name}: stored as {stored[name].file_type}")
                continue
            weights += math.prod(code.shape)
            pairs = zip(*(map(np.asarray, jax.tree.leaves(each)) for each in (found, code)), strict=True)
            if differing := max(int((one != other).sum()) for one, other in pairs):
                wrong.append(f"{name}: codes that differ: {differing}")
        if wrong:
            more = f"; and {len(wrong) - EXAMPLES} more" if len(wrong) > EXAMPLES else ""
            raise ValueError(
                f"{path.name}: its codes are not those that training computed with ({'; '.join(wrong[:EXAMPLES])}"
                f"{more}). Report this as a fault of qlora_jax"
            )
        return weights
