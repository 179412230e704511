"""The live page in a real browser: what it shows, wide and narrow, light and dark, and what it never does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Loop, chromium
from tests.router_http_helpers import A1, HASHES, PROMPT, A, Api, entry_of, stored

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
EVIL = "<img src=x onerror=\"document.title='evil'\">"
#: Texts whose contrast is below what WCAG AA wants.
CONTRAST = """() => {
  const linear = (value) => value <= 10 ? value / 3294 : ((value / 255 + 0.055) / 1.055) ** 2.4;
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    const color = node ? parse(getComputedStyle(node).backgroundColor) : [255, 255, 255];
    return color[3] === 0 ? behind(node.parentElement) : color;
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const texts = [...node.childNodes].filter((child) => child.nodeType === 3);
    const text = texts.map((child) => child.textContent.trim()).join("");
    if (!text || !node.checkVisibility() || node.closest("script, style")) continue;
    const both = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    if (ratio < 4.5) poor.push(`${text.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def api(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Worker 1: rank 0 with a hole, rank 1 empty; worker 2 waiting; a model with a hostile name."""
    model = tmp_path_factory.mktemp("model")
    words(model / "tokenizer.json")
    made = Api()

    async def start() -> None:
        await made.__aenter__()
        made.enter(entry_of(1, dp=2, model_path=str(model)), entry_of(2, model_path=str(model)))
        made.enter(entry_of(9, model=EVIL))
        await made.holds(A, stored(sliding=[3, 4, 7], whole=range(8)))
        await made.holds(A1)
        for reused in (80, 16):
            long_id = f"{reused}" * 70
            _, chosen = await made.post("/select", token_ids=PROMPT, model_name="m", selection_id=long_id)
            await made.post("/release", selection_id=chosen["selection_id"], cached_tokens=reused)
        await made.post("/select", token_ids=PROMPT, model_name="m", selection_id=EVIL, ttl_s=3_600)

    loop.run(start())
    yield made
    loop.run(made.__aexit__())


def words(path: Path) -> None:
    """A tokenizer of the words w0, w1 and so on, which are the tokens 0, 1 and so on."""
    vocabulary = {f"w{number}": number for number in PROMPT}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    path.write_text(json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}))


Open = Callable[..., Any]


@pytest.fixture
def page_of(browser: Any, api: Api) -> Iterator[Open]:
    """Opens the page and waits for its first answer; no test leaves an error or a request elsewhere."""
    opened: list[Any] = []
    wrong: list[str] = []

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": WIDE, **options})
        opened.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: None if allowed(api, request) else wrong.append(request.url))
        page.goto(api.url + "/")
        page.locator("#status", has_text="ready").wait_for()
        return page

    yield open_page
    for context in opened:
        context.close()
    assert wrong == []


def allowed(api: Api, request: Any) -> bool:
    """All that the page ever asks for: nothing outside, and nothing that changes anything."""
    wanted = {("GET", "/"), ("GET", "/overview"), ("POST", "/explain")}
    return request.url == "data:," or (request.method, request.url.removeprefix(api.url)) in wanted


def card(page: Any, rank: str) -> Any:
    return page.locator("#workers article", has=page.get_by_text(rank, exact=True))


def explain(page: Any, prompt: str, model: str = "m") -> None:
    page.locator("#prompt").fill(prompt)
    page.locator("#model").select_option(model)
    page.locator("#ask").click()


def test_each_rank_is_shown_with_its_state_and_the_blocks_of_each_window(page_of: Open) -> None:
    page = page_of()
    bars = card(page, "1/0").locator("[role=img]")

    assert [bar.get_attribute("aria-label") for bar in bars.all()] == [
        "window 32: holds 3 on device",
        "window global: holds 8 on device, of 100 blocks",
    ]
    assert "8 / 100 · 8 %" in card(page, "1/0").inner_text()
    assert "promises kept: 50.0 % of 2" in card(page, "1/0").inner_text()
    states = {rank: card(page, rank).locator(".pill").inner_text() for rank in ("1/0", "1/1", "2/0")}
    assert states == {"1/0": "live", "1/1": "live", "2/0": "waiting"}
    assert "2 of 4" in page.locator("#numbers").inner_text()


def test_the_last_choices_say_what_was_promised_what_was_reused_and_why(page_of: Open) -> None:
    page = page_of()
    cards = page.locator("#choices article")
    figures = [text.split(": ")[1] for text in cards.locator(".figures").all_inner_texts()]

    assert cards.locator(".pill").all_inner_texts() == ["under way", "reused less by 4 blocks", "kept"]
    assert figures == ["promised 80", "promised 80, reused 16", "promised 80, reused 80"]
    assert "reuses 80 tokens more than any other rank" in cards.first.inner_text()
    cards.first.locator("summary").click()
    page.evaluate("update()")
    assert cards.first.locator("details").get_attribute("open") is not None, (
        "it stays open as the page keeps up"
    )
    assert cards.first.locator("tr.chosen td").first.inner_text() == "1/0"


def test_a_prompt_is_explained_as_a_picture_of_blocks_and_in_words(page_of: Open) -> None:
    page = page_of()
    explain(page, ", ".join(map(str, PROMPT)))
    first = page.locator("#explained article").first
    first.wait_for()

    assert "would reuse 80 tokens" in first.inner_text()
    labels = [each.get_attribute("aria-label") for each in first.locator(".blocks").all()]
    assert labels == [
        "holds blocks 3 to 4, 7; block 5 is missing for the next boundary",
        "holds blocks 0 to 7",
    ]
    boxes = {
        kind: first.locator(f".blocks i.{kind}").first.bounding_box()
        for kind in ("missing", "needed", "edge")
    }
    strip = first.locator(".blocks").first.bounding_box()
    at = {kind: round((box["x"] - strip["x"]) / strip["width"] * 8, 1) for kind, box in boxes.items()}
    assert at == {"missing": 5.0, "needed": 3.0, "edge": 5.0}


def test_a_prompt_in_words_is_tokenized_by_the_router(page_of: Open) -> None:
    page = page_of()
    explain(page, " ".join(f"w{token}" for token in PROMPT))

    page.locator("#explained article", has_text="would reuse 80 tokens").wait_for()


def test_a_refused_prompt_shows_the_reason(page_of: Open) -> None:
    page = page_of()
    explain(page, "1, 2", EVIL)
    page.locator("#explained", has_text="No rank of this model is known yet").wait_for()
    explain(page, "w1", EVIL)

    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "/models/m/tokenizer.json" in alert.inner_text()


def test_names_from_workers_and_clients_are_text_and_never_markup(page_of: Open) -> None:
    page = page_of()

    assert page.locator("#workers").inner_text().count(EVIL) == 1
    assert page.locator("#choices").inner_text().count(EVIL) == 1
    assert page.locator("main img").count() == 0
    assert page.title() == "vswa router"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["1280", "390"])
def test_everything_fits_and_can_be_read(page_of: Open, viewport: dict[str, int], scheme: str) -> None:
    page = page_of(viewport=viewport, color_scheme=scheme)
    explain(page, "1,2,3")
    page.locator("#explained article").first.wait_for()
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")

    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"], "nothing hangs over"
    assert page.evaluate(CONTRAST) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 384) == (scheme == "light")


def test_a_router_that_does_not_answer_is_seen_and_its_return_too(page_of: Open) -> None:
    page = page_of()
    page.route("**/overview", lambda route: route.abort())
    page.evaluate("update()")
    assert page.locator("#status").inner_text() == "not answering"
    assert page.locator("#workers article").count() == 4, "what was known stays, with its time"

    page.unroute("**/overview")
    page.evaluate("update()")
    assert page.locator("#status").inner_text() == "ready"


def test_where_the_router_wants_a_token_the_page_asks_for_it_and_sends_it(page_of: Open) -> None:
    page = page_of()
    sent: list[str | None] = []

    def guard(route: Any) -> None:
        sent.append(route.request.headers.get("authorization"))
        if sent[-1] == "Bearer open sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": "expected a token", "code": 401})

    page.route("**/overview", guard)
    page.evaluate("update()")
    assert page.locator("#login").is_visible()

    page.get_by_label("This router wants a token").fill("open sesame")
    page.get_by_role("button", name="Use it").click()
    page.locator("#status", has_text="ready").wait_for()
    assert (sent[0], sent[-1]) == (None, "Bearer open sesame")
    assert page.locator("#login").is_hidden()


def test_the_numbers_follow_what_happens(page_of: Open, api: Api, loop: Loop) -> None:
    page = page_of()
    loop.run(api.holds(A1, stored(sliding=range(8), whole=range(6))))

    card(page, "1/1").get_by_label("window global: holds 6 on device, of 100 blocks").wait_for()
    assert len(HASHES) == 8
