"""Reads a study file, and checks all of it before anything runs."""

import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qlora_jax.config import Config, ConfigError, validate
from qlora_jax.config.parse import find_problems, from_dict, given_problems, walk_settings
from qlora_jax.config.suggestions import suggest_key
from qlora_jax.config.yaml_files import read_yaml
from qlora_jax.data.readers.files import Row, content_digest, stream_rows
from qlora_jax.evaluation.registry import TASKS
from qlora_jax.evaluation.settings import EvaluateArgs, check_evaluate
from qlora_jax.evaluation.task import MEASURES, Better, measures_of
from qlora_jax.studies.comparison.settings import Settings, StudySettings, TaskSettings
from qlora_jax.untrusted_json import JsonObject


def shared_row_problems(task: TaskSettings, training: Sequence[str]) -> list[str]:
    """Returns a problem per file that shares rows with the held-out rows; empty if none does.

    Rows are equal if all their columns are. Texts have no rows, and are not compared.

    Args:
      training: the files of training rows.
    """
    path = next((task.evaluate[kind] for kind in MEASURES if kind != "text" and task.evaluate.get(kind)), None)
    if not isinstance(path, str):
        return []
    held_out = set(_held_out_digests(path))
    files = {"train": training, "search": [task.search]}
    problems = []
    for name, paths in files.items():
        for seen in filter(None, paths):
            shared = len(held_out.intersection(_held_out_digests(seen)))
            if shared:
                problems.append(
                    f"{name}: {seen} has {shared} of the {len(held_out)} held-out rows of {path}. Remove them from it"
                )
    return problems


def _held_out_digests(path: str) -> Iterator[bytes]:
    """Yields a digest of each row that can be read; a run reports the others."""
    for row in stream_rows(path):
        if isinstance(row, Row):
            yield hashlib.sha256(json.dumps(row.data, sort_keys=True).encode("utf-8", "surrogatepass")).digest()[:16]


TRAIN = "data.train"  # a method may set it, to compare data
Raw = JsonObject  # the content of a YAML file
Pair = tuple[str, str]  # names of a method and a task
# Training settings that a comparison sets for every run, by what determines them.
FIXED = {
    "output": "output",
    "train.seed": "seeds",
    "train.eval_every": "the comparison, which evaluates at the end",
    "train.keep_best": "the comparison, which evaluates at the end",
    "train.patience": "the comparison, which trains each run to its end",
    TRAIN: "tasks",
    "data.eval": "tasks",
    "data.eval_fraction": "tasks",
}
# Settings of `evaluate` that a comparison sets.
OF_EVALUATE = ("run", "model", "step", "against", "against_step", "json", "json_rows", "keep", "columns")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyTask:
    """A task of a study.

    Attributes:
      kind: the setting of `evaluate` that names its held-out file, such as `rows`.
      better: the direction in which its measure improves.
      training: its files of training rows, those of methods included.
      digests: a digest of the content of each of its files, by path.
    """

    name: str
    settings: TaskSettings
    kind: str
    better: Better
    training: Sequence[str]
    digests: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A checked study.

    Attributes:
      base: the settings of the base configuration, nested, with the study's settings of all runs.
      tasks: by name, in the order of the file.
    """

    settings: StudySettings
    base: Raw
    tasks: Mapping[str, StudyTask]

    @property
    def methods(self) -> list[str]:
        """The names of the methods; the first is the reference."""
        return list(self.settings.methods)

    def pairs(self) -> Iterator[Pair]:
        """Yields each (method, task)."""
        return itertools.product(self.methods, self.tasks)

    def learning_rates(self, method: str) -> Sequence[float]:
        """Returns the learning rates of a method; empty if its settings have the only one."""
        rates = self.settings.learning_rates
        return rates[method] if isinstance(rates, dict) else rates or []

    def searches(self, method: str) -> list[tuple[float, int]]:
        """Returns the learning rates and seeds of a method's search; empty if there is at most one learning rate."""
        rates = self.learning_rates(method)
        return list(itertools.product(rates, self.settings.search_seeds)) if len(rates) > 1 else []

    def config(self, method: str, task: str, settings: Settings) -> Config:
        """Returns the configuration of a run; raises ConfigError."""
        parts = (self.tasks[task].settings.settings, self.settings.methods[method], settings)
        return _config(self.base, {key: value for part in parts for key, value in part.items()})


def read_study(path: str, *, model: str | None = None, output: str | None = None) -> Study:
    """Reads and checks a study file.

    Args:
      model, output: replace the study's model.path and output; None: as in the file.

    Raises:
      ConfigError: all problems of the file, of the configurations of its runs, and of the rows it names.
    """
    raw, sources = read_yaml(path)
    raw |= {} if output is None else {"output": output}
    if problems := [*find_problems(StudySettings, raw, sources), *_task_problems(raw, sources)]:
        raise ConfigError(problems)
    settings = from_dict(StudySettings, raw)
    if problems := _study_problems(settings):
        raise ConfigError(problems)
    shared = settings.settings | ({} if model is None else {"model.path": model})
    tasks, problems = _read_tasks(settings)
    base, base_problems = _read_base(settings.base, shared)
    if problems := [*problems, *base_problems]:
        raise ConfigError(problems)
    study = Study(settings=settings, base=base, tasks=tasks)
    if problems := _config_problems(study):
        raise ConfigError(problems)
    return study


