"""A LoRA as a PEFT adapter: adapter_model.safetensors, adapter_config.json and a README.

Dimension key: L layers, K in, R rank, N out.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from qlora_jax.config import LoraArgs
from qlora_jax.io.inventory import layer_name

PREFIX = "base_model.model."
Lora = Mapping[str, Mapping[str, jax.Array | np.ndarray]]


def adapter_tensors(lora: Lora) -> dict[str, np.ndarray]:
    """lora_A.weight [R, K] = lora_a[layer]^T and lora_B.weight [N, R] = lora_b[layer]^T, for each layer of each module.

    Args:
      lora: {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}}.
    """
    tensors = {}
    for name, matrices in lora.items():
        for matrix, peft_name in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for layer, values in enumerate(np.asarray(matrices[matrix])):
                key = f"{PREFIX}{layer_name(name, layer)}.{peft_name}.weight"
                tensors[key] = np.ascontiguousarray(values.T)
    return tensors


def adapter_config(lora: Lora, args: LoraArgs, linears: Iterable[str], base: str) -> dict[str, Any]:
    """adapter_config.json: PEFT builds from it the adapter that was trained, with the same scaling.

    Args:
      linears: names of all linear layers, those without an adapter included, with the layer's index left out.
      base: where PEFT finds the base model: a path or a name.

    Raises:
      ValueError: the settings give a module another rank than it has.
    """
    _check_ranks(lora, args)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": args.rank,
        "lora_alpha": _whole(args.alpha),
        "lora_dropout": args.dropout,
        "use_rslora": args.use_rslora,
        "target_modules": target_suffixes(list(lora), list(linears)),
        "rank_pattern": dict(args.rank_pattern),
        "alpha_pattern": {pattern: _whole(alpha) for pattern, alpha in args.alpha_pattern.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def target_suffixes(targets: Sequence[str], linears: Sequence[str]) -> list[str]:
    """For each target the shortest end of its name that no linear layer without an adapter shares, each once."""
    others = [name for name in linears if name not in targets]
    suffixes = set()
    for name in targets:
        parts = layer_name(name, 0).split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        suffixes.add(next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)))
    return sorted(suffixes)


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """The adapter's three files, in a folder that is there."""
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(config), encoding="utf-8")


README = """\
---
library_name: peft
tags: [lora, qlora]
---

A LoRA adapter (rank {r}, alpha {lora_alpha}) for the base model `{base_model_name_or_path}`, trained with qlora_jax.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({loadable!r})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def _readme(config: dict[str, Any]) -> str:
    base = config["base_model_name_or_path"]
    loadable = "the same model as a Hugging Face folder" if is_gguf(base) else base
    return README.format(**config, loadable=loadable)


def is_gguf(base: str) -> bool:
    """Whether a base is a file that transformers and peft do not load as it is."""
    return base.endswith(".gguf")


def _check_ranks(lora: Lora, args: LoraArgs) -> None:
    """PEFT finds a module's rank by the first pattern that matches the end of its full name."""
    wrong = []
    for name, matrices in lora.items():
        matching = (p for p in args.rank_pattern if re.match(rf"(.*\.)?({p})$", layer_name(name, 0)))
        expected, found = args.rank_pattern.get(next(matching, ""), args.rank), matrices["lora_a"].shape[-1]
        if found != expected:
            wrong.append(f"{name} has rank {found}, the settings say {expected}")
    if wrong:
        raise ValueError(f"the LoRA does not fit the run's settings: {'; '.join(wrong)}")


def _whole(number: float) -> float | int:
    """32 for 32.0: PEFT writes alpha as an integer."""
    return int(number) if float(number).is_integer() else number
