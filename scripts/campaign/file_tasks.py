"""Commands that write files, the sound files that they read, and digests of their results."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from qlora_jax.config import Config, read_config, write_config
from qlora_jax.inference.result_cache import digest
from qlora_jax.io.run_folder.checkpoint import saved_steps
from qlora_jax.line_digests import without_digest
from qlora_jax.studies.comparison.run_files import OUTCOME_FILE
from scripts.campaign.commands import Finished, Running, run_command
from scripts.campaign.run_results import CACHE, CONFIG, MODEL, PROMPTS, ROWS, TinyRun, moved, run_digest, write_settings

BASE_RUN, HALF_RUN = "base_run", "half_run"  # a finished run, and one that stopped half-way
RUNS, HEAD = "runs", "head"  # names of sound files
FEW_ROWS, QUESTIONS, JUDGE = "few.jsonl", "questions.jsonl", "judge.jsonl"
DRAWN = {"people", "keys"}  # folders of pages for people, who must not guess the order of the systems
TEXTS = {".json", ".jsonl", ".md", ".yaml", ".html"}


@dataclasses.dataclass(frozen=True)
class FileTask:
    """A command that writes.

    Attributes:
      words: returns its words, given the folder of sound files and the output on the disk.
      result: returns a digest of what it wrote.
      before: writes what has to be on the disk before, such as a run to resume.
      again: returns the words that repeat it after an error, given the sound files and the output.
      sound: names its sound files in SOUND_FILES.
    """

    words: Callable[[Path, Path], list[str]]
    result: Callable[[Path], str]
    before: Callable[[Path, Path], None] = lambda sound, output: None
    again: Callable[[Path, Path], list[str]] | None = None
    sound: str = RUNS

    def repeat(self, sound: Path, output: Path) -> list[str]:
        """Returns the words that repeat the command after an error."""
        return (self.again or self.words)(sound, output)


# Training


def _train_words(sound: Path, output: Path) -> list[str]:
    config = moved(read_config(sound / CONFIG), sound, output)
    return write_settings(config, output.parent.parent / f"{output.name}.yaml")


def _train_again(sound: Path, output: Path) -> list[str]:
    if saved_steps(output):
        return _resume_words(sound, output)
    shutil.rmtree(output, ignore_errors=True)
    return _train_words(sound, output)


def _resume_words(sound: Path, output: Path) -> list[str]:
    return [*_train_words(sound, output), "--resume"]


def _copy_half(sound: Path, output: Path) -> None:
    shutil.copytree(sound / HALF_RUN, output)


def _with_cache(words: Callable[[Path, Path], list[str]]) -> Callable[[Path, Path], list[str]]:
    """Returns the words of a training run whose encoded rows are cached on the disk."""
    return lambda sound, output: [*words(sound, output), "--data.cache", str(output.with_name("encoded"))]


# Using a run


def _model_of(sound: Path) -> list[str]:
    return ["--run", str(sound / BASE_RUN), "--model", str(sound / MODEL)]


def _generate_words(sound: Path, output: Path) -> list[str]:
    prompts = ["--prompts", str(sound / PROMPTS), "--max_new_tokens", "8"]
    return ["generate", *_model_of(sound), *prompts, "--output", str(output)]


def _evaluate_words(sound: Path, output: Path) -> list[str]:
    output.mkdir(exist_ok=True)
    files = ["--rows", str(sound / FEW_ROWS), "--json", str(output / "scores.json"), "--keep", str(output / "kept")]
    return ["evaluate", *_model_of(sound), *files]


def _predict_words(sound: Path, output: Path) -> list[str]:
    output.mkdir(exist_ok=True)
    files = ["--rows", str(sound / ROWS), "--output", str(output / "labels.jsonl"), "--keep", str(output / "kept")]
    return ["predict", *_model_of(sound), *files]


def _export(form: str, *more: str) -> FileTask:
    return FileTask(
        lambda sound, output: ["export", *_model_of(sound), "--format", form, "--output", str(output), *more],
        files_digest,
    )


def _quantize(*more: str) -> FileTask:
    return FileTask(
        lambda sound, output: ["quantize", "--model", str(sound / MODEL), "--output", str(output), *more], files_digest
    )


def _measure_words(sound: Path, output: Path) -> list[str]:
    return [*_quantize("--measure", str(sound / FEW_ROWS)).words(sound, output), "--budget", "1MiB"]


# Comparing models


def _systems(sound: Path) -> dict[str, object]:
    return {"base": str(sound / MODEL), "tuned": {"path": str(sound / BASE_RUN), "base": str(sound / MODEL)}}


def _arena_words(sound: Path, output: Path) -> list[str]:
    judge = {"kind": "model", "path": str(sound / MODEL), "prompts": str(sound / JUDGE), "reads": "likelihood"}
    settings = {
        "output": str(output),
        "systems": _systems(sound),
        "prompts": str(sound / QUESTIONS),
        "judges": {"model": judge, "me": {"kind": "person"}},
        "max_new_tokens": 4,
        "orderings": 20,
        "prior_sd": 400.0,
    }
    return ["arena", *_options(settings)]


def _variance_words(sound: Path, output: Path) -> list[str]:
    settings = {
        "output": str(output),
        "models": _systems(sound),
        "prompts": str(sound / QUESTIONS),
        "vary": {"seed": [0, 1]},
        "measures": ["length", "likelihood"],
        "fixed.temperature": 1.0,
        "fixed.max_new_tokens": 4,
    }
    return ["variance", *_options(settings)]


def _options(settings: Mapping[str, object]) -> list[str]:
    """Returns settings as words of a command line."""
    return [
        word
        for key, value in settings.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def _compare_words(sound: Path, output: Path) -> list[str]:
    """Writes a study of two methods with one learning rate beside the output's disk."""
    folder = output.parent.parent
    write_config(moved(read_config(sound / CONFIG), sound, output), folder / "base.yaml")
    few, train = sound / FEW_ROWS, folder / "train.jsonl"
    train.write_text((sound / ROWS).read_text().removeprefix(few.read_text()))
    rows = {"train": str(train), "evaluate": {"rows": str(few)}, "measure": "loss per token"}
    study = {
        "base": str(folder / "base.yaml"),
        "methods": {"rank 4": {}, "rank 2": {"lora.rank": 2}},
        "tasks": {"words": rows},
        "seeds": [0],
        "budget": {"steps": 2},
        "output": str(output),
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return ["compare", "--study", str(folder / "study.yaml")]


def _outcomes_digest(output: Path) -> str:
    """Returns a digest of the scores of a study's runs, whose times differ; expects a page and a table."""
    paths = sorted(output.rglob(OUTCOME_FILE))
    outcomes = [json.loads(without_digest(path.read_text(), str(path), required=True)) for path in paths]
    names = sorted(path.name for path in output.iterdir() if path.is_file() and path.suffix in (".html", ".csv"))
    return digest([*names, *(outcome["values"] for outcome in outcomes)])


# Results


def files_digest(output: Path) -> str:
    """Returns a digest of the files in a folder; texts may name the folder, and some are drawn at random."""
    files = sorted(path for path in output.rglob("*") if path.is_file()) if output.is_dir() else [output]
    return digest([item for path in files for item in (str(path.relative_to(output)), _content(path, output))])


def _content(path: Path, output: Path) -> bytes:
    if path.parent.name in DRAWN:
        return b""
    content = path.read_bytes()
    return content.replace(str(output).encode(), b"OUTPUT") if path.suffix in TEXTS else content


# Sound files


def _write_runs(folder: Path) -> None:
    """Writes a model, rows, questions, a judge's prompt, a finished run, and one that stopped half-way."""
    config = TinyRun(sections={"train": dict(save_every=2)}).write(folder, folder / BASE_RUN)
    path = folder / MODEL / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"]["use_regex"] = True
    path.write_text(json.dumps(tokenizer))
    (folder / FEW_ROWS).write_text("".join((folder / ROWS).read_text().splitlines(keepends=True)[:4]))
    rows = [{"prompt": f"say {word}", "answer": word} for word in ("sun", "moon", "rain")]
    (folder / QUESTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{question} {answer_1} {answer_2} {prompt}"  # fits in the model's 256 positions
    judge = {"system_prompt": "Judge.", "prompt_template": template, "defaults": {"prompt": "1, 2 or 3?"}}
    (folder / JUDGE).write_text(json.dumps(judge) + "\n")
    _train(config, folder)
    config = dataclasses.replace(read_config(folder / CONFIG), output=str(folder / HALF_RUN))
    process = Running(write_settings(config, folder / "half.yaml"), folder / "printed.txt", folder / CACHE)
    process.wait_until(lambda: len(saved_steps(folder / HALF_RUN)) >= 2)
    process.send(9)
    process.wait()


def _write_head_run(folder: Path) -> None:
    """Writes a model, labelled rows, and a finished run with a head."""
    _train(TinyRun(objective="classification").write(folder, folder / BASE_RUN), folder)


def _train(config: Config, folder: Path) -> None:
    must_succeed(run_command(write_settings(config, folder / CONFIG), folder / "printed.txt", folder / CACHE))


def must_succeed(done: Finished) -> None:
    """Raises RuntimeError if a command on sound files failed."""
    if done.status != 0:
        raise RuntimeError(f"a command failed on sound files:\n{done.output}")


SOUND_FILES: Mapping[str, Callable[[Path], None]] = {RUNS: _write_runs, HEAD: _write_head_run}
TASKS: Mapping[str, FileTask] = {
    "train": FileTask(_train_words, run_digest, again=_train_again),
    "train_cached": FileTask(_with_cache(_train_words), run_digest, again=_with_cache(_train_again)),
    "resume": FileTask(_resume_words, run_digest, before=_copy_half),
    "generate": FileTask(_generate_words, files_digest),
    "evaluate": FileTask(_evaluate_words, files_digest),
    "predict": FileTask(_predict_words, files_digest, sound=HEAD),
    "export_peft": _export("peft", "--with_base"),
    "export_hf": _export("hf"),
    "export_gguf": _export("gguf"),
    "export_gguf_lora": _export("gguf-lora", "--with_base"),
    "quantize": _quantize(),
    "dequantize": _quantize("--quant_type", "none"),
    "measure": FileTask(_measure_words, files_digest),
    "arena": FileTask(_arena_words, files_digest),
    "variance": FileTask(_variance_words, files_digest),
    "compare": FileTask(_compare_words, _outcomes_digest),
}
