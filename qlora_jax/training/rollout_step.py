"""A rollout phase of a run: samples replies, scores them, and makes the batches of the next optimizer steps.

The cache of keys and values is freed before the first gradient is computed.

Dimension key: K steps of a phase, A micro-batches, B rows (prompts) of each, T positions, G replies to a prompt,
R = B G replies of a micro-batch, N replies and P prompts of the phase.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from qlora_jax.data.batching.mixture import Mixture
from qlora_jax.data.batching.packing import NO_ROW, Batch
from qlora_jax.data.rows import TokenRows
from qlora_jax.measures.statistics import bootstrap
from qlora_jax.models.partition import Lora
from qlora_jax.objectives.objective import read_by_outputs, token_values
from qlora_jax.objectives.policy_gradient import ADVANTAGES, OLD_LOGPS, REFERENCE_LOGPS, TOKEN_SCALE
from qlora_jax.objectives.router_losses import unrouted
from qlora_jax.rewards.functions import RewardError, RewardFunctions, RewardTable
from qlora_jax.rollouts.advantages import Advantages, group_advantages, token_scale
from qlora_jax.rollouts.dynamic_sampling import Draw, Redrawn, draw_with_signal
from qlora_jax.rollouts.episodes import Phase, play_episodes
from qlora_jax.rollouts.inputs import RolloutInputs, row_lengths
from qlora_jax.rollouts.prompt_rows import PromptRows
from qlora_jax.rollouts.reply import Reply
from qlora_jax.rollouts.rows import Group, replies_batch, with_token_values
from qlora_jax.rollouts.sampler import draw_seed, rollout_engine, sample_replies, sampling_of
from qlora_jax.rollouts.scored_replies import replies_to_score
from qlora_jax.rollouts.started_prompts import Asked, start_prompts
from qlora_jax.rollouts.tool_turns import continue_with_tools
from qlora_jax.training.data_replies import replies_of_data
from qlora_jax.training.device_mesh import place_batch, rows_of_batch
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.metrics.record_summaries import EVAL, HIGH, LOSS, LOW, REWARD
from qlora_jax.training.session import Session
from qlora_jax.verifiers.process import is_address

GoOn = Callable[[str], None]  # shows the progress; raises to end the phase
SHOWN = 4  # held-out replies in samples.jsonl


class _Answered(NamedTuple):
    """A prompt as its replies start from it, and the replies."""

    asked: Asked
    replies: list[Reply]


def roll_out(
    session: Session, lora: Lora, step: int, prompts: Sequence[Batch], go_on: GoOn
) -> list[tuple[Batch, Record]]:
    """Samples and scores replies; returns the batches of the phase's steps, with entries for their records.

    Args:
      lora: parameters after `step` steps.
      prompts: batches of prompts, one for each step of the phase.

    Raises:
      RewardError: a reward function failed, and rewards.on_error=stop.
    """
    config = session.run.config
    asked, place_KM = _asked(prompts)
    drawn = draw_with_signal(
        lambda chosen, number: _draw(session, lora, step, asked, chosen, number, go_on),
        len(asked),
        config.policy.max_redraws,
        lambda rewards_NF: _compare(session, rewards_NF).has_signal_P,
    )
    compared = _compare(session, drawn.draw.table.rewards_NF)
    phase = _Phase(drawn, place_KM, compared, *_trained(session, drawn.draw.groups, compared))
    batches = _batches(session, prompts, phase)
    for name, other in (OLD_LOGPS, lambda: lora), (REFERENCE_LOGPS, lambda: _reference(session)):
        if name in token_values(session.run.inputs.objective):
            own = other()
            batches = [_with_logps(session, own, batch, name) for batch in batches]
    records = [_record(session, phase, k) for k in range(len(prompts))]
    sampled = drawn.draw
    records[0] |= {
        "rollout_seconds": sampled.sampling,
        "reward_seconds": sampled.scoring,
        "rollout_tokens": sampled.tokens,
    }
    return list(zip(batches, records, strict=True))


def held_out_rewards(session: Session, lora: Lora, step: int, go_on: GoOn) -> tuple[list[Record], dict[str, float]]:
    """Returns (records of the first held-out prompts' replies, entries of the evaluation's record).

    Each prompt gets one reply, drawn as in training, with the same random numbers in every evaluation. The held-out
    loss is minus the mean reward. Replies on which a function failed are left out and counted.

    Raises:
      RewardError: a reward function failed, and rewards.on_error=stop; or no reply has a reward.
    """
    inputs, rows = _inputs(session), session.run.inputs.dataset.eval
    assert inputs.held_out is not None and rows is not None
    answered = _held_out_replies(session, lora, go_on)
    table = _score(session, inputs.held_out, rows, answered, step)
    rewards = group_advantages(table.rewards_NF, num_generations=1, weights_F=_rewards(session).weights).rewards_N
    rewards[[problem.row for problem in table.problems]] = np.nan
    scored = rewards[np.isfinite(rewards)]
    if not scored.size:
        raise RewardError(
            "reward functions: found no reward for any held-out reply, expected at least one. Correct the functions"
        )
    mean, (low, high) = float(scored.mean()), bootstrap(scored, np.ones(len(scored)))
    found = {LOSS: -mean, LOSS + LOW: -high, LOSS + HIGH: -low}
    found |= {f"{EVAL}{REWARD}": mean, f"{EVAL}{REWARD}{LOW}": low, f"{EVAL}{REWARD}{HIGH}": high}
    found |= _by_function(table.rewards_NF, table.names, EVAL)
    if table.problems:
        found[f"{EVAL}rewards_failed"] = len(table.problems)
    replies = [reply for each in answered for reply in each.replies]
    found[f"{EVAL}reply_tokens"] = float(np.mean([reply.length for reply in replies]))
    found |= _of_tools(session, replies, EVAL)
    samples = [
        {**each, **({REWARD: float(reward)} if np.isfinite(reward) else {})}
        for each, reward in zip(_samples(answered, step), rewards, strict=False)
    ]
    return samples, found


def _held_out_replies(session: Session, lora: Lora, go_on: GoOn) -> list[_Answered]:
    """Returns each held-out prompt with one reply, drawn with the same random numbers every time."""
    prompts, rows = _inputs(session).held_out, session.run.inputs.dataset.eval
    assert prompts is not None and rows is not None
    asked = [Asked(int(rows.numbers[index]), rows.row(index)[0][:-1].tolist()) for index in range(len(rows))]
    seeds = [draw_seed(session.run.config.train.seed, each.number) for each in asked]
    return _sample(session, lora, prompts, rows, asked, seeds, 1, go_on)


def _samples(answered: Sequence[_Answered], step: int) -> list[Record]:
    """Returns records of the first replies to held-out prompts."""
    return [
        {"step": step, "prompt": {"prompt": each.asked.prompt}, "reply": reply.text, "end": reply.end}
        for each in answered[:SHOWN]
        for reply in each.replies
    ]


def _inputs(session: Session) -> RolloutInputs:
    found = session.run.inputs.rollouts
    assert found is not None, "the objective samples replies"
    return found


def _rewards(session: Session) -> RewardFunctions:
    assert session.rewards is not None, "the run has started them"
    return session.rewards


def _asked(batches: Sequence[Batch]) -> tuple[list[Asked], Int64[np.ndarray, "K M"]]:
    """Returns (the prompts of all batches in order, the number of the prompt in each place; -1 in gaps)."""
    numbers_KM, lengths_KM = (np.stack([getattr(b, name).ravel() for b in batches]) for name in ("rows", "lengths"))
    is_prompt_KM = numbers_KM != NO_ROW
    asked = [
        Asked(int(numbers_KM[k, m]), batches[k].inputs.reshape(numbers_KM.shape[1], -1)[m, : lengths_KM[k, m]].tolist())
        for k, m in np.argwhere(is_prompt_KM)
    ]
    return asked, np.where(is_prompt_KM, is_prompt_KM.ravel().cumsum().reshape(is_prompt_KM.shape) - 1, -1)


def _sample(
    session: Session,
    lora: Lora,
    prompts: PromptRows,
    rows: TokenRows | Mixture,
    asked: Sequence[Asked],
    seeds: Sequence[int],
    count: int,
    go_on: GoOn,
) -> list[_Answered]:
    """Returns each prompt with `count` replies.

    Args:
      seeds: of the draws of each prompt.
    """
    inputs, settings = _inputs(session), session.run.config.rollouts
    parts, tokenizer = session.parts.with_lora(lora), session.run.inputs.dataset.tokenizer
    most = {"longest": inputs.longest_prompt, "most": inputs.most_replies}

    def show(done: int) -> None:
        go_on(f"{done:,} of {count * len(asked):,} replies")

    if is_address(session.run.config.environment):
        phase = Phase(
            tokenizer=tokenizer,
            settings=settings,
            stop_ids=inputs.stop_ids,
            longest=inputs.longest_prompt,
            longest_row=inputs.lengths[-1],
            positions=session.run.inputs.model.max_positions,
        )
        engine = rollout_engine(parts, tokenizer, settings, **most)
        how = {"seeds": seeds, "count": count, "where": rows.where, "go_on": show}
        return [_Answered(*each) for each in play_episodes(engine, phase, asked, prompts, **how)]
    tools = None if session.rewards is None else session.rewards.tools
    how = {"seeds": seeds, "count": count, "longest": inputs.longest_prompt, "where": rows.where}
    asked = start_prompts(asked, prompts, tools, inputs.template, **how)
    with_tools = None
    if tools is not None and inputs.template is not None and tools.schemas:
        variables = [prompts.variables(each.number) for each in asked for _ in range(count)]
        how = {"tools": tools, "template": inputs.template, "variables": variables, "settings": settings}
        with_tools = functools.partial(continue_with_tools, **how)
    replies = sample_replies(
        parts,
        tokenizer,
        [each.ids for each in asked],
        [sampling_of(settings, seed) for seed in seeds],
        settings,
        count=count,
        **most,
        stop_ids=inputs.stop_ids,
        go_on=show,
        with_tools=with_tools,
    )
    return [_Answered(*each) for each in zip(asked, replies, strict=True)]


def _score(
    session: Session, prompts: PromptRows, rows: TokenRows | Mixture, answered: Sequence[_Answered], step: int
) -> RewardTable:
    """Calls the reward functions with every reply."""
    numbers, tools = [each.asked.number for each in answered], _rewards(session).tools
    how = {"step": step, "steps": session.run.total_steps, "asking": [each.asked.prompt for each in answered]}
    how["environments"] = tools is not None and tools.environment is not None
    replies = [each.replies for each in answered]
    return _rewards(session).score(replies_to_score(prompts, numbers, replies, rows.where, **how))


def _sample_prompts(
    session: Session, lora: Lora, step: int, asked: Sequence[Asked], chosen: Sequence[int], number: int, go_on: GoOn
) -> list[_Answered]:
    """Returns the chosen prompts of a phase with their replies; `number` is that of the draw."""
    config, again = session.run.config, (number,) if number else ()
    seeds = [draw_seed(config.train.seed, step, place, asked[place].number, *again) for place in chosen]
    rows, own = session.run.inputs.dataset.train, [asked[place] for place in chosen]
    return _sample(session, lora, _inputs(session).prompts, rows, own, seeds, config.rollouts.num_generations, go_on)


def _draw(
    session: Session, lora: Lora, step: int, asked: Sequence[Asked], chosen: Sequence[int], number: int, go_on: GoOn
) -> Draw[_Answered]:
    """Samples and scores replies to the chosen prompts of a phase; `number` is that of the draw."""
    began = time.perf_counter()
    answered = _sample_prompts(session, lora, step, asked, chosen, number, go_on)
    sampled = time.perf_counter()
    go_on("rewards")
    table = _score(session, _inputs(session).prompts, session.run.inputs.dataset.train, answered, step)
    seconds = {"sampling": sampled - began, "scoring": time.perf_counter() - sampled}
    tokens = sum(reply.length for each in answered for reply in each.replies)
    return Draw(groups=answered, table=table, tokens=tokens, **seconds)


class _Phase(NamedTuple):
    """The prompts, replies and rewards of a phase.

    Fields:
      place_KM: number of the prompt in each place of each step; -1 in gaps.
      compared: of the replies that count.
      trained_PG: True for each reply whose tokens train.
      lengths_PG: tokens that the model drew for each reply.
    """

    drawn: Redrawn[_Answered]
    place_KM: Int64[np.ndarray, "K M"]
    compared: Advantages
    trained_PG: Bool[np.ndarray, "P G"]
    lengths_PG: Int64[np.ndarray, "P G"]

    def placed(self, values_PG: np.ndarray) -> Float64[np.ndarray, "K M G"]:
        """Returns numbers of replies in the places of their prompts, and 0 in gaps."""
        return np.where(self.place_KM[..., None] >= 0, values_PG[self.place_KM], 0.0).astype(np.float64)

    def group(self, number: int) -> Group | None:
        """Returns a prompt with its replies; None for a gap."""
        if number < 0:
            return None
        asked, replies = self.drawn.draw.groups[number]
        return Group(asked.number, asked.ids, replies, self.trained_PG[number].tolist())


def _compare(session: Session, rewards_NF: Float64[np.ndarray, "N F"]) -> Advantages:
    config, weights_F = session.run.config, _rewards(session).weights
    how = {"num_generations": config.rollouts.num_generations, "scale_rewards": config.policy.scale_rewards}
    return group_advantages(rewards_NF, weights_F=weights_F, **how)


def _trained(
    session: Session, answered: Sequence[_Answered], compared: Advantages
) -> tuple[Bool[np.ndarray, "P G"], Int64[np.ndarray, "P G"]]:
    """Returns (which replies train: those with a reward, and cut ones unless they are masked; their tokens)."""
    is_cut_PG = np.array([[reply.is_cut for reply in each.replies] for each in answered])
    lengths_PG = np.array([[reply.length for reply in each.replies] for each in answered], np.int64)
    masked_PG = is_cut_PG & session.run.config.policy.mask_truncated_completions
    return np.isfinite(compared.rewards_N).reshape(is_cut_PG.shape) & ~masked_PG, lengths_PG


def _batches(session: Session, prompts: Sequence[Batch], phase: _Phase) -> list[Batch]:
    """Returns the training batches of the phase's steps."""
    config, inputs = session.run.config, _inputs(session)
    shape_AB = prompts[0].inputs.shape[:2]
    by_micro_batch = len(prompts), shape_AB[0], -1
    scales = token_scale(
        config.policy.loss_type,
        phase.placed(phase.lengths_PG * phase.trained_PG).reshape(by_micro_batch).astype(np.int64),
        phase.placed(np.ones_like(phase.trained_PG)).reshape(by_micro_batch) > 0,
        max_completion_length=config.rollouts.max_completion_length,
    )
    advantages_KMG = phase.placed(phase.compared.advantages_N.reshape(phase.trained_PG.shape))
    scales_KMG = scales.reshape(advantages_KMG.shape)
    return [
        replies_batch(
            [phase.group(number) for number in phase.place_KM[k].tolist()],
            {ADVANTAGES: advantages_KMG[k], TOKEN_SCALE: scales_KMG[k]},
            inputs.lengths,
            shape_AB,
            pad_id=inputs.pad_id,
            position=batch.position,
        )
        for k, batch in enumerate(prompts)
    ]


