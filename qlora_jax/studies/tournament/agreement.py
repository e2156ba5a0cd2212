"""Agreement of judges, as in section 5 of the QLoRA paper: on single verdicts, and on the ranking of the systems.

A judge's verdict on a prompt and two systems is the one it prefers over all its comparisons of them, in either order,
or a tie. So a judge that always prefers the first reply counts as undecided.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from qlora_jax.studies.tournament.matches import Game
from qlora_jax.studies.tournament.ratings.elo import ratings_by_ordering
from qlora_jax.studies.tournament.ratings.games import Interval, read_games

RESAMPLES, ORDERINGS = 1_000, 1_000
CATEGORIES = 3  # the system whose name sorts first is better, a tie, the other is better

Item = tuple[str, str, str]  # a prompt, and two systems in the order of their names
Verdicts = Mapping[Item, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kappa:
    """Agreement beyond chance: 1 always, 0 as often as by chance.

    Attributes:
      interval: 95 % interval over prompts; None for one prompt, or if all verdicts are the same in some resample.
    """

    value: float
    interval: Interval | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgePair:
    """Agreement of two judges.

    Attributes:
      items: number of pairs of replies on which both gave a verdict.
      cohen_kappa: agreement on them; None if it is not defined, for lack of such items, or because all verdicts are
        the same.
      spearman, kendall: rank correlations (tau-b) of their Elo ratings of the systems that both judged; None for fewer
        than two systems, or if a judge rates all of them the same.
    """

    first: str
    second: str
    items: int
    cohen_kappa: Kappa | None
    spearman: float | None
    kendall: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of all judges.

    Attributes:
      items: number of pairs of replies on which every judge gave a verdict.
      fleiss_kappa: agreement of all judges on them; None if it is not defined.
    """

    judges: list[str]
    pairs: list[JudgePair]
    items: int
    fleiss_kappa: Kappa | None


def agreement(comparisons: Sequence[Game], *, seed: int = 0) -> Agreement:
    """Compares all judges with each other; intervals are over prompts.

    Raises:
      ValueError: statsmodels is not installed, there are fewer than two judges, or a comparison is malformed.
    """
    by_judge: dict[str, list[Game]] = defaultdict(list)
    for comparison in comparisons:
        by_judge[comparison.judge].append(comparison)
    if len(by_judge) < 2:
        raise ValueError(
            f"judges: agreement is between judges (found {len(by_judge)}, expected 2 or more). Add a judge."
        )
    judges = sorted(by_judge)
    verdicts = {judge: verdicts_of(by_judge[judge]) for judge in judges}
    elo = {judge: _elo(by_judge[judge], seed) for judge in judges}
    shared = sorted(set.intersection(*(set(one) for one in verdicts.values())))
    return Agreement(
        judges=judges,
        pairs=[
            _pair((a, verdicts[a], elo[a]), (b, verdicts[b], elo[b]), seed)
            for a, b in itertools.combinations(judges, 2)
        ],
        items=len(shared),
        fleiss_kappa=fleiss_kappa([verdicts[judge] for judge in judges], shared, seed),
    )


def verdicts_of(comparisons: Sequence[Game]) -> dict[Item, int]:
    """One judge's verdicts: 0 if the system whose name sorts first is better, 1 for a tie, 2 if the other is."""
    balance: dict[Item, float] = defaultdict(float)
    for prompt, first, second, outcome, _ in comparisons:
        one, other = sorted((first, second))
        balance[prompt, one, other] += (outcome - 0.5) if first == one else (0.5 - outcome)
    return {item: 1 - int(np.sign(points)) for item, points in balance.items()}


