"""The routes of the server, and what holds for all of them: hosts, keys, limits, and errors as JSON."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping

from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_jax import runtime
from qlora_jax.server import completions, openai_chat
from qlora_jax.server.adapters import load_adapter, unload_adapter
from qlora_jax.server.anthropic_messages import complete_message, message_events, prepare_messages
from qlora_jax.server.anthropic_schemas import MessagesBody
from qlora_jax.server.embeddings import embeddings
from qlora_jax.server.errors import ApiError, anthropic_error, error_response, openai_error
from qlora_jax.server.openai_schemas import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    LoadAdapterBody,
    UnloadAdapterBody,
)
from qlora_jax.server.openapi import openapi_document
from qlora_jax.server.request_validation import Body, decode_body, read_body
from qlora_jax.server.service import Service
from qlora_jax.untrusted_json import shorten

# The page has its style and script inside, and calls nothing but this server.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OPEN_PATHS = ("/", "/health")  # without a key: they say nothing about models
TIDY_SECONDS = 10.0  # between two times at which freed memory is returned, which takes 10 ms
SEND_SECONDS = 60.0  # until a client that reads nothing loses its stream

Json = dict[str, object]


def make_app(service: Service) -> ASGIApp:
    """Returns the application."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.thread.start()
        tidying = asyncio.create_task(_give_memory_back())
        yield
        tidying.cancel()
        service.thread.stop()

    gets: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/": lambda request: _page(service),
        "/health": lambda request: _health(service),
        "/metrics": lambda request: _metrics(service),
        "/v1/models": lambda request: _models(service),
        "/v1/models/{name:path}": lambda request: _model(service, request),
        "/runs/{name:path}": lambda request: _run(service, request),
        "/openapi.json": lambda request: _openapi(gets),
    }
    routes = [Route(path, _post(service, path), methods=["POST"]) for path in POSTS]
    routes += [Route(path, _get(answer), methods=["GET"]) for path, answer in gets.items()]
    handlers = {ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _gone, Exception: _failure}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    return _Guard(app, service, frozenset([*POSTS, *gets]))


async def _give_memory_back() -> None:
    """Returns the memory that programs and requests leave behind, every TIDY_SECONDS."""
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        await run_in_threadpool(runtime.give_memory_back)


def _get(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Coroutine]:
    async def endpoint(request: Request) -> Response:
        return await answer(request)

    return endpoint


def _post(service: Service, path: str) -> Callable[[Request], Coroutine]:
    kind, answer = POSTS[path]

    async def endpoint(request: Request) -> Response:
        content = await read_body(request, service.limits.max_body)
        body = await run_in_threadpool(lambda: kind.parse(decode_body(content)))
        return await answer(service, request, body)

    return endpoint


class _Guard:
    """Refuses requests of other hosts and without the key, and counts all of them."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]):
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        counted = path if path in self._paths else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._service.metrics.count(counted, message["status"])
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            await send(message)

        error = self._refusal(Request(scope))
        await (self._app if error is None else error_response(error, path))(scope, receive, counting)

    def _refusal(self, request: Request) -> ApiError | None:
        # A page of another site may call this machine by a name that it has just made point here.
        host = request.headers.get("host", "").rsplit("@")[-1]
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
        if self._service.hosts and name.lower() not in self._service.hosts:
            return ApiError(403, f"Host: found {shorten(name)}, expected {' or '.join(sorted(self._service.hosts))}")
        key = self._service.key
        if key is None or request.url.path in OPEN_PATHS:
            return None
        bearer = request.headers.get("authorization", "")
        scheme, _, token = bearer.partition(" ")
        given = request.headers.get("x-api-key") or (token if scheme.lower() == "bearer" else bearer)
        if hmac.compare_digest(given.encode(), key.encode()):
            return None
        headers = {"WWW-Authenticate": "Bearer"}
        return ApiError(
            401, "the API key is missing or wrong. Send it as a bearer token", code="invalid_api_key", headers=headers
        )


# ---- errors


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "Starlette chooses the handler by the type"
    return error_response(error, request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "Starlette chooses the handler by the type"
    path = shorten(request.url.path)
    problems = {404: f"{path}: no such route", 405: f"{path}: does not answer {request.method}"}
    message = problems.get(error.status_code, error.detail)
    known = error.status_code if error.status_code in problems else 400
    return error_response(ApiError(known, message, headers=error.headers), request.url.path)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failure(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "the server has failed. Its error is in the server's log"), request.url.path)


# ---- answers


async def _while_connected[T](request: Request, work: Coroutine[None, None, T]) -> T:
    """Returns what `work` returns; ends it when the client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _streamed(
    request: Request, events: AsyncIterator[Json], shape: Callable[[ApiError], Json], last: str | None
) -> Response:
    """Returns a response of server-sent events; an error before the first one has its own status."""
    first = await _while_connected(request, _next(events))

    async def texts() -> AsyncIterator[Json]:
        try:
            yield _event(first)
            async for event in events:
                yield _event(event)
        except ApiError as error:
            yield _event(shape(error))
            return
        if last is not None:
            yield {"data": last}

    return EventSourceResponse(texts(), sep="\n", send_timeout=SEND_SECONDS)


