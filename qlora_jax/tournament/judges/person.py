"""A person, who judges on a page and sends back the file that it exports."""

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.atomic_files import write_text
from qlora_jax.metadata import read_json
from qlora_jax.tournament.judges.judge import Judgement, Record, Verdict
from qlora_jax.tournament.matches import Match, Transcripts
from qlora_jax.tournament.pages.person_page import ExportedVerdicts, PageKey, draw_key, match_of, person_page
from qlora_jax.tournament.reporter import Reporter
from qlora_jax.tournament.settings import PersonArgs

MAX_BYTES = 64 << 20  # of a key, which has 200 bytes per pair


class PersonJudge:
    """Writes the page once, and reads the verdicts that it exports.

    Attributes:
      page: the page.
      key: the file that says which systems wrote the replies of the page.
    """

    remembers = True

    def __init__(self, name: str, args: PersonArgs, folder: Path, reporter: Reporter):
        """`folder` is that of the tournament."""
        self.page, self.key = folder / "people" / f"{name}.html", folder / "keys" / f"{name}.json"
        self._name, self._args, self._reporter = name, args, reporter

    def inputs(self) -> dict[str, str | int | float | bool | None]:
        """Nothing: the exported file is read each time."""
        return {}

    def judge(self, matches: Sequence[Match], transcripts: Transcripts, record: Record) -> None:
        """Records the exported verdicts on the pairs of the page; without an exported file, asks for one.

        Raises:
          ValueError: the exported file is not of this page, or replies have changed since the page was written.
        """
        key = self._open_key(matches, transcripts)
        if self._args.answers is None:
            self._reporter.message(
                f"{self._name}: {len(key['matches']):,} pairs to judge: open {self.page} in a browser, save the "
                f"verdicts to a file, and set judges.{self._name}.answers to it. Keep {self.key} to yourself"
            )
        verdicts = {} if self._args.answers is None else _read_answers(self._args.answers, key)
        for name, keyed in key["matches"].items():
            record(Judgement(match_of(keyed), verdicts.get(name)))

    def _open_key(self, matches: Sequence[Match], transcripts: Transcripts) -> PageKey:
        """The key of the page; draws it if there is none, and writes the page if it is missing."""
        if self.key.exists():
            key = read_json(self.key, PageKey, MAX_BYTES)
            self._check_texts(key, matches, transcripts)
        elif self._args.answers is not None:
            raise ValueError(f"{self.key}: no such file, but {self._args.answers} needs it. Restore it")
        else:
            key = draw_key(matches, transcripts, limit=self._args.limit, both_orders=self._args.both_orders)
            _write(self.key, json.dumps(key, indent=1))
        if not self.page.exists():
            _write(self.page, person_page(key, transcripts))
        return key

    def _check_texts(self, key: PageKey, matches: Sequence[Match], transcripts: Transcripts) -> None:
        """Raises ValueError if the page shows other texts, or systems and prompts that no longer take part."""
        wanted, shown = {*matches}, key["matches"].values()
        current = [m for m in shown if match_of(m) in wanted and transcripts.digest(match_of(m)) == m["texts"]]
        if len(current) < len(shown):
            raise ValueError(
                f"{self.page}: {len(shown) - len(current)} of its {len(shown)} pairs have other texts now, or do not "
                f"take part. Restore them, or delete {self.page} and {self.key} to judge on a new page"
            )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _read_answers(path: str, key: PageKey) -> dict[str, Verdict]:
    """The verdicts in an exported file by the id of the pair."""
    found = read_json(path, ExportedVerdicts)
    if found["page"] != key["page"]:
        raise ValueError(
            f"{path}: of another page (found {found['page']}, expected {key['page']}). Give the right file"
        )
    if unknown := [name for name in found["verdicts"] if name not in key["matches"]]:
        raise ValueError(
            f"{path}: verdicts on pairs that the page does not have ({', '.join(unknown[:8])}). Export again"
        )
    return {**found["verdicts"]}
