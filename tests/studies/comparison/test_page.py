"""The page of a study: figures, untrusted names, and its width on a phone."""

import csv
import dataclasses
import json
import re
import shutil

import pytest

from qlora_jax.studies.comparison.page import COSTS, _text_of, front, page, write_page
from qlora_jax.studies.comparison.results import COLUMNS, Finished, summarize, write_table
from qlora_jax.studies.comparison.run import Run
from tests.studies.comparison.studies import finish, read, study_of

CHROMIUM = shutil.which("chromium")
HOSTILE = "<script>x() $\\frac{ & \x1b[31m"
TASK = "a long name " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def results(folder):
    methods = {"lora": {}, HOSTILE: {"lora.rank": 4}, "vectors": {"lora.method": "ia3"}}
    tasks = {TASK: study_of(folder)["tasks"]["numbers"]}
    study = read(folder, methods=methods, tasks=tasks)
    searched, final = [], []
    for index, (method, task) in enumerate(study.pairs()):
        for rate in (0.001, 0.01):
            settings = {"train.seed": 1000, "optim.learning_rate": rate}
            searched.append((Run(study=study, stage="search", method=method, task=task, settings=settings), rate, {}))
        for seed in (0, 1, 2):
            settings = {"train.seed": seed, "optim.learning_rate": 0.001}
            run = Run(study=study, stage="final", method=method, task=task, settings=settings)
            final.append((run, 1 + index / 10, {"peak_bytes": (index + 1) << 20, "seconds": 2.0 + index}))
    for run, loss, changes in [*searched, *final]:
        run.folder.mkdir(parents=True)
        run.prepare()
        finish(run, loss, **changes)
    counts = {pair: 10 ** (3 + index) for index, pair in enumerate(study.pairs())}
    return summarize(study, [run for run, *_ in [*searched, *final]], counts)


@pytest.fixture(scope="module")
def text(results):
    return page(results)


def test_the_page_has_the_figures_and_runs_nothing(results, text):
    for one in results.estimates:
        assert f"{one.mean.value:.4f}" in text and f"{one.parameters:,}" in text
    for one in results.differences:
        assert f"{one.mean.value:+.4f}" in text
    assert (
        "corrected by Holm for the number of tests on this page (2)" in text
        and "chosen (at the end of the grid)" in text
    )
    assert "<script" not in text and "&lt;script&gt;x()" in text and "\x1b" not in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")  # only names of SVG


def test_settings_are_shown_whole():
    nested = {"lora.rank": 4, "model.rope": {"factor": 2.0, "kind": "yarn"}}
    assert _text_of(nested) == 'lora.rank: 4, model.rope: {"factor": 2.0, "kind": "yarn"}'
    assert _text_of({"data.train": "a {x} ü"}) == 'data.train: "a {x} ü"' and _text_of({}) == "as configured"


def test_a_rank_that_the_budget_chose_is_shown(results, text):
    def sized(one: Finished) -> Finished:
        rank = {"lora.rank": 11} if one.run.method == "lora" else {}
        return one._replace(run=dataclasses.replace(one.run, settings={**one.run.settings, **rank}))

    assert "lora.rank: 11" not in text
    assert page(dataclasses.replace(results, runs=[*map(sized, results.runs)])).count("lora.rank: 11") == 1


def test_the_ids_of_plots_are_unique(text):
    used = re.findall(r' id="([^"]+)"', text)
    groups = [name for name in used if not re.fullmatch(r"[\w.]+_\d+", name)]  # matplotlib numbers the groups of a plot
    assert groups and len({*groups}) == len(groups)


def test_the_table_has_every_run(results, folder):
    with open(write_table(results, folder / "study"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results.runs) == 15 and tuple(rows[0]) == COLUMNS
    assert {row["method"] for row in rows} == {*results.study.methods}
    scored = [row for row in rows if row["stage"] == "final"]
    assert float(scored[0]["value"]) == pytest.approx(results.estimates[0].by_seed[0])
    outcome = json.loads((folder / "study" / scored[0]["folder"] / "outcome.json").read_text())
    assert float(scored[0]["seconds"]) == outcome["seconds"]
    assert [row["value"] for row in rows if row["stage"] == "search"] == [""] * 6


def test_the_front_follows_the_direction_of_the_measure(results):
    first = results.of_task(TASK)
    parameters = COSTS[0]
    assert front(first, parameters, "lower") == [0]  # fewest parameters and lowest loss
    assert front(first, parameters, "higher") == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="requires chromium (Debian: apt-get install chromium)")
def test_the_page_fits_its_window_and_its_tables_scroll(results, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    place = write_page(results, tmp_path).as_uri()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, scheme in ((360, "light"), (768, "dark"), (1280, "light")):
            tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            tab.goto(place)
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            tables = "[...document.querySelectorAll('.scroll')]"
            scrolls = tab.evaluate(f"{tables}.some(t => t.scrollWidth > t.clientWidth)")
            assert scrolls == (width < 1280)
            shown = "[...document.querySelectorAll('figure svg')].filter(s => s.checkVisibility())"
            letters = tab.evaluate(f"{shown}.map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width * 10)")
            assert letters and all(9 < size < 17 for size in letters)
            dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 27)"
            assert dark == (scheme == "dark")
        browser.close()
