"""The Pareto front of points that should have a low cost and a good quality."""

from collections.abc import Sequence


def pareto_front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Returns the indices of the points that no other beats, by rising cost.

    A point beats another if neither its cost nor its loss is higher, and one of them is lower. A quality that should be
    high is given as a negative loss.
    """
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], losses[index])):
        same = front and (costs[index], losses[index]) == (costs[front[-1]], losses[front[-1]])
        if not front or losses[index] < losses[front[-1]] or same:
            front.append(index)
    return front
