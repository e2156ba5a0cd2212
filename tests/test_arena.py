"""`qlora-jax arena` with tiny models: replies, a judge of ours, and a second start."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_jax import arena
from tests.e2e.project import write_model
from tests.inference.small_run import STEPS, write_run
from tests.marks import EXHAUSTIVE
from tests.studies.tournament.tiny_tournament import write_lines

pytestmark = pytest.mark.slow


def write_config(folder: Path, judge_positions: int, **judge: Any) -> str:
    """Writes two checkpoints of a run as systems, and a model as judge."""
    write_run(folder)
    prompts = [{"question_id": i, "prompt": f"say {i}"} for i in range(3)]
    model = {
        "kind": "model",
        "path": str(write_model(folder / "judge", 5, max_position_embeddings=judge_positions)),
        "prompts": write_lines(folder / "judge.jsonl", [{"defaults": {"prompt": "1, 2 or 3?"}}]),
    }
    settings = {
        "output": str(folder / "arena"),
        "prompts": write_lines(folder / "prompts.jsonl", prompts),
        "systems": {f"step-{step}": {"path": str(folder / "run"), "step": step} for step in STEPS},
        "judges": {"ours": model | judge},
        "max_new_tokens": 8,
        "orderings": 20,
        "prior_sd": 400.0,
    }
    path = folder / "arena.json"  # JSON is YAML
    path.write_text(json.dumps(settings))
    return str(path)


def record_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}


@pytest.mark.parametrize(
    "judge",
    [
        {"reads": "likelihood"},
        pytest.param({"reads": "review", "max_tokens": 4, "retries": 1}, marks=EXHAUSTIVE),
    ],
    ids=lambda judge: judge["reads"],
)
def test_models_reply_are_judged_and_nothing_is_done_twice(tmp_path, capsys, monkeypatch, judge):
    config = write_config(tmp_path, 1024, **judge)
    arena.main(["--config", config])
    shown = capsys.readouterr()
    assert "Ranking by ours" in shown.out or judge["reads"] == "review"
    assert "results.html" in shown.err
    folder = tmp_path / "arena"
    stored = record_files(folder)
    assert [*stored] == ["ours.jsonl", "step-3.jsonl", "step-7.jsonl"]
    replies = [json.loads(line) for line in stored["step-3.jsonl"].splitlines()[1:]]
    assert [reply["prompt"] for reply in replies] == ["0", "1", "2"] and {r["tokens"] for r in replies} == {8}
    counts = json.loads((folder / "results.json").read_text())["judges"]["ours"]
    assert (counts["matches"], counts["missing"]) == (6, 0)
    # A random model rarely writes a verdict in 4 tokens: each attempt is counted, and no match is lost.
    assert counts["attempts"]["unreadable"] >= counts["unreadable"] * (2 if judge["reads"] == "review" else 1)

    # Half of the replies and judgements are lost: exactly those come back.
    for name in ("replies/step-7.jsonl", "judgements/ours.jsonl"):
        path = folder / name
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    arena.main(["--config", config])
    assert record_files(folder) == stored

    # With everything stored, no model is loaded.
    monkeypatch.setattr("qlora_jax.studies.local_model.load_base", None)
    arena.main(["--config", config])
    with pytest.raises(ValueError, match=r"step-3.jsonl: made with other inputs: max_new_tokens \(found 8, expected 9"):
        arena.main(["--config", config, "--max_new_tokens", "9"])
    write_model(tmp_path / "model", seed=9)
    with pytest.raises(ValueError, match=r"step-3.jsonl: made with other inputs: base \(found"):
        arena.main(["--config", config])
    # The replies of the second system are checked before those of the first are generated.
    (folder / "replies/step-3.jsonl").unlink()
    with pytest.raises(ValueError, match=r"step-7.jsonl: made with other inputs: base \(found"):
        arena.main(["--config", config])


def test_a_prompt_that_is_too_long_for_a_judge_is_reported(tmp_path, capsys):
    arena.main(["--config", write_config(tmp_path, 256, reads="likelihood")])
    results = json.loads((tmp_path / "arena/results.json").read_text())
    assert results["judges"]["ours"]["missing"] == 6 and results["judges"]["ours"]["attempts"]["failed"] == 6
    assert results["standings"] == {}
    lines = (tmp_path / "arena/judgements/ours.jsonl").read_text()
    assert "the judge's prompt is too long (found" in lines
    assert "no verdict yet" in (tmp_path / "arena/results.html").read_text()