def _task_problems(raw: Raw, sources: Mapping[str, str]) -> list[str]:
    tasks, problems = raw.get("tasks"), []
    mappings = {name: task for name, task in tasks.items() if isinstance(task, dict)} if isinstance(tasks, dict) else {}
    for name, task in mappings.items():
        start = f"tasks.{name}."
        places = {key.removeprefix(start): place for key, place in sources.items() if key.startswith(start)}
        problems += [f"{start}{problem}" for problem in find_problems(TaskSettings, task, places)]
    return problems


def _study_problems(settings: StudySettings) -> list[str]:
    """Returns what is wrong with settings that need no other file."""
    budget = settings.budget
    given = [name for name in ("steps", "trainable_parameters", "seconds") if getattr(budget, name) is not None]
    problems = []
    if len(given) != 1:
        found = " and ".join(given) or "none"
        problems.append(f"budget: found {found}, expected exactly one of steps, trainable_parameters, seconds")
    for key, seeds in {"seeds": settings.seeds, "search_seeds": settings.search_seeds}.items():
        if len({*seeds}) < len(seeds) or min(seeds) < 0:
            problems.append(f"{key}: found {seeds}, expected different numbers of 0 or more")
    if shared := sorted({*settings.search_seeds} & {*settings.seeds}):
        problems.append(f"search_seeds: found {shared}, which are in seeds. Choose other seeds")
    for section, names in {"methods": settings.methods, "tasks": settings.tasks}.items():
        wrong = [name for name in names if not name.strip() or "/" in name or name.startswith(".")]
        problems += [f"{section}: found the name {name!r}, expected a valid folder name" for name in wrong]
    return [*problems, *_rate_problems(settings), *_key_problems(settings)]


def _rate_problems(settings: StudySettings) -> list[str]:
    rates = settings.learning_rates
    if rates is None:
        return []
    grids = rates if isinstance(rates, dict) else dict.fromkeys(settings.methods, rates)
    problems = []
    if grids.keys() != settings.methods.keys():
        problems.append(f"learning_rates: found {', '.join(grids)}, expected the methods {', '.join(settings.methods)}")
    wrong = {name: grid for name, grid in grids.items() if not grid or min(grid) <= 0 or len({*grid}) < len(grid)}
    return problems + [
        f"learning_rates: found {grid} for {name}, expected different numbers above 0" for name, grid in wrong.items()
    ]


def _key_problems(settings: StudySettings) -> list[str]:
    """Returns unknown training settings, and those that the comparison sets itself."""
    fixed, known = _fixed_keys(settings), [key for key, _, _ in walk_settings(Config)]
    places: dict[str, Mapping[str, object]] = {"settings": settings.settings}
    places |= {f"methods.{name}": part for name, part in settings.methods.items()}
    places |= {f"tasks.{name}.settings": _settings_of(task) for name, task in settings.tasks.items()}
    problems = []
    for place, part in places.items():
        for key in part:
            if key not in known:
                problems.append(f"{place}: {key}: unknown setting{suggest_key(key, known)}")
            elif key in fixed and not (key == TRAIN and place.startswith("methods.")):
                problems.append(f"{place}: {key}: it comes from {fixed[key]}. Remove it")
    return problems + _twice_set(settings)


def _settings_of(task: Mapping[str, object]) -> Mapping[str, object]:
    settings = task.get("settings")
    return settings if isinstance(settings, dict) else {}


def _fixed_keys(settings: StudySettings) -> dict[str, str]:
    budget = settings.budget
    fixed = dict(FIXED)
    if budget.trainable_parameters is None:
        fixed |= {"train.steps": "budget", "train.epochs": "budget"}
    else:
        fixed["lora.rank"] = "budget"
    return fixed | ({} if settings.learning_rates is None else {"optim.learning_rate": "learning_rates"})


def _twice_set(settings: StudySettings) -> list[str]:
    pairs = itertools.product(settings.methods.items(), settings.tasks.items())
    return [
        f"methods.{method}: {key}: also set by tasks.{task}.settings. Remove it from one of them"
        for (method, part), (task, other) in pairs
        for key in part
        if key in _settings_of(other)
    ]


def _read_base(path: str, shared: Settings) -> tuple[Raw, list[str]]:
    try:
        raw, sources = read_yaml(path)
    except ConfigError as error:
        return {}, error.problems
    except OSError as error:
        return {}, [f"base: {path}: cannot be read ({error})"]
    if problems := given_problems(Config, raw, sources):
        return {}, problems
    _set_all(raw, shared)
    return raw, []


