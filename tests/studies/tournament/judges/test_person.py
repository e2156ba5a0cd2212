"""A person's page, its key, and the verdicts that come back; a browser drives it in test_person_page.py."""

import json
import re

import pytest

from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.judges.person import PersonJudge
from qlora_jax.studies.tournament.matches import unordered
from qlora_jax.studies.tournament.settings import PersonArgs
from tests.studies.tournament.tiny_tournament import WORDS, arena_args, transcripts_of, write_lines, write_tournament


@pytest.fixture
def transcripts(tmp_path):
    return transcripts_of(arena_args(**write_tournament(tmp_path)))


def ask(folder, transcripts, **settings):
    folder.mkdir(exist_ok=True)
    judge = PersonJudge("anna", PersonArgs(**settings), folder, ProgressReporter())
    found = []
    judge.judge(transcripts.matches(), transcripts, found.append)
    return judge, found


def items_of(judge) -> list[dict[str, str]]:
    (data,) = re.findall(r'id="data">(.*?)</script>', judge.page.read_text(), re.DOTALL)
    return json.loads(data)["items"]


def test_each_pair_is_shown_once_on_random_sides(tmp_path, transcripts):
    judge, found = ask(tmp_path, transcripts)
    assert {one.verdict for one in found} == {None}
    shown = [one.match for one in found]
    assert len(shown) == 12
    assert len(unordered(shown)) == 12
    key = json.loads(judge.key.read_text())["matches"]
    for item in items_of(judge):
        keyed = key[item["id"]]
        assert item["left"] == transcripts.replies[keyed["first"]][keyed["prompt"]]
        assert item["right"] == transcripts.replies[keyed["second"]][keyed["prompt"]]


def test_the_page_says_nothing_about_systems(tmp_path, transcripts):
    pages, orders = set(), set()
    for number in range(3):
        judge, found = ask(tmp_path / str(number), transcripts)
        text = judge.page.read_text()
        assert not [name for name in (*WORDS, "anna") if name in text]
        assert "http" not in re.sub(r"http-equiv", "", text)
        pages.add(text)
        orders.add(tuple(one.match for one in found))
        ids = [item["id"] for item in items_of(judge)]
        assert len({*ids}) == 12 and all(re.fullmatch("[0-9a-f]{16}", one) for one in ids)
    assert len(pages) == len(orders) == 3  # neither ids, sides nor order follow from the texts or a seed


def test_limit_and_both_orders(tmp_path, transcripts):
    _, found = ask(tmp_path, transcripts, limit=5, both_orders=True)
    shown = {one.match for one in found}
    assert len(shown) == len(found) == 10
    assert {match.swapped() for match in shown} == shown


def test_exported_verdicts_come_back_as_the_keys_systems(tmp_path, transcripts):
    judge, _ = ask(tmp_path, transcripts)
    page = judge.page.read_text()
    key = json.loads(judge.key.read_text())
    ids = [*key["matches"]]
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({"page": key["page"], "verdicts": {ids[0]: 1, ids[1]: 2, ids[2]: 3}}))
    again, found = ask(tmp_path, transcripts, answers=str(answers))
    assert again.page.read_text() == page  # a page that people are judging on is not written again
    assert [one.verdict for one in found] == [1, 2, 3, *[None] * 9]
    assert [(one.match.first, one.match.prompt) for one in found] == [
        (keyed["first"], keyed["prompt"]) for keyed in key["matches"].values()
    ]


def test_changed_settings_are_refused_and_pairs_that_the_page_lacks_are_reported(tmp_path):
    messages = []
    reporter = ProgressReporter()
    reporter.message = messages.append
    two, three = (transcripts_of(arena_args(**write_tournament(tmp_path, systems=systems))) for systems in (2, 3))
    for transcripts in (two, three):
        PersonJudge("anna", PersonArgs(), tmp_path, reporter).judge(
            transcripts.matches(), transcripts, lambda one: None
        )
    assert [text for text in messages if "not on the page" in text] == [messages[1]]
    assert messages[1].startswith("anna: 8 of 12 pairs are not on the page")
    with pytest.raises(
        ValueError, match=r"limit \(found 5, expected null\), both_orders \(found true, expected false\)"
    ):
        PersonJudge("anna", PersonArgs(limit=5, both_orders=True), tmp_path, reporter)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda key, first: {"page": "0" * 16, "verdicts": {first: 1}}, r"of another page"),
        (lambda key, first: {"page": key, "verdicts": {"0" * 16: 1}}, r"verdicts on pairs that the page does not have"),
        (lambda key, first: {"page": key, "verdicts": {first: 4}}, r"found 4, expected 1, 2 or 3"),
        (lambda key, first: {"verdicts": {}}, r"page: missing"),
    ],
)
def test_files_of_other_pages_are_refused(tmp_path, transcripts, change, problem):
    judge, _ = ask(tmp_path, transcripts)
    key = json.loads(judge.key.read_text())
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(change(key["page"], next(iter(key["matches"])))))
    with pytest.raises(ValueError, match=problem):
        ask(tmp_path, transcripts, answers=str(answers))


def test_changed_replies_and_a_missing_key_are_refused(tmp_path, transcripts):
    judge, _ = ask(tmp_path, transcripts)
    settings = write_tournament(tmp_path)
    rows = [{"question_id": 10 + i, "reply": f"A new reply to {i}."} for i in range(4)]
    settings["systems"]["alpha-system"]["replies"] = write_lines(tmp_path / "new.jsonl", rows)
    with pytest.raises(ValueError, match=r"8 of its 12 pairs have other texts now"):
        ask(tmp_path, transcripts_of(arena_args(**settings)))
    judge.key.unlink()
    with pytest.raises(ValueError, match=r"anna.json: no such file, but .*answers.json needs it"):
        ask(tmp_path, transcripts, answers=str(tmp_path / "answers.json"))
