"""Random models in transformers, for scripts of this folder."""

import torch
import transformers


def random_model(overrides: dict) -> torch.nn.Module:
    """A model of a config (llama where `model_type` is left out), in f32, with every parameter away from its default.

    Attention is transformers' plain one: its fused ones leave soft caps out.
    """
    config = transformers.AutoConfig.for_model(**({"model_type": "llama"} | overrides))
    kind = transformers.AutoModelForImageTextToText if "text_config" in overrides else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # norms start at one and biases at zero: move them too
            around = 1.0 if "norm" in key else 0.0
            parameter.copy_(around + torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.08))
    return model
