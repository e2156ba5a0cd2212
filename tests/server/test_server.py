"""The server under bad requests, limits, keys, clients that leave, several clients, and at its end."""

import concurrent.futures
import contextlib
import http.client
import json
import random
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_jax import runtime
from qlora_jax.server import app
from qlora_jax.server.anthropic_schemas import MessagesBody
from qlora_jax.server.openai_schemas import ChatBody, CompletionBody, EmbeddingBody
from qlora_jax.server.service import Limits
from tests.server.conftest import KEY, Served, Start, echo, make_model
from tests.server.scripted_engine import wait_until

HI = [{"role": "user", "content": "Hi"}]
BODIES = {
    "/v1/chat/completions": (ChatBody, {"model": "a", "messages": HI}),
    "/v1/completions": (CompletionBody, {"model": "a", "prompt": "x"}),
    "/v1/messages": (MessagesBody, {"model": "a", "max_tokens": 5, "messages": HI}),
    "/v1/embeddings": (EmbeddingBody, {"model": "vectors", "input": "x"}),
}


@pytest.fixture(scope="module")
def served(serve: Start):
    with serve(echo) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with httpx.Client(base_url=served.url, timeout=20) as client:
        yield client


def is_error(response: httpx.Response) -> bool:
    error = response.json()["error"]
    return isinstance(error["message"], str) and isinstance(error["type"], str) and response.status_code >= 400


def chat(served: Served, **fields) -> httpx.Response:
    body = {"model": "a", "messages": HI, **fields}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=20)


# ---- every field


@pytest.mark.parametrize("path", BODIES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=20), value=st.sampled_from([None, 1, "x", [], {}])
)
def test_a_field_with_any_other_name_is_refused(client, path, name, value):
    kind, body = BODIES[path]
    known = {*kind.inert, *(field.alias or name for name, field in kind.model_fields.items())}
    if name not in known:
        response = client.post(path, json={**body, name: value})
        assert (
            response.status_code == 400
            and is_error(response)
            and "expected no field of this name. Remove it" in response.text
        )


@pytest.mark.parametrize("path", BODIES)
def test_inert_fields_have_inert_values_only(client, path):
    kind, body = BODIES[path]
    for name, values in kind.inert.items():
        assert client.post(path, json={**body, name: None}).status_code == 200
        if not any(isinstance(value, object) and type(value) is object for value in values):
            response = client.post(path, json={**body, name: {"x": 1}})
            assert response.status_code == 400 and f"{name}: not implemented" in response.text


# ---- damaged requests


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b'{"model": "a", "model": "b"}', "application/json"),
        (b'{"temperature": NaN}', "application/json"),
        (b'{"temperature": 1e999}', "application/json"),
        (b'{"model": "\\ud800"}', "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"model": ' + b"9" * 5000 + b"}", "application/json"),
        (json.dumps({"model": "a", "messages": HI}).encode(), "text/plain"),
        (json.dumps({"model": "a", "messages": HI}).encode(), ""),
    ],
)
def test_what_is_not_json_is_refused(client, content, kind):
    for path in BODIES:
        response = client.post(path, content=content, headers={"Content-Type": kind})
        assert response.status_code == 400 and is_error(response)


def damaged(draw: random.Random, valid: bytes) -> bytes:
    """A request's body with some bytes changed, removed, repeated or added."""
    content = bytearray(valid)
    for _ in range(draw.randint(1, 4)):
        at, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        match draw.randrange(4):
            case 0:
                content[at:end] = b""
            case 1:
                content[at:at] = draw.randbytes(3)
            case 2:
                content[at:at] = content[at:end]
            case 3:
                content[at:at] = draw.choice([b"null", b"-1", b"{}", b"[]", b'""', b"1e400", b"\\u0000", b'"a":'])
    return bytes(content)


def send_damaged(served: Served, count: int) -> None:
    draw = random.Random(count)
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}]
    bodies = [
        *((path, body) for path, (_, body) in BODIES.items()),
        (
            "/v1/chat/completions",
            {
                "model": "a",
                "messages": HI,
                "tools": tools,
                "tool_choice": "auto",
                "n": 1,
                "stop": ["x"],
                "logprobs": True,
                "top_logprobs": 2,
                "seed": 1,
                "temperature": 0.5,
                "max_tokens": 4,
                "logit_bias": {"1": 2},
            },
        ),
    ]
    with httpx.Client(base_url=served.url, timeout=20) as client:
        for _ in range(count):
            path, body = draw.choice(bodies)
            response = client.post(
                path, content=damaged(draw, json.dumps(body).encode()), headers={"Content-Type": "application/json"}
            )
            assert response.status_code in (200, 400, 404) and (response.status_code == 200 or is_error(response))
    wait_until(lambda: not served.engine.running)
    assert chat(served).status_code == 200


