"""Scores by their plain definition, and rows with a shared prompt, for tests of evaluation."""

import numpy as np

from tests.inference.tiny import VOCAB, full_logits


def expected_scores(parts, ids: np.ndarray, scored: np.ndarray) -> tuple[float, list[bool]]:
    """(sum of -log p, True for each scored token that is the likeliest) by the plain definition, in float64."""
    logits = np.asarray(full_logits(parts, ids.tolist()), np.float64)
    places = [at for at in range(1, len(ids)) if scored[at]]
    nll = sum(np.log(np.exp(logits[at - 1]).sum()) - logits[at - 1, ids[at]] for at in places)
    return nll, [logits[at - 1].argmax() == ids[at] for at in places]


def expected_divergence(parts, reference, ids: np.ndarray, scored: np.ndarray) -> float:
    """Sum over the scored tokens of sum_v p_v (log p_v - log q_v) at the position before, in float64."""
    logps = [
        logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for logits in (np.asarray(full_logits(one, ids.tolist()), np.float64) for one in (parts, reference))
    ]
    before = [at - 1 for at in range(1, len(ids)) if scored[at]]
    return (np.exp(logps[0]) * (logps[0] - logps[1]))[before].sum()


def greedy_row(parts, prompt: np.ndarray, count: int):
    """A row whose `count` scored tokens are those that greedy decoding generates after the prompt."""
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(full_logits(parts, ids)[-1].argmax()))
    return np.array(ids, np.int32), np.arange(len(ids)) >= len(prompt)


def options(rng: np.random.Generator, prompt: np.ndarray, lengths):
    """Rows that continue a prompt; some of their tokens are not scored."""
    more = [np.concatenate([prompt, rng.integers(0, VOCAB, n).astype(np.int32)]) for n in lengths]
    rows = [(ids, np.arange(len(ids)) >= len(prompt)) for ids in more]
    for ids, scored in rows:
        scored[len(prompt) + 1 : -1] = rng.random(max(0, len(ids) - len(prompt) - 2)) < 0.7
    return rows
