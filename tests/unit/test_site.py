"""The documentation site: built as ``make docs`` does, without a warning, and looked at in a browser."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import browser
from tests.launch import TIMEOUT

ROOT = Path(__file__).parents[2]
PAGES = ("index.html", "docs/routing.html", "docs/results/moonlight.html", "CHANGELOG.html")
COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site."""
    python = ROOT / ".venv-docs" / "bin" / "python"
    if not python.exists():
        if importlib.util.find_spec("mkdocs") is None:
            pytest.skip("mkdocs-material is neither here nor in .venv-docs, which `make docs` makes; links are tested")
        python = Path(sys.executable)
    folder = tmp_path_factory.mktemp("site")
    line = [str(python), "tools/site.py", "--site-dir", str(folder)]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stdout + result.stderr
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def address(built: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(built))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_it_builds_without_a_warning(built: Path) -> None:
    for name in PAGES:
        assert "megatron" in (built / name).read_text()


def test_pages_fit_phones_and_desktops_and_ask_nothing_of_other_hosts(address: str) -> None:
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium or Chrome is installed (Debian: apt-get install chromium)")
    with browser.started(program) as tab:
        for width in (390, 1440):
            for name in PAGES:
                tab.open(f"{address}/{name}", width, is_phone=width == 390)
                assert tab.ask("document.documentElement.scrollWidth <= innerWidth"), (name, width)
                assert tab.ask("[...document.images].every(image => image.complete && image.naturalWidth)"), name
        tab.open(f"{address}/index.html", 1440)  # the first page: its report and its commands need no scrolling
        assert tab.ask("[...document.querySelectorAll('pre code')].every(each => each.scrollWidth <= each.clientWidth)")
        sent = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
        assert [url for url in sent if not url.startswith((address, "data:"))] == []
        assert [event for event in tab.events if event["method"] in COMPLAINTS] == []
