"""The noise that transformers' NEFTune hook adds to embeddings [B, T, D] in training and in evaluation."""

import torch
from bridge import inputs, save
from transformers.integrations.neftune import neftune_post_forward_hook

given = inputs()
torch.manual_seed(0)
embedding = torch.nn.Embedding(given["vocab"], given["width"])
embedding.neftune_noise_alpha = given["alpha"]
ids = torch.randint(given["vocab"], given["shape"])
plain = embedding(ids)
embedding.register_forward_hook(neftune_post_forward_hook)
save(
    train=(embedding.train()(ids) - plain).detach().numpy(),
    evaluation=(embedding.eval()(ids) - plain).detach().numpy(),
)