def _read_tasks(settings: StudySettings) -> tuple[dict[str, StudyTask], list[str]]:
    tasks, problems = {}, []
    for name, raw in settings.tasks.items():
        task = from_dict(TaskSettings, raw)
        found = [*_search_problems(task, search=settings.learning_rates is not None), *_evaluate_problems(task)]
        trains = [task.train, *(part[TRAIN] for part in settings.methods.values() if TRAIN in part)]
        training = list(dict.fromkeys(path for train in trains for path in sources(train)))
        digests, missing = _digests(task, training)
        found += missing or ([] if found else shared_row_problems(task, training))
        problems += [f"tasks.{name}.{problem}" for problem in found]
        if not found:
            (kind,) = _kinds(task)
            better = MEASURES[kind][task.measure]
            tasks[name] = StudyTask(
                name=name, settings=task, kind=kind, better=better, training=training, digests=digests
            )
    return tasks, problems


def _search_problems(task: TaskSettings, *, search: bool) -> list[str]:
    given = (task.search is not None) + (task.search_fraction > 0)
    if search and given != 1:
        return ["search: the search of learning rates needs rows. Set exactly one of search and search_fraction"]
    if not search and given:
        return ["search: found without learning_rates, which are searched on it. Remove it, or set learning_rates"]
    return []


def _kinds(task: TaskSettings) -> list[str]:
    return [name for name in TASKS if task.evaluate.get(name) is not None]


def _evaluate_problems(task: TaskSettings) -> list[str]:
    fixed = [f"evaluate: {key}: the comparison sets it. Remove it" for key in task.evaluate if key in OF_EVALUATE]
    if fixed:
        return fixed
    raw = {**task.evaluate, "run": "run"}
    problems = find_problems(EvaluateArgs, raw, {})
    if not problems:
        try:
            check_evaluate(from_dict(EvaluateArgs, raw))
        except ConfigError as error:
            problems = error.problems
    return [f"evaluate: {problem}" for problem in problems] or _measure_problems(task)


def _measure_problems(task: TaskSettings) -> list[str]:
    kinds = _kinds(task)
    if len(kinds) != 1 or kinds[0] not in MEASURES:
        found = ", ".join(kinds) or "none"
        return [f"evaluate: found {found}, expected one of {', '.join(MEASURES)}, which have scores of each row"]
    known = MEASURES[kinds[0]]
    if task.measure in known:
        return []
    return [f"measure: found {task.measure!r}, expected {' or '.join(map(repr, known))} for {kinds[0]}"]


def sources(train: object) -> list[str]:
    """Returns the files of a value of data.train."""
    return [str(path) for path in train] if isinstance(train, dict) else [str(train)]


def _digests(task: TaskSettings, training: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the digest of each file of a task, and what is wrong with the files."""
    shots = task.evaluate.get("shots")
    evaluated = [task.evaluate.get(name) for name in MEASURES] + [shots]
    digests, problems = {}, []
    for path in [*training, task.search, *evaluated]:
        if isinstance(path, str):
            try:
                digests[path] = content_digest(path)
            except ValueError as error:
                problems.append(f"files: {error}")
    return digests, problems


def _config_problems(study: Study) -> list[str]:
    """Returns the problems of the configurations of all methods and tasks; equal ones once, with the methods."""
    found: dict[str, list[str]] = {}
    for method, task in study.pairs():
        for problem in _problems_of(study, method, task):
            found.setdefault(problem, []).append(method)
    count = len(study.methods) * len(study.tasks)
    return [
        problem if len(methods) == count else f"methods.{', '.join(dict.fromkeys(methods))}: {problem}"
        for problem, methods in found.items()
    ]


def _problems_of(study: Study, method: str, task: str) -> list[str]:
    try:
        config = study.config(method, task, {**data_settings(study, (method, task), search=True), "output": "run"})
    except ConfigError as error:
        return error.problems
    kind, measure = study.tasks[task].kind, study.tasks[task].settings.measure
    known = measures_of(config.objective)
    if measure in known.get(kind, ()):
        return []
    expected = " or ".join(f"{name!r} of {task}" for task, names in known.items() for name in names)
    return [
        f"tasks.{task}.measure: found {measure!r} of {kind}, which objective={config.objective} does not have "
        f"(expected {expected or 'another objective'})"
    ]


def data_settings(study: Study, pair: Pair, *, search: bool) -> Settings:
    """Returns the settings of the data and evaluations of a method and a task.

    Args:
      search: evaluate on the rows of the search at the end. With search_fraction, they are held out in any case.
    """
    method, task = pair
    settings = study.tasks[task].settings
    return {
        "data.train": study.settings.methods[method].get(TRAIN, settings.train),
        "data.eval": settings.search if search else None,
        "data.eval_fraction": settings.search_fraction,
        "train.eval_every": 0,
        "train.keep_best": False,
        "train.patience": 0,
    }


def _config(base: Raw, settings: Settings) -> Config:
    raw = copy.deepcopy(base)
    _set_all(raw, settings)
    config = from_dict(Config, raw)
    validate(config)
    return config


def _set_all(raw: Raw, settings: Settings) -> None:
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        inner = raw if not section else raw.get(section)
        if not isinstance(inner, dict):
            inner = raw[section] = {}
        inner[name] = value


def output_of(study: Study) -> Path:
    """Returns the absolute folder of a study, because runs may start in another one."""
    return Path(study.settings.output).absolute()
