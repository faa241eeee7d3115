"""The page of a curated set in a real browser."""

import time
from pathlib import Path

import numpy as np
import pytest

from tests.integration.browser import needs_browser, opened
from tests.tools.curate.series import body
from tools.curate.page import write_page
from tools.curate.run import Row
from tools.curate.state import State
from tools.curate.work import picture

pytestmark = needs_browser


@pytest.fixture
def browser(tmp_path):
    with opened(tmp_path / "profile") as browser:
        yield browser


def page_of(out: Path, count: int) -> Path:
    """Write a page of so many volumes, one in ten a twin of the one before, and one series without a volume."""
    seen = picture(body(), np.diag([3.0, 3, 3, 1]), None)
    state, rows = State(out / "state.sqlite"), []
    for number in range(count):
        id_ = f"{number:016x}"
        row = Row(
            id_, f"source{number % 3}", "used", modality=("ct", "t1", "flair")[number % 3], patient=f"p{number // 2}"
        )
        row.measures = {
            "shape": [48 + number % 9, 48, 16], "spacing_mm": [3.0, 3.0, 3.0 + number % 4], "lowest": 0,
            "highest": 1300, "notes": [],
        }  # fmt: skip
        if number % 10 == 9:
            row.status, row.twin_of = "twin", f"{number - 1:016x}"
            row.reason = f"near twin of {row.twin_of}"
        rows.append(row)
        state._base.execute("INSERT INTO volume VALUES (?, '', '{}', '', ?)", (id_, seen))
    state._base.commit()
    state.close()
    rows.append(Row("f" * 16, "source0", "left out", "gantry tilt of 12 degrees </script><b>", "ct", images=40))
    return write_page(rows, out)


COUNT = 'return document.getElementById("count").textContent'
CARDS = 'return [...document.querySelectorAll(".card")].map(card => card.dataset.id)'


def test_a_click_on_a_filter_shows_what_is_like_that(tmp_path, browser):
    browser.open(page_of(tmp_path, 50))
    assert browser.run(COUNT) == "51 of 51 series"
    assert browser.run('return document.querySelector(".card img").naturalWidth') == 216
    browser.click('[data-status="left out"]')
    assert browser.run(COUNT) == "1 of 51 series"
    assert "</script><b>" in browser.run('return document.querySelector(".why").textContent')
    browser.click('[data-status="twin"]')  # each beside the one that stays
    cards = browser.run(CARDS)
    assert cards[:2] == [f"{9:016x}", f"{8:016x}"]
    assert len(cards) == 10
    browser.click('[data-status="twin"]')
    browser.run('const s = document.getElementById("modality"); s.value = "flair"; s.onchange()')
    assert browser.run(COUNT) == "16 of 51 series"
    browser.run('const s = document.getElementById("search"); s.value = "tilt"; s.oninput({target: s})')
    assert browser.run(COUNT) == "0 of 51 series"
    assert browser.run('return performance.getEntriesByType("resource").length') == 0  # nothing from a network


def test_ten_thousand_volumes_are_quick(tmp_path, browser):
    page = page_of(tmp_path, 10_000)
    start = time.monotonic()
    browser.open(page)
    assert browser.run(COUNT) == "10001 of 10001 series"
    opened_s = time.monotonic() - start
    click = (
        'const t = performance.now(); document.querySelector("[data-status=twin]").click(); '
        "return performance.now() - t"
    )
    scroll = (
        'const v = document.getElementById("view"), t = performance.now(); v.scrollTop = v.scrollHeight; '
        "v.dispatchEvent(new Event('scroll')); draw(); return performance.now() - t"
    )
    scrolled_ms, clicked_ms = browser.run(scroll), browser.run(click)
    assert browser.run("return document.querySelectorAll('.card').length") < 100
    assert opened_s < 20
    assert clicked_ms < 1000
    assert scrolled_ms < 1000
    print(
        f"page of {page.stat().st_size / 1e6:.0f} MB: opened in {opened_s:.1f} s, {clicked_ms=:.0f}, {scrolled_ms=:.0f}"
    )
