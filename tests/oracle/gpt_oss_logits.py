"""Random gpt-oss models: f32 logits of rows of every kind, and gradients, as in family_rows.py.

Each of `configs` is saved as a folder. Of those in `mxfp4`, the matrices of experts are drawn as codes: the folder has
them in the form of published checkpoints, and the logits are those of transformers' dequantization. That is returned
too, and the gradients by the fused matrices of experts.
"""

import json
import pathlib

import torch
from bridge import inputs, save
from random_models import random_model
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

given = inputs()
tokens = torch.from_numpy(given["tokens"]).long()
padding, cut = given["padding"], given["cut"]
torch.manual_seed(0)
found = {}


def with_codes(folder: pathlib.Path, model: torch.nn.Module, name: str) -> None:
    """Replaces the experts' matrices by random codes, in the model (dequantized) and in its folder."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for key, parameter in model.named_parameters():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inner, outer = parameter.shape
        blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(121, 125, (experts, outer, inner // 32), dtype=torch.uint8)
        dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        found[f"{name}/dequantized/{key}"] = dense.numpy()
        parameter.data.copy_(dense)
        del tensors[key]
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    save_file(tensors, folder / "model.safetensors")


def logits(model, row, **kwargs):
    return model(row[None], **kwargs).logits[0]


for name, config in given["configs"].items():
    model, folder = random_model(config), pathlib.Path(given["folder"]) / name
    model.save_pretrained(folder)
    if name in given["mxfp4"]:
        with_codes(folder, model, name)
    mask = (torch.arange(tokens.shape[1]) >= padding)[None].long()
    with torch.no_grad():
        parts = [logits(model, tokens[0, :cut]), logits(model, tokens[0, cut:])]
        found[f"{name}/right"] = logits(model, tokens[0]).numpy()
        found[f"{name}/left"] = logits(model, tokens[1], attention_mask=mask)[padding:].numpy()
        found[f"{name}/packed"] = torch.cat(parts).numpy()
    log_p = torch.log_softmax(model(tokens).logits[:, :-1], dim=-1)
    nll = -log_p.gather(-1, tokens[:, 1:, None]).sum()
    nll.backward()
    found[f"{name}/nll"] = nll.detach().numpy()
    for key, parameter in model.named_parameters():
        if ".layers." in key and parameter.ndim > 1:
            found[f"{name}/gradient/{key}"] = parameter.grad.numpy()
save(**found)
