"""The server of `watch` over HTTP, and its page in a browser."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager

import pytest

from qlora_jax.training.live.pages import watch_page
from qlora_jax.training.live.run_status import RunReader
from qlora_jax.training.live.watch_server import WatchServer
from tests.browser import BROWSER_TEST, SIZES, launched, opened
from tests.training.live.small_folder import SmallRun

HOSTILE = "<img src=x onerror=\"document.title='ran'\"> </script>"


@contextmanager
def watching(folder, host="127.0.0.1"):
    with WatchServer(RunReader(folder), host, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(tmp_path):
    with SmallRun(tmp_path / "mine") as small:
        small.evaluation(0, 4.0)
        small.steps(1, 6)
        yield small


def ask(server, path="/run", method="GET", **headers):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def test_the_status_changes_with_the_run_and_is_sent_only_then(run):
    with watching(run.folder) as server:
        response, content = ask(server)
        assert response.status == 200 and json.loads(content)["step"] == 5
        assert ask(server, If_None_Match=response.headers["ETag"])[0].status == 304
        run.steps(6, 7)
        again, content = ask(server, If_None_Match=response.headers["ETag"])
        assert again.status == 200 and json.loads(content)["step"] == 6


def test_no_path_reaches_the_disk_and_nothing_can_be_changed(run):
    paths = ["/config.yaml", "/../config.yaml", "/run/../config.yaml", "/%2e%2e/config.yaml", "//etc/passwd", "/run?x"]
    with watching(run.folder) as server:
        assert [ask(server, path)[0].status for path in paths] == [404] * len(paths)
        assert [ask(server, method=method)[0].status for method in ("POST", "PUT", "DELETE")] == [501] * 3
        assert ask(server, "/")[0].headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize("host", ["example.com", "127.0.0.1", "localhost:1", "", "evil.localhost"])
def test_a_request_for_another_host_is_refused(run, host):
    with watching(run.folder) as server:
        assert ask(server, Host=host)[0].status == 403
        assert ask(server, Host=f"localhost:{server.server_port}")[0].status == 200


def test_a_port_in_use_is_an_error_with_advice(run):
    with watching(run.folder) as server, pytest.raises(ValueError, match=r"another program listens on it\)\. Give"):
        WatchServer(RunReader(run.folder), "127.0.0.1", server.server_port)


@pytest.mark.skipif(not socket.has_ipv6, reason="requires IPv6")
def test_it_listens_on_the_address_of_ip_version_6(run):
    try:
        with watching(run.folder, "::1") as server:
            assert server.address == f"http://[::1]:{server.server_port}/" and ask(server)[0].status == 200
    except ValueError:
        pytest.skip("this machine has no address of IP version 6")


def test_the_page_is_one_file_that_loads_nothing():
    text = watch_page(HOSTILE)
    assert HOSTILE not in text and "&lt;img" in text
    assert text.count("<script>") == 1 and "src=" not in text.replace("&lt;img src=x", "") and "url(" not in text


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


class TestInABrowser:
    pytestmark = BROWSER_TEST

    @pytest.mark.parametrize(("width", "scheme"), SIZES)
    def test_the_page_follows_the_run_to_its_end(self, browser, run, width, scheme):
        run.sample(0, HOSTILE)
        with watching(run.folder) as server, opened(browser, server.address, width, scheme) as page:
            page.wait_for_selector("#run figure svg")
            assert "step 5 of 10" in page.inner_text(".state") and page.title() == "50 % mine"
            assert "0:15 left" in page.inner_text(".state")  # 5 steps of 3 s
            tiles = page.inner_text(".tiles")
            assert "last training loss" in tiles and "0.600" in tiles and "2.00 GiB" in tiles
            assert "Loss, nats per supervised token" in page.inner_text("figure >> nth=0")
            captions = page.locator("figcaption").all_inner_texts()
            assert {"Learning rate", "Memory in use, GiB"} <= {*captions}
            assert page.text_content(".reply") == HOSTILE
            page.click("summary")
            assert "path: models/base" in page.inner_text("pre")
            page.hover("figure svg >> nth=0")
            assert "step " in page.inner_text(".legend >> nth=0")
            page.mouse.move(0, 0)
            run.steps(6, 11)
            run.evaluation(10, 1.0)
            page.wait_for_selector(".state:has-text('step 10 of 10')")
            assert page.is_visible("pre")  # an opened part stays open
            run.lock(None)
            page.wait_for_selector("[role=status]:has-text('finished')")
            assert page.evaluate("document.documentElement.scrollWidth") == width

    def test_smoothing_draws_the_curve_anew(self, browser, run):
        with watching(run.folder) as server, opened(browser, server.address) as page:
            curve = page.locator("figure >> nth=0 >> path.first:not(.faint)")
            curve.wait_for()
            before, slider = curve.get_attribute("d"), page.locator("input[type=range]")
            assert (
                slider.input_value() == "0" and page.locator("path.faint").count() == 0
            )  # so few steps are not averaged
            slider.fill("0.9")
            assert curve.get_attribute("d") != before and page.locator("path.faint").count() == 1
            run.steps(6, 7)
            page.wait_for_selector("text=step 6")
            assert slider.input_value() == "0.9"

    def test_a_page_waits_for_a_run_and_for_a_server(self, browser, tmp_path):
        with watching(tmp_path / "later") as server, opened(browser, server.address) as page:
            page.wait_for_selector("[role=status]:has-text('does not exist yet')")
            with SmallRun(tmp_path / "later") as run:
                page.wait_for_selector("[role=status]:has-text('starting')")
                run.steps(1, 2)
                page.wait_for_selector(".state:has-text('step 1 of 10')")
            page.route("**/run", lambda route: route.abort())
            page.wait_for_selector("[role=alert]:has-text('No news of the run')")
            page.unroute("**/run")
            page.wait_for_selector("[role=alert]:has-text('No news')", state="hidden", timeout=15_000)