def _record(session: Session, phase: _Phase, k: int) -> Record:
    """Returns the entries of a step's record: rewards of the first draws, and the lengths of the replies that count."""
    chosen, drawn = phase.place_KM[k][phase.place_KM[k] >= 0], phase.drawn
    table, first = drawn.draw.table, _compare(session, drawn.first_NF)
    rewards_PG = first.rewards_N.reshape(phase.trained_PG.shape)[chosen]
    functions_PGF = drawn.first_NF.reshape(*phase.trained_PG.shape, -1)
    replies = [reply for number in chosen for reply in drawn.draw.groups[number].replies]
    found: Record = {
        "groups_without_signal": 1.0 - float(phase.compared.has_signal_P[chosen].mean()),
        "reply_tokens": float(phase.lengths_PG[chosen].mean()),
        "replies_cut": float(np.mean([reply.is_cut for reply in replies])),
    }
    found |= _of_tools(session, replies, "")
    if session.run.config.policy.max_redraws:
        found["groups_redrawn"] = float(np.mean(drawn.draws_P[chosen] > 1))
    found |= _means({REWARD: rewards_PG, f"{REWARD}_std": first.std_P[chosen]})
    found |= _by_function(functions_PGF[chosen].reshape(-1, len(table.names)), table.names, "")
    if table.problems:
        found["rewards_failed"] = len(table.problems)
    logged = {f"{REWARD}_metric_{name}": value for name, value in table.metrics.items() if np.isfinite(value)}
    return found | logged


