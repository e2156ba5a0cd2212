"""Requests that schemathesis draws from our OpenAPI document: those that it allows, and others."""

import collections
from collections.abc import Sequence

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings

import qlora_jax as q
from qlora_jax.server.app import POSTS
from tests.inference.small_run import write_run
from tests.server.conftest import Start, echo
from tests.server.test_server import BODIES, HI

schemathesis = pytest.importorskip("schemathesis")
NAMED = ("/v1/models/{name}", "/runs/{name}")


@pytest.fixture(scope="module")
def scripted(serve: Start):
    with serve(echo) as served:
        yield served.url


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_run(folder).rename(folder / "run")
    found = {"runs": [str(folder / "run")], "adapters": str(folder), "port": 0, "cache": "16MiB", "max_tokens": 16}
    with q.serve_models(str(folder / "model"), background=True, compute_dtype="float32", **found) as server:
        yield server.url


def document_of(url: str) -> dict:
    return httpx.get(f"{url}/openapi.json").raise_for_status().json()


@pytest.mark.parametrize("path", BODIES)
def test_the_document_allows_what_is_answered(scripted, path):
    kind, body = BODIES[path]
    document = document_of(scripted)
    (content,) = document["paths"][path]["post"]["requestBody"]["content"].values()
    validator = jsonschema.Draft202012Validator({**content["schema"], "components": document["components"]})
    for name in kind.inert.keys() | {name for name, field in kind.model_fields.items() if not field.is_required()}:
        validator.validate({**body, name: None})
    for wrong in ({**body, "none_such": 1}, {**body, "model": 1}, {}):
        assert not validator.is_valid(wrong)


def send_drawn(url: str, models: Sequence[str], path: str, count: int, allowed: bool) -> collections.Counter[int]:
    """Sends requests that the document allows, or not; returns their statuses.

    The server may refuse what the document allows, because fields of a body may contradict each other.
    """
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    document = document_of(url)
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", ()):
            schema["properties"]["model"] = {"enum": [*models, "none_such"]}
    operation = schemathesis.openapi.from_dict(document)[path]["GET" if path in NAMED else "POST"]
    mode = schemathesis.GenerationMode.POSITIVE if allowed else schemathesis.GenerationMode.NEGATIVE
    statuses: collections.Counter[int] = collections.Counter()

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case) -> None:
        response = case.call(base_url=url, timeout=60)
        case.validate_response(response, excluded_checks=[positive_data_acceptance])
        statuses[response.status_code] += 1

    send()
    body = {"model": models[0], "messages": HI, "max_tokens": 2}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    return statuses


CASES = [(path, allowed) for path in POSTS for allowed in (True, False)] + [(path, True) for path in NAMED]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "allowed"), CASES)
def test_a_drawn_request_gets_an_answer_or_one_error(scripted, path, allowed):
    statuses = send_drawn(scripted, ["a", "plain", "vectors"], path, 20, allowed)
    assert allowed or 200 not in statuses


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("path", "allowed"), CASES)
def test_ten_thousand_drawn_requests_of_the_real_engine(real, path, allowed):
    statuses = send_drawn(real, ["model", "run"], path, 750, allowed)
    assert allowed or 200 not in statuses
