"""Kinds of damaged data: rows of every format, Parquet, chat templates, configurations, and cached rows."""

import dataclasses
import functools
import gzip
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_jax.config import read_config, to_dict
from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.config.schema import DataArgs
from qlora_jax.data.dataset import Dataset, load_dataset
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.row_kinds import objectives_of
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.inference.prompts import encode_prompts, prompter, read_prompts
from qlora_jax.untrusted_json import JsonObject
from scripts.campaign.file_kind import FileKind
from scripts.campaign.hostile_templates import SNIPPETS, tokens_of
from scripts.campaign.mutations import TEXTS, damage_bytes, damage_text, damage_value, to_json
from tests.data.conftest import LLAMA3, MISTRAL, MODERN, THINKING, ZEPHYR
from tests.data.sound_rows import SOUND_ROWS

ASSETS = Path(__file__).resolve().parent.parent.parent / "tests/data/assets"
TEMPLATES = (LLAMA3, MISTRAL, MODERN, THINKING, ZEPHYR)
TEMPLATE_FILE, CACHE, FORMAT_FILE, OBJECTIVE_FILE = "template.jinja", "cache", "format.txt", "objective.txt"


@functools.cache
def tokenizer() -> Tokenizer:
    """Returns SmolLM2's tokenizer with its chat template."""
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return load_tokenizer(
        {
            "tokenizer_json": gzip.decompress((ASSETS / "smollm2_tokenizer.json.gz").read_bytes()).decode(),
            "chat_template": (ASSETS / "smollm2_chat_template.jinja").read_text(),
            "unk_token": "<|endoftext|>",
            "add_bos_token": False,
            **named,
        }
    )


def load(objective: str = "sft", **settings: Any) -> list[object]:
    """Loads a data set; returns what training and the data report take from it."""
    data, paired = DataArgs(**settings), objective == "kto"
    dataset = load_dataset(
        data, tokenizer(), seed=0, micro_batch_size=1, accumulation=1, objective=objective, kl_pairs=paired
    )
    return [*_batches(dataset), dataset.fingerprint]


def _batches(dataset: Dataset) -> list[object]:
    found = []
    for _, batch in zip(range(min(dataset.steps_per_epoch, 20)), dataset.train_batches(), strict=False):
        found += [array for _, array in sorted(batch.arrays().items())]
    return found


# Rows


def _rows_of(row_format: str, count: int = 6) -> list[JsonObject]:
    return [SOUND_ROWS[row_format] | {"id": number} for number in range(count)]


def _write_rows(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows_of("completion")))
    (folder / FORMAT_FILE).write_text("auto")
    (folder / OBJECTIVE_FILE).write_text("sft")


def _damage_rows(chance: random.Random, folder: Path) -> str:
    """Writes rows of any format, some of them damaged, in any file type; at times damages the bytes, too."""
    return _damage_rows_of(chance, folder, chance.choice(list(SOUND_ROWS)))


def _damage_rows_of(chance: random.Random, folder: Path, row_format: str) -> str:
    rows: list[object] = [*_rows_of(row_format)]
    for number in chance.sample(range(len(rows)), chance.choice((0, 1, 1, 2, 6))):
        rows[number] = damage_value(chance, rows[number])
    name = chance.choice(("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.jsonl.gz", "rows.csv.gz"))
    content = _encoded(chance, rows, name)
    if chance.random() < 0.4:
        content = damage_bytes(chance, content)
    (folder / "rows.jsonl").unlink()
    (folder / name).write_bytes(content)
    (folder / FORMAT_FILE).write_text(chance.choice(("auto", row_format)))
    return f"{name}, {row_format}: {content[:300]!r}"


def _encoded(chance: random.Random, rows: Sequence[object], name: str) -> bytes:
    if ".csv" in name or ".tsv" in name:
        text = _columns(chance, rows, "\t" if ".tsv" in name else ",")
    elif name == "rows.json":
        text = f"[{','.join(to_json(chance, row) for row in rows)}]"
    else:
        text = "".join(f"{to_json(chance, row)}\n" for row in rows)
    if ".json" in name and chance.random() < 0.1:
        text = text.replace("{", '{"id": 1, "id": 2, ', 1)
    content = text.encode("utf-8", "surrogatepass")
    if not name.endswith(".gz"):
        return content
    return gzip.compress(b"") * chance.choice((*[0] * 8, 10, 300_000)) + gzip.compress(content, 1)


