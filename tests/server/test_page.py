"""The page at / on the real server, by hand: what it sends and shows, and what it says is wrong."""

import dataclasses
import io
import json
import re
import shlex
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from sd35bench.server.auth import make_key
from sd35bench.server.predictions import Query
from tests.server.live import MODEL, live, make_settings
from tests.server.page_server import Served, picture, served

READY = "#fields:enabled"
BAD = [
    ("steps", "99", "Steps is 99: it must be a whole number from 1 to 50."),
    ("steps", "2.5", "Steps is 2.5: it must be a whole number from 1 to 50."),
    ("cfg", "-1", "CFG is -1: it must be a number from 0 to 20."),
    ("cfg", "", "CFG is empty or not a number: it must be a number from 0 to 20."),
    (
        "seed",
        "abc",
        "Seed is abc: it must be a whole number from 0 to 18446744073709551615, or empty",
    ),
    ("prompt", "  ", "Prompt is empty: say what the image shows."),
]
SAID = "() => document.getElementById('alert').textContent !== ''"
HIDE = """() => {
    Object.defineProperty(document, "hidden", { get: () => true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


def shown_image(page):
    """Wait for the large image; its natural size in px."""
    page.wait_for_selector("#picture:not([hidden])")
    page.wait_for_function("() => document.getElementById('picture').naturalWidth > 0")
    return page.evaluate("(({naturalWidth: w, naturalHeight: h}) => [w, h])(picture)")


def test_page_is_light_and_lets_nothing_else_in(still: Served):
    index = httpx2.get(f"{still.url}/").text
    parts = set(re.findall(r'(?:src|href)="(page/[\w.]+)"', index))
    assert len(parts) == 5
    weight = 0
    for path in ("", *parts):
        reply = httpx2.get(f"{still.url}/{path}")
        assert reply.status_code == 200
        kind = {"": "html", "js": "javascript"}.get(path.rpartition(".")[2], "css")
        assert kind in reply.headers["content-type"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' data: blob:;")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        weight += len(reply.content)
    assert weight < 40_000


def test_page_is_sent_once(still: Served):
    first = httpx2.get(f"{still.url}/page/page.js")
    again = httpx2.get(
        f"{still.url}/page/page.js", headers={"If-None-Match": first.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    assert httpx2.head(f"{still.url}/").status_code == 200


def test_page_names_no_other_host():
    folder = Path(__file__).parents[2] / "sd35bench" / "server" / "page"
    for path in folder.glob("*.*"):
        found = set(re.findall(r"https?://[\w.-]+", path.read_text("utf-8")))
        assert found <= {"http://www.w3.org"}, path.name


@pytest.mark.browser
def test_image_is_made_by_keyboard_alone(visit, tmp_path):
    """Tab and type, arrows for the ratio, Enter on the button; the file is what was asked."""
    with live(make_settings(tmp_path / "state")) as server:
        page = visit(server)
        page.wait_for_selector(READY)
        keys = page.keyboard

        def tab_to(name: str) -> None:
            for _ in range(40):
                keys.press("Tab")
                if (
                    page.evaluate("document.activeElement.id || document.activeElement.name")
                    == name
                ):
                    return
            raise AssertionError(f"Tab never reaches {name}")

        tab_to("prompt")
        keys.type("a red circle left of a blue square")
        tab_to("aspect_ratio")
        keys.press("ArrowRight")
        tab_to("steps")
        keys.type("7")  # replaces what tabbing selected
        tab_to("seed")
        keys.type("42")
        tab_to("output_format")
        keys.type("png")
        tab_to("generate")
        keys.press("Enter")
        assert shown_image(page) == [88, 48]
        (made,) = server.state.store.listing("", Query()).predictions
        assert made.input["prompt"] == "a red circle left of a blue square"
        asked = {k: made.input[k] for k in ("aspect_ratio", "steps", "seed", "output_format")}
        assert asked == {
            "aspect_ratio": "16:9",
            "steps": 7,
            "seed": 42,
            "output_format": "png",
        }
        facts = page.locator("#facts").inner_text()
        assert re.search(r"Seed\s+42\b", facts)
        assert re.search(r"Predict time\s+0\.\d\d s", facts)
        assert page.locator("#picture").get_attribute("alt") == made.input["prompt"]
        assert "Done in" in page.get_by_role("status").inner_text()
        data = httpx2.get(server.url + page.locator("#file").get_attribute("href")).content
        assert Image.open(io.BytesIO(data)).size == (88, 48)


@pytest.mark.browser
def test_ctrl_enter_generates_and_empty_seed_is_drawn(still: Served, visit):
    page = visit(still)
    page.wait_for_selector(READY)
    page.fill("#prompt", "one")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#rows li")
    (waiting,) = still.listed()
    assert page.locator(".badge").inner_text() == "waiting"
    assert page.locator("#stage-text").inner_text() == "Waiting for its turn…"
    still.finish(picture())
    assert shown_image(page) == [88, 48]
    assert f"{waiting.input['seed']}" in page.locator("#facts").inner_text()
    page.click("#again")
    assert page.input_value("#seed") == str(waiting.input["seed"])


@pytest.mark.browser
def test_bad_values_are_said_in_words_where_they_are(still: Served, visit):
    page = visit(still)
    page.wait_for_selector(READY)
    for field, value, words in BAD:
        page.fill("#prompt", "one")
        good = page.input_value(f"#{field}")
        page.fill(f"#{field}", value)
        page.click("#generate")
        assert page.locator("#alert").inner_text().startswith(words)
        assert page.locator("#alert").get_attribute("role") == "alert"
        assert page.evaluate("document.activeElement.id") == field
        assert page.get_attribute(f"#{field}", "aria-invalid") == "true"
        page.fill(f"#{field}", good)
    assert still.listed() == []
    page.click("#generate")
    page.wait_for_selector("#rows li")
    assert page.locator("#alert").inner_text() == ""
    assert page.locator("[aria-invalid]").count() == 0


@pytest.mark.browser
def test_ranges_and_defaults_are_the_servers(visit, still):
    page = visit(still)
    page.wait_for_selector(READY)
    schema = httpx2.get(f"{still.url}/v1/model").json()["request_schema"]["properties"]
    for name in ("steps", "cfg", "output_quality", "prompt_strength"):
        number = schema[name]["anyOf"][0]
        assert float(page.get_attribute(f"#{name}", "max")) == number["maximum"]
        assert float(page.input_value(f"#{name}")) == schema[name]["default"]
    ratios = page.get_by_role("radio").evaluate_all("(all) => all.map((r) => r.value)")
    assert ratios == schema["aspect_ratio"]["enum"]


@pytest.mark.browser
def test_cancel_and_failure_are_seen(still: Served, visit):
    page = visit(still)
    page.wait_for_selector(READY)
    for prompt in ("first", "second", "third"):
        page.fill("#prompt", prompt)
        page.click("#generate")
        page.wait_for_function(
            "(p) => document.querySelector('.row-prompt')?.textContent === p", arg=prompt
        )
    assert page.locator(".row-prompt").all_inner_texts() == ["third", "second", "first"]
    assert page.locator("#stage-text").inner_text() == "Waiting; 2 of yours before it."
    page.get_by_role("button", name="Cancel: second").click()
    second = page.locator("#rows li").nth(1)
    second.locator(".badge.cancelled").wait_for()
    assert not second.get_by_role("button", name="Cancel: second").is_visible()
    assert [p.status for p in still.listed()] == ["created", "cancelled", "created"]
    still.fail("fails by <b>design</b>")
    third = page.locator("#rows li").nth(2)
    third.locator(".badge.error").wait_for()
    page.get_by_role("button", name="Show: first").click()
    assert page.locator("#stage-text").inner_text() == "Failed: fails by <b>design</b>"
    assert page.locator("#picture").is_hidden()


@pytest.mark.browser
def test_init_image_goes_up_and_strength_appears(still: Served, visit, tmp_path):
    path = tmp_path / "init.png"
    path.write_bytes(picture(40, 30, "orange"))
    page = visit(still)
    page.wait_for_selector(READY)
    assert page.locator("#prompt_strength").is_hidden()
    page.set_input_files("#image", path)
    page.wait_for_function("() => document.getElementById('preview').naturalWidth === 40")
    page.fill("#prompt_strength", "0.5")
    page.fill("#prompt", "one")
    for _ in range(2):
        page.click("#generate")
        page.wait_for_selector("#generate:not([aria-disabled])")
    first, second = still.listed()
    assert first.input["prompt_strength"] == 0.5
    assert first.input["image"] == second.input["image"]  # uploaded once
    sent = still.state.files.read_upload(httpx2.URL(first.input["image"]).path)
    assert sent == path.read_bytes()
    kept = Image.open(still.state.inits.path(first.id))
    assert (kept.format, kept.size) == ("PNG", (40, 30))
    page.click("#remove-image")
    assert page.locator("#prompt_strength").is_hidden()
    page.click("#generate")
    page.wait_for_function("() => document.querySelectorAll('#rows li').length === 3")
    assert still.listed()[0].input["image"] is None


@pytest.mark.browser
def test_servers_refusals_are_said_in_words(still: Served, visit, tmp_path):
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "bad.png").write_bytes(b"no image at all")
    page = visit(still, refusals=True)
    page.wait_for_selector(READY)
    page.fill("#prompt", "one")
    page.set_input_files("#image", tmp_path / "bad.png")
    page.click("#generate")
    page.wait_for_function(SAID)
    assert "the upload is not taken" in page.locator("#alert").inner_text()
    page.set_input_files("#image", tmp_path / "good.png")
    page.fill("#prompt_strength", "0")
    page.click("#generate")
    page.wait_for_function("() => document.activeElement.id === 'prompt_strength'")
    assert "must be above 0 with an image" in page.locator("#alert").inner_text()
    assert still.listed() == []


@pytest.mark.browser
def test_model_without_init_images_has_no_field_for_them(visit, tmp_path):
    with served(tmp_path / "state", model=dataclasses.replace(MODEL, takes_images=False)) as server:
        page = visit(server)
        page.wait_for_selector(READY)
        assert page.locator("#image").is_hidden()


@pytest.mark.browser
def test_key_is_asked_for_kept_in_the_tab_and_in_no_address(visit, tmp_path, faults):
    key = make_key("me", tmp_path / "keys")
    with served(tmp_path / "state", key_file=tmp_path / "keys") as server:
        addresses: list[str] = []
        page = visit(server, refusals=True)
        page.on("request", lambda r: addresses.append(r.url))
        page.get_by_label("API key").wait_for()
        assert page.locator("#prompt").is_hidden()
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.getElementById('key-alert').textContent !== ''")
        said = page.locator("#key-alert").inner_text()
        assert said == "The server does not know this key."
        assert faults(page) == []
        assert page.evaluate("sessionStorage.length") == 0
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        page.wait_for_selector(READY)
        page.fill("#prompt", "one")
        page.click("#generate")
        page.wait_for_selector("#rows li")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.click("summary")
        curl = page.locator("#curl").inner_text()
        assert "X-API-Key: $API_KEY" in curl
        assert key not in page.content()
        page.reload()
        page.wait_for_selector("#rows li")  # the tab still has it
        page.get_by_role("button", name="Forget my key").click()
        page.wait_for_selector("#key-form:not([hidden])")
        assert page.evaluate("sessionStorage.length") == 0
        assert page.locator("#rows li").count() == 0
        assert len(addresses) > 5
        assert not any(key in address for address in addresses)


@pytest.mark.browser
def test_curl_command_makes_the_same_request(still: Served, visit):
    page = visit(still)
    page.wait_for_selector(READY)
    page.fill("#prompt", 'it\'s "quoted" $HOME `x` \\ é')
    page.fill("#seed", "3")
    page.click("#generate")
    page.wait_for_selector("#rows li")
    page.click("summary")
    words = shlex.split(page.locator("#curl").inner_text().replace("\\\n", " "))
    assert words[:4] == ["curl", "-X", "POST", f"{still.url}/v1/prediction"]
    body = json.loads(words[words.index("-d") + 1])
    assert httpx2.post(words[3], json=body).status_code == 200
    again, first = still.listed()
    assert again.input == first.input


@pytest.mark.browser
def test_page_goes_on_after_the_server_was_away(still: Served, visit):
    page = visit(still, refusals=True)
    page.wait_for_selector(READY)
    page.route("**/v1/**", lambda route: route.abort())
    page.fill("#prompt", "one")
    page.click("#generate")
    page.wait_for_function(SAID)
    assert "does not answer" in page.locator("#alert").inner_text()
    page.unroute("**/v1/**")
    page.click("#generate")
    page.wait_for_selector("#rows li")
    assert page.locator("#alert").inner_text() == ""


@pytest.mark.browser
def test_polls_stay_within_the_rate(still: Served, visit):
    """A prediction that never ends, on a clock that runs ahead; nothing while nobody looks."""
    page = visit(still, service_workers="block")  # a clock is a whole context's
    page.wait_for_selector(READY)
    page.clock.install()
    page.reload()
    page.wait_for_selector(READY)
    page.fill("#prompt", "one")
    page.click("#generate")
    page.wait_for_selector("#rows li")
    sent: list[int] = []
    ended: list[int] = []
    now = [0]
    page.on("request", lambda _: sent.append(now[0]))
    page.on("requestfinished", lambda _: ended.append(now[0]))

    def pass_time(milliseconds: int) -> None:
        page.clock.run_for(milliseconds)
        while len(ended) < len(sent):
            page.wait_for_timeout(2)
        page.evaluate("() => 0")  # the page has gone on with the answer

    for now[0] in range(65):
        pass_time(1000)
    busiest = max(sum(start <= t < start + 60 for t in sent) for start in range(6))
    assert 15 <= busiest <= 46  # one second's edge
    page.evaluate(HIDE)
    before = len(sent)
    for _ in range(3):
        pass_time(6000)
    assert len(sent) == before
