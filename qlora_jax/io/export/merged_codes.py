"""Exports of runs that trained with merged weights (`lora.merge_into`): their file has the codes of training.

Dimension key: N out, K in.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.config import LoraArgs
from qlora_jax.config.exports import EXPORTS, Dtype, ExportOptions
from qlora_jax.io.hf.model_writer import dense_tensor
from qlora_jax.io.open_model import open_model
from qlora_jax.io.tensor_map import Slot, slots_of
from qlora_jax.methods.merge_into import FORMATS, replace_by_codes, tables
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.frozen_weight import ops_of
from qlora_jax.quant.encoders import ENCODERS

ALONE = "adapter_alone"  # the flag that exports an adapter without the rounding that it was trained with
EXAMPLES = 5  # tensors that an error names


def merged_dtype(lora: LoraArgs, form: str, options: ExportOptions) -> Dtype | None:
    """Returns the dtype of an export, by default that of training if the format has it; None: the format's default.

    Raises:
      ValueError: the export would not be the model that was trained; with all reasons.
    """
    merge_into, declared = lora.merge_into, EXPORTS[form]
    if merge_into is None:
        return options.dtype
    problems, trained = [], f"a run with lora.merge_into={merge_into}"
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
    return cast(Dtype, merge_into) if form == "gguf" else options.dtype


def _whole(merge_into: str) -> str:
    return "--format hf" if FORMATS[merge_into].projections_only else "--format gguf"


class TrainedCodes:
    """The tensors of a model that trained with merged weights, in codes where its file has codes.

    Args:
      model: the model with its adapters, which are replaced by codes, in place.
      base: slots of the model before it was prepared for training.
    """

    def __init__(self, model: CausalLM, base: Sequence[Slot], merge_into: str):
        replace_by_codes(model)
        self.slots = slots_of(model)
        self._format = FORMATS[merge_into]
        names = {f"{name}.weight" for name in tables(model)}
        self._tables = {slot.names[0]: slot for slot in base if ".".join(map(str, slot.path)) in names}

    def code(self, slot: Slot, index: int) -> GgmlTensor | None:
        """Returns the codes of the tensor at `index` in `slot.names`; None: the file has none."""
        name = slot.names[index]
        if name in self._tables:
            table_VD = jnp.asarray(self._tables[name].leaf)
            if table_VD.shape[1] % self._format.block:
                return None
            return cast(GgmlTensor, ENCODERS[self._format.kind](table_VD.astype(jnp.float32)))
        spec = slot.quantization_of(index)
        if not isinstance(spec, GgmlTensor) or spec.ggml_type != self._format.kind:
            return None
        layer, *expert = slot.place(index)
        part, row = ops_of(slot.leaf).part(slot.leaf, layer)
        return jax.tree.map(lambda codes: codes[(row, *expert)], part)

    def tensors(self, compute_dtype: np.dtype) -> Iterator[GgmlTensor | np.ndarray]:
        """Yields the tensors of all slots in order."""
        for slot in self.slots:
            for index in range(len(slot.names)):
                code = self.code(slot, index)
                yield np.asarray(dense_tensor(slot, index, compute_dtype, {}, {})) if code is None else code

    def check(self, path: Path) -> int:
        """Compares every code of a GGUF file with those of training, and returns the number of weights in codes.

        Raises:
          ValueError: a code differs, or other tensors are in codes; names them.
        """
        stored, weights, wrong = open_model(path).tensors, 0, []
        for slot in self.slots:
            for index, name in enumerate(slot.names):
                entry, code = stored[name], self.code(slot, index)
                if (code is not None) != (entry.file_type == self._format.kind):
                    wrong.append(f"{name}: stored as {entry.file_type}")
                elif code is not None:
                    assert entry.read_stored is not None
                    found, expected = entry.read_stored(0, entry.rows).codes, np.asarray(code.codes)
                    weights += int(np.prod(code.shape))
                    if count := int((found != expected).any(axis=1).sum()):
                        wrong.append(f"{name}: {count} of {len(expected)} rows differ")
        if wrong:
            more = f"; and {len(wrong) - EXAMPLES} more" if len(wrong) > EXAMPLES else ""
            raise ValueError(
                f"{path.name}: its codes are not those that training computed with ({'; '.join(wrong[:EXAMPLES])}"
                f"{more}). Report this as a fault of qlora_jax"
            )
        return weights
