"""The page of `dinat-triton explore`: its answers against Geometry and Plan, bad questions, and a browser on it."""

import http.client
import json
import os
import random
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest

from dinat_triton import Geometry, Plan
from dinat_triton.explore.server import Server

GEOMETRY = Geometry((9, 12), (3,), (2, 3), (2, 1), (False, True), ("clip", "wrap"))
FIELDS = {"shape": "9,12", "kernel": "3", "dilation": "2,3", "stride": "2,1", "causal": "0,1", "border": "clip,wrap"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(server: Server, path: str, host: str | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(server.url + path.lstrip("/"), headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(server: Server, question: str, **fields: object) -> tuple[int, Any]:
    return get(server, f"api/{question}?{urlencode(FIELDS | fields)}")


def test_neighbors_are_those_of_the_geometry(server: Server) -> None:
    keys, _ = GEOMETRY.neighbors()
    for token in range(0, GEOMETRY.num_tokens, 7):
        status, answer = ask(server, "neighbors", token=token)
        assert status == 200
        assert answer["keys"] == [key for key in keys[token].tolist() if key >= 0]
        assert answer["queries"] == np.flatnonzero((keys == token).any(1)).tolist()
        assert answer["position"] == [token // 12, token % 12]


def test_plan_answers_are_those_of_the_plan(server: Server) -> None:
    plan = Plan(GEOMETRY, (2, 3))
    status, answer = ask(server, "plan", token=50, tile="2,3")
    assert status == 200
    assert 50 in answer["rows"]
    assert {key for row in answer["rows"] for key in GEOMETRY.neighbors()[0][row] if key >= 0} == set(answer["columns"])
    cost = plan.cost()
    assert answer["cost"]["scores"] == round(cost.scores_per_query, 2)
    assert answer["cost"]["useful"] == round(cost.useful_per_query, 2)


def test_fields_propagate_sets_of_keys(server: Server) -> None:
    status, answer = ask(server, "field", token=50, dilations="1,2")
    assert status == 200
    layers = [replace(GEOMETRY, dilation=(d,)).neighbors()[0] for d in (1, 2)]
    first = {int(key) for key in layers[0][50] if key >= 0}
    second = {int(key) for middle in layers[1][50] if middle >= 0 for key in layers[0][middle] if key >= 0}
    assert [set(layer["tokens"]) for layer in answer["layers"]] == [first, second]
    assert answer["layers"][1]["coverage"] == round(100 * len(second) / 108, 2)


@pytest.mark.parametrize(
    ("question", "fields", "reason"),
    [
        ("about", {"kernel": "7"}, "kernel_size * dilation must fit"),
        ("about", {"border": "fold"}, "border must be one of 'shift', 'clip', 'wrap'"),
        ("about", {"shape": "100,100"}, "10000 tokens; this page shows up to 4096"),
        ("about", {"shape": "9,x"}, "shape must be integers"),
        ("about", {"shape": "1" * 2000}, "may have 1000 characters"),
        ("neighbors", {"token": "108"}, "token must be below 108"),
        ("neighbors", {}, "token is missing"),
        ("field", {"token": "0", "dilations": " ".join(["1"] * 25)}, "dilations must be 1 to 24 integers"),
        ("plan", {"token": "0", "shape": "64,64", "kernel": "63", "dilation": "1", "tile": "64"}, "pairs over all"),
    ],
)
def test_wrong_questions_get_a_reason(server: Server, question: str, fields: dict[str, str], reason: str) -> None:
    status, answer = ask(server, question, **fields)
    assert status == 400
    assert reason in answer["error"]


def test_only_this_machine_is_served(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "api/about?shape=9&kernel=3", host="evil.example")[0] == 403
    assert get(server, "api/about?shape=9&kernel=3", host=f"localhost:{server.server_port}")[0] == 200
    assert get(server, "api/nothing")[0] == 404
    assert get(server, "../plots.py")[0] == 404


def test_head_says_what_get_would_and_all_is_under_a_policy(server: Server) -> None:
    for path in ("", "page.js", "api/about?shape=9&kernel=3", "nothing"):
        found = []
        for method in ("GET", "HEAD"):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
            connection.request(method, f"/{path}")
            with connection.getresponse() as response:
                found.append((response.status, response.headers["Content-Length"], len(body := response.read())))
                assert "default-src 'none'; script-src 'self'" in response.headers["Content-Security-Policy"]
            assert b"style=" not in body  # the policy has a browser ignore styles in markup
        assert found[1] == (*found[0][:2], 0)
        assert int(found[0][1]) == found[0][2] > 0


def test_malformed_queries_never_break_it(server: Server) -> None:
    rng = random.Random(3)
    names = [*FIELDS, "token", "tile", "dilations", "", "%", "x"]
    scraps = ["1", "0", "-1", "99999999999999", "1e3", "٣", "%00", "%ff", "nan", "9,12", ",", " ", "\x7f", "'", "{}"]
    for _ in range(300):
        values = [rng.choice([quote, lambda text: re.sub(r"[^!-~]", "", text)])(rng.choice(scraps)) for _ in range(8)]
        fields = [f"{rng.choice(names)}={value}" for value in values[: rng.randint(0, 8)]]
        query = rng.choice(["&", ";", "&&"]).join(fields)
        status, _ = get(server, f"api/{rng.choice(['about', 'neighbors', 'field', 'plan', '', '//'])}?{query}")
        assert status in (200, 400, 404)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with its driver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync", "window-size=1180,900"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    service = webdriver.ChromeService(driver, env=os.environ | {"NO_PROXY": "127.0.0.1,localhost"})
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


class Page:
    """The page as a test drives it; it asks the server in the background."""

    def __init__(self, browser: Any, url: str):
        self.browser, self.script = browser, browser.execute_script
        browser.get(url)
        self.until(lambda: self.state() == "ready")

    def until(self, condition: Callable[[], bool]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 20, 0.02).until(lambda browser: condition())

    def state(self) -> str:
        return self.script("return map.dataset.state")

    def text(self, name: str) -> str:
        return self.script("return document.getElementById(arguments[0]).textContent", name)

    def marked(self, name: str) -> list[int]:
        code = "return cells.filter(c => c.classList.contains(arguments[0])).map(c => +c.dataset.token)"
        return self.script(code, name)

    def type(self, name: str, value: object, state: str = "ready") -> None:
        element = self.browser.find_element("name", name)
        element.clear()
        self.script("map.dataset.state = 'changing'")
        element.send_keys(str(value))
        self.until(lambda: self.state() == state)


def test_page_shows_the_keys_of_the_hovered_query_and_says_what_is_impossible(server: Server, browser: Any) -> None:
    from selenium.webdriver import ActionChains

    page = Page(browser, f"{server.url}?shape=14,12&kernel=3&dilation=1&token=0")
    page.type("dilation-0", 4)
    page.type("dilation-1", 3)
    page.script("form.elements['border-1'].value = 'wrap'; form.dispatchEvent(new Event('input'))")
    geometry = Geometry((14, 12), (3,), (4, 3), border=("shift", "wrap"))
    for token in (0, 80, 167):
        cell = browser.find_element("css selector", f"[data-token='{token}']")
        ActionChains(browser, duration=0).move_to_element(cell).perform()
        keys = geometry.neighbors()[0][token].tolist()
        page.until(lambda token=token, keys=keys: page.marked("key") == sorted({*keys} - {token}))
        assert page.marked("query") == page.marked("here") == [token]
        assert [int(key) for key in page.text("tokens").split()] == keys
    readout = page.text("readout")
    page = Page(browser, browser.current_url)  # all that was chosen is in the address
    assert page.text("readout") == readout
    page.type("kernel-1", 13, "error")
    assert "13 * 3 = 39 exceeds length 12" in page.text("message")
    page.type("kernel-1", 2)
    assert page.text("message") == ""


def test_page_works_with_the_keyboard(server: Server, browser: Any) -> None:
    page = Page(browser, f"{server.url}?{urlencode(FIELDS)}&token=50")
    press = browser.find_element("id", "map").send_keys
    press("\ue014", "\ue015", "2")  # right, down, second view
    token = 50 + 1 + 12
    seen_by = np.flatnonzero((GEOMETRY.neighbors()[0] == token).any(1)).tolist()
    page.until(lambda: page.marked("query") == sorted({*seen_by} - {token}))
    assert page.marked("key") == [token]
    press("4")
    rows = ask(server, "plan", token=token, tile="4")[1]["rows"]
    page.until(lambda: page.marked("query") == sorted(rows))
