"""The report in a real Chromium, offline: `make browser`. CHROMIUM names the program, if it is not found."""

import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from report_runs import STEPS, make_run, make_seeds, rate, spoilt_run

from metawrap.report import gather, write_report_page

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api")

PROGRAM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SECONDS = 60_000
MARKUP = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def browser():
    if PROGRAM is None:
        pytest.skip("there is no Chromium: set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    make_seeds(place / "plus", [0, 1])
    make_run(place / "one", method="maml", epochs=2)
    make_run(place / "odd", method="protonet", data=MARKUP, insight=False)
    write_report_page(gather([place / name for name in ("plus", "one", "odd")]), place / "report.html")
    return place / "report.html"


@contextlib.contextmanager
def open_page(browser, path, width=1280, scheme="light"):
    """A page of that width and colour scheme, without a network; fails on any complaint of the console's."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, offline=True, color_scheme=scheme, has_touch=width < 500
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page, complaints = context.new_page(), []
    page.set_default_timeout(SECONDS)

    def complain(text, wrong=True):
        complaints.extend([text] if wrong else [])

    page.on("console", lambda message: complain(message.text, message.type in ("error", "warning")))
    page.on("pageerror", lambda error: complain(str(error)))
    page.on("request", lambda sent: complain(sent.url, not sent.url.startswith(("file:", "data:", "blob:"))))
    page.goto(path.as_uri())
    page.wait_for_function(
        "document.querySelectorAll('.chart .main-svg').length >= 2 * document.querySelectorAll('.chart').length"
    )
    yield page
    assert complaints == []
    context.close()


@pytest.fixture
def opened(browser, report, request):
    with open_page(browser, report, *getattr(request, "param", ())) as page:
        yield page


def lines_of(page, chart="rates-0"):
    """The y of the lines that are drawn, of seed 0."""
    return page.evaluate(
        "name => document.getElementById(name).data.filter(t => t.meta && t.meta.run.endsWith('seed 0')).map(t => t.y)",
        f"chart-{chart}",
    )[:STEPS]


def move_slider(page, panel, place):
    page.eval_on_selector(
        f"#panel-{panel} .slider",
        "(slider, place) => { slider.value = place; slider.dispatchEvent(new Event('input', { bubbles: true })); }",
        place,
    )


def test_it_opens_offline_without_a_complaint_and_draws_every_chart(opened):
    names = opened.eval_on_selector_all(".chart", "charts => charts.map(chart => chart.id)")
    assert len(names) == 14
    for name in names:
        parts = ".scatterlayer .trace, .barlayer .trace, .heatmaplayer image"
        drawn = opened.eval_on_selector(f"#{name}", "(chart, parts) => chart.querySelectorAll(parts).length", parts)
        assert drawn > 0, name
    assert opened.evaluate("window.hacked") is None


def test_markup_in_any_text_of_a_run_is_shown_and_not_run(browser, tmp_path):
    path = tmp_path / "report.html"
    write_report_page(gather([spoilt_run(tmp_path / "run", MARKUP)]), path)
    with open_page(browser, path) as page:
        assert f"Rates of the {MARKUP.rpartition('.')[2]}" in page.inner_text("#panel-rates")
        page.hover("#chart-embedding .points path >> nth=0", force=True)
        page.wait_for_selector("#chart-embedding .hoverlayer text")
        assert MARKUP in page.text_content("#chart-embedding .hoverlayer")
        assert page.locator("[onerror]").count() == 0
        assert page.evaluate("window.hacked") is None


def test_the_slider_moves_the_rates(opened):
    marks = "#chart-rates-0 .scatterlayer .trace .point"
    drawn = []
    for place in (3, 0, 1):
        move_slider(opened, "rates", place)
        expected = [[rate(0, place + 1, layer, step) for layer in range(3)] for step in range(STEPS)]
        assert lines_of(opened) == expected
        assert opened.inner_text("#panel-rates output") == str(place + 1)
        transforms = "points => points.map(point => point.getAttribute('transform'))"
        drawn.append(opened.eval_on_selector_all(marks, transforms))
    after, _, before = drawn
    assert len(after) == 2 * STEPS * 3  # The third run ended before.
    assert all(one != other for one, other in zip(before[:9], after[:9], strict=True))


def test_the_slider_takes_keys_and_the_button_plays_to_the_end(opened):
    opened.focus("#panel-rates .slider")
    opened.keyboard.press("Home")
    assert opened.inner_text("#panel-rates output") == "1"
    opened.click("#panel-rates .play")
    opened.wait_for_function("document.querySelector('#panel-rates output').textContent === '4'")
    opened.wait_for_function("document.querySelector('#panel-rates .play').textContent === '▶'")


def test_a_negative_rate_is_drawn_below_the_zero_line(opened):
    low = opened.evaluate(
        """() => {
            const box = document.querySelector('#chart-rates-0 .zl').getBoundingClientRect();
            const points = [...document.querySelectorAll('#chart-rates-0 .scatterlayer .point')];
            return points.filter(point => point.getBoundingClientRect().top > box.bottom).length;
        }"""
    )
    assert low == 2  # The last layer's first step, of the two runs that have this epoch.


def test_another_run_is_chosen_with_its_own_epochs(opened):
    first = opened.evaluate("document.getElementById('chart-norms-weight').data[0].y")
    opened.select_option("#panel-norms .choice", label="one (MAML)")
    assert opened.inner_text("#panel-norms output") == "2"
    second = opened.evaluate("document.getElementById('chart-norms-weight').data[0].y")
    # The file has 1 + 0.01 for each epoch.
    assert first == [1.04, 1.04]
    assert second == [1.02, 1.02]


def test_the_slider_leaves_a_line_hidden_that_the_legend_has_hidden(opened):
    opened.click("#chart-rates-0 .legendtoggle >> nth=0")
    hidden = "document.getElementById('chart-rates-0').data.filter(line => line.visible === 'legendonly').length"
    opened.wait_for_function(f"{hidden} === {1 + STEPS}")
    move_slider(opened, "rates", 1)
    assert opened.inner_text("#panel-rates output") == "2"
    assert opened.evaluate(hidden) == 1 + STEPS
    move_slider(opened, "rates", 3)
    legend = opened.eval_on_selector_all("#chart-rates-0 .legendtext", "texts => texts.map(text => text.textContent)")
    assert legend[2] == "one (MAML): no epoch 4"


@pytest.mark.parametrize("opened", [(400, "dark")], indirect=True)
def test_a_figure_is_saved_as_it_is_shown_on_white_and_nothing_covers_the_legend(opened, tmp_path):
    assert opened.locator(".modebar-btn").count() == 0
    files = {}
    for form in ("svg", "png"):
        with opened.expect_download() as download:
            opened.click(f"figure:has(#chart-rates-0) .save[data-form={form}]")
        assert download.value.suggested_filename == f"metawrap-rates-0.{form}"
        download.value.save_as(files.setdefault(form, tmp_path / f"rates.{form}"))
    with Image.open(files["png"]) as image:
        assert image.size == (1600, 960)
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    texts = re.findall(r"<text[^>]*>([^<]+)", files["svg"].read_text())
    assert {"plus (MAML++), seed 0", "inner learning rate", "step 1", "step 3", "conv0.conv"} <= set(texts)


def test_the_command_is_copied(opened):
    opened.click(".copy >> nth=0")
    opened.wait_for_function("document.querySelector('.copy').textContent === 'Copied'")
    assert opened.evaluate("navigator.clipboard.readText()") == "metawrap train --seeds 0,1"


@pytest.mark.parametrize(
    "opened", [(1280, "light"), (400, "light"), (1280, "dark"), (400, "dark")], indirect=True, ids=str
)
def test_nothing_is_wider_than_the_window(opened, request, tmp_path):
    width, scheme = request.node.callspec.params["opened"]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate("document.body.scrollWidth") <= width
    wide = opened.evaluate(
        """width => [...document.querySelectorAll('.chart, section > *, .card, pre')]
            .filter(element => element.getBoundingClientRect().right > width + 1)
            .map(element => element.outerHTML.slice(0, 80))""",
        width,
    )
    assert wide == []
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    opened.screenshot(path=folder / f"report-page-{width}-{scheme}.png", full_page=True)
    with Image.open(folder / f"report-page-{width}-{scheme}.png") as image:
        corner = image.convert("RGB").getpixel((2, 2))
        assert image.width == width
        assert (sum(corner) > 600) == (scheme == "light")
        assert len(image.convert("RGB").getcolors(10**7)) > 200


@pytest.mark.parametrize("opened", [(400, "light")], indirect=True)
def test_every_words_of_the_axes_are_inside_of_their_chart_on_a_phone(opened):
    outside = opened.evaluate(
        """() => [...document.querySelectorAll('.chart')].flatMap(chart => {
            const box = chart.getBoundingClientRect();
            return [...chart.querySelectorAll('.xtick text, .ytick text, .legendtext')].filter(text => {
                const own = text.getBoundingClientRect();
                return own.left < box.left - 2 || own.right > box.right + 2 || own.bottom > box.bottom + 2;
            }).map(text => chart.id + ': ' + text.textContent);
        })"""
    )
    assert outside == []