def _columns(chance: random.Random, rows: Sequence[object], separator: str) -> str:
    objects = [row if isinstance(row, dict) else {"text": row} for row in rows]
    names = list(dict.fromkeys(str(name) for row in objects for name in row))
    quote = chance.choice(('"', '"', ""))
    cells = [[_cell(row.get(name, ""), quote) for name in names] for row in objects]
    return "\n".join(separator.join(line) for line in [names, *cells]) + "\n"


def _cell(value: object, quote: str) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return quote + text.replace('"', '""') + quote


def _read_rows(folder: Path) -> list[object]:
    (path,) = folder.glob("rows.*")
    found = load(train=str(path), format=(folder / FORMAT_FILE).read_text())
    rows = read_prompts(str(path)) if path.name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")) else []
    return [*found, len(rows)]


def _damage_objective_rows(chance: random.Random, folder: Path) -> str:
    """Damages rows of pairs and labels, for an objective that trains on them, or now and then for another one."""
    formats = [row_format for row_format in FORMATS.values() if row_format.kind != "text"]
    row_format = chance.choice(formats)
    objectives = [row_format.objective] if row_format.objective else objectives_of(row_format.kind)
    objective = chance.choice(OBJECTIVES.names() if chance.random() < 0.1 else objectives)
    (folder / OBJECTIVE_FILE).write_text(objective)
    return f"{objective}: {_damage_rows_of(chance, folder, row_format.name)}"


def _read_objective_rows(folder: Path) -> list[object]:
    (path,) = folder.glob("rows.*")
    objective, row_format = ((folder / name).read_text() for name in (OBJECTIVE_FILE, FORMAT_FILE))
    return load(objective, train=str(path), format=row_format)


def _read_prompts(folder: Path) -> Sequence[object]:
    (path,) = folder.glob("rows.*")
    rows = read_prompts(str(path))
    return encode_prompts(str(path), rows, prompter(tokenizer(), raw=False, system=None), 4096)


# Parquet


def _write_parquet(folder: Path) -> None:
    _write_table(folder / "rows.parquet", _rows_of("alpaca", 9))
    (folder / FORMAT_FILE).write_text("auto")


def _write_table(path: Path, rows: Sequence[JsonObject], **settings: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, **settings)


def _damage_parquet(chance: random.Random, folder: Path) -> str:
    row_format = chance.choice(("alpaca", "messages", "completion", "text"))
    path = folder / "rows.parquet"
    _write_table(path, _rows_of(row_format, 9))
    _damage_table(chance, path)
    return row_format


def _damage_table(chance: random.Random, path: Path) -> None:
    """Damages a Parquet file, half of the time in its footer."""
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    if chance.random() < 0.5:
        content = content[:-footer] + damage_bytes(chance, content[-footer:])
    else:
        content = damage_bytes(chance, content)
    path.write_bytes(content)


def _chats_with_parts(count: int) -> list[JsonObject]:
    """Returns chats whose contents are lists of one to three parts, next to a column of other lists."""
    parts = [[{"type": "text", "text": f"part {index} "} for index in range(1 + n % 3)] for n in range(count)]
    turns = [[{"role": "user", "content": own}, {"role": "assistant", "content": own[:1]}] for own in parts]
    return [{"messages": own * (1 + n % 2), "tags": [["a"], []] * (n % 3)} for n, own in enumerate(turns)]


def _write_lists(folder: Path) -> None:
    _write_table(folder / "rows.parquet", _chats_with_parts(12))


def _damage_lists(chance: random.Random, folder: Path) -> str:
    """Writes chats with lists of parts in some form, and damages the file."""
    settings = dict(
        row_group_size=chance.choice((1, 4, 100)),
        data_page_size=chance.choice((1, 16, 1 << 20)),
        compression=chance.choice(("none", "zstd")),
        use_dictionary=chance.random() < 0.7,
        store_schema=chance.random() < 0.5,
    )
    _write_table(folder / "rows.parquet", _chats_with_parts(12), **settings)
    if chance.random() < 0.9:
        _damage_table(chance, folder / "rows.parquet")
    return str(settings)


# Templates


def _write_template(folder: Path) -> None:
    (folder / TEMPLATE_FILE).write_text(MODERN)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows_of("messages")))


def _damage_template(chance: random.Random, folder: Path) -> str:
    template = damage_text(chance, tokens_of(chance.choice(TEMPLATES)), (*SNIPPETS, *TEXTS[:20]))
    (folder / TEMPLATE_FILE).write_bytes(template.encode("utf-8", "surrogatepass"))
    return repr(template[:1500])


