"""Checks that a tournament determines every parameter of its model, and names those that it does not.

A maximum of the likelihood exists, and is the only one, unless some direction in the space of parameters makes no
observed outcome less likely than another outcome of its game (Albert and Anderson 1984). Ford's condition for
Bradley-Terry, that no group of systems wins all its games against the others, is the case without ties and bias.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

from qlora_jax.studies.tournament.ratings.davidson import Model
from qlora_jax.studies.tournament.ratings.games import Games

FIX = "Compare more, or set prior_sd (for instance 400), a normal prior in Elo points that keeps ratings finite."
_INFEASIBLE = 2  # status of scipy's linprog


def check_estimates_exist(games: Games, model: Model) -> None:
    """Raises ValueError if the maximum-likelihood estimate of a parameter is not a single finite number."""
    points_SS = _points(games)
    if problem := _never_compared(games, points_SS) or _one_sided(games, points_SS) or _undetermined(model):
        raise ValueError(f"comparisons: {problem}. {FIX}")


def _points(games: Games) -> Float64[np.ndarray, "systems systems"]:
    """Points that each system (column) took from each other one (row): 1 for a win, 0.5 for a tie."""
    points_SS = np.zeros((len(games.systems),) * 2)
    np.add.at(points_SS, (games.second, games.first), games.outcome)
    np.add.at(points_SS, (games.first, games.second), 1 - games.outcome)
    return points_SS


def _never_compared(games: Games, points_SS: Float64[np.ndarray, "systems systems"]) -> str | None:
    groups = _groups(points_SS, connection="weak")
    if len(groups) == 1:
        return None
    named = "; ".join(_named(games.systems, group) for group in groups)
    return f"groups of systems were never compared with each other (found {len(groups)} groups, expected 1): {named}"


def _one_sided(games: Games, points_SS: Float64[np.ndarray, "systems systems"]) -> str | None:
    """Describes groups that took all points, or none, from the systems outside."""
    problems = []
    groups = _groups(points_SS, connection="strong")
    for group in groups if len(groups) > 1 else []:
        inside = np.isin(np.arange(len(games.systems)), group)
        taken, given = points_SS[np.ix_(~inside, inside)].sum(), points_SS[np.ix_(inside, ~inside)].sum()
        if not given:
            problems.append(f"{_named(games.systems, group)} won all {taken:.0f} games against the others")
        elif not taken:
            problems.append(f"{_named(games.systems, group)} lost all {given:.0f} games against the others")
    return "; ".join(problems) + ", so their strength has no finite estimate" if problems else None


def _undetermined(model: Model) -> str | None:
    """Names the parameters in a direction that never makes an observed outcome relatively less likely."""
    rows_P = _advantages(model)
    if np.linalg.matrix_rank(rows_P) < len(model.names) - 1:  # all strengths may rise by the same amount
        _, _, directions = np.linalg.svd(np.vstack([rows_P, model.penalty]))
        return f"they do not determine {_moving(model, directions[-1])}"
    separating = _sparse_direction(rows_P)
    return None if separating is None else f"no finite estimate exists for {_moving(model, separating)}"


def _sparse_direction(rows_P: Float64[np.ndarray, "rows P"]) -> Float64[np.ndarray, " P"] | None:
    """The direction of smallest absolute sum along which all rows are at least 0 and sum to 1; None if none exists."""
    from scipy.optimize import linprog

    both_ways = np.hstack([rows_P, -rows_P])  # a direction is the difference of two vectors that are not negative
    found = linprog(
        np.ones(both_ways.shape[1]),
        A_ub=-both_ways,
        b_ub=np.zeros(len(rows_P)),
        A_eq=both_ways.sum(axis=0)[None],
        b_eq=[1.0],
    )
    if found.status == _INFEASIBLE:
        return None
    if not found.success:
        raise RuntimeError(f"the linear program of the existence check failed: {found.message}")
    return np.subtract(*np.split(found.x, 2))


def _advantages(model: Model) -> Float64[np.ndarray, "rows P"]:
    """Derivative of the log odds of each observed outcome against each other outcome of the same pair."""
    observed_MK = model.counts.sum(axis=0) > 0
    against = model.features[:, :, None, :] - model.features[:, None, :, :]
    return np.unique(against[observed_MK].reshape(-1, len(model.names)), axis=0)


def _moving(model: Model, direction_P: Float64[np.ndarray, " P"]) -> str:
    """Names the parameters that differ along a direction; strengths count relative to their median."""
    moved = direction_P.copy()
    moved[: model.systems] -= np.median(moved[: model.systems])
    return ", ".join(
        name for name, size in zip(model.names, moved, strict=True) if abs(size) > 1e-6 * np.abs(moved).max()
    )


def _groups(points_SS: Float64[np.ndarray, "systems systems"], connection: str) -> list[Int[np.ndarray, " _"]]:
    from scipy.sparse.csgraph import connected_components

    count, label_S = connected_components(points_SS > 0, connection=connection)
    return [np.flatnonzero(label_S == label) for label in range(count)]


def _named(systems: Sequence[str], group: Int[np.ndarray, " _"]) -> str:
    return ", ".join(systems[int(index)] for index in group)
