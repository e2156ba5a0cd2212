"""The file that `pairs` writes: replies are drawn and scored part by part, and each prompt gives at most one pair.

Dimension key: F reward functions, P prompts of a part with G replies each, N = P G.
"""

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from qlora_jax.api.load import load_opened
from qlora_jax.api.predict import TEXT_SUFFIXES
from qlora_jax.api.provenance import parts_of
from qlora_jax.atomic_files import write_named_text
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.formats.turn_fields import TEMPLATE_KWARGS
from qlora_jax.data.readers.files import Row, raise_problems, read_rows
from qlora_jax.data.rows import File
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.prompts import encode_prompts, prompter, read_prompts, stop_ids
from qlora_jax.inference.replies import CACHED_TOGETHER
from qlora_jax.inference.result_cache import ResultCache, open_cache
from qlora_jax.io.pretrained import OpenedModel, open_pretrained, weight_settings
from qlora_jax.models.partition import ModelParts
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.rewards.functions import RewardFunctions, RewardTable
from qlora_jax.rollouts.advantages import group_advantages
from qlora_jax.rollouts.pairs_settings import PairsArgs
from qlora_jax.rollouts.preference_pairs import ADDED, LeftOut, choose_pair, preference_row
from qlora_jax.rollouts.prompt_rows import PromptRows
from qlora_jax.rollouts.reply import Reply
from qlora_jax.rollouts.sampler import draw_seed, sample_replies, sampling_of
from qlora_jax.rollouts.scored_replies import replies_to_score
from qlora_jax.untrusted_json import JsonObject, shorten

_FORMS = {"prompt": "prompt", "messages": "prompt-messages"}  # column of the prompt -> format of the row

_ADVICE = (
    "Raise rollouts.num_generations, rollouts.temperature or rollouts.max_completion_length, or change the rewards"
)


@dataclasses.dataclass(kw_only=True)
class PairsFound:
    """The pairs of the prompts so far, and the prompts that have none.

    Attributes:
      opened: the model that replies.
      rows: the pairs.
      left_out: number of prompts without a pair, by the reason.
      rewards: of all replies, nan where a reply has none.
      chosen, rejected: rewards of the replies in pairs.
      cut: number of replies that ended before the model ended them.
      failed: number of rewards that are missing because a function failed.
      example: the first reply and its reward.
    """

    opened: OpenedModel
    rows: list[dict[str, object]] = dataclasses.field(default_factory=list)
    left_out: Counter[LeftOut] = dataclasses.field(default_factory=Counter)
    rewards: list[float] = dataclasses.field(default_factory=list)
    chosen: list[float] = dataclasses.field(default_factory=list)
    rejected: list[float] = dataclasses.field(default_factory=list)
    cut: int = 0
    failed: int = 0
    example: tuple[str, float] = ("", 0.0)

    @property
    def reasons(self) -> str:
        """Why prompts were left out."""
        return "left out: " + ", ".join(f"{times:,} with {reason}" for reason, times in self.left_out.items())


def write_pairs(args: PairsArgs, reporter: ProgressReporter) -> PairsFound:
    """Writes the file, complete or not at all.

    Args:
      args: settings that `check_pairs` accepts.

    Raises:
      ValueError: prompts or reward functions cannot be used, a function failed, or no prompt gives a pair.
    """
    rows = read_prompts(args.prompts) if args.prompts.endswith(TEXT_SUFFIXES) else read_rows(args.prompts)
    prompts = _prompt_rows(args.prompts, rows)
    opened = open_pretrained(model=args.model, run=args.run, step=args.step, chat_template=args.chat_template)
    prompting = prompter(opened.tokenizer, raw=False, system=None)
    asked = [_to_encode(prompts, row) for row in rows]
    encoded = encode_prompts(args.prompts, asked, prompting, opened.features.max_positions)
    stops = stop_ids(opened.tokenizer, opened.stop_ids, chat=prompting.chat)
    with RewardFunctions(args.rewards, args.reward) as functions:
        functions.check_columns(prompts.names)
        with reporter.loading() as progress:
            weights = weight_settings(opened, args.quant_type, args.compute_dtype)
            parts = parts_of(load_opened(opened, weights, args.chat_template, progress))
        found, cache = PairsFound(opened=opened), open_cache(args.keep, parts)
        drawn = _drawn(args, encoded, stops, parts, opened.tokenizer, cache, reporter)
        for step, (numbers, groups) in enumerate(drawn):
            where = {number: f"{args.prompts}:{rows[number].place}" for number in numbers}.__getitem__
            scored = functions.score(replies_to_score(prompts, numbers, groups, where, step=step))
            _add_pairs(found, prompts, numbers, groups, scored, functions.weights)
    if not found.rows:
        text, reward = found.example
        example = f"reward {reward:g} of the first reply, {shorten(text)}"
        raise ValueError(f"{args.prompts}: no prompt gives a pair ({found.reasons}; {example}). {_ADVICE}")
    write_named_text(Path(args.output), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows))
    return found