def _by_function(rewards_NF: Float64[np.ndarray, "N F"], names: Sequence[str], prefix: str) -> Record:
    """Returns the mean reward of each function, if there are several."""
    several = len(names) > 1
    return _means({f"{prefix}{REWARD}_of_{name}": rewards_NF[:, f] for f, name in enumerate(names) if several})


def _of_tools(session: Session, replies: Sequence[Reply], prefix: str) -> dict[str, float]:
    """Returns the calls of tools per reply, and the share of them that gave an error; nothing without tools."""
    if _rewards(session).tools is None:
        return {}
    calls, failed = (sum(getattr(reply, name) for reply in replies) for name in ("calls", "failed_calls"))
    return {f"{prefix}tool_calls": calls / len(replies), f"{prefix}tool_failures": failed / max(calls, 1)}


def _means(named: Mapping[str, np.ndarray]) -> Record:
    """Returns the mean of the numbers that are not nan, of each array that has any."""
    there = {name: values[np.isfinite(values)] for name, values in named.items()}
    return {name: float(values.mean()) for name, values in there.items() if values.size}


def _reference(session: Session) -> Lora:
    assert session.reference is not None, "a run with policy.beta keeps its initial adapter"
    return session.reference.on_devices()


def _with_logps(session: Session, lora: Lora, batch: Batch, name: str) -> Batch:
    """Returns the batch with log p of its targets under other parameters, without dropout."""
    objective, parts = session.run.inputs.objective, session.parts.with_lora(lora)
    read, found = read_by_outputs(batch.arrays(), objective), []
    for a in range(len(batch.inputs)):
        arrays = place_batch({key: array[a] for key, array in read.items()}, session.run.mesh)
        outputs = session.run.gradients.forward.outputs(objective, arrays)(parts, arrays)
        found.append(np.asarray(unrouted(outputs).logps_BT, np.float32))
    return with_token_values(batch, name, np.stack(found))