async def _next(events: AsyncIterator[Json]) -> Json:
    return await anext(events)


def _event(value: Json) -> Json:
    name = {"event": value["type"]} if "type" in value else {}
    return {**name, "data": json.dumps(value, ensure_ascii=False, allow_nan=False)}


async def _chat(service: Service, request: Request, body: ChatBody) -> Response:
    prepared = await run_in_threadpool(openai_chat.prepare, service, body)
    model, task, chat = prepared
    if body.stream:
        return await _streamed(
            request, openai_chat.stream_chat(service, model, body, task, chat), openai_error, "[DONE]"
        )
    found = await _while_connected(request, openai_chat.complete_chat(service, model, body, task, chat))
    return JSONResponse(found)


async def _completion(service: Service, request: Request, body: CompletionBody) -> Response:
    model, choices = await run_in_threadpool(completions.prepare_completion, service, body)
    if body.stream:
        events = completions.stream_completion(service, model, body, choices)
        return await _streamed(request, events, openai_error, "[DONE]")
    return JSONResponse(await _while_connected(request, completions.complete(service, model, body, choices)))


async def _messages(service: Service, request: Request, body: MessagesBody) -> Response:
    model, task, chat = await run_in_threadpool(prepare_messages, service, body)
    events = message_events(service, model, body, task, chat)
    if body.stream:
        return await _streamed(request, events, anthropic_error, None)
    return JSONResponse(await _while_connected(request, complete_message(events)))


async def _embeddings(service: Service, request: Request, body: EmbeddingBody) -> Response:
    return JSONResponse(await _while_connected(request, embeddings(service, body)))


async def _load(service: Service, request: Request, body: LoadAdapterBody) -> Response:
    return PlainTextResponse(await load_adapter(service, body))


async def _unload(service: Service, request: Request, body: UnloadAdapterBody) -> Response:
    return PlainTextResponse(await unload_adapter(service, body))


# Path -> the class of its bodies, and the function that answers them.
POSTS: Mapping[str, tuple[type[Body], Callable[..., Awaitable[Response]]]] = {
    "/v1/chat/completions": (ChatBody, _chat),
    "/v1/completions": (CompletionBody, _completion),
    "/v1/messages": (MessagesBody, _messages),
    "/v1/embeddings": (EmbeddingBody, _embeddings),
    "/v1/load_lora_adapter": (LoadAdapterBody, _load),
    "/v1/unload_lora_adapter": (UnloadAdapterBody, _unload),
}


async def _models(service: Service) -> Response:
    return JSONResponse({"object": "list", "data": [model.described() for model in service.models]})


async def _model(service: Service, request: Request) -> Response:
    return JSONResponse(service.models.get(request.path_params["name"]).described())


async def _run(service: Service, request: Request) -> Response:
    model = service.models.get(request.path_params["name"])
    if model.status is None:
        raise ApiError(404, f"{model.name}: has no run")
    return JSONResponse(await run_in_threadpool(model.status))


async def _page(service: Service) -> Response:
    if service.page is None:
        raise ApiError(404, "this server has no page. Send requests to /v1")
    return HTMLResponse(service.page, headers={"Content-Security-Policy": PAGE_POLICY})


async def _openapi(gets: Iterable[str]) -> Response:
    return JSONResponse(openapi_document({path: kind for path, (kind, _) in POSTS.items()}, gets))


async def _health(service: Service) -> Response:
    service.thread.check_runs()
    return Response(status_code=200)


async def _metrics(service: Service) -> Response:
    usage = await service.thread.call(service.thread.usage)
    return Response(service.metrics.text(usage._asdict()), media_type="text/plain; version=0.0.4")
