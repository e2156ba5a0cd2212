"""Files of a small tournament whose replies are recorded, and a judge that decides by the words of a reply."""

import json
import re
from pathlib import Path
from typing import Any

from qlora_jax.config.parse import from_dict
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.matches import Transcripts, read_tournament_prompts
from qlora_jax.studies.tournament.replies import collect_replies
from qlora_jax.studies.tournament.settings import ArenaArgs, check_arena

QUALITY = {"good": 3, "fair": 2, "poor": 1}  # word of a reply: its quality
WORDS = {"alpha-system": "good", "beta-system": "fair", "gamma-system": "poor"}
INSTRUCTION = "Compare both answers, and end with a line 1, 2 or 3."


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_judge_prompts(folder: Path) -> str:
    rows = [
        {"category": "general", "defaults": {"prompt": INSTRUCTION}},
        {"category": "coding", "defaults": {"prompt": "Run the code. " + INSTRUCTION}},
    ]
    return write_lines(folder / "judge.jsonl", rows)


def write_tournament(folder: Path, prompts: int = 4, systems: int = 3) -> dict[str, Any]:
    """Writes prompts and replies; returns settings without judges."""
    categories = ("general", "coding")
    rows = [
        {"question_id": 10 + i, "prompt": f"Question number {i}?", "category": categories[i % 2]}
        for i in range(prompts)
    ]
    files = {}
    for name, word in [*WORDS.items()][:systems]:
        # The last system is the best one on the first prompt, so that none loses everything.
        replies = [f"A {word} reply to {i}." for i in range(prompts)]
        replies[0] = "A good reply to 0, after all." if word == "poor" else replies[0]
        lines = [{"question_id": 10 + i, "reply": reply} for i, reply in enumerate(replies)]
        files[name] = {"replies": write_lines(folder / f"{word}.jsonl", lines)}
    return {
        "output": str(folder / "arena"),
        "prompts": write_lines(folder / "prompts.jsonl", rows),
        "systems": files,
        "orderings": 50,
        "prior_sd": 400.0,
    }


def arena_args(**settings: Any) -> ArenaArgs:
    args = from_dict(ArenaArgs, settings)
    check_arena(args)
    return args


def transcripts_of(args: ArenaArgs) -> Transcripts:
    prompts = read_tournament_prompts(args)
    replies = collect_replies(args, prompts, ProgressReporter())
    return Transcripts(prompts={prompt.id: prompt for prompt in prompts}, replies=replies)


def right_verdict(message: str) -> int:
    """The verdict that the words of both answers in a judge's prompt deserve."""
    first, second = (QUALITY[word] for word in re.findall(r"A (good|fair|poor) reply", message))
    return 1 if first > second else 2 if second > first else 3
