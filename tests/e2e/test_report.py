"""The page of a run: marked rows are what the mask says, and what people wrote stays text."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from qlora_jax.line_digests import with_digest
from qlora_jax.training.run import dry_run, lock_output, train
from qlora_jax.training.run_spec import open_inputs
from tests.e2e.project import project, stop_after

RAN = "document.documentElement.dataset.ran = 1"
HOSTILE = [
    f"<script>{RAN}</script>",
    f"</div></body><img src=x onerror='{RAN}'>",
    f'"><svg onload="{RAN}"> &lt;b&gt; {{{{ 7 * 7 }}}}',
    "\x1b[31m\x00 \u202e end </s> of\r\nline",
]
VOID = {"meta", "img", "br", "link", "input"}
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """Elements, their attributes, and the text of `.row` elements: all of it, and what is marked."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[str] = []
        self.marked: list[list[str]] = []
        self._open: list[str] = []
        self._in_row = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if ("class", "row") in attrs:
            self.rows.append("")
            self.marked.append([])
            self._open, self._in_row = [], True
        if tag == "mark" and self._in_row:
            self.marked[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass
        self._in_row &= bool(self._open)

    def handle_data(self, data):
        if self._in_row:
            self.rows[-1] += data
            if "mark" in self._open:
                self.marked[-1][-1] += data


def told(text: str) -> str:
    """Control characters as the page shows them, and the one that turns directions."""
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
    return shown.replace("\u202e", "<U+202E>")


def hostile(folder: Path):
    config = project(folder, data=dict(max_length=256), train=dict(steps=4, eval_every=2))
    rows = [{"prompt": f"{n} {HOSTILE[n % 4]}", "completion": f"<i>{n}</i>\n{HOSTILE[(n + 1) % 4]}"} for n in range(40)]
    Path(config.data.train).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(settings, what was printed) of a dry run over rows that would be a page's elements."""
    config = hostile(tmp_path_factory.mktemp("reported"))
    out = io.StringIO()
    dry_run(config, Path(config.output), resume=False, oversized=False, console=Console(file=out, width=200))
    return config, out.getvalue()


@pytest.fixture(scope="module")
def ended(reported, tmp_path_factory):
    """The same settings with the records and samples of a run, as a card would have told them."""
    config = dataclasses.replace(reported[0], output=str(tmp_path_factory.mktemp("ended")))
    known = {"mfu": 0.4, "device_bytes": 3 << 30, "device_peak_bytes": 4 << 30, "host_bytes": 2 << 30}
    counts = {"tokens": 100, "supervised_tokens": 50, "length": 64, "seconds": 1.0, "learning_rate": 1e-4}
    steps = [{"step": n, "loss": 3 / n} | counts | known for n in range(1, 200)]
    replies = [
        {"step": n, "prompt": {"prompt": text}, "reply": text, "end": "stop"} for n in (0, 199) for text in HOSTILE
    ]
    for name, records in {"metrics": [*steps, {"step": 199, "eval_loss": 2.0}], "samples": replies}.items():
        text = "".join(with_digest(json.dumps(record)) for record in records)
        (Path(config.output) / f"{name}.jsonl").write_text(text)
    (Path(config.output) / "checkpoints" / "199").mkdir(parents=True)
    dry_run(config, Path(config.output), resume=True, oversized=False, console=Console(file=io.StringIO()))
    return config


def page_of(config) -> str:
    return (Path(config.output) / "report.html").read_text(encoding="utf-8")


def facts_of(config):
    return json.loads((Path(config.output) / "report.json").read_text(encoding="utf-8"))


def test_marked_text_is_what_the_mask_decodes_to(reported):
    config, _ = reported
    dataset = open_inputs(config).dataset
    page, facts = Page(page_of(config)), facts_of(config)
    assert len(page.rows) == len(facts["rows"]) == 32
    for shown, marks, row in zip(page.rows, page.marked, facts["rows"], strict=True):
        (number,) = [n for n in map(int, dataset.train.numbers) if dataset.train.where(n) == row["place"]]
        ids, mask = dataset.train.row(list(dataset.train.numbers).index(number))
        assert shown == told(dataset.tokenizer.decode(ids.tolist()))
        assert marks == [told(dataset.tokenizer.decode(ids[mask].tolist()))]
        assert [s["text"] for s in row["segments"] if s["supervised"]] == [dataset.tokenizer.decode(ids[mask].tolist())]


def test_three_rows_are_unfolded(reported):
    config, _ = reported
    rows = page_of(config).split('<details class="card"')[1:33]
    assert [n for n, row in enumerate(rows) if row.startswith(" open")] == [0, 16, 31]


def test_what_people_wrote_stays_text_and_nothing_is_loaded(reported):
    config, _ = reported
    page = Page(page_of(config))
    assert not {"script", "img", "i", "link", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("#") for name, value in page.attributes if name in ("src", "href", "xlink:href"))
    assert "default-src 'none'; style-src 'unsafe-inline'" in page_of(config) and "url(h" not in page_of(config)
    assert any("{{ 7 * 7 }}" in row and "&lt;b&gt;" in row for row in page.rows)


def test_the_dry_run_prints_plan_and_place_and_writes_no_more(reported):
    config, printed = reported
    assert "memory plan" in printed and "saved activations" in printed and "report.html" in printed
    assert "warning: step 1 of 4 will change nothing" in printed
    assert sorted(path.name for path in Path(config.output).iterdir()) == ["report.html", "report.json"]
    with lock_output(Path(config.output), resume=False, warn=pytest.fail):
        pass  # a run may take it
    facts = facts_of(config)
    assert facts["training"] == {} and facts["memory_plan"]["fits"] and facts["memory_plan"]["peak_bytes"] is None
    assert facts["data"]["train"]["rows"] == 40 - facts["data"]["eval"]["rows"]
    assert facts["config"]["data"]["max_length"] == 256


@pytest.mark.slow
def test_a_run_ends_with_a_page_of_all_its_steps_also_when_resumed(tmp_path, monkeypatch):
    prompts, quiet = tmp_path / "prompts.txt", Console(file=io.StringIO())
    prompts.write_text(f"{HOSTILE[0]}\n{HOSTILE[1]}\n")
    config = hostile(tmp_path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, samples=str(prompts), sample_tokens=4))
    with monkeypatch.context() as patch:
        stop_after(patch, config, 2)
        assert not train(config, Path(config.output), resume=False, oversized=False, console=quiet).finished
    assert facts_of(config)["training"]["steps"] == 2
    assert train(config, Path(config.output), resume=True, oversized=False, console=quiet).finished
    done = facts_of(config)["training"]
    assert done["steps"] == done["last_eval"]["step"] == 4 and done["first_eval"]["step"] == 0
    text = page_of(config)
    assert "loss over optimizer steps" in text and f"{done['first_eval']['loss']:.3f} → " in text
    samples = facts_of(config)["samples"]
    assert [sample["prompt"]["prompt"] for sample in samples] == HOSTILE[:2]
    assert [[step for step, _ in sample["replies"]] for sample in samples] == [[0, 4]] * 2
    page = Page(text)
    assert "script" not in page.tags and "img" not in page.tags and page.rows[0] == HOSTILE[0]
    assert facts_of(config)["memory_plan"]["peak_bytes"] is None or "of the plan" in text