# Distillation of replies: `Session.teacher` adds its predictions to each batch of them, as to the rows of the data.


def draw_replies(
    session: Session, lora: Lora, step: int, prompts: Sequence[Batch], go_on: GoOn
) -> list[tuple[Batch, Record]]:
    """Samples replies, or takes those of the data; returns the phase's batches, with entries for their records.

    The choice is drawn for each phase from the run's seed and the number of steps before.

    Args:
      lora: parameters after `step` steps.
      prompts: batches of prompts, one for each step of the phase.
    """
    inputs, (asked, place_KM), began = _inputs(session), _asked(prompts), time.perf_counter()
    lmbda = session.run.config.distillation.lmbda
    is_sampled = draw_seed(session.run.config.train.seed, step) < lmbda * 2**32
    if is_sampled:
        answered = _sample_prompts(session, lora, step, asked, range(len(asked)), 0, go_on)
    else:
        answered = _completions(session, asked)
    seconds, found = time.perf_counter() - began, list[tuple[Batch, Record]]()
    for batch, place_M in zip(prompts, place_KM, strict=True):
        groups = [_all_trained(answered[at]) if at >= 0 else None for at in place_M.tolist()]
        shape, how = batch.inputs.shape[:2], {"pad_id": inputs.pad_id, "position": batch.position}
        own = [reply for at in place_M[place_M >= 0].tolist() for reply in answered[at].replies]
        record: Record = {} if lmbda == 1 else {"on_policy": float(is_sampled)}
        if is_sampled:
            record["reply_tokens"] = float(np.mean([reply.length for reply in own]))
            record["replies_cut"] = float(np.mean([reply.is_cut for reply in own]))
        found.append((replies_batch(groups, {}, inputs.lengths, shape, **how), record))
    if is_sampled:
        tokens = sum(reply.length for each in answered for reply in each.replies)
        found[0][1].update({"rollout_seconds": seconds, "rollout_tokens": tokens})
    return found


