"""The report in a real browser: accessible in light and dark, by keyboard, narrow and printed.

It needs chromium and axe-core: ``MANUALLOOP_AXE`` names the file ``axe.min.js``.
"""

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from report_cases import HOSTILE, Linear, batches, trained

from manualloop import Predictions, evaluate_loop, write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("MANUALLOOP_CHROMIUM") or shutil.which("chromium")
AXE = os.environ.get("MANUALLOOP_AXE")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with every section and texts that would like to be more than texts."""
    folder = tmp_path_factory.mktemp("report")
    model, data = Linear(), batches(torch.arange(20) % 3)
    score = partial(evaluate_loop, model, data, ["accuracy", "classification_report"])
    result = trained(
        *(model, data),
        evaluate=score,
        best_metric="accuracy",
        max_grad_norm=1.0,
        checkpoint_dir=folder / "run",
    )
    numbers = np.arange(len(HOSTILE))
    scores = np.full((len(HOSTILE), 3), 1 / 3, np.float32)
    table = Predictions(
        *(numbers, numbers % 3, scores, (numbers + numbers // 5) % 3),
        {"text": list(HOSTILE)},
        ("<b>negative</b>", "neutral", "x" * 300),
    )
    return write_report(result, folder / "report.html", table)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_axe_finds_nothing_serious(report, browser, scheme, width):
    if AXE is None:
        pytest.skip("MANUALLOOP_AXE does not name axe.min.js")
    context = browser.new_context(
        color_scheme=scheme, bypass_csp=True, viewport={"width": width, "height": 900}
    )
    page = context.new_page()
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.evaluate(Path(AXE).read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    context.close()
    assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found] == []


def test_nothing_runs_and_nothing_is_loaded(report, browser):
    page = browser.new_page(viewport={"width": 400, "height": 900})
    requests, dialogs, errors = [], [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(report.as_uri())
    width = page.evaluate("document.documentElement.scrollWidth")
    page.close()
    assert requests == [report.as_uri()]
    assert dialogs == errors == []
    assert width <= 400  # tables scroll by themselves


def test_the_keyboard_reaches_everything_in_order(report, browser):
    page = browser.new_page()
    page.goto(report.as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.goto(report.as_uri())
    wanted = "a[href], summary, [tabindex='0']"
    number = page.evaluate(f'document.querySelectorAll("{wanted}").length')
    tops = []
    hidden = page.evaluate(
        f'[...document.querySelectorAll("{wanted}")].filter(e => !e.checkVisibility()).length'
    )
    for _ in range(number - hidden):
        page.keyboard.press("Tab")
        tops.append(
            page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)")
        )
    page.close()
    assert tops == sorted(set(tops))


def test_it_prints(report, browser, tmp_path):
    page = browser.new_page()
    page.goto(report.as_uri())
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    page.close()
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
