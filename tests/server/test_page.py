"""The chat page in a browser: streams, settings, two models, stopping, errors, keys, and the run next to the chat."""

import pytest

from qlora_jax.server.page import chat_page
from tests.browser import BROWSER_TEST, SIZES, launched, opened
from tests.server.stub_backend import BASE, HOSTILE, KEY, RUN_MODEL, backend
from tests.training.live.small_folder import SmallRun


def test_the_page_is_one_file_that_loads_nothing():
    text = chat_page()
    assert text.count("<script>") == 1 and "src=" not in text and "@import" not in text and "url(" not in text
    assert "default-src 'none'" in text and "script-src 'sha256-" in text and "connect-src 'self'" in text


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture
def run(tmp_path):
    with SmallRun(tmp_path / "mine") as small:
        small.steps(1, 6)
        yield small


def send(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:visible")


class TestInABrowser:
    pytestmark = BROWSER_TEST

    @pytest.mark.parametrize(("width", "scheme"), SIZES)
    def test_a_message_is_answered_and_shown_as_text(self, browser, run, width, scheme):
        with backend(run.folder) as server, opened(browser, server.address, width, scheme) as page:
            page.wait_for_selector(".pane")
            assert page.input_value(".pane select") == RUN_MODEL  # the first trained one
            page.fill("#prompt", "one")
            page.press("#prompt", "Shift+Enter")
            page.type("#prompt", "two")
            page.press("#prompt", "Enter")
            page.wait_for_selector("#send:visible")
            assert page.text_content(".turn:not(.user) > .text") == f"{RUN_MODEL}: {HOSTILE}word word word "
            assert page.text_content(".turn details .text") == "I think hard."
            assert not page.is_visible(".turn details .text")  # folded
            facts = page.inner_text(".turn footer")
            assert "42 tokens" in facts and "tokens/s" in facts and "first after" in facts and "ended: length" in facts
            assert page.title() == "Chat" and page.evaluate("document.documentElement.scrollWidth") == width
            page.context.grant_permissions(["clipboard-read", "clipboard-write"])
            page.click(".turn footer button")
            page.wait_for_selector("button:has-text('Copied')")
            assert page.evaluate("navigator.clipboard.readText()") == f"{RUN_MODEL}: {HOSTILE}word word word "
            send(page, "again")
            first, second = server.requests
            assert first == {
                "model": RUN_MODEL,
                "stream": True,
                "stream_options": {"include_usage": True},
                "messages": [{"role": "user", "content": "one\ntwo"}],
            }
            assert [each["role"] for each in second["messages"]] == ["user", "assistant", "user"]
            assert second["messages"][1]["content"] == f"{RUN_MODEL}: {HOSTILE}word word word "
            page.click("#new")
            send(page, "anew")
            assert [each["content"] for each in server.requests[-1]["messages"]] == ["anew"]
            assert page.locator(".turn.user").count() == 1

    def test_two_models_get_one_message_with_the_settings(self, browser, run):
        values = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 7, "seed": 3}
        with backend(run.folder) as server, opened(browser, server.address) as page:
            page.wait_for_selector(".pane")
            page.click("#two")
            page.click("summary")
            for name, value in values.items():
                page.fill(f"#{name}", str(value))
            page.fill("#system", "Be brief.")
            send(page, "hello")
            replies = page.locator(".turn:not(.user) > .text").all_text_contents()
            assert [reply.split(":")[0] for reply in replies] == [RUN_MODEL, BASE]
            assert sorted(request["model"] for request in server.requests) == sorted([RUN_MODEL, BASE])
            for request in server.requests:
                assert {name: request[name] for name in values} == values
                assert request["messages"][0] == {"role": "system", "content": "Be brief."}
            page.click("#two")
            assert page.locator(".pane").count() == 1

    def test_stop_ends_the_request_and_keeps_what_came(self, browser, run):
        with backend(run.folder) as server, opened(browser, server.address) as page:
            page.wait_for_selector(".pane")
            page.fill("#prompt", "endless")
            page.press("#prompt", "Enter")
            page.wait_for_selector(".turn:not(.user) > .text:has-text('word word')")
            page.click("#stop")
            page.wait_for_selector("#send:visible")
            assert "ended: stopped" in page.inner_text(".turn footer")
            page.wait_for_timeout(500)
            assert server.left == 1
            send(page, "next")
            assert [each["role"] for each in server.requests[-1]["messages"]] == ["user", "assistant", "user"]

    @pytest.mark.parametrize(
        ("prompt", "problem"),
        [("fail", "expected at most 2"), ("break", "the engine stopped"), ("cut", "ended before the reply did")],
    )
    def test_an_error_is_shown_and_not_sent_again(self, browser, run, prompt, problem):
        with backend(run.folder) as server, opened(browser, server.address) as page:
            page.wait_for_selector(".pane")
            send(page, prompt)
            assert problem in page.inner_text(".turn .bad")
            assert page.input_value("#prompt") == prompt
            send(page, "next")
            assert [each["content"] for each in server.requests[-1]["messages"]] == ["next"]

    def test_a_server_with_a_key_asks_for_it(self, browser, run):
        with backend(run.folder, needs_key=True) as server, opened(browser, server.address) as page:
            page.wait_for_selector("#key:visible")
            assert "API key: missing" in page.inner_text("#problem")
            page.fill("#key-text", KEY)
            page.press("#key-text", "Enter")
            page.wait_for_selector(".pane")
            assert not page.is_visible("#key") and page.inner_text("#problem") == ""
            send(page, "hello")
            assert len(server.requests) == 1

    @pytest.mark.parametrize(("width", "scheme"), SIZES)
    def test_the_run_stands_next_to_the_chat_while_it_trains(self, browser, run, width, scheme):
        with backend(run.folder) as server, opened(browser, server.address, width, scheme) as page:
            page.wait_for_selector(".pane")
            page.click("#show-run")
            page.wait_for_selector("#run svg")
            assert "step 5 of 10" in page.inner_text("#run .state") and "training" in page.inner_text("#run")
            run.steps(6, 8)
            page.wait_for_selector("#run .state:has-text('step 7 of 10')")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            page.select_option(".pane select", BASE)
            page.wait_for_selector("#run:has-text('This model has no run.')")
            asked = len(server.paths)
            page.wait_for_timeout(2500)
            assert len(server.paths) == asked
