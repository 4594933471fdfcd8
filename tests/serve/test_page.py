"""The page at /ui, in a real browser that is handed real files."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from moon.runtime.predictor import Predictor
from moon.serve.page import policy_of
from tests.evaluation.chromium import Chromium, find_chromium
from tests.serve.conftest import Server

TOKEN = "0123456789abcdef"
OVER = "!document.getElementById('result').hidden || status().className === 'wrong'"
WIDE = "document.documentElement.scrollWidth - innerWidth"
# The ratio of WCAG 2, between each element with text of its own and what is behind it.
CONTRASTS = """(() => {
  const light = rgb => rgb.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ratios = {};
  for (const one of document.body.querySelectorAll("*")) {
    const text = [...one.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!text || !one.checkVisibility() || one.closest("script, .unseen")) continue;
    let back = one;
    while (/, 0\\)$/.test(getComputedStyle(back).backgroundColor)) back = back.parentElement;
    const pair = [getComputedStyle(one).color, getComputedStyle(back).backgroundColor].map(light);
    ratios[one.id || one.localName] = (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
  }
  return ratios;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("chromium is not installed")
    with Chromium(executable, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, predictor: Predictor, pictures: list[bytes]
) -> dict[str, Path]:
    """An image that is accepted, one that is not, and what is no image."""
    folder = tmp_path_factory.mktemp("files")
    found = {"broken": folder / "it's broken.png"}
    found["broken"].write_bytes(b"no image")
    for picture, decision in zip(pictures, predictor.predict(pictures), strict=True):
        kind = "accepted" if decision.accepted else "abstained"
        if kind not in found:
            found[kind] = folder / f"{kind}.png"
            found[kind].write_bytes(picture)
    return found


def words(browser: Chromium, name: str) -> str:
    return str(browser.evaluate(f"document.getElementById('{name}').textContent"))


def drop(browser: Chromium, file: Path) -> None:
    browser.drop(file)
    browser.until(OVER.replace("status()", "document.getElementById('status')"))


def test_it_comes_whole_and_asks_nobody_else(server: Server) -> None:
    with server.client() as client:
        answer = client.get("/ui")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"https?://|//\w|@import|url\(|\son\w+=|\sstyle=", answer.text)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_policy_has_the_hashes() -> None:
    policy = policy_of("<style>a</style><script>b</script>")
    for name, text in (("style-src", b"a"), ("script-src", b"b")):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    with pytest.raises(ValueError, match="unpack"):
        policy_of("<style>a</style><script>b</script><script>c</script>")


def test_a_dropped_image_gets_its_label(
    browser: Chromium, server: Server, files: dict[str, Path], predictor: Predictor
) -> None:
    (decision,) = predictor.predict([files["accepted"]])
    browser.open(f"{server.url}/ui")
    browser.until("document.getElementById('model').textContent.startsWith('tiny')")
    drop(browser, files["accepted"])
    assert words(browser, "verdict") == decision.label
    assert words(browser, "status") == f"Accepted: {decision.label}"
    rows = browser.evaluate("[...document.querySelectorAll('#top th')].map(e => e.textContent)")
    assert rows == [label for label, _ in decision.top]
    bar = browser.evaluate("document.getElementById('bar').ariaLabel")
    assert re.fullmatch(r"Score ebo [\d.-]+, at or above the threshold [\d.-]+", bar)
    right = browser.evaluate(
        "score.getBoundingClientRect().left >= "
        "document.querySelector('.reached').getBoundingClientRect().left"
    )
    assert right
    browser.until("document.getElementById('preview').naturalWidth > 0")
    asked = {re.sub(r"(?<=blob:).*", "", url) for url in browser.requests()}
    assert asked == {f"{server.url}/ui", f"{server.url}/", f"{server.url}/predict", "blob:"}
    assert browser.complaints() == []


def test_the_curl_line_gives_the_same(
    browser: Chromium, server: Server, files: dict[str, Path]
) -> None:
    import json
    import subprocess

    browser.open(f"{server.url}/ui")
    drop(browser, files["abstained"])
    line = words(browser, "curl")
    assert line.startswith("curl -H 'Content-Type: image/png' --data-binary")
    shown = json.loads(words(browser, "json"))
    found = subprocess.run(
        ["sh", "-c", line], cwd=files["abstained"].parent, capture_output=True, check=False
    )
    if found.returncode == 127:
        pytest.skip("curl is not installed")
    assert json.loads(found.stdout)["predictions"] == shown["predictions"]
    quoted = browser.evaluate("command(new File([], \"it's.png\", {type: 'image/png'}))")
    assert r"'@it'\''s.png'" in quoted


def test_an_abstention_has_no_label(
    browser: Chromium, server: Server, files: dict[str, Path]
) -> None:
    browser.open(f"{server.url}/ui")
    drop(browser, files["abstained"])
    assert words(browser, "verdict").startswith("Abstains")
    assert words(browser, "why")
    assert "below the threshold" in words(browser, "figures")
    assert browser.evaluate(
        "score.getBoundingClientRect().right <= "
        "document.querySelector('.reached').getBoundingClientRect().left + 4"
    )


def test_what_is_no_image_is_told(
    browser: Chromium, server: Server, files: dict[str, Path]
) -> None:
    browser.open(f"{server.url}/ui")
    drop(browser, files["accepted"])
    drop(browser, files["broken"])
    browser.until("document.getElementById('status').className === 'wrong'")
    assert "not an image" in words(browser, "status")
    assert browser.evaluate("document.getElementById('result').hidden")


def test_the_policy_is_in_force(browser: Chromium, server: Server) -> None:
    browser.open(f"{server.url}/ui")
    browser.evaluate(
        "const s = document.createElement('script'); s.textContent = 'window.let_in = 1';"
        "document.body.append(s)"
    )
    assert browser.evaluate("window.let_in") is None
    assert browser.evaluate("fetch('http://127.0.0.2:9/').then(() => 'sent', () => 'blocked')") == (
        "blocked"
    )
    assert sum("violates the following Content Security" in one for one in browser.complaints()) > 1


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("kind", ["accepted", "abstained", "broken"])
def test_it_can_be_read(
    browser: Chromium, server: Server, files: dict[str, Path], dark: bool, kind: str
) -> None:
    browser.open(f"{server.url}/ui", dark=dark, width=320)
    drop(browser, files[kind])
    assert browser.evaluate(WIDE) == 0
    ratios = browser.evaluate(CONTRASTS)
    assert {"h1", "status", "drop"} <= set(ratios)
    assert min(ratios.values()) >= 4.5, ratios
    page = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (page == "rgb(255, 255, 255)") != dark


def test_it_works_from_the_keyboard(
    browser: Chromium, server: Server, files: dict[str, Path]
) -> None:
    browser.open(f"{server.url}/ui")
    drop(browser, files["accepted"])
    order = []
    for _ in range(4):
        browser.press("Tab", 9)
        order.append(browser.evaluate("document.activeElement.id"))
    assert order == ["file", "curl", "copy", "json"]
    browser.evaluate("document.getElementById('file').focus({focusVisible: true})")
    assert browser.evaluate("getComputedStyle(drop).outlineStyle") == "solid"
    # Everything that can be reached has a name for those who do not see it.
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node["name"]["value"])
        for node in tree
        if not node["ignored"] and "name" in node
    }
    assert ("button", "Copy") in named
    assert ("table", "Most likely known classes") in named
    assert ("region", "The answer") in named
    (chooser,) = {name for role, name in named if role == "button" and name != "Copy"}
    assert "choose a file" in chooser
    roles = [node["role"]["value"] for node in tree if not node["ignored"]]
    assert {"main", "heading", "status", "region", "image"} <= set(roles)


def test_the_token_is_asked_for_and_kept_in_memory(
    browser: Chromium, serve: Callable[..., Server], files: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    server = serve("--token-file", str(path))
    assert httpx.get(f"{server.url}/").status_code == 401
    browser.open(f"{server.url}/ui")
    browser.until("!document.getElementById('token-form').hidden")
    drop(browser, files["accepted"])
    assert words(browser, "status") == "The service needs a token."
    for given, said in (("wrong", "That token is not"), (TOKEN, "Accepted: ")):
        browser.evaluate(f"document.getElementById('token').value = '{given}'")
        browser.evaluate("document.querySelector('#token-form button').click()")
        browser.until(f"document.getElementById('status').textContent.startsWith('{said}')")
    assert '-H "Authorization: Bearer $MOON_TOKEN"' in words(browser, "curl")
    assert TOKEN not in browser.evaluate("document.body.textContent")
    kept = (
        "JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}, location.href])"
    )
    assert TOKEN not in browser.evaluate(kept)
    browser.open(f"{server.url}/ui")
    browser.until("!document.getElementById('token-form').hidden")
    assert browser.evaluate("document.getElementById('token').value") == ""
    assert TOKEN not in server.errors()
