"""A random Llama of `config` saved by transformers in bf16 shards into `folder`; returns its weights as f32."""

import torch
from bridge import inputs, save
from transformers import LlamaConfig, LlamaForCausalLM

given = inputs()
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**given["config"])).to(torch.bfloat16)
model.save_pretrained(given["folder"], max_shard_size="40KB")
save(**{name: value.float().numpy() for name, value in model.state_dict().items()})
