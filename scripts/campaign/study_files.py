"""Kinds of damaged files of tournaments, studies and layer costs: prompts, replies, verdicts, records, settings."""

import contextlib
import json
import random
from collections.abc import Mapping
from pathlib import Path

import yaml

from qlora_jax.config.command_line import read_arguments
from qlora_jax.config.validate import validate
from qlora_jax.io.pretrained import open_base
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.comparison.results import summarize
from qlora_jax.studies.comparison.run import Run, check_unchanged, run_of
from qlora_jax.studies.comparison.study import read_study
from qlora_jax.studies.record_file import RecordFile
from qlora_jax.studies.tournament.judging import StoredJudgement
from qlora_jax.studies.tournament.tournament import RESULTS_FILE, hold_tournament
from scripts.campaign.data_files import YAML_TEXTS, damage_any
from scripts.campaign.file_kind import FileKind
from scripts.campaign.model_files import MODEL, read_opened
from scripts.campaign.mutations import damage_bytes, damage_lines, damage_text, damage_value, to_json
from tests.e2e.project import write_model
from tests.studies.comparison.studies import finish, write_study
from tests.studies.tournament.tiny_tournament import WORDS, arena_args, write_lines, write_tournament

# Tournaments with recorded replies and verdicts


def _write_tournament(folder: Path) -> None:
    write_tournament(folder)
    first, second, third = WORDS
    pairs = [(first, second), (second, third), (first, third), (third, first)]
    verdicts = [
        {"question_id": 10 + number, "model_a": one, "model_b": two, "verdict": 1 + (number + place) % 3}
        for number in range(4)
        for place, (one, two) in enumerate(pairs)
    ]
    write_lines(folder / "verdicts.jsonl", verdicts)


def _damage_tournament(chance: random.Random, folder: Path) -> str:
    """Damages a row of one file, or its bytes."""
    path = chance.choice(sorted(folder.glob("*.jsonl")))
    lines = path.read_text().splitlines()
    at = chance.randrange(len(lines))
    lines[at] = to_json(chance, damage_value(chance, json.loads(lines[at])))
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")
    path.write_bytes(damage_bytes(chance, content) if chance.random() < 0.3 else content)
    return f"{path.name}: {lines[at][:200]!r}"


def _read_tournament(folder: Path) -> list[object]:
    settings = {
        "output": str(folder / "arena"),
        "prompts": str(folder / "prompts.jsonl"),
        "systems": {name: {"replies": str(folder / f"{word}.jsonl")} for name, word in WORDS.items()},
        "judges": {"people": {"kind": "verdicts", "path": str(folder / "verdicts.jsonl")}},
        "orderings": 10,
        "prior_sd": 400.0,
    }
    results = hold_tournament(arena_args(**settings), ProgressReporter())
    stored = json.loads((folder / "arena" / RESULTS_FILE).read_text())
    return [json.dumps(stored["standings"], sort_keys=True), *results.standings]


# Records that interrupted tournaments and studies resume from

RECORDS, INPUTS = "judgements.jsonl", {"model": "m", "seed": 3, "temperature": 0.5}


def _write_records(folder: Path) -> None:
    _read_records(folder)


def _read_records(folder: Path) -> list[object]:
    """Reads the records, and judges again what is missing, as a tournament does."""
    with RecordFile(folder / RECORDS, INPUTS, StoredJudgement) as file:
        stored = {record["prompt"]: record for record in file.records}
        for number in range(12):
            if str(number) not in stored:
                stored[str(number)] = StoredJudgement(
                    prompt=str(number),
                    first="alpha",
                    second="beta",
                    texts="0123456789abcdef",
                    verdict=1,
                    review=f"The first answer is better. {number}",
                    failed=0,
                    timed_out=0,
                    unreadable=0,
                    problem=None,
                )
                file.append(stored[str(number)])
    return [json.dumps(stored[name], sort_keys=True) for name in sorted(stored)]


# Comparisons of methods


def _final_runs() -> list[Run]:
    """Returns the runs of the study in this directory."""
    study = read_study("study.yaml")
    return [
        run_of(study, "final", pair, {"train.seed": seed, "optim.learning_rate": 0.001})
        for pair in study.pairs()
        for seed in study.settings.seeds
    ]


def _write_comparison(folder: Path) -> None:
    with contextlib.chdir(folder):
        write_study(Path())
        for run in _final_runs():
            run.prepare()
            finish(run)


def _damage_comparison(chance: random.Random, folder: Path) -> str:
    """Damages the study, its base settings, its rows, or the job or outcome of a run."""
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if path.suffix != ".yaml":
        return damage_any(chance, path)
    return damage_yaml(chance, path)


def damage_yaml(chance: random.Random, path: Path) -> str:
    """Damages the values, lines or bytes of a YAML file."""
    text = path.read_text()
    if chance.random() < 0.7:
        value = damage_value(chance, yaml.safe_load(text))
        text = yaml.safe_dump(value) if chance.random() < 0.5 else to_json(chance, value)
    if chance.random() < 0.2:
        text = damage_text(chance, text.splitlines(keepends=True), YAML_TEXTS)
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(damage_bytes(chance, content) if chance.random() < 0.2 else content)
    return f"{path.name}: {text[:200]!r}"


def _read_comparison(folder: Path) -> list[object]:
    """Reads a finished study again, performs what it lacks, and computes its results."""
    with contextlib.chdir(folder):
        runs = _final_runs()
        check_unchanged(runs)
        for run in runs:
            if not run.finished:
                run.prepare()
                finish(run)
        results = summarize(runs[0].study, runs, dict.fromkeys(runs[0].study.pairs(), 9))
    return [*map(repr, results.estimates), *map(repr, results.differences)]


# Layers in 16 bits


def _write_kept(folder: Path) -> None:
    write_model(folder / MODEL)
    settings = {"model": {"quant_type": "nf4", "keep_16bit": ["layers.1.mlp.down_proj", "v_proj"]}}
    (folder / "keep_16bit.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def _damage_kept(chance: random.Random, folder: Path) -> str:
    return damage_yaml(chance, folder / "keep_16bit.yaml")


def _read_kept(folder: Path) -> list[object]:
    """Loads the model as `train --config keep_16bit.yaml` does."""
    others = ["--model.path", str(folder / MODEL), "--data.train", "rows.jsonl", "--output", "run"]
    config = read_arguments(["--config", str(folder / "keep_16bit.yaml"), *others])
    validate(config)
    return [config.model.keep_16bit, *read_opened(open_base(config.model))]


STUDY_KINDS: Mapping[str, FileKind] = {
    "tournament": FileKind(write=_write_tournament, damage=_damage_tournament, read=_read_tournament),
    "records": FileKind(
        write=_write_records, damage=lambda c, f: damage_any(c, f / RECORDS), read=_read_records, digested=True
    ),
    "records_lines": FileKind(
        write=_write_records, damage=lambda c, f: damage_lines(c, f / RECORDS), read=_read_records, digested=True
    ),
    "comparison": FileKind(write=_write_comparison, damage=_damage_comparison, read=_read_comparison),
    "keep_16bit": FileKind(write=_write_kept, damage=_damage_kept, read=_read_kept),
}