def _prompt_rows(path: str, rows: Sequence[Row]) -> PromptRows:
    """Returns the prompts of a file; raises ValueError that lists rows which cannot become rows of pairs."""
    column = "messages" if "messages" in rows[0].data and "prompt" not in rows[0].data else "prompt"
    problems = [(row.place, problem) for row in rows for problem in _problems(row.data, column)]
    raise_problems(path, problems, len(rows))
    return PromptRows(rows={row.place.number: row.data for row in rows}, files=[File(path)], columns={path: column})


def _problems(columns: JsonObject, column: str) -> list[str]:
    taken = [name for name in ADDED if name in columns and name != column]
    problems = [f"column {name!r} exists, and pairs get this name. Rename it" for name in taken]
    try:
        json.dumps(columns, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        problems.append(f"cannot be written as JSON ({error}). Remove this column, or make it text")
    return FORMATS[_FORMS[column]].check(columns) + problems


def _to_encode(prompts: PromptRows, row: Row) -> Row:
    """Returns the row with the columns that `encode_prompts` knows."""
    prompt = prompts.prompt(row.place.number)
    others = {name: row.data[name] for name in ("tools", TEMPLATE_KWARGS) if name in row.data}
    return Row(row.place, {"prompt" if isinstance(prompt, str) else "messages": prompt, **others})


def _drawn(
    args: PairsArgs,
    encoded: Sequence[Sequence[int]],
    stops: frozenset[int],
    parts: ModelParts,
    tokenizer: Tokenizer,
    cache: ResultCache,
    reporter: ProgressReporter,
) -> Iterator[tuple[tuple[int, ...], list[list[Reply]]]]:
    """Yields (numbers of the next rows, the replies to each), from the cache where it has them."""
    settings, count = args.rollouts, args.rollouts.num_generations
    together = max(1, CACHED_TOGETHER // count)
    how = {"longest": max(map(len, encoded)), "most": min(together, len(encoded)) * count}
    draw = functools.partial(sample_replies, parts, tokenizer, settings=settings, count=count, stop_ids=stops, **how)
    with reporter.counting("replies", count * len(encoded)) as advance:
        for numbers in itertools.batched(range(len(encoded)), together):
            prompts = [[*encoded[number]] for number in numbers]
            samplings = [sampling_of(settings, draw_seed(args.seed, number)) for number in numbers]

            def to_array(prompts=prompts, samplings=samplings, before=count * numbers[0]) -> tuple[np.ndarray]:
                groups = draw(prompts, samplings, go_on=lambda done: advance(before + done))
                return (np.frombuffer(json.dumps(groups).encode(), np.uint8),)

            inputs = [prompts, samplings, settings.max_completion_length, count, sorted(stops)]
            (stored,) = cache.get_or_compute(inputs, to_array)
            advance(count * (numbers[-1] + 1))
            yield numbers, [[Reply(*reply) for reply in group] for group in json.loads(stored.tobytes())]


def _add_pairs(
    found: PairsFound,
    prompts: PromptRows,
    numbers: Sequence[int],
    groups: Sequence[Sequence[Reply]],
    scored: RewardTable,
    weights_F: Float64[np.ndarray, " F"],
) -> None:
    """Adds the pairs of these rows."""
    compared = group_advantages(scored.rewards_NF, num_generations=len(groups[0]), weights_F=weights_F)
    if not found.rewards:
        found.example = groups[0][0].text, float(compared.rewards_N[0])
    found.rewards += compared.rewards_N.tolist()
    found.failed += len(scored.problems)
    rewards_PG = compared.rewards_N.reshape(len(groups), -1)
    for number, replies, rewards_G in zip(numbers, groups, rewards_PG, strict=True):
        found.cut += sum(reply.is_cut for reply in replies)
        pair = choose_pair(replies, rewards_G)
        if isinstance(pair, str):
            found.left_out[pair] += 1
            continue
        found.rows.append(preference_row(prompts, number, replies, pair))
        found.chosen.append(float(rewards_G[pair.chosen]))
        found.rejected.append(float(rewards_G[pair.rejected]))
