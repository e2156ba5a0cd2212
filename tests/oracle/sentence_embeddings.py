"""Embeddings of `texts` by sentence-transformers, for each of `folders`: {name: folder}, in batches of 2."""

from bridge import inputs, save
from sentence_transformers import SentenceTransformer

given = inputs()
models = {name: SentenceTransformer(folder, device="cpu") for name, folder in given["folders"].items()}
save(**{name: model.encode(given["texts"], batch_size=2) for name, model in models.items()})