def _completions(session: Session, asked: Sequence[Asked]) -> list[_Answered]:
    """Returns each prompt with the completion of its row, as the first reply."""
    dataset, settings = session.run.inputs.dataset, session.run.config.rollouts
    how = {"count": settings.num_generations, "most": settings.max_completion_length}
    replies = replies_of_data(_inputs(session).prompts, dataset.tokenizer, asked, dataset.train.where, **how)
    return [_Answered(*each) for each in zip(asked, replies, strict=True)]


def held_out_batches(session: Session, lora: Lora, step: int, go_on: GoOn) -> tuple[list[Record], list[Batch]]:
    """Returns (records of the first held-out prompts' replies, batches of one reply to each held-out prompt)."""
    answered = _held_out_replies(session, lora, go_on)
    rows, inputs = rows_of_batch(session.run.config, session.run.mesh), _inputs(session)
    longest = max(len(each.asked.ids) for each in answered)
    lengths = row_lengths(longest, session.run.config.rollouts.max_completion_length, 1, 1)
    groups = [_all_trained(each) for each in answered]
    filled = [[*some, *[None] * (rows - len(some))] for some in itertools.batched(groups, rows)]
    how = {"pad_id": inputs.pad_id, "position": None}
    return _samples(answered, step), [replies_batch(some, {}, lengths, (1, rows), **how) for some in filled]


def _all_trained(answered: _Answered) -> Group:
    asked, replies = answered
    return Group(asked.number, asked.ids, replies, [True] * len(replies))
