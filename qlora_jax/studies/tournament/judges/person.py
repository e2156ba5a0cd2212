"""A person, who judges on a page and sends back the file that it exports."""

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.atomic_files import write_text
from qlora_jax.metadata import read_json
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.judges.judge import Judgement, Record, Verdict
from qlora_jax.studies.tournament.matches import Match, Transcripts, unordered
from qlora_jax.studies.tournament.pages.person_page import ExportedVerdicts, PageKey, draw_key, match_of, person_page
from qlora_jax.studies.tournament.settings import PersonArgs

MAX_BYTES = 64 << 20  # largest key file; it has 200 bytes per pair


class PersonJudge:
    """Writes the page once, and reads the verdicts that it exports.

    Attributes:
      page: the page.
      key: the file that says which systems wrote the replies of the page.
    """

    remembers = True

    def __init__(self, name: str, args: PersonArgs, folder: Path, reporter: ProgressReporter):
        """Reads the key and the exported file, if there are any.

        Args:
          folder: of the tournament.

        Raises:
          ValueError: the page was drawn with other settings, or the exported file is not of this page.
          OSError: the exported file cannot be read.
        """
        self.page, self.key = folder / "people" / f"{name}.html", folder / "keys" / f"{name}.json"
        self._name, self._args, self._reporter = name, args, reporter
        self._key = self._read_key()
        self._verdicts = {} if args.answers is None or self._key is None else _read_answers(args.answers, self._key)

    def inputs(self) -> dict[str, str | int | float | bool | None]:
        """Nothing: the exported file is read each time."""
        return {}

    def judge(self, matches: Sequence[Match], transcripts: Transcripts, record: Record) -> None:
        """Records the exported verdicts on the pairs of the page; without an exported file, asks for one.

        Raises:
          ValueError: replies have changed since the page was written.
        """
        key = self._open_key(matches, transcripts)
        self._report_left_out(key, matches)
        if self._args.answers is None:
            self._reporter.message(
                f"{self._name}: {len(key['matches']):,} pairs to judge: open {self.page} in a browser, save the "
                f"verdicts to a file, and set judges.{self._name}.answers to it. Keep {self.key} to yourself"
            )
        for name, keyed in key["matches"].items():
            record(Judgement(match_of(keyed), self._verdicts.get(name)))

    def _open_key(self, matches: Sequence[Match], transcripts: Transcripts) -> PageKey:
        """The key of the page; draws it if there is none, and writes the page if it is missing."""
        key = self._key
        if key is None:
            key = draw_key(matches, transcripts, limit=self._args.limit, both_orders=self._args.both_orders)
            _write(self.key, json.dumps(key, indent=1))
        self._check_texts(key, matches, transcripts)
        if not self.page.exists():
            _write(self.page, person_page(key, transcripts))
        return key

    def _read_key(self) -> PageKey | None:
        """The key of a page that was written before; ValueError if other settings drew it, or it is lost."""
        if not self.key.exists():
            if self._args.answers is not None:
                raise ValueError(f"{self.key}: no such file, but {self._args.answers} needs it. Restore it")
            return None
        key = read_json(self.key, PageKey, MAX_BYTES)
        changed = [
            f"{setting} (found {json.dumps(given)}, expected {json.dumps(drawn)})"
            for setting, given, drawn in (
                ("limit", self._args.limit, key["limit"]),
                ("both_orders", self._args.both_orders, key["both_orders"]),
            )
            if given != drawn
        ]
        if changed:
            raise ValueError(
                f"judges.{self._name}: {self.page} was drawn with other settings: {', '.join(changed)}. Restore them, "
                f"or delete {self.page} and {self.key} to judge on a new page"
            )
        return key

    def _report_left_out(self, key: PageKey, matches: Sequence[Match]) -> None:
        """Reports the pairs of the tournament that the page does not show."""
        total = len(unordered(matches))
        if left := total - len(unordered([match_of(keyed) for keyed in key["matches"].values()])):
            self._reporter.message(
                f"{self._name}: {left:,} of {total:,} pairs are not on the page, which shows what limit drew when it "
                "was written. For pairs that were added later, add another judge of kind person"
            )

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
    path.parent.mkdir(exist_ok=True)
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
