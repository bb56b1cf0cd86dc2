"""The page of runs in a real browser. Without one these tests skip; `make test-browser` asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from megatron_muon.monitor import metrics, page
from tests import browser
from tests.unit.sick_run import write_record

EVIL = "<b>evil</b><img src=x onerror=\"document.title='caught'\">"


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Tab]:
    program = browser.find()
    if program is None:
        if os.environ.get("BROWSER_FOR_TESTS") is not None:
            pytest.fail("BROWSER_FOR_TESTS is set, and there is no browser by that name or another")
        pytest.skip("no Chromium or Chrome is installed (Debian: apt-get install chromium)")
    with browser.started(program) as found:
        yield found


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    runs = {
        EVIL: metrics.read(write_record(folder / "sick.jsonl", is_sick=True, seed=1, flags={EVIL: EVIL})),
        "healthy": metrics.read(write_record(folder / "healthy.jsonl")),
        "plain": metrics.read(write_record(folder / "plain.jsonl", interval=0)),
    }
    page.write_page(runs, folder / "page.html")
    return (folder / "page.html").as_uri()


def complaints(tab: browser.Tab) -> list[dict[str, object]]:
    kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
    return [event for event in tab.events if event["method"] in kinds]


def legend(tab: browser.Tab, key: str) -> list[str]:
    rows: list[str] = tab.ask(f"[...document.querySelectorAll('[data-key={key}] .legend div')].map(e => e.textContent)")
    return rows


def count(tab: browser.Tab, selector: str) -> int:
    return int(tab.ask(f"document.querySelectorAll({selector!r}).length"))


def test_it_shows_lines_and_marks_asks_nothing_of_the_network_and_complains_of_nothing(
    tab: browser.Tab, url: str
) -> None:
    tab.events.clear()
    tab.open(url, 1440)
    requests = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert requests == [url]
    assert count(tab, "#sheet .panel") == 12
    for key in ("loss", "logit", "update_ratio", "defect", "grad_norm", "time"):
        assert count(tab, f"[data-key={key}] .line") >= 3, key
    assert count(tab, "[data-key=loss] .lost") == 1  # NaN at the end of the sick one
    assert count(tab, "[data-key=cosine] .alarm") == 0  # not drawn while it is not open
    assert count(tab, "[data-key=loss] .alarm") == 3
    assert tab.ask("[...document.querySelectorAll('.told')].map(e => e.dataset.key)") == [
        "update_ratio",
        "defect",
        "shares",
    ]
    assert "Nothing was measured of Muon's work in plain" in tab.ask("document.querySelector('.note').textContent")
    assert count(tab, "img") == count(tab, "h1 b") == 0 and tab.ask("document.title") == f"Runs: {EVIL}, healthy, plain"
    assert not complaints(tab)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1440, "light"), (1440, "dark")])
def test_it_fits_phones_and_desktops_in_light_and_dark(tab: browser.Tab, url: str, width: int, scheme: str) -> None:
    tab.open(url, width, scheme=scheme, is_phone=width < 500)
    tab.ask("document.querySelectorAll('details').forEach(e => e.open = true)")
    tab.ask("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    assert (
        tab.ask("[document.documentElement.scrollWidth <= innerWidth, document.body.scrollWidth <= innerWidth]")
        == [True] * 2
    )
    assert (
        tab.ask(
            "[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide, svg')"
            " && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))"
        )
        == []
    )
    page_colour = tab.ask("getComputedStyle(document.body).backgroundColor")
    assert page_colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 26)")
    assert count(tab, "#further .line") > 20


def test_the_pointer_reads_values_at_an_iteration(tab: browser.Tab, url: str) -> None:
    tab.open(url, 1440)
    before = legend(tab, "loss")
    assert before[0] == "last values"
    left, top, width = tab.ask(
        "(() => { const r = document.querySelector('[data-key=logit] svg').getBoundingClientRect();"
        " return [r.left, r.top, r.width]; })()"
    )
    tab.move(left + 48 + 0.5 * (width - 58), top + 60)  # the middle of the axis of 200 iterations
    assert legend(tab, "logit") == [
        "iteration 100",
        f"{EVIL}: largest logit200.9",
        *[f"{n}: largest logit44.82" for n in ("healthy", "plain")],
    ]
    assert legend(tab, "loss")[0] == "iteration 100" and legend(tab, "loss") != before  # all panels follow
    tab.move(1, 1)
    assert legend(tab, "loss") == before
    assert not complaints(tab)


def test_runs_and_classes_are_switched_on_and_off(tab: browser.Tab, url: str) -> None:
    tab.open(url, 1440)
    lines = count(tab, "[data-key=defect] .line")
    tab.ask("document.querySelector('#runs input').click()")
    assert (
        not [row for row in legend(tab, "defect") if row.startswith(EVIL)] and count(tab, "[data-key=loss] .alarm") == 0
    )
    tab.ask("document.querySelectorAll('#runs input')[2].click()")  # one is left, which shows the parts of its step
    assert [row for row in legend(tab, "parts") if "products" in row]
    tab.ask("document.querySelector('#runs input').click()")
    assert count(tab, "[data-key=defect] .line") == lines
    tab.ask("document.querySelector('#choose input[type=search]').value = 'linear_fc1'")
    tab.ask("document.querySelector('#choose input[type=search]').dispatchEvent(new Event('input'))")
    tab.ask("document.getElementById('all').click()")
    assert count(tab, "[data-key=defect] .line") == lines + 4  # gate and up, of two runs
    assert len([row for row in legend(tab, "defect") if "mlp.linear_fc1[gate]" in row]) == 2
    tab.ask("document.querySelectorAll('#lines input').forEach(e => e.click())")
    assert count(tab, "[data-key=defect] .line") == 4
    tab.ask("document.getElementById('none').click()")
    assert count(tab, "[data-key=defect] .line") == 0
    assert not complaints(tab)
