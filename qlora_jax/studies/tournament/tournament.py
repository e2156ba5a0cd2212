"""Holds a tournament: replies, judgements, results."""

import json
from collections.abc import Mapping
from pathlib import Path

from qlora_jax.atomic_files import write_text
from qlora_jax.io.run_folder.run_lock import lock_run
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.examples import choose_examples
from qlora_jax.studies.tournament.judges.judge import Judge
from qlora_jax.studies.tournament.judges.recorded import RecordedJudge
from qlora_jax.studies.tournament.judges.registry import build_judges
from qlora_jax.studies.tournament.judging import check_inputs, check_texts, judge_matches
from qlora_jax.studies.tournament.matches import Match, Transcripts, read_tournament_prompts, systems_of
from qlora_jax.studies.tournament.replies import collect_replies
from qlora_jax.studies.tournament.results import Results, compute_results, to_dict
from qlora_jax.studies.tournament.results_page import results_page
from qlora_jax.studies.tournament.settings import ArenaArgs, public_settings

RESULTS_FILE, PAGE_FILE = "results.json", "results.html"


def hold_tournament(args: ArenaArgs, reporter: ProgressReporter) -> Results:
    """Generates missing replies, asks for missing judgements, and writes the results into the folder `output`.

    Judges, prompts, models and all stored files are opened first, so that a wrong path, a missing key or another
    setting is reported before hours of work. Judges whose verdicts lie in other files come before those that are asked.

    Args:
      args: settings that `check_arena` accepts.

    Raises:
      ValueError: a file, a model or a judge cannot be used, or what is stored is of other inputs.
      OSError: a file cannot be written.
    """
    folder = Path(args.output)
    with lock_run(folder, reporter.message) as lock:
        judges = build_judges(args, reporter)
        check_inputs(judges, folder)
        prompts = read_tournament_prompts(args) if args.systems else []
        transcripts = Transcripts(
            prompts={prompt.id: prompt for prompt in prompts}, replies=collect_replies(args, prompts, reporter)
        )
        matches = transcripts.matches() if args.systems else _recorded_matches(judges)
        check_texts(judges, matches, transcripts, folder)
        first = sorted(judges, key=lambda name: not judges[name].remembers)
        found = {}
        for name in first:
            lock.check()
            found[name] = judge_matches(name, judges[name], matches, transcripts, folder, reporter)
        judged = {name: found[name] for name in judges}
        results = compute_results(args, [*args.systems] or systems_of(matches), judged)
        examples = choose_examples(judged, _ratings(results), args.seed)
        lock.check()
        content = {"settings": public_settings(args)} | to_dict(results)
        write_text(folder / RESULTS_FILE, json.dumps(content, indent=1) + "\n")
        write_text(folder / PAGE_FILE, results_page(folder.name, results, examples, transcripts))
    return results


def _recorded_matches(judges: Mapping[str, Judge]) -> list[Match]:
    """All matches of the verdict files, in order."""
    files = [judge.verdicts for judge in judges.values() if isinstance(judge, RecordedJudge)]
    return [*dict.fromkeys(match for verdicts in files for match in verdicts)]


def _ratings(results: Results) -> dict[str, float]:
    """The final rating of each system; empty without one."""
    final = results.final
    rating = final and (final.bradley_terry or final.elo)
    return {one.system: one.rating for one in rating.systems} if rating else {}