def _read_template(folder: Path) -> list[object]:
    return load(train=str(folder / "rows.jsonl"), chat_template=str(folder / TEMPLATE_FILE))


# Configurations

YAML_TEXTS = (
    *("a: &a [*a]\n", "&a {*a: *a}\n", "!!python/object/apply:os.system ['id']\n", "--- a\n--- b\n", "? [a]\n: b\n"),
    *("\t- x\n", "a: b: c\n", "lora: {rank: 4, rank: 8}\n", "%YAML 9.9\n---\n", "a: !!binary x\n", "a: 2024-99-99\n"),
    *("a: 1:60:60\n", "a: 0o9\n", "a: !!int x\n", "a: !!float x\n", "a: .inf\n", "a: 1e999\n", "<<: *x\n", "<<: 1\n"),
    *("a: !!int ''\n", "a: !!float ''\n", "a: !!bool maybe\n", "a: !!timestamp x\n", f"a: {'1:' * 200}1.5\n"),
    *('a: "\\U00110000"\n', "a: !!timestamp 2024-99-99\n", "a: !!null x\n", "!!set [a]\n", "a: !!omap x\n"),
    "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{','.join([f'*a{n}'] * 9)}]\n" for n in range(12)),
    *("[" * 20_000, "{a: " * 20_000, "- " * 20_000, "lora:\n  target_modules: '(([a-z_.0-9]+)+)+!'\n"),
    *(
        "data:\n  train: {a: 1}\n",
        "model: 3\n",
        "lora:\n  rank_pattern: {'(': 4}\n",
        "\x00",
        "\ufeff",
        "a: '\\ud800'\n",
    ),
)


def _write_config(folder: Path) -> None:
    from tests.e2e.project import project

    config = dataclasses.replace(project(folder / "project"), output="run")
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))


def _damage_config(chance: random.Random, folder: Path) -> str:
    path = folder / "config.yaml"
    text = path.read_text()
    if chance.random() < 0.5:
        value = damage_value(chance, yaml.safe_load(text))
        text = yaml.safe_dump(value) if chance.random() < 0.5 else to_json(chance, value)
    if chance.random() < 0.4:
        lines = text.splitlines(keepends=True)
        text = damage_text(chance, lines, YAML_TEXTS)
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(damage_bytes(chance, content) if chance.random() < 0.3 else content)
    return repr(text[:300])


def _read_config(folder: Path) -> list[object]:
    return [to_dict(read_config(folder / "config.yaml"))]


# Cached rows


def _write_cache(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows_of("messages", 40)))
    _read_cache(folder)


def _damage_cache(chance: random.Random, folder: Path) -> str:
    path = chance.choice(sorted(path for path in (folder / CACHE).rglob("*") if path.is_file()))
    return damage_any(chance, path)


def damage_any(chance: random.Random, path: Path) -> str:
    """Damages a file's bytes, or its values if it is JSON; now and then removes it."""
    content = path.read_bytes()
    if chance.random() < 0.05:
        path.unlink()
        return f"{path.name}: removed"
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if value is not None and chance.random() < 0.7:
        content = to_json(chance, damage_value(chance, value)).encode("utf-8", "surrogatepass")
    else:
        content = damage_bytes(chance, content)
    path.write_bytes(content)
    return f"{path.name}: {len(content)} bytes"


def _read_cache(folder: Path) -> list[object]:
    return load(train=str(folder / "rows.jsonl"), cache=str(folder / CACHE))


DATA_KINDS: Mapping[str, FileKind] = {
    "rows": FileKind(write=_write_rows, shared="rows", damage=_damage_rows, read=_read_rows),
    "objective_rows": FileKind(
        write=_write_rows, shared="rows", damage=_damage_objective_rows, read=_read_objective_rows
    ),
    "prompts": FileKind(write=_write_rows, shared="rows", damage=_damage_rows, read=_read_prompts),
    "parquet": FileKind(
        write=_write_parquet, damage=_damage_parquet, read=lambda f: load(train=str(f / "rows.parquet"))
    ),
    "parquet_lists": FileKind(
        write=_write_lists, damage=_damage_lists, read=lambda f: load(train=str(f / "rows.parquet"))
    ),
    "template": FileKind(write=_write_template, damage=_damage_template, read=_read_template),
    "yaml": FileKind(write=_write_config, damage=_damage_config, read=_read_config),
    "cache": FileKind(write=_write_cache, damage=_damage_cache, read=_read_cache, digested=True),
}
