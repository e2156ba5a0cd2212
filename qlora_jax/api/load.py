"""`load`: a base model, training run or PEFT adapter as a Flax module and a tokenizer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from qlora_jax.api.provenance import Provenance, attach
from qlora_jax.api.settings import loading_bar
from qlora_jax.config import ModelArgs
from qlora_jax.config.fields import TemplateValue
from qlora_jax.config.suggestions import suggests_arguments
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.io.loading.loader import Progress
from qlora_jax.io.pretrained import OpenedModel, apply_adapter, is_finetuned, load_checked, open_base, open_finetuned
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import combine

QuantType = Literal["nf4", "fp4", "int4", "e2m1", "e3m0", "nvfp4", "stored", "none"]
ComputeDtype = Literal["auto", "bfloat16", "float32"]


@suggests_arguments
def load(
    path: str,
    *,
    quant_type: QuantType | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
    compute_dtype: ComputeDtype | None = None,
    keep_16bit: str | list[str] | None = None,
    new_tokens: Sequence[str] = (),
    new_special_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, TemplateValue] | None = None,
    base: str | None = None,
    step: int | None = None,
    progress: bool = False,
) -> tuple[CausalLM, Tokenizer]:
    """Loads a model for use or training: (an `nnx.Module`, its tokenizer).

    >>> model, tokenizer = q.load("model", quant_type="nf4")
    >>> model.config.num_layers
    2

    Weights are quantized tensor by tensor while they are read, so host memory holds one unquantized tensor at a time.

    Args:
      path: a Hugging Face folder, a GGUF file, a name on the Hub (org/name, org/name@revision, org/name/file.gguf), the
        folder of a training run, or the folder of a PEFT adapter.
      quant_type: 4-bit data type of the linear layers, "stored" for the files' own codes, "none" for 16 bits; None:
        nf4, or that of the training run.
      block_size: number of weights that share one scale; None: 64, or that of the training run.
      double_quant: quantize the scales too; None: True, or as in the training run.
      compute_dtype: dtype of the matmuls; None or "auto": bfloat16 where the device is fast at it.
      keep_16bit: linear layers that stay in 16 bits: names such as ["down_proj", "layers.0.self_attn.v_proj"], or one
        regular expression for full names; None: none, or those of the training run.
      new_tokens: tokens to add to a base's vocabulary; their rows train with the adapter.
      new_special_tokens: special tokens to add, such as turn markers.
      chat_template: a jinja file, or chatml, gemma, llama3 or zephyr, to use instead of the model's template.
      chat_template_kwargs: variables for the template, such as {"enable_thinking": False}; None: the training run's.
      base: for a run or adapter, the path of its base model if that moved after training.
      step: for a run, the checkpoint to load; None: the newest.
      progress: show a progress bar.

    Raises:
      ValueError: files are missing, damaged or not supported, or the base is not the one that the run was trained on.
    """
    if is_finetuned(path):
        if new_tokens or new_special_tokens:
            raise ValueError(f"{path}: new_tokens require a base model (found a run or adapter). Remove them")
        opened = open_finetuned(
            path, base=base, step=step, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs
        )
    else:
        if base is not None or step is not None:
            raise ValueError(f"{path}: base and step require a run or adapter (found a base model). Remove them")
        args = ModelArgs(path=path, new_tokens=[*new_tokens], new_special_tokens=[*new_special_tokens])
        opened = open_base(args, chat_template, chat_template_kwargs)
    changes = {
        "quant_type": quant_type,
        "block_size": block_size,
        "double_quant": double_quant,
        "compute_dtype": compute_dtype,
        "keep_16bit": keep_16bit,
    }
    args = dataclasses.replace(opened.args, **{name: value for name, value in changes.items() if value is not None})
    with loading_bar(progress) as report:
        return load_opened(opened, args, chat_template, report), opened.tokenizer


def load_opened(
    opened: OpenedModel, args: ModelArgs, chat_template: str | None = None, progress: Progress | None = None
) -> CausalLM:
    """Loads the weights of an opened model in the format of `args`, with the run's adapter if there is one.

    Raises:
      ValueError: a file is damaged, or the base is not the one that the run was trained on.
    """
    loaded = load_checked(opened, args, progress)
    run = opened.run
    model = loaded.model if run is None else combine(apply_adapter(loaded.model, run))
    provenance = Provenance(
        opened=dataclasses.replace(opened, args=args),
        chat_template=chat_template or (run.chat_template if run else None),
        chat_template_kwargs=opened.tokenizer.chat_template_kwargs,
        fingerprint=loaded.fingerprint,
        lora_args=run.lora_args if run else None,
        initial=run.initial if run else None,
        head=run.head if run else None,
        rounded=run.rounded if run else True,
    )
    return attach(model, provenance)
