"""The page in a real Chromium: `make browser`. CHROMIUM names the program, if it is not found."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import photos as made
import pytest

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from metawrap import ProtoNet  # noqa: E402
from metawrap.classifier import Classifier, fit_classifier  # noqa: E402
from metawrap.cli.serve import server_of  # noqa: E402
from metawrap.service import Adapter, Limits, create_app  # noqa: E402

pytestmark = pytest.mark.browser
PROGRAM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MARKUP = "<img src=x onerror='window.hacked = 1'>"
# A drop of files on the element, as a hand makes it.
DROP = """async (element, [name, bytes]) => {
    const carried = new DataTransfer();
    carried.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
    element.dispatchEvent(new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }));
}"""


@contextlib.contextmanager
def serving(source: Any, limits: Limits | None = None) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = server_of(create_app(source, limits))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def chromium() -> Any:
    if PROGRAM is None:
        pytest.skip("there is no Chromium: set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, address: str, width: int, scheme: str, refusals: bool = False) -> Iterator[Any]:
    """The page; fails on requests to other places and on complaints, but for refused requests where they are wanted."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, complaints = context.new_page(), list[str]()
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    own = (address, "blob:", "data:")
    page.on("request", lambda sent: None if sent.url.startswith(own) else complaints.append(sent.url))
    page.goto(address)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.hacked") is None
    assert [each for each in complaints if not (refusals and "status of 4" in each)] == []
    context.close()


@pytest.fixture(scope="module")
def learning() -> Iterator[str]:
    learner = ProtoNet(made.network(), norm="running").eval()
    limits = Limits(photo_bytes=50_000, photos=20, classes=4)
    adapter = Adapter(lambda photos: fit_classifier(learner, photos, made.WAY), made.WAY, MARKUP)
    with serving(adapter, limits) as address:
        yield address


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_drop_photos_learn_and_name(chromium: Any, learning: str, tmp_path: Path, width: int, scheme: str) -> None:
    folder = made.folder(tmp_path / "photos", 3)
    names = {"red": f"red {MARKUP}", "green": "vert", "blue": "أزرق"}
    with opened(chromium, learning, width, scheme) as page:
        page.click("#add")
        assert page.evaluate("document.activeElement.placeholder").startswith("Name")
        for card, (colour, name) in zip(page.locator("#classes .card").all(), names.items(), strict=True):
            card.locator("[type=text]").fill(name)
            for number in range(2):
                content = (folder / colour / f"{number}.png").read_bytes()
                card.locator(".drop").evaluate(DROP, [f"{MARKUP}{number}.png", list(content)])
            assert card.locator(".photos img").count() == 2
        page.click("#learn")
        page.locator("#ask").wait_for()
        assert "6 of 6 were named right: 100.0 %" in page.inner_text("#said")
        for colour, name in names.items():
            page.locator("#drop").evaluate(DROP, ["new.png", list((folder / colour / "2.png").read_bytes())])
            first = page.locator("#found .card:first-child .name:first-child span:first-child", has_text=name)
            first.wait_for()
        texts = page.locator("#found .card:first-child .name span:last-child").all_inner_texts()
        shares = [float(text.removesuffix(" %")) for text in texts]
        assert sum(shares) == pytest.approx(100, abs=0.2)
        bars = page.locator("#found .card:first-child .bar").all()
        drawn = [100 * bar.locator("i").bounding_box()["width"] / bar.bounding_box()["width"] for bar in bars]
        assert drawn == pytest.approx(shares, abs=1)
        # A photo beside the marked places does not replace the page.
        page.locator("h1").evaluate(DROP, ["new.png", [1]])
        page.locator("#classes .photos button").first.click()
        assert page.locator("#stale").is_visible()


def test_it_is_used_by_keyboard(chromium: Any, learning: str, tmp_path: Path) -> None:
    folder = made.folder(tmp_path / "photos", 2)
    with opened(chromium, learning, 400, "light") as page:
        page.on("filechooser", lambda _: None)  # Switched on here: a key may overtake a switch just before it.
        page.locator("#classes .card").nth(1).wait_for()
        for colour in ("red", "blue"):
            page.keyboard.press("Tab")
            page.keyboard.type(colour)
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.ariaLabel") == "Remove the class"
            page.keyboard.press("Tab")
            with page.expect_file_chooser() as chooser:
                page.keyboard.press("Enter")
            chooser.value.set_files([folder / colour / "0.png", folder / colour / "1.png"])
            page.locator("#classes .photos img").nth(1 if colour == "red" else 3).wait_for()
            for _ in range(2):  # Past the photos.
                page.keyboard.press("Tab")
                assert page.evaluate("document.activeElement.ariaLabel").startswith("Remove ")
        for button in ("add", "learn"):
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.id") == button
        page.keyboard.press("Enter")
        page.locator("#ask").wait_for()


def test_what_is_missing_or_refused_is_said(chromium: Any, learning: str) -> None:
    with opened(chromium, learning, 1280, "light", refusals=True) as page:
        first, second = page.locator("#classes .card").nth(0), page.locator("#classes .card").nth(1)
        page.click("#learn")
        assert "needs a name" in page.inner_text("#said")
        first.locator("[type=text]").fill("one")
        second.locator("[type=text]").fill("two")
        page.click("#learn")
        assert "“one” needs a photo" in page.inner_text("#said")
        first.locator(".drop").evaluate(DROP, ["large.png", [0] * 50_001])
        assert "large.png is larger than" in page.inner_text("#said")
        for card in (first, second):
            card.locator(".drop").evaluate(DROP, [f"{MARKUP}.png", [1, 2, 3]])
        page.click("#learn")
        page.locator("#said", has_text="not a readable image").wait_for()
        assert f"one/{MARKUP}.png" in page.inner_text("#said")
        assert not page.locator("#ask").is_visible()
        assert page.locator("[onerror]").count() == 0


def test_a_classifier_is_served(chromium: Any) -> None:
    names = [f"class {number}" for number in range(39)]
    classifier = Classifier.of(made.network(40), [*names, MARKUP], made.WAY)
    with serving(classifier) as address, opened(chromium, address, 400, "dark") as page:
        page.locator("#ask").wait_for()
        assert page.inner_text("#about").startswith("40 classes: class 0, class 1")
        assert not page.locator("#teach").is_visible()
        page.locator("#drop [type=file]").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": _png()})
        page.locator("#found .name").nth(4).wait_for()


def _png() -> bytes:
    made.photo("red", 1).save(content := io.BytesIO(), "PNG")
    return content.getvalue()