def cohen_kappa(a: Verdicts, b: Verdicts, items: Sequence[Item], seed: int = 0) -> Kappa | None:
    """Cohen's kappa of two judges on `items`, with its interval over prompts; None if it is not defined."""
    from_statsmodels = _inter_rater("cohens_kappa")

    def kappa(table: Float64[np.ndarray, "rows columns"]) -> float:
        return float(from_statsmodels(table, return_results=False))

    tables = np.zeros((len(items), CATEGORIES, CATEGORIES))
    tables[np.arange(len(items)), [a[item] for item in items], [b[item] for item in items]] = 1
    return _estimate(lambda drawn: kappa(tables[drawn].sum(axis=0)), items, seed)


def fleiss_kappa(judges: Sequence[Verdicts], items: Sequence[Item], seed: int = 0) -> Kappa | None:
    """Fleiss' kappa of all judges on `items`, with its interval over prompts; None if it is not defined."""
    from_statsmodels = _inter_rater("fleiss_kappa")
    counts = np.zeros((len(items), CATEGORIES))
    for verdicts in judges:
        counts[np.arange(len(items)), [verdicts[item] for item in items]] += 1
    return _estimate(lambda drawn: float(from_statsmodels(counts[drawn], method="fleiss")), items, seed)


def rank_correlations(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[float, float] | None:
    """(Spearman's rho, Kendall's tau-b) of two ratings of the systems that both have; None if not defined."""
    from scipy import stats

    shared = sorted(set(a) & set(b))
    ratings_a, ratings_b = [a[name] for name in shared], [b[name] for name in shared]
    if len(set(ratings_a)) < 2 or len(set(ratings_b)) < 2:
        return None
    rho, tau = stats.spearmanr(ratings_a, ratings_b), stats.kendalltau(ratings_a, ratings_b)
    return float(np.asarray(rho)[0]), float(np.asarray(tau)[0])


Judge = tuple[str, Verdicts, Mapping[str, float]]  # its name, verdicts, and ratings


def _pair(a: Judge, b: Judge, seed: int) -> JudgePair:
    items = sorted(set(a[1]) & set(b[1]))
    correlations = rank_correlations(a[2], b[2])
    return JudgePair(
        first=a[0],
        second=b[0],
        items=len(items),
        cohen_kappa=cohen_kappa(a[1], b[1], items, seed),
        spearman=correlations and correlations[0],
        kendall=correlations and correlations[1],
    )


def _elo(comparisons: Sequence[Game], seed: int) -> dict[str, float]:
    games = read_games(comparisons)
    mean_S = ratings_by_ordering(games, ORDERINGS, np.random.default_rng(seed)).mean(axis=0)
    return dict(zip(games.systems, mean_S.tolist(), strict=True))


def _estimate(kappa: Callable[[Int64[np.ndarray, " items"]], float], items: Sequence[Item], seed: int) -> Kappa | None:
    """Kappa of all items, with the percentile interval of 1,000 draws of prompts with replacement."""
    if not items:
        return None
    prompts = sorted({prompt for prompt, _, _ in items})
    by_prompt = [np.array([i for i, item in enumerate(items) if item[0] == prompt]) for prompt in prompts]
    rng = np.random.default_rng(seed)
    draws = [
        np.concatenate([by_prompt[p] for p in rng.integers(len(prompts), size=len(prompts))]) for _ in range(RESAMPLES)
    ]
    with np.errstate(invalid="ignore"):  # 0 / 0 where all verdicts are the same
        value, samples = kappa(np.arange(len(items))), np.array([kappa(drawn) for drawn in draws])
    if np.isnan(value):
        return None
    if len(prompts) < 2 or np.isnan(samples).any():
        return Kappa(value=value, interval=None)
    low, high = np.quantile(samples, (0.025, 0.975))
    return Kappa(value=value, interval=(float(low), float(high)))


def _inter_rater(name: str) -> Callable[..., float]:
    """A function of statsmodels.stats.inter_rater, which is imported when it is needed."""
    try:
        from statsmodels.stats import inter_rater  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "judges: kappas need statsmodels, which is not installed. Run pip install 'qlora-jax[study]'."
        ) from None
    return getattr(inter_rater, name)
