"""Collects the replies of all systems: generated here and stored, or read from a file."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import xxhash

from qlora_jax.data.readers.files import Place, Problem, raise_problems, read_rows
from qlora_jax.inference.decode import Reply
from qlora_jax.inference.prompts import encode_prompts
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.local_model import LocalModel, open_local_model
from qlora_jax.studies.record_file import Inputs, RecordFile, stored_records
from qlora_jax.studies.tournament.matches import Prompt, id_text, read_ids
from qlora_jax.studies.tournament.settings import ArenaArgs, RecordedRepliesArgs, SystemArgs, system_settings

MODEL = ("raw", "quant_type", "compute_dtype")


class StoredReply(TypedDict):
    """A line of a system's replies.

    Fields:
      prompt: id of the prompt.
      ids_digest: digest of the prompt's token ids.
      end: see DecodeStep.
      tokens: number of tokens of the reply.
    """

    prompt: str
    ids_digest: str
    reply: str
    end: str
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The settings of a system's replies."""

    system: str | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int


class _Generated(NamedTuple):
    """A system to generate replies with.

    Fields:
      inputs: all inputs of its replies but the prompts.
      ids: the ids of the prompts.
      path: the file of its replies.
    """

    name: str
    model: SystemArgs
    generation: Generation
    inputs: Inputs
    ids: Sequence[Sequence[int]]
    path: Path


def collect_replies(
    args: ArenaArgs, prompts: Sequence[Prompt], reporter: ProgressReporter
) -> dict[str, dict[str, str]]:
    """The replies of each system by the id of the prompt; generates those that are missing.

    All systems are opened, all prompts encoded, and all stored replies checked before the first model is loaded. One
    model is loaded at a time.

    Raises:
      ValueError: a model, a file of replies or a prompt cannot be used, or stored replies are of other inputs.
    """
    settings = {name: system_settings(given) for name, given in args.systems.items()}
    recorded: dict[str, dict[str, str]] = {}
    generated: dict[str, _Generated] = {}
    for name, one in settings.items():
        if isinstance(one, RecordedRepliesArgs):
            recorded[name] = read_replies(one, args, prompts)
        else:
            generated[name] = found = _open(name, one, args, prompts)
            _on_prompts(found, stored_records(found.path, found.inputs, StoredReply), prompts)
    replies = {}
    for name in settings:
        replies[name] = recorded[name] if name in recorded else _generate(generated.pop(name), prompts, reporter)
    return replies


def read_replies(recorded: RecordedRepliesArgs, args: ArenaArgs, prompts: Sequence[Prompt]) -> dict[str, str]:
    """The replies in a file by the id of the prompt; those to prompts beyond `max_prompts` are left out.

    Raises:
      ValueError: rows without id or reply, or with the id of no prompt, or prompts without a reply or with several; the
        message lists them.
    """
    path, column = recorded.replies, args.id_column
    rows, ids = read_rows(path), read_ids(str(args.prompts), column)
    known, wanted = {*ids}, {prompt.id for prompt in prompts}
    has_ids = any(column in row.data for row in rows) or ids != [str(number + 1) for number in range(len(ids))]
    found: dict[str, str] = {}
    problems: list[Problem] = []
    unknown: dict[str, Place] = {}
    for row in rows:
        try:
            name = id_text(row, column) if has_ids else str(row.place.number + 1)
        except ValueError as error:
            problems.append((row.place, str(error)))
            continue
        reply = row.data.get(recorded.reply_column)
        if name in found:
            problems.append((row.place, f"a second reply to the prompt {name!r}. Remove one"))
        elif name not in known:
            unknown[name] = row.place
        elif name in wanted and not isinstance(reply, str):
            problems.append((row.place, f"{recorded.reply_column}: found {reply!r}, expected a text. Set reply_column"))
        elif name in wanted and isinstance(reply, str):
            found[name] = reply
    expected = f"expected ids of prompts: {_some(ids)}; prompts without {column} are numbered from 1"
    problems += [
        (place, f"{column}: found {_some([*unknown])} ({expected}). Correct them") for place in unknown.values()
    ]
    raise_problems(path, problems, len(rows))
    if missing := [prompt.id for prompt in prompts if prompt.id not in found]:
        raise ValueError(f"{path}: no reply to {len(missing)} of {len(prompts)} prompts ({_some(missing)}). Add them")
    return found


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def _open(name: str, system: SystemArgs, args: ArenaArgs, prompts: Sequence[Prompt]) -> _Generated:
    """Encodes the prompts, and identifies the model; nothing of it stays in memory."""
    own = {field.name: getattr(system, field.name) for field in dataclasses.fields(Generation)}
    generation = Generation(**{key: getattr(args, key) if value is None else value for key, value in own.items()})
    opened = open_local_model(system, generation.system)
    ids = encode_prompts(str(args.prompts), [p.row for p in prompts], opened.prompter, opened.max_positions)
    inputs = dataclasses.asdict(generation) | {key: getattr(system, key) for key in MODEL} | opened.identity()
    return _Generated(name, system, generation, inputs, ids, Path(args.output) / "replies" / f"{name}.jsonl")


def _generate(system: _Generated, prompts: Sequence[Prompt], reporter: ProgressReporter) -> dict[str, str]:
    """Generates the replies that are not stored, and stores each as soon as it is complete."""
    with RecordFile(system.path, system.inputs, StoredReply) as file:
        replies = _on_prompts(system, file.records, prompts)
        missing = [index for index, prompt in enumerate(prompts) if prompt.id not in replies]
        if not missing:
            return replies
        reporter.message(f"{system.name}: loading")
        with reporter.loading() as progress:
            model = open_local_model(system.model, system.generation.system).load(progress)
        with reporter.counting(f"{system.name}: replies", len(prompts), len(replies)) as progress:
            for row, reply in _replies_of(model, [system.ids[index] for index in missing], system.generation):
                index, text = missing[row], model.tokenizer.decode(reply.ids)
                name = prompts[index].id
                stored = {
                    "prompt": name,
                    "ids_digest": _digest(system.ids[index]),
                    "end": reply.end,
                    "tokens": len(reply.ids),
                }
                file.append(StoredReply(**stored, reply=text))
                replies[name] = text
                progress(len(replies))
    return replies


def _replies_of(model: LocalModel, ids: Sequence[Sequence[int]], generation: Generation) -> Iterator[tuple[int, Reply]]:
    sampling = Sampling(
        temperature=generation.temperature, top_k=generation.top_k, top_p=generation.top_p, seed=generation.seed
    )
    return model.reply_each(ids, sampling, generation.max_new_tokens)


def _on_prompts(system: _Generated, records: Sequence[StoredReply], prompts: Sequence[Prompt]) -> dict[str, str]:
    """The stored replies to the prompts; ValueError if a prompt has changed since."""
    digests = {prompt.id: _digest(ids) for prompt, ids in zip(prompts, system.ids, strict=True)}
    records = [record for record in records if record["prompt"] in digests]
    if changed := [record["prompt"] for record in records if record["ids_digest"] != digests[record["prompt"]]]:
        raise ValueError(
            f"{system.path}: prompts have changed since these replies ({', '.join(changed[:8])}). Restore them, give "
            "the tournament another output, or delete this file to generate its replies again"
        )
    return {record["prompt"]: record["reply"] for record in records}


def _digest(ids: Sequence[int]) -> str:
    return xxhash.xxh3_64_hexdigest(repr([*ids]).encode())
