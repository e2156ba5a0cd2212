"""Writes the model card of an export: base, method, data in numbers, evaluations, settings, versions, licence.

Nothing in it comes from a row: only numbers, names of settings, and the names of base and library.
"""

import importlib.metadata
import os
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from qlora_jax.atomic_files import write_text
from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs, differences, read_config
from qlora_jax.config.methods import METHODS, uses
from qlora_jax.io.export.result import ExportResult
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.hf.hub import HubName
from qlora_jax.io.peft.writer import is_gguf
from qlora_jax.io.pretrained import OpenedModel
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE
from qlora_jax.model_source import ModelSource
from qlora_jax.training.metrics.metrics_file import JSON_FILE, METRICS_FILE, read_metrics
from qlora_jax.untrusted_json import JsonObject, read_json

CARD = "README.md"
LIBRARIES = {"peft": "peft", "hf": "transformers", "gguf": "llama.cpp", "gguf-lora": "llama.cpp"}
VERSIONS = ("qlora-jax", "jax", "flax", "optax")
COUNTS = ("rows", "kept", "truncated", "overlong", "tokens", "supervised")  # numbers of the data report
NAME = re.compile(r"[A-Za-z0-9_]+")  # values of settings that are shown besides numbers: no paths and no texts
FRONT = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
REPORT_BYTES = 64 << 20


def write_model_card(folder: Path, opened: OpenedModel, result: ExportResult, format: str, dtype: str | None) -> None:
    """Writes folder/README.md; one that PEFT's export wrote becomes the section on how to use the adapter."""
    assert opened.run is not None
    old = (folder / CARD).read_text() if (folder / CARD).is_file() else ""
    base, licence = _base_name(opened.source), licence_of(opened.source)
    front: JsonObject = {"library_name": LIBRARIES.get(format, "qlora_jax"), "tags": ["qlora", "qlora_jax"]}
    front |= {} if opened.source.hub_name is None else {"base_model": base}
    front |= {} if licence is None else {"license": licence}
    usage = FRONT.sub("", old, count=1).replace(str(opened.source.path.absolute()), base).strip()
    text = yaml.safe_dump(front, sort_keys=False)
    command = f"qlora-jax export --run RUN --format {format}" + (f" --dtype {dtype}" if dtype else "")
    sections = {
        "Model": _model_lines(opened, base, licence, format, dtype),
        "Use": [usage] if usage else [],
        "Export": [f"- {line}" for line in result.lines if os.sep not in line],
        **_run_sections(opened.run.path, opened.run.step),
        "Commands": ["```bash", "qlora-jax train --config config.yaml", command, "```"],
        "Versions": [f"- {name} {importlib.metadata.version(name)}" for name in VERSIONS],
    }
    body = [f"## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items() if lines]
    write_text(folder / CARD, f"---\n{text}---\n\n" + "\n".join(body))


def licence_of(source: ModelSource) -> str | None:
    """Returns the licence that the base's files name: in a GGUF file's keys, or in the card of a folder."""
    if is_gguf(str(source.path)):
        found = parse_header(source.path).metadata.get("general.license")
    else:
        card = source.path / CARD
        front = FRONT.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
        found = (yaml.safe_load(front[1]) or {}).get("license") if front else None
    return found if isinstance(found, str) else None


def _base_name(source: ModelSource) -> str:
    on_hub = HubName.parse(source.hub_name or "")
    return on_hub.repo if on_hub else source.path.name


def _model_lines(opened: OpenedModel, base: str, licence: str | None, format: str, dtype: str | None) -> list[str]:
    assert opened.run is not None
    lora = opened.run.lora_args
    sizes = [f", {name} {getattr(lora, name):g}" for name in ("rank", "alpha") if uses(lora.method, name)]
    local = format == "peft" and opened.source.hub_name is None
    where = "; it is not on the Hub: set base_model_name_or_path in adapter_config.json" * local
    return [
        f"- base: {base}, trained on its {opened.args.quant_type} weights{where}",
        f"- method: {METHODS[lora.method].title}{''.join(sizes)}",
        f"- format: {format}" + (f", {dtype}" if dtype else ""),
        f"- licence of the base: {licence or 'its files name none'}",
    ]


def _run_sections(run: Path, step: int | None) -> dict[str, list[str]]:
    """Returns the sections that a run's files give; none for a PEFT adapter."""
    if step is None:
        return {}
    config = read_config(run / CONFIG_FILE)
    changed = {key: value for key, (value, _) in differences(config, _defaults(config)).items()}
    settings = [f"- {key}: {_shown(value)}" for key, value in changed.items() if _is_shown(value)]
    return {
        "Data": list(_data_lines(run)),
        "Evaluation": list(_evaluation_lines(run, step)),
        "Settings": [f"- objective: {config.objective}", *settings],
    }


def _defaults(config: Config) -> Config:
    model, data = ModelArgs(path=config.model.path), DataArgs(train=config.data.train)
    return Config(model=model, lora=LoraArgs(), data=data, output=config.output)


def _is_shown(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_shown, value))
    return isinstance(value, int | float) or (isinstance(value, str) and NAME.fullmatch(value) is not None)


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _data_lines(run: Path) -> Iterator[str]:
    if not (run / JSON_FILE).is_file():
        return
    report = read_json(run / JSON_FILE, dict[str, object], REPORT_BYTES)
    data = report["data"]
    assert isinstance(data, dict)
    for split, name in (("train", "training"), ("eval", "held out")):
        if isinstance(found := data.get(split), dict):
            yield f"- {name}: " + ", ".join(f"{count} {found[count]:,}" for count in COUNTS)


def _evaluation_lines(run: Path, step: int) -> Iterator[str]:
    """Yields a table of the held-out metrics before training and at the step, with 95 % intervals."""
    if not (run / METRICS_FILE).is_file():
        return
    records = {record["step"]: record for record in read_metrics(run / METRICS_FILE) if "eval_loss" in record}
    columns = [records[each] for each in (0, step) if each in records]
    if not columns:
        return
    yield "| held out, 95 % interval | " + " | ".join(f"step {column['step']}" for column in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for key, value in columns[-1].items():
        if isinstance(value, float) and not key.endswith(("_low", "_high")):
            yield f"| {key} | " + " | ".join(_with_interval(column, key) for column in columns) + " |"


def _with_interval(record: JsonObject, key: str) -> str:
    if key not in record:
        return ""
    low, high = record.get(f"{key}_low"), record.get(f"{key}_high")
    return f"{record[key]:.4g}" + ("" if low is None or high is None else f" [{low:.4g}, {high:.4g}]")
