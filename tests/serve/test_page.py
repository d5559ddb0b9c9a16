"""The chat page in a real browser: it asks, shows, stops, and runs nothing of what it is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2.serve.app import PAGE

ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ANSWERED = "#send:not([hidden])"
MARKUP = (
    "<img src=x onerror=\"document.title='ran'\"><script>document.title='ran'</script>\n"
    "<b>bold</b> & **strong**\n\n```html\n<i>code</i>\n```\n[link](javascript:document.title='ran')"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of its own, which must not complain."""
    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda line: (
            complaints.append(line.text)
            if line.type == "error" and "status of 4" not in line.text
            else None
        ),
    )
    yield page
    context.close()
    assert not complaints


def ask(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def wait(page: Any, expression: str) -> None:
    """Until it is true; the browser's own waiting is what the page's policy forbids."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(expression)


def pretend(page: Any, *pieces: str) -> None:
    """Let the server answer with these pieces."""
    chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": [], "usage": {"completion_tokens": len(pieces)}})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )


def test_a_question_is_answered(page: Any, served: Any) -> None:
    page.goto(served.url)
    wait(page, "document.querySelector('#model').textContent === 'tiny'")
    page.click("#open-settings")
    page.fill("#max_tokens", "20")
    page.fill("#system", "Be brief.")
    page.press("#system", "Escape")
    assert page.is_hidden("#settings")
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "Hello?")
    body = json.loads(asked.value.post_data)
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
    ]
    assert (body["max_tokens"], body["temperature"]) == (20, 0.7)
    page.wait_for_selector(ANSWERED)
    assert page.inner_text("li.user .content") == "Hello?"
    assert page.inner_text("li.assistant .content")
    assert "tokens" in page.inner_text("li.assistant .note")
    first = page.inner_text("li.assistant .content")
    page.click(".again")
    page.wait_for_selector(ANSWERED)
    wait(page, "document.querySelector('li.assistant .note').textContent")
    assert page.locator("li").count() == 2
    assert page.inner_text("li.assistant .content") != first
    page.click("#new")
    assert page.locator("li").count() == 0


def test_markup_in_an_answer_does_not_run(page: Any, served: Any) -> None:
    page.goto(served.url)
    pretend(page, *MARKUP)  # one character at a time
    ask(page, MARKUP)
    page.wait_for_selector(ANSWERED)
    for item in ("li.user", "li.assistant"):
        shown = page.inner_text(f"{item} .content")
        assert "<img src=x onerror=" in shown
        assert "<script>" in shown
        assert page.inner_text(f"{item} pre code") == "<i>code</i>"
        assert page.inner_text(f"{item} strong") == "strong"
    for element in ("li img", "li script", "li b", "li i", "li a"):
        assert page.locator(element).count() == 0
    assert page.title() == "qwen2"


def endless(route: Any) -> None:
    """Ask with one more field, for this random model might stop by itself."""
    body = {**json.loads(route.request.post_data), "ignore_eos": True}
    route.continue_(post_data=json.dumps(body))


def test_stop_ends_the_answer_on_the_server_too(page: Any, served: Any) -> None:
    served.wait_until_idle()
    page.goto(served.url)
    page.click("#open-settings")
    page.fill("#max_tokens", "1900")
    page.route("**/v1/chat/completions", endless)
    ask(page, "Never end.")
    wait(page, "document.querySelector('li.assistant .content').textContent")
    page.press("#question", "Escape")
    page.wait_for_selector(ANSWERED)
    assert "stopped" in page.inner_text("li.assistant .note")
    served.wait_until_idle()


def test_errors_are_said(page: Any, serve: Any) -> None:
    with serve(keys=("secret-key",)) as served:
        page.goto(served.url)
        ask(page, "Hello?")
        page.wait_for_selector(".problem")
        assert "API key" in page.inner_text(".problem")
        page.keyboard.type("secret-key")  # the field has the focus
        page.press("#key", "Tab")
        wait(page, "document.querySelector('#model').textContent === 'tiny'")
        page.fill("#max_tokens", "5")
        page.click(".again")
        wait(page, "document.querySelector('li:last-child .note').textContent")
        assert page.locator(".problem").count() == 0
        assert "secret-key" not in page.evaluate("JSON.stringify(localStorage)")


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_follows_the_scheme(
    browser: Any, served: Any, size: tuple[int, int], scheme: str
) -> None:
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(served.url)
    pretend(page, "word " * 200, "\n```\n", "x" * 500, "\n```")
    ask(page, "long" * 100)
    page.wait_for_selector(ANSWERED)
    for open_settings in (False, True):
        if open_settings:
            page.click("#open-settings")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("document.documentElement.scrollHeight") == height
    page.click("#close-settings")
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    dark = sum(int(n) for n in before[4:-1].split(",")) < 3 * 128
    assert dark == (scheme == "dark")
    page.click("#theme")
    assert page.evaluate(ground) != before
    page.reload()
    assert page.evaluate(ground) != before
    context.close()


def test_every_control_is_reached_by_keyboard(page: Any, served: Any) -> None:
    page.goto(served.url)
    page.click("#open-settings")
    page.focus("body")
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    controls = page.eval_on_selector_all(
        "button:not([hidden]), input, textarea", "all => all.map(each => each.id)"
    )
    assert set(controls) <= reached
    names = page.eval_on_selector_all(
        "button, input, textarea",
        "all => all.map(e => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent)",
    )
    assert all(names)


def test_nothing_is_loaded_from_elsewhere(served: Any) -> None:
    for path in PAGE:
        response = served.client.get(path)
        assert response.status_code == 200
        assert "http" not in response.text.replace("http://www.w3.org/2000/svg", "")
        for forbidden in ("innerHTML", "insertAdjacentHTML", "eval(", "document.write", "style="):
            assert forbidden not in response.text
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_answers(page: Any, real_checkpoint: Path) -> None:
    command = [sys.executable, "-m", "qwen2.cli", "serve", str(real_checkpoint), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        page.goto(process.stdout.readline().split("served at ")[1].split(",")[0])
        ask(page, "What is the capital of France? Answer in one short sentence.")
        page.wait_for_selector(ANSWERED, timeout=120_000)
        assert "Paris" in page.inner_text("li.assistant .content")
        ask(page, "Repeat exactly: <img src=x onerror=alert(1)>")
        page.wait_for_selector(ANSWERED, timeout=120_000)
        assert page.locator("li img").count() == 0
        assert page.locator("li.assistant").count() == 2
    finally:
        process.terminate()
        assert process.wait(60) == 0
