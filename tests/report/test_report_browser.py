"""The page in a real browser: at a phone's and a desk's width, by mouse and by keyboard, and without scripts."""

import datetime
import json

import pytest
from chromium import PROGRAM, Chromium

from d2g_jax.report import write_report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium on this machine")
END, LEFT_ARROW = 35, 37
PAPER = {"light": "rgb(252, 252, 250)", "dark": "rgb(18, 20, 22)"}
SHOWN = "[...document.querySelectorAll('.timeline img')].filter((image) => image.offsetHeight).length"
POINT = """(() => {
  const chart = document.querySelector(".chart"), box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 12, clientY: box.top + 20}));
  return document.getElementById("tip").innerText;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def look(browser, page, width, *, dark=False, scripts=True):
    """Loads a file in a window of that width and colour scheme."""
    browser.scripts(scripts)
    browser.resize(width, 844, phone=width < 600, dark=dark)
    browser.loaded(page.as_uri())


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_it_fits_and_answers(browser, gallery, width, scheme):
    page = write_report(gallery)
    look(browser, page, width, dark=scheme == "dark")
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("getComputedStyle(document.body).backgroundColor") == PAPER[scheme]
    assert browser.requests() == [page.as_uri()]
    assert browser.run("[...document.images].filter((image) => !image.naturalWidth).length") == 0
    # A wide table scrolls in its card; nothing else is cut off.
    cut = "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1"
    assert browser.run(cut + " && !e.closest('.scroll')).length") == 0
    tip = browser.run(POINT)
    assert "images" in tip
    assert "mse" in tip
    assert "full" in tip


def test_the_slider_is_driven_by_keys(browser, gallery):
    look(browser, write_report(gallery), 390)
    browser.run("document.querySelector('.timeline input').focus()")
    output = "document.querySelector('.timeline output').textContent"
    assert (browser.run(output), browser.run(SHOWN)) == ("after 10 images", 1)
    browser.press("ArrowLeft", code=LEFT_ARROW)
    assert (browser.run(output), browser.run(SHOWN)) == ("after 5 images", 1)
    browser.press("ArrowLeft", code=LEFT_ARROW)
    browser.press("ArrowLeft", code=LEFT_ARROW)
    assert (browser.run(output), browser.run(SHOWN)) == ("after 0 images", 1)
    browser.press("End", code=END)
    assert browser.run(output) == "after 10 images"


def test_without_scripts_all_grids_stand_there_with_their_captions(browser, gallery):
    look(browser, write_report(gallery), 390, scripts=False)
    assert browser.run(SHOWN) == 3
    captions = "[...document.querySelectorAll('.timeline figcaption')].map((one) => one.innerText)"
    assert browser.run(captions) == ["after 0 images", "after 5 images", "after 10 images"]
    assert browser.run("document.querySelector('.timeline label').offsetHeight") == 0


@pytest.mark.parametrize(("minutes", "badge"), [(1, "running full, 50%"), (150, "last sign of life 3 hours ago")])
def test_a_running_page_says_its_age(browser, workdir, minutes, badge):
    moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=minutes)
    status = {"state": "running", "stage": "training", "done": 160, "total": 320, "written": moment.isoformat()}
    (workdir / "status.json").write_text(json.dumps(status))
    page = write_report(workdir)
    look(browser, page, 390)
    assert browser.run("document.querySelector('.state').textContent") == badge
    assert browser.run("document.querySelector('.now p').textContent") == "Training · 160 of 320 images"
    assert browser.run("document.querySelector('.now progress').position") == 0.5
    assert "ago" in browser.run("document.getElementById('written').textContent")
    assert '<noscript><meta http-equiv="refresh"' in page.read_text()
