"""The server with the real engine, a tiny base and two runs on it: as a command, and from Python."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import jax
import numpy as np
import openai
import pytest

import qlora_jax as q
from qlora_jax.config import ConfigError
from tests.browser import CHROMIUM, launched, opened
from tests.inference.small_run import STEPS, write_run
from tests.server.scripted_engine import wait_until

SAY = [{"role": "user", "content": "say sun 1"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A base, and two runs on it with other adapters."""
    folder = tmp_path_factory.mktemp("served")
    write_run(folder).rename(folder / "first")
    shutil.copytree(folder / "first", folder / "second")
    shutil.rmtree(folder / "second/checkpoints" / str(max(STEPS)))
    (folder / "adapters").mkdir()
    shutil.copytree(folder / "second", folder / "adapters/third")
    return {"model": folder / "model", "first": folder / "first", "second": folder / "second"}


@pytest.fixture(scope="module")
def client(runs):
    settings = {"port": 0, "cache": "16MiB", "max_rows": 8, "adapters": str(runs["model"].parent / "adapters")}
    names = [str(runs["first"]), str(runs["second"])]
    with (
        q.serve_models(str(runs["model"]), runs=names, background=True, compute_dtype="float32", **settings) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert server.models == ["model", "first", "second"]
        assert len({id(model.tokenizer.backend) for model in server._service.models}) == 1
        yield client


def say(client: openai.OpenAI, model: str, **settings) -> str:
    given = {"temperature": 0, "max_tokens": 12, **settings}
    return client.chat.completions.create(model=model, messages=SAY, **given).choices[0].message.content


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "first", "second"])
def test_every_model_answers_as_it_does_alone(client, runs, name):
    alone = q.generate_text(*q.load(str(runs[name]), compute_dtype="float32"), SAY, max_new_tokens=12)
    assert say(client, name) == alone.removesuffix("</s>")
    chunks = client.chat.completions.create(model=name, messages=SAY, stream=True, temperature=0, max_tokens=12)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == say(client, name)


@pytest.mark.slow
def test_draws_depend_on_the_seed_alone(client):
    replies = [say(client, "first", temperature=1, seed=seed) for seed in (1, 2, 1)]
    assert replies[0] == replies[2] != replies[1]
    drawn = client.chat.completions.create(model="first", messages=SAY, seed=1, n=2, max_tokens=12)
    assert drawn.choices[0].message.content == replies[0] != drawn.choices[1].message.content


@pytest.mark.slow
def test_the_page_and_the_state_of_a_run_come_from_the_server(client):
    address = str(client.base_url).removesuffix("v1/")
    page = httpx.get(address)
    assert (
        page.status_code == 200
        and "<html" in page.text
        and "default-src 'none'" in page.headers["content-security-policy"]
    )
    assert httpx.get(f"{address}runs/first").json()["name"] == "first"
    assert httpx.get(f"{address}runs/model").status_code == 404


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="requires chromium (Debian: apt-get install chromium)")
def test_the_page_shows_what_two_models_answer(client):
    address = str(client.base_url).removesuffix("v1/")
    with launched() as browser, opened(browser, address, 390) as page:
        page.wait_for_selector(".pane")
        page.click("#two")
        page.click("summary")
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "12")
        page.fill("#prompt", SAY[0]["content"])
        page.press("#prompt", "Enter")
        page.wait_for_selector("#send:visible")
        names = [pane.input_value() for pane in page.locator(".pane select").all()]
        assert len(set(names)) == 2
        shown = page.locator(".turn:not(.user) > .text").all_text_contents()
        assert shown == [say(client, name) for name in names]
        assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.slow
def test_scores_are_those_of_the_model(client, runs):
    model, tokenizer = q.load(str(runs["first"]), compute_dtype="float32")
    ids = [256, *tokenizer.encode("say sun")]
    found = client.completions.create(model="first", prompt=ids, max_tokens=1, logprobs=1, echo=True, temperature=0)
    logits = np.asarray(q.logits(model, np.array([ids])))[0]
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    expected = [log_p[place, token] for place, token in enumerate(ids[1:])]
    np.testing.assert_allclose(found.choices[0].logprobs.token_logprobs[1:-1], expected, atol=1e-4)
    tops = [max(top.values()) for top in found.choices[0].logprobs.top_logprobs[1:-1]]
    np.testing.assert_allclose(tops, log_p[:-1].max(axis=-1), atol=1e-4)


@pytest.mark.slow
def test_json_mode_gives_json(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    text = say(
        client,
        "first",
        response_format=form,
        max_tokens=60,
        temperature=1,
        logit_bias={str(b): -100 for b in b" \n\t\r"},
    )
    assert isinstance(json.loads(text)["a"], bool)
    form["json_schema"]["schema"] = {"type": "vector"}
    for wrong, field in (
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"response_format": form}, "response_format.json_schema.schema"),
    ):
        with pytest.raises(openai.BadRequestError, match=f"{field}: the ") as refused:
            say(client, "first", extra_body=wrong)
        assert refused.value.param == field
    assert say(client, "first")


@pytest.mark.slow
def test_an_adapter_comes_and_goes_while_the_server_runs(client):
    post = client.with_options().post
    post("/load_lora_adapter", body={"lora_name": "third", "lora_path": "third"}, cast_to=str)
    assert say(client, "third") == say(client, "second") != say(client, "first")
    assert client.models.retrieve("third").model_extra["parent"] == "model"
    post("/unload_lora_adapter", body={"lora_name": "third"}, cast_to=str)
    with pytest.raises(openai.NotFoundError):
        say(client, "third")


def test_wrong_settings_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="can be reached from other machines"):
        q.serve_models("model", host="0.0.0.0")
    with pytest.raises(ConfigError, match="found 2 models named 'a'"):
        q.serve_models(runs=["x/a", "y/a"])
    with pytest.raises(ConfigError, match="ports: unknown setting"):
        q.serve_models("model", ports=3)
    with pytest.raises(ConfigError, match="adapters: not a folder"):
        q.serve_models("model", adapters=str(tmp_path / "none"))


def started(runs: dict[str, Path], *words: str) -> tuple[subprocess.Popen, str]:
    """The command, and the address that it prints."""
    command = [sys.executable, "-m", "qlora_jax", "serve", "--model", str(runs["model"]), "--run", str(runs["first"])]
    command += ["--run", str(runs["second"]), "--port", "0", "--cache", "16MiB", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stderr:
        if line.startswith("serving "):
            return process, line.split(" at ")[1].strip()
    raise AssertionError(process.wait())


def ended(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_command_ends_with_all_of_its_processes(runs, number):
    process, url = started(runs)
    body = {"model": "second", "messages": SAY, "max_tokens": 5, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] in range(1, 6)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert number == signal.SIGKILL or said.strip() == "stopped by SIGTERM"
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_until(lambda: ended(process.pid))
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, timeout=5)
