"""A real server on loopback, whose engine is scripted."""

import contextlib
import dataclasses
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.inference.engine.request import Request
from qlora_jax.inference.prompts import stop_ids
from qlora_jax.server.app import make_app
from qlora_jax.server.engine_thread import EngineThread
from qlora_jax.server.metrics import Metrics
from qlora_jax.server.run import Server
from qlora_jax.server.served_models import ServedModel, ServedModels, chat_format
from qlora_jax.server.service import Limits, Service
from tests.server.scripted_engine import ScriptedEngine

ASSETS = Path(__file__).resolve().parent.parent / "data/assets"
# Tools in the system turn, calls and reasoning as Qwen3 writes them.
TEMPLATE = """{%- if tools %}{{- '<|im_start|>system\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{% endfor %}{{- '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
KEY = "a secret"
POSITIONS = 512


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    text = gzip.decompress((ASSETS / "smollm2_tokenizer.json.gz").read_bytes()).decode()
    source = {"tokenizer_json": text, "chat_template": TEMPLATE}
    return load_tokenizer({**source, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})


@dataclasses.dataclass
class Served:
    """A running server, and the engine behind it."""

    url: str
    engine: ScriptedEngine
    service: Service
    server: Server


Start = Callable[..., contextlib.AbstractContextManager[Served]]


@pytest.fixture(scope="session")
def serve(tokenizer: Tokenizer) -> Start:
    """Returns a function that starts a server with a script: request -> text of its reply."""
    ends = stop_ids(tokenizer, (), chat=True)
    form = chat_format(tokenizer)

    def embed(texts):
        lengths = [len(tokenizer.encode(text)) for text in texts]
        return [lambda length=length: np.array([[length, 1.0, -0.5]]) for length in lengths], sum(lengths)

    def model(name: str, **fields) -> ServedModel:
        given = dict(adapter=None, tokenizer=tokenizer, form=form, stop_ids=ends, turn_end_ids=ends)
        return ServedModel(**{"name": name, "positions": POSITIONS, "root": f"/models/{name}", **given, **fields})

    @contextlib.contextmanager
    def start(
        script: Callable[[Request], str],
        *,
        seconds: float = 0,
        places: int = 100,
        limits: Limits | None = None,
        **given,
    ) -> Iterator[Served]:
        engine = ScriptedEngine(tokenizer, script, POSITIONS, seconds)
        models = [
            model("base"),
            model("a", adapter="a", parent="base", status=lambda: {"title": "a run"}),
            model("plain", form=None),
            model("vectors", embed=embed, parent="base"),
        ]
        thread = EngineThread(engine, places=places)
        service = Service(
            models=ServedModels(models),
            thread=thread,
            limits=limits or Limits(max_body=1 << 20, max_tokens=300, seconds=20.0),
            metrics=Metrics(),
            **given,
        )
        server = Server(make_app(service), service, "127.0.0.1", 0, 5)
        server.start()
        try:
            yield Served(server.url, engine, service, server)
        finally:
            server.stop()

    return start


def make_model(served: Served, name: str, **fields) -> ServedModel:
    """A model like those of the server."""
    return dataclasses.replace(served.service.models.get("a"), name=name, **fields)


def echo(request: Request) -> str:
    """A script whose reply says which adapter answers."""
    return f"I am {request.adapter or 'the base'}. Straße, naïve café: 1, 2, 3."
