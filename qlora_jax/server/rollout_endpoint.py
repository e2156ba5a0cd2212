"""Serves an engine to the programs of a rollout phase, on a free port of this machine and with a new key."""

import contextlib
import secrets
from collections.abc import Iterator

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.rollouts.episodes import Endpoint
from qlora_jax.server.app import make_app
from qlora_jax.server.engine_thread import AnyEngine, EngineThread
from qlora_jax.server.metrics import Metrics
from qlora_jax.server.run import Server
from qlora_jax.server.served_models import ServedModel, ServedModels, chat_format
from qlora_jax.server.service import Limits, Service

MODEL = "policy"
SECONDS = 7 * 24 * 3600.0  # for a request; a phase has other limits
BODY_BYTES = 64 << 20
PLACES = 1 << 16
STOP_SECONDS = 1


@contextlib.contextmanager
def serve_rollouts(
    engine: AnyEngine, tokenizer: Tokenizer, stop_ids: frozenset[int], positions: int
) -> Iterator[Endpoint]:
    """Yields the endpoint of an engine; leaving it ends what still runs.

    Args:
      stop_ids: ids with which the model ends a turn.
      positions: of the model.
    """
    model = ServedModel(
        name=MODEL,
        adapter=None,
        tokenizer=tokenizer,
        form=chat_format(tokenizer),
        stop_ids=stop_ids,
        turn_end_ids=stop_ids,
        positions=positions,
        root=MODEL,
    )
    service = Service(
        models=ServedModels([model]),
        thread=EngineThread(engine, places=PLACES),
        limits=Limits(max_body=BODY_BYTES, max_tokens=(1 << 31) - 1, seconds=SECONDS),
        metrics=Metrics(),
        key=secrets.token_urlsafe(),
    )
    assert service.key is not None
    with Server(make_app(service), service, "127.0.0.1", 0, STOP_SECONDS).start() as server:
        yield Endpoint(f"{server.url}/v1", service.key, MODEL, lambda: service.thread.failure)