def test_the_page_of_a_card_has_mfu_speed_and_memory(ended):
    text = page_of(ended)
    assert "40.0%" in text and facts_of(ended)["training"]["mfu"] == 0.4
    for caption in ("loss", "Learning rate", "Speed", "MFU", "Memory in use"):
        assert f'aria-label="{caption} over optimizer steps"' in text
    assert (
        "Memory in use, GiB" in text and text.count('<div class="wide">') == 1
    )  # the loss; the others are two and two


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="requires chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("width", [360, 700, 768, 1100, 1600])
def test_a_browser_runs_nothing_and_fits_the_page_with_letters_of_one_size(reported, ended, tmp_path, width, when):
    # Without its policy, so that escaping alone has to hold; and with a script that tells the page's width.
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page_of(ended if when == "after" else reported[0]))
    inner = tmp_path / "inner.html"
    told = (
        "document.documentElement.scrollWidth + ' ' + ('ran' in document.documentElement.dataset) + ' ' + "
        "[...document.querySelectorAll('figure svg')].filter(svg => svg.checkVisibility())"
        ".map(svg => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width * 10)"
        ".every(letters => letters > 10 && letters < 17)"
    )
    probe = f"<script>parent.postMessage({told}, '*')</script>"
    inner.write_text(text.replace("</body>\n</html>", f"{probe}</body></html>"), encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<script>onmessage = e => document.title = e.data</script>"
        f"<iframe src=inner.html style='width: {width}px; height: 800px; border: 0'></iframe>"
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
        "--dump-dom",
    ]
    done = subprocess.run([CHROMIUM, *flags, outer.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    assert f"<title>{width} false true</title>" in done.stdout
