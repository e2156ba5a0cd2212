"""Metrics of routers: loads per layer, and the places that show them."""

import numpy as np

from qlora_jax.training.display.run_display import Throughput, status_fields
from qlora_jax.training.metrics.metrics_file import MetricsFile, read_metrics
from qlora_jax.training.metrics.step_metrics import loads
from qlora_jax.training.report.curves import charts

STEP = dict(loss=1.0, learning_rate=1e-4, grad_norm=0.5, tokens=10, supervised_tokens=5, length=16, seconds=1.0)
ROUTERS = dict(
    router_aux_loss=1.2,
    router_z_loss=3.5,
    router_max_load=2.5,
    router_entropy=0.8,
    router_dead_experts=3.0,
    router_max_load_by_layer=[2.5, 1.5],
    router_entropy_by_layer=[0.8, 0.9],
    router_dead_experts_by_layer=[3.0, 0.0],
)


def test_loads_are_those_of_each_layer():
    max_load, entropy, dead = loads(np.array([[8.0, 0.0, 4.0, 4.0], [4.0, 4.0, 4.0, 4.0]]))
    np.testing.assert_allclose(max_load, [2.0, 1.0])
    np.testing.assert_allclose(entropy, [0.75, 1.0])
    assert dead.tolist() == [1.0, 0.0]


def test_numbers_and_lists_are_stored_and_shown(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", 0) as file:
        for step in (1, 2):
            file.write({"step": step} | STEP | ROUTERS)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["router_max_load_by_layer"] for record in records] == [[2.5, 1.5]] * 2
    assert "router max load 2.5x, 3 dead experts" in status_fields(records[0], Throughput(), 1)
    assert status_fields(records[0] | {"router_dead_experts": 1.0}, Throughput(), 1)[-1].endswith("2.5x, 1 dead expert")
    drawn = {chart.caption: [[*line.values] for line in chart.lines] for chart in charts(records, 0)}
    assert drawn["Load of the busiest expert over the mean load"] == [[2.5, 2.5], [2.0, 2.0]]
    np.testing.assert_allclose(drawn["Entropy of the experts' loads over its maximum"], [[0.8, 0.8], [0.85, 0.85]])
    assert drawn["Experts without a token in the step, all layers"] == [[3.0, 3.0]]
    dense = [{"step": step} | STEP for step in (1, 2)]
    assert not any("router" in field for field in status_fields(dense[0], Throughput(), 1))
    assert not any("xpert" in chart.caption or "outer" in chart.caption for chart in charts(dense, 0))
