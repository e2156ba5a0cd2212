"""The benchmark of experts: both models have the same active parameters, and their steps take turns."""

import types

import pytest

from scripts.bench import experts as bench


def test_both_models_have_the_same_active_parameters_but_for_the_routers():
    models = bench.configs(experts=8, per_token=2, layers=3)
    routers = 3 * 8 * bench.WIDTHS["hidden_size"]
    assert models["mixture"].active_parameters() == models["dense"].parameters() + routers


def test_steps_take_turns_and_the_speed_is_that_of_pairs():
    order = []

    class Model:
        memory = types.SimpleNamespace(arguments=2**20, temporaries=2**21)

        def __init__(self, name, seconds):
            self.name, self.step, self.seconds = name, seconds, []

        def run(self, batch):
            order.append((batch, self.name))
            self.seconds.append(self.step if batch else 100.0)  # the first is slow

    models = {"mixture": Model("mixture", 4.0), "dense": Model("dense", 3.0)}
    found = bench.measure(models, [0, 1, 2])
    assert [name for _, name in order] == ["dense", "mixture", "mixture", "dense", "dense", "mixture"]
    assert found["speed"] == 0.75 and found["interval"] == (0.75, 0.75)
    assert found["dense"] == {"step_s": 3.0, "arguments_mib": pytest.approx(1), "temporaries_mib": pytest.approx(2)}
