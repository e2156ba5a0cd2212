"""Compares the speed of this tree with another version of it, for jobs that read and write files.

    git worktree add --detach ../before COMMIT
    python -m scripts.bench.versions --before ../before [--jobs render save] [--pairs 20]

Each job runs in two processes that take turns, one sample each. The table has the median ratio of the pairs, this tree
over the other, with a 95 % interval (bootstrap): of seconds, and of processor seconds, on which other work on the
machine has less effect. The last line is JSON.
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.bench.support.environment import ROOT
from scripts.bench.support.interleave import Record, WorkerGroup, ratio_interval
from scripts.bench.support.progress import phase, phases
from scripts.bench.workers.file_jobs import JOBS
from scripts.fetch_smollm2 import fetch_smollm2

WORKER = ROOT / "scripts/bench/workers/file_jobs.py"
# Programs start as they do for users, whose packages are compiled to bytecode.
BYTECODE = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{tempfile.gettempdir()}/qlora_jax_bench_bytecode"}
FIELDS = ("seconds", "processor_seconds")
TOOL_ROWS = 500
TOOL_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nYou may call one or more functions.\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nReturn a JSON object within <tool_call></tool_call> for each call.<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def tool_row(number: int) -> dict[str, object]:
    """Returns a conversation of five turns, with two functions, one of which is called."""
    properties = {"city": {"type": "string", "description": "the city's name"}, "days": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    functions = [
        {"name": name, "description": f"Returns the {name} of a city for some days.", "parameters": parameters}
        for name in ("weather", "events")
    ]
    call = {"name": "weather", "arguments": {"city": f"City {number}", "days": number % 7}}
    return {
        "tools": [{"type": "function", "function": function} for function in functions],
        "messages": [
            {"role": "system", "content": "You are a travel assistant. Answer in one sentence."},
            {"role": "user", "content": f"I travel to City {number} for {number % 7} days. Do I need an umbrella?"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": json.dumps({"rain": number % 2 == 0, "degrees": number % 30})},
            {"role": "assistant", "content": f"Yes, take one to City {number}." if number % 2 == 0 else "No."},
        ],
    }


def prepare(folder: Path, before: Path) -> None:
    """Writes the files of the jobs: rows, a GGUF model, a run of one step, and the run as a Hugging Face model.

    The other version trains the run, because only a newer one reads both.
    """
    with gzip.open(ROOT / "examples/titles/train.jsonl.gz") as file:
        (folder / "chat.jsonl").write_bytes(file.read())
    shutil.copy(ROOT / "examples/titles/train.jsonl.gz", folder / "chat.jsonl.gz")
    (folder / "tools.jsonl").write_text("".join(json.dumps(tool_row(i)) + "\n" for i in range(TOOL_ROWS)))
    (folder / "tools.jinja").write_text(TOOL_TEMPLATE)
    (folder / "model.gguf").symlink_to(fetch_smollm2())
    data = ["--data.train", str(folder / "chat.jsonl"), "--data.max_length", "256", "--data.overlong", "drop"]
    train = ["--model", str(folder / "model.gguf"), *data, "--train.steps", "1", "--output", str(folder / "run")]
    _command(before, "train", *train)
    _command(before, "export", "--run", str(folder / "run"), "--format", "hf", "--output", str(folder / "hf"))


def _command(tree: Path, *arguments: str) -> None:
    command = [sys.executable, "-P", "-m", "qlora_jax", *arguments]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=subprocess.DEVNULL)


def measure(job: str, before: Path, folder: Path, pairs: int) -> dict[str, list[Record]]:
    """Returns the samples of both versions, from turns of two, of which the first does not count."""
    samples: dict[str, list[Record]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch, WorkerGroup(BYTECODE | {"TMPDIR": scratch}) as workers:
        for name, tree in (("before", before), ("after", ROOT)):
            command = ["env", f"PYTHONPATH={tree}", sys.executable, "-P", str(WORKER), job, str(folder)]
            workers.start(name, command)
        for name, turns in workers.run(pairs).items():
            samples[name] = [record for turn in turns for record in turn]
        if workers.failures:
            raise RuntimeError(f"{job}: {workers.failures}")
    return samples


def ratio(samples: dict[str, list[Record]], field: str) -> tuple[float, float, float]:
    """Returns the median ratio of the pairs, and its 95 % interval by bootstrap."""
    ratios = [a[field] / b[field] for a, b in zip(samples["after"], samples["before"], strict=True)]
    return statistics.median(ratios), *ratio_interval(ratios)


def line(job: str, samples: dict[str, list[Record]]) -> str:
    """Returns the job's line of the table."""
    cells = [job.ljust(18)]
    for field in FIELDS:
        before, after = (statistics.median(record[field] for record in samples[name]) for name in ("before", "after"))
        cells.append(f"{before:8.4f} {after:8.4f} s  {{:.3f}} [{{:.3f}}, {{:.3f}}]".format(*ratio(samples, field)))
    return "   ".join(cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the jobs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the root folder of the other version")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=[*JOBS])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="keeps the files of the jobs (default: a temporary folder)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "hf").exists():
            phase("writing the files of the jobs")
            prepare(folder, args.before)
        print(f"{'job':18}   before    after    seconds, after / before          before    after    processor seconds")
        results = {}
        for job in phases("job", args.jobs):
            results[job] = samples = measure(job, args.before.resolve(), folder, args.pairs)
            print(line(job, samples), flush=True)
    print(json.dumps({job: {field: ratio(samples, field) for field in FIELDS} for job, samples in results.items()}))


if __name__ == "__main__":
    main()