def test_damaged_bodies_get_one_error_and_disturb_nothing(served):
    send_damaged(served, 300)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ten_thousand_damaged_bodies(served):
    send_damaged(served, 10_000)


def test_damaged_http_ends_its_connection_only(served):
    address = urlsplit(served.url)
    for content in (
        b"\x00" * 100,
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
    ):
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1000):
                pass
    assert chat(served).status_code == 200


# ---- routes and limits


def test_other_routes_are_errors_too(client):
    for method, path, status in [
        ("GET", "/x", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/models/zz", 404),
        ("GET", "/runs/../../etc/passwd", 404),
        ("GET", "/runs/base", 404),
    ]:
        response = client.request(method, path)
        assert response.status_code == status and is_error(response), path
    assert client.get("/health").status_code == 200
    assert client.get("/runs/a").json() == {"title": "a run"}


def test_metrics_count_requests_and_tokens(serve):
    with serve(echo) as served:
        chat(served)
        chat(served, model="zz")
        text = httpx.get(f"{served.url}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['qlora_jax_requests_total{path="/v1/chat/completions",status="200"}'] == "1.0"
    assert lines['qlora_jax_requests_total{path="/v1/chat/completions",status="404"}'] == "1.0"
    assert float(lines['qlora_jax_prompt_tokens_total{model="a"}']) > 5
    assert float(lines['qlora_jax_reply_tokens_total{model="a"}']) > 5
    assert lines["qlora_jax_first_token_seconds_count"] == "1.0"
    assert lines['qlora_jax_engine{name="running"}'] == "0.0"


def test_a_large_body_is_refused_whatever_its_headers_say(serve):
    with serve(echo, limits=Limits(max_body=1000, max_tokens=9, seconds=9)) as served:
        response = chat(served, messages=[{"role": "user", "content": "x" * 2000}])
        assert response.status_code == 413 and is_error(response)

        def pieces():
            yield from [b"x" * 300] * 10

        response = httpx.post(
            f"{served.url}/v1/completions", content=pieces(), headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 413 and is_error(response)


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_its_grammar_ends_is_an_error(serve, stream):
    with serve(echo) as served:
        served.engine.problem = "grammar: too complex here"
        response = chat(served, stream=stream)
        last = response.text.strip().splitlines()[-1].removeprefix("data: ")
        assert json.loads(last)["error"]["message"] == served.engine.problem and "[DONE]" not in response.text
        served.engine.problem = None
        assert chat(served).status_code == 200


def test_a_full_queue_says_when_to_come_back(serve):
    with serve(lambda request: "one two three four " * 200, seconds=0.02, places=2) as served:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            running = [pool.submit(chat, served, max_tokens=150) for _ in range(2)]
            wait_until(lambda: len(served.engine.running) == 2)
            refused = chat(served)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1" and is_error(refused)
            assert chat(served, n=2).status_code == 429
            assert chat(served, n=3).status_code == 400  # never fits
            assert [each.result().status_code for each in running] == [200, 200]
        assert chat(served, max_tokens=2).status_code == 200


def test_a_request_that_takes_too_long_ends(serve):
    limits = Limits(max_body=1000, max_tokens=300, seconds=0.3)
    with serve(lambda request: "one two three " * 100, seconds=0.02, limits=limits) as served:
        response = chat(served)
        assert response.status_code == 504 and is_error(response)
        text = chat(served, stream=True).text
        last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
        assert last["error"]["type"] == "timeout_error" and "[DONE]" not in text
        wait_until(lambda: not served.engine.running)


def test_a_key_is_needed_if_there_is_one(serve):
    with serve(echo, key=KEY) as served:
        refused = chat(served)
        assert refused.status_code == 401 and is_error(refused) and refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        assert httpx.get(f"{served.url}/runs/a").status_code == 401
        assert httpx.get(f"{served.url}/health").status_code == 200
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
            assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{served.url}/v1/models", headers={"x-api-key": "ä".encode()}).status_code == 401


def test_only_names_of_this_machine_are_answered_without_a_key(serve):
    with serve(echo, hosts=frozenset({"localhost", "127.0.0.1", "[::1]"})) as served:
        assert chat(served).status_code == 200
        for host, status in {
            "evil.example:8000": 403,
            "localhost": 200,
            "[::1]:80": 200,
            "127.0.0.1.evil.example": 403,
        }.items():
            assert httpx.get(f"{served.url}/v1/models", headers={"Host": host}).status_code == status


def test_the_page_may_load_nothing(serve):
    with serve(echo, page="<title>page</title>") as served:
        page = httpx.get(served.url)
        assert page.text == "<title>page</title>" and "default-src 'none'" in page.headers["content-security-policy"]


# ---- clients


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(serve, stream):
    with serve(lambda request: "one two three " * 600, seconds=0.1) as served:
        address = urlsplit(served.url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
        body = json.dumps({"model": "a", "messages": HI, "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        wait_until(lambda: served.engine.steps >= 3)
        if stream:
            connection.getresponse().read(10)
        left = served.engine.steps
        connection.close()
        wait_until(lambda: served.engine.cancelled and not served.engine.running)
        assert served.engine.steps <= left + 2  # one that ran, and one before the server notices
        assert chat(served, max_tokens=2).status_code == 200


def test_a_reader_that_reads_nothing_does_not_stop_others(serve):
    with serve(lambda request: "one two three " * 90, seconds=0.001) as served:
        address = urlsplit(served.url)
        with socket.create_connection((address.hostname, address.port)) as slow:
            body = json.dumps({"model": "a", "messages": HI, "stream": True}).encode()
            head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + body)
            for _ in range(3):
                assert chat(served, max_tokens=20).status_code == 200


def test_several_clients_get_their_own_replies(served):
    def ask(number: int) -> bool:
        model = ("a", "base")[number % 2]
        found = chat(served, model=model).json()["choices"][0]["message"]["content"]
        return ("the base" in found) == (model == "base")

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = [*pool.map(ask, range(32))]
    assert all(found)
    wait_until(lambda: not served.engine.running)


def test_a_failing_engine_ends_the_server_with_its_error(serve, caplog):
    errors = []
    with serve(lambda request: "one two " * 100, seconds=0.02) as served:
        run = threading.excepthook
        threading.excepthook = lambda found: errors.append(found.exc_value)
        try:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                running = pool.submit(chat, served)
                wait_until(lambda: served.engine.running)
                served.engine.fail = True
                assert running.result().status_code == 500
            with contextlib.suppress(httpx.HTTPError):
                assert chat(served).status_code == 503
            served.server.stop()
        finally:
            threading.excepthook = run
    assert [str(error) for error in errors] == ["the scripted engine fails"]


def test_running_requests_finish_before_the_server_stops(serve):
    with serve(lambda request: "one two three four", seconds=0.1) as served:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            running = [pool.submit(chat, served, stream=stream) for stream in (True, False)]
            wait_until(lambda: len(served.engine.running) == 2)
            served.server.stop()
            assert all(each.result().status_code == 200 and "four" in each.result().text for each in running)
            assert "[DONE]" in running[0].result().text
        with pytest.raises(httpx.HTTPError):
            chat(served)


def test_freed_memory_is_returned_while_it_runs(serve, monkeypatch: pytest.MonkeyPatch):
    returned = threading.Semaphore(0)
    monkeypatch.setattr(app, "TIDY_SECONDS", 0.01)
    monkeypatch.setattr(runtime, "give_memory_back", returned.release)
    with serve(lambda request: "one") as served:
        assert all(returned.acquire(timeout=10) for _ in range(3))
        assert chat(served).status_code == 200


# ---- adapters


def test_adapters_come_from_the_folder_that_was_named(serve, tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    added, removed = [], []

    def load(name, folder):
        if folder.name == "two":
            raise ValueError("two: damaged")
        return make_model(holder[0], name, adapter=name, root=str(folder)), lambda: added.append((name, folder))

    holder: list[Served] = []
    given = {"load": load, "unload": lambda model: removed.append(model.name), "adapters": tmp_path / "adapters"}
    with serve(echo, **given) as served, httpx.Client(base_url=served.url) as client:
        holder.append(served)

        def post(route: str, **body) -> httpx.Response:
            return client.post(f"/v1/{route}_lora_adapter", json=body)

        for path in ("../adapters", "/etc", "..", "", "three", str(tmp_path)):
            assert post("load", lora_name="x", lora_path=path).status_code == 404
        assert post("load", lora_name="x", lora_path="two").status_code == 400
        assert post("load", lora_name="../x", lora_path="one").status_code == 400
        assert post("load", lora_name="a", lora_path="one").status_code == 400
        assert "added successfully" in post("load", lora_name="x", lora_path="one").text
        assert added == [("x", tmp_path / "adapters/one")]
        assert chat(served, model="x").json()["choices"][0]["message"]["content"].startswith("I am x")
        assert post("unload", lora_name="base").status_code == 400
        assert post("unload", lora_name="a").status_code == 400  # it was there at the start
        assert post("unload", lora_name="x").status_code == 200 and removed == ["x"]
        assert chat(served, model="x").status_code == 404


def test_without_a_folder_no_adapter_is_loaded(client):
    response = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "x"})
    assert response.status_code == 403 and is_error(response)
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 403
