"""Answers /v1/embeddings for runs with an embedding head."""

import asyncio
import base64

import numpy as np
from starlette.concurrency import run_in_threadpool

from qlora_jax.server.engine_thread import took_too_long
from qlora_jax.server.errors import ApiError, bad_request
from qlora_jax.server.openai_chat import Json
from qlora_jax.server.openai_schemas import EmbeddingBody
from qlora_jax.server.service import Service


async def embeddings(service: Service, body: EmbeddingBody) -> Json:
    """Returns the embeddings of texts, of which a few at a time are computed between two steps of the engine."""
    model = service.models.get(body.model)
    if (embed := model.embed) is None:
        message = (
            f"model: {model.name} has no embedding head (expected a run of objective=embedding). Use another model"
        )
        raise ApiError(400, message, param="model")
    texts = [body.input] if isinstance(body.input, str) else body.input
    seconds = service.limits.seconds
    try:
        with service.thread.places(1):
            async with asyncio.timeout(seconds):
                shares, tokens = await run_in_threadpool(embed, texts)
                found = [await service.thread.call(share) for share in shares]
    except TimeoutError:
        raise took_too_long(seconds) from None
    except ValueError as error:
        raise bad_request(str(error).split("\n")) from None
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(np.concatenate(found).astype(np.float32))
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


def _encoded(vector: np.ndarray, form: str) -> object:
    return vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
