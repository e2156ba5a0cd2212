"""Answers /v1/embeddings for runs with an embedding head."""

import base64

import numpy as np

from qlora_jax.server.errors import ApiError, bad_request
from qlora_jax.server.openai_chat import Json
from qlora_jax.server.openai_schemas import EmbeddingBody
from qlora_jax.server.service import Service


async def embeddings(service: Service, body: EmbeddingBody) -> Json:
    """Returns the embeddings of texts, which are computed between two steps of the engine."""
    model = service.models.get(body.model)
    if (embed := model.embed) is None:
        message = (
            f"model: {model.name} has no embedding head (expected a run of objective=embedding). Use another model"
        )
        raise ApiError(400, message, param="model")
    texts = [body.input] if isinstance(body.input, str) else body.input
    try:
        vectors, tokens = await service.thread.call(lambda: embed(texts))
    except ValueError as error:
        raise bad_request([f"input: {error}"]) from None
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(np.asarray(vectors, np.float32))
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


def _encoded(vector: np.ndarray, form: str) -> object:
    return vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
