"""Shows that this tree gives what an earlier commit gave: the same programs, numbers, files, plans and messages.

    python -m scripts.same_as_before [--commit COMMIT] [--only TEXT] [--messages]

Both trees run the same commands on the same machine, from the same inputs. A case is a list of command lines in one
folder. Its result is everything that the commands print and write, and the lowered text of every program that they
compile. The earlier commit runs twice: a line that differs between its own runs, such as a time, is compared without
its numbers. Nothing is stored beyond the machine, because digests differ between processors.

`--messages` also runs both default test suites and compares the texts of all errors that tests expect.
"""

import argparse
import collections
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "05d0bfd9"  # the last one before the redesign
HOME = ROOT / ".cache" / "same_as_before"
HANDED_OVER = "handed over"
LOCATION = r"(?m)^#loc.*\n|\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
SYMBOL = r'@"[^"]*"|@[\w$.]+'
SINGLE_OPERATION = 5_000  # characters of a program
# Differences that are meant: a part of a line, and the reason.
EXPECTED: Mapping[str, str] = {}

TRAIN = (
    "train --model inputs/llama --model.compute_dtype float32 --data.max_length 96 --data.buckets 2 "
    "--optim.learning_rate 1e-2 --train.steps 3 --train.micro_batch_size 2 --train.accumulation 2 "
    "--train.save_every 1 --train.keep 3 --mesh.fsdp 1 --mesh.data 1 --output run"
)
SFT = f"{TRAIN} --data.train inputs/sft.jsonl --data.eval_fraction 0.2"
DRY = SFT.replace("inputs/llama", "inputs/families/{}") + " --lora.rank 4 --dry_run"
EXPORTS = tuple(f"export --run run --format {kind}" for kind in ("peft", "gguf-lora", "hf", "gguf"))
RESUME = ("CUT", "train --config run/config.yaml --resume")  # CUT removes the newest checkpoint
REPLY = "generate --run run --prompt sun --raw --max_new_tokens 8"
EVALUATE = "evaluate --run run --rows inputs/sft.jsonl"
METHODS = {
    "lora": "--lora.rank 4 --lora.dropout 0.1",
    "rslora, patterns": "--lora.rank 4 --lora.use_rslora true --lora.rank_pattern '{q_proj: 8}'",
    "some layers": "--lora.rank 4 --lora.layers_to_transform [1]",
    "dora": "--lora.rank 4 --lora.method dora",
    "dora, dropout, bf16": "--lora.rank 4 --lora.method dora --lora.dropout 0.1 --lora.dtype bfloat16",
    "lora_fa": "--lora.rank 4 --lora.method lora_fa",
    "loraplus": "--lora.rank 4 --optim.loraplus_lr_ratio 16",
    "pissa": "--lora.rank 4 --lora.init pissa",
    "loftq": "--lora.rank 4 --lora.init loftq --model.double_quant false",
    "oft": "--lora.method oft --lora.oft_block_size 8",
    "oft, exact": "--lora.method oft --lora.oft_blocks 4 --lora.block_share true --lora.use_cayley_neumann false",
    "vera": "--lora.method vera --lora.rank 16",
    "ia3": "--lora.method ia3",
    "ln_tuning": "--lora.method ln_tuning",
    "bitfit": "--lora.method bitfit --model inputs/biased",
    "houlsby": "--lora.rank 4 --lora.method houlsby",
    "pfeiffer": "--lora.rank 4 --lora.method pfeiffer",
    "full": "--lora.method full --model.quant_type none",
    "tables": "--lora.rank 4 --lora.modules_to_save [embed_tokens,lm_head]",
    "experts": "--lora.rank 4 --model inputs/families/qwen3moe "
    "--lora.target_parameters [gate_up_proj,mlp.experts.down_proj]",
    "router": "--lora.rank 4 --model inputs/families/mixtral --lora.target_parameters [mlp.gate]",
}
RUNS = {
    "packed, branching": "--lora.rank 4 --data.packing true",
    "remat none": "--lora.rank 4 --train.remat none",
    "remat full": "--lora.rank 4 --train.remat full",
    "neftune": "--lora.rank 4 --train.neftune_noise_alpha 5",
    "8-bit": "--optim.name adamw_8bit --lora.rank 64",
    "lion, 8-bit": "--optim.name lion_8bit --lora.rank 64",
    "paged": "--lora.rank 4 --optim.paging on --optim.paging_budget 40KiB",
    "paged, 8-bit": "--optim.name paged_adamw_8bit --lora.rank 64 --optim.paging on --optim.paging_budget 170KiB",
    "mesh of data": "--lora.rank 4 --mesh.data 2",
    "mesh that cuts": "--lora.rank 4 --mesh.fsdp 2",
    "bf16": "--lora.rank 4 --model.compute_dtype bfloat16",
    "fp4": "--lora.rank 4 --model.quant_type fp4",
    "int4": "--lora.rank 4 --model.quant_type int4",
    "mixture": "--lora.rank 4 --model inputs/families/qwen3moe",
    "mixture, offloaded": "--lora.rank 4 --model inputs/families/qwen3moe --model.experts offload",
    "samples": "--lora.rank 4 --train.samples inputs/prompts.txt --train.sample_tokens 4 --train.eval_every 1",
    "new tokens": "--lora.rank 4 --model.new_tokens '[<a>, <b>]'",
}
PREFERENCES = ("dpo", "kto", "orpo", "cpo", "simpo", "reward")
HEADS = ("classification", "multi_label", "regression", "embedding")
PLANS = {
    "70b": "--model llama-3-70b --card h100",
    "8b": "--model llama-3-8b --card rtx4090 --data.max_length 2048",
    "8b, does not fit": "--model llama-3-8b --card rtx4090 --data.max_length 65536",
    "8 cards": "--model llama-3-70b --card rtx4090 --cards 8",
} | {
    f"{name}, {method}": f"--model inputs/published/{name} --card h100 --lora.method {method}"
    for name, method in {
        "GLM-4.5-Air": "lora",
        "gpt-oss-20b": "lora_fa",
        "gemma-3-27b-it": "dora",
        "Qwen3-30B-A3B": "lora",
        "Olmo-3-1025-7B": "oft",
        "SmolLM3-3B-Base": "vera",
        "granite-3.3-8b-instruct": "ia3",
        "gemma-3-4b-it": "full",
    }.items()
}
WRONG = (
    "train --model inputs/llama",
    f"{SFT} --lora.method dore",
    f"{SFT} --lora.oft_block_size 8 --lora.vera_seed 2 --train.steps 0 --lora.target_modules [q_prj]",
    f"{SFT} --lora.method oft --lora.oft_block_size 7",
    f"{SFT} --lora.method full",
    f"{SFT} --objective dpo",
    f"{SFT} --objective classification",
    f"{SFT} --preference.beta 0.2 --head.labels [a,b]",
    f"{SFT} --data.format alpaka",
    f"{SFT} --lora.method ln_tuning --lora.target_modules all-linear --mesh.data 2",
    "export --run nowhere --format peft",
    "export --run nowhere --format onnx",
    "plan --model llama-3-8b --card rtx9090",
    "plan --model llama-9-8b",
    "generate --prompt x",
    "evaluate --run nowhere",
)
ARENA = (
    "arena --prompts inputs/arena.jsonl --output arena --orderings 50 --systems "
    "'{a: {replies: inputs/a.jsonl}, b: {replies: inputs/b.jsonl}, c: {replies: inputs/c.jsonl}}' "
    "--judges '{j: {kind: model, path: inputs/llama, reads: likelihood, prompts: inputs/judge.jsonl}}'"
)

type Case = Sequence[str]


def cases(families: Sequence[str]) -> dict[str, Case]:
    """Returns the cases by name: command lines, which run in the folder of the case."""
    found: dict[str, Case] = {
        f"method: {name}": (f"{SFT} {words}", *RESUME, *EXPORTS, REPLY, EVALUATE) for name, words in METHODS.items()
    }
    found |= {f"run: {name}": (f"{SFT} {words}", *RESUME) for name, words in RUNS.items()}
    for name in (*PREFERENCES, *HEADS):
        rows = f"--objective {name} --data.train inputs/{name}.jsonl --data.eval_fraction 0.3 --lora.rank 4"
        after = (f"predict --run run --rows inputs/{name}.jsonl --output predicted.jsonl",) if name in HEADS else ()
        found[f"objective: {name}"] = (f"{TRAIN} {rows}", *RESUME, *EXPORTS[:3], *after)
    found["handed over: run"] = ("COPY run", *RESUME, *EXPORTS, REPLY, EVALUATE)  # the earlier tree has written it
    found["handed over: arena"] = ("COPY arena", ARENA)
    found |= {f"family: {name}": (DRY.format(name),) for name in families}
    found |= {f"plan: {name}": (f"plan --json {words}", f"plan {words}") for name, words in PLANS.items()}
    stored = (
        f"{SFT} --lora.method full --model.quant_type none",
        "export --run run --format gguf --output q8 --dtype q8_0",
        "quantize --model inputs/llama --output bnb",
        f"{SFT} --model bnb --model.quant_type stored --output of_bnb",
        "MOVE q8 model.gguf",
        f"{SFT} --model model.gguf --model.quant_type stored --output of_gguf",
        f"{SFT} --model model.gguf --output again",
    )
    commands = (
        "train",
        "generate",
        "predict",
        "evaluate",
        "compare",
        "arena",
        "variance",
        "export",
        "quantize",
        "plan",
    )
    helps = tuple(f"{name} --help{more}" for name in commands for more in ("", " all"))
    return found | {
        "formats: stored codes": stored,
        "settings: help": helps,
        "settings: configs": tuple(
            f"train --config {path} --model inputs/llama --data.train inputs/sft.jsonl --output {path.stem} --dry_run"
            for path in sorted(Path(ROOT / "configs").glob("*.yaml"))
        ),
        "settings: wrong": WRONG,
        "studies: arena": (ARENA, ARENA),
    }


# ---------------------------------------------------------------------------------------------- in a tree's process

_WRITE_INPUTS = """
import json, sys
from pathlib import Path
from tests.e2e.project import byte_tokenizer_json, write_model
from tests.e2e.test_objective_matrix import rows_of
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import write_folder
inputs = Path(sys.argv[1])
sizes = dict(hidden_size=64, intermediate_size=128)
llama = write_model(inputs / "llama", **sizes)
file = llama / "tokenizer.json"
file.write_text(file.read_text().replace('"use_regex":false', '"use_regex":true'))  # as GPT-2's, which GGUF can say
write_model(inputs / "biased", attention_bias=True, mlp_bias=True, **sizes)
vocabulary = dict(vocab_size=258, max_position_embeddings=256, bos_token_id=256, eos_token_id=257, pad_token_id=257)
for name, (_, config) in FAMILIES.items():
    if name == "exaone4, windows": continue  # 64 layers
    config = config | vocabulary
    folder = write_folder(inputs / "families" / name.replace(", ", "-"), config, random_tensors(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((llama / file).read_text())
def write(name, rows): (inputs / name).write_text("".join(json.dumps(row) + "\\n" for row in rows))
words = ["sun", "moon", "a much longer word that fills another bucket, of more than sixty-four bytes"]
write("sft.jsonl", [dict(prompt=f"say {words[i % 3]} {i}", completion=words[i % 2]) for i in range(24)])
for name in sys.argv[2].split(): write(f"{name}.jsonl", rows_of(name))
(inputs / "prompts.txt").write_text("say sun\\nsay moon\\n")
write("arena.jsonl", [dict(question_id=i, prompt=f"say {i}") for i in range(6)])
for k, name in enumerate("abc"):
    write(f"{name}.jsonl", [dict(question_id=i, reply=f"{words[(i + k) % 2]} {i * k}") for i in range(6)])
write("judge.jsonl", [dict(defaults=dict(prompt="1, 2 or 3?"))])
for path in Path("tests/models/published_configs").glob("*.json"):
    (inputs / "published" / path.stem).mkdir(parents=True)
    (inputs / "published" / path.stem / "config.json").write_text(json.dumps(json.loads(path.read_text())["config"]))
"""


def result_file(results: Path, name: str) -> Path:
    """Returns the file of a case's result."""
    return results / f"{re.sub(r'\W+', '_', name)}.gz"


def run_cases(found: Mapping[str, Case], results: Path, inputs: Path) -> None:
    """Runs cases one after another in this process; writes the result of each, lines by name, to `results`/CASE.gz."""
    import jax

    for name, commands in found.items():
        folder = result_file(results, name).with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "inputs").symlink_to(inputs)
        programs = results / f"{folder.name}.ir"
        shutil.rmtree(programs, ignore_errors=True)
        jax.config.update("jax_dump_ir_to", str(programs))
        with contextlib.chdir(folder):
            printed = {f"printed by {k}: {line}": _run(line) for k, line in enumerate(commands)}
        lines = printed | dict(_written(folder)) | {"programs": sorted({*_programs(programs)})}
        text = json.dumps(lines).replace(str(folder.resolve()), "FOLDER").replace(str(results.parent), "TREE")
        with gzip.open(result_file(results, name), "wt") as file:
            file.write(text)
        shutil.rmtree(folder)
        jax.clear_caches()


def hand_over(kept: str, inputs: Path) -> None:
    """Writes a run or a tournament that both trees continue."""
    folder = inputs.parent / HANDED_OVER
    folder.mkdir(exist_ok=True)
    if not (folder / "inputs").exists():
        (folder / "inputs").symlink_to(inputs)
    with contextlib.chdir(folder):
        print(*_run(SFT if kept == "run" else ARENA), sep="\n")


def _run(line: str) -> list[str]:
    """Runs one command line; returns the printed lines and how it ended. The last of a repeated option counts."""
    name, *words = shlex.split(line)
    at = {word: index for index, word in enumerate(words) if word.startswith("--")}
    words = [word for i, word in enumerate(words) if at.get(words[i - (word not in at)], i) in (i, i - 1)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            match name:
                case "CUT":
                    newest = max(Path("run/checkpoints").glob("[0-9]*"), key=lambda path: int(path.name), default=None)
                    shutil.rmtree(newest) if newest else None
                case "COPY":
                    shutil.copytree(Path("inputs").resolve().parent / HANDED_OVER / words[0], words[0])
                case "MOVE":
                    shutil.move(next(Path(words[0]).glob("*.gguf")), words[1])
                case _:
                    import importlib

                    from qlora_jax.config import run_main

                    run_main(importlib.import_module(f"qlora_jax.{name}").main, words)
            ended = "ended"
        except SystemExit as end:
            ended = f"exit code {end.code}"
        except BaseException as error:  # a defect: the trees must have the same one
            ended = f"{type(error).__name__}: {error}"
    return [*out.getvalue().splitlines(), ended]


def _written(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the lines of each file: of arrays and binary files a digest."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        name = re.sub("[0-9a-f]{32,}", "DIGEST", str(relative))
        if relative.parts[0] == "inputs" or not path.is_file() or "checkpoints" in relative.parts:
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            records = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
            yield name, [line for record in records for line in _indented(record)]
        elif path.suffix in (".yaml", ".html", ".md", ".txt", ".csv", ".tsv"):
            yield name, data.decode().splitlines()
        else:
            yield name, [hashlib.sha256(data).hexdigest()]
    for step in sorted(folder.glob("*/checkpoints/[0-9]*")):
        yield str(step.relative_to(folder)), list(_checkpoint(step))


def _indented(record: str) -> list[str]:
    return json.dumps(json.loads(record), indent=1).splitlines() if record.strip() else []


def _checkpoint(step: Path) -> Iterator[str]:
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    for item in sorted(path for path in step.iterdir() if path.is_dir()):
        if (item / "_METADATA").exists():
            tree = ocp.StandardCheckpointer().restore(item.absolute())
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                array = np.asarray(leaf)
                content = hashlib.sha256(array.tobytes()).hexdigest()
                yield f"{item.name}{jax.tree_util.keystr(path)} {array.dtype}{array.shape} {content}"
        else:
            yield from (f"{item.name}: {line}" for line in _indented((item / "metadata").read_text()))


def _programs(folder: Path) -> Iterator[str]:
    """Yields a digest of each program that is not a single operation; symbols are numbered by their first use."""
    for path in folder.glob("*_compile.mlir"):
        text = re.sub(LOCATION, "", path.read_text())
        symbols = {symbol: f"@{k}" for k, symbol in enumerate(dict.fromkeys(re.findall(SYMBOL, text)))}
        text = re.sub(SYMBOL, lambda found, symbols=symbols: symbols[found[0]], text)
        text = re.sub(r"\b\d{12,}\b", "ADDRESS", text)  # callbacks into Python have addresses
        if len(text) > SINGLE_OPERATION:
            yield f"{len(text):8} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def pytest_configure(config) -> None:
    """Makes pytest.raises append the errors that tests expect to a file in $SAME_AS_BEFORE_MESSAGES."""
    from _pytest.raises import RaisesExc

    folder, leave = os.environ["SAME_AS_BEFORE_MESSAGES"], RaisesExc.__exit__

    def recorded(self, exc_type, exc_val, exc_tb):
        name = exc_type and exc_type.__name__
        text = re.sub(r"/[\w./-]*pytest-[\w./-]*|0x[0-9a-f]+", "PLACE", f"{name}: {exc_val}")
        with open(f"{folder}/{os.getpid()}", "a", encoding="utf-8") as file:
            file.write(json.dumps(text) + "\n")
        return leave(self, exc_type, exc_val, exc_tb)

    RaisesExc.__exit__ = recorded


# ---------------------------------------------------------------------------------------------- of both trees


def worktree(commit: str) -> Path:
    """Returns the folder of a commit's files, which it checks out and builds if it is not there."""
    tree = HOME / commit / "tree"
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, check=True)
    python(tree, "-m", "pallas_kernels.native.build")
    return tree


def python(tree: Path, *words: str, **environment: str) -> None:
    """Runs Python with the packages of a tree."""
    own = dict(PYTHONPATH=str(tree), JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2", COLUMNS="120", NO_COLOR="1")
    own |= dict(JAX_COMPILATION_CACHE_DIR=str(HOME / "programs"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1")
    subprocess.run([sys.executable, *words], cwd=tree, env=os.environ | own | environment, check=True)


def results_of(tree: Path, results: Path, found: Mapping[str, Case]) -> None:
    """Runs cases in a tree."""
    results.mkdir(parents=True, exist_ok=True)
    (results / "cases.json").write_text(json.dumps(found))
    python(tree, str(Path(__file__)), "--run", str(results))


def masked(line: str) -> str:
    """Returns a line without its numbers and digests."""
    return re.sub(r"\bp?[0-9a-f]{10,}\b|\d[\d.,:]*(e[+-]?\d+)?", "#", line)


def differences(first: Sequence[str], second: Sequence[str], now: Sequence[str]) -> list[str]:
    """Returns lines of `now` that neither of two earlier runs has, and those that it lacks, as in a diff."""
    varying = {masked(line) for line in {*first} ^ {*second}}

    def plain(lines: Sequence[str]) -> collections.Counter[str]:
        return collections.Counter(masked(line) if masked(line) in varying else line for line in lines)

    before, after, again = plain(first), plain(now), plain(second)
    lost, new = (before & again) - after, after - (before | again)
    order = [] if lost or new or varying or [*first] == [*now] else ["! the order of lines differs"]
    lines = [f"- {line}" for line in lost] + [f"+ {line}" for line in new] + order
    return [line for line in lines if not any(part in line for part in EXPECTED)]


def compare(name: str, folders: Sequence[Path]) -> list[str]:
    """Returns what differs in a case between two earlier runs and this one."""
    results = []
    for folder in folders:
        with gzip.open(result_file(folder, name), "rt") as file:
            results.append(json.load(file))
    found = []
    for part, lines in results[0].items():
        if part.startswith("printed by 0") and lines[-1] != "ended" and not name.startswith("settings: wrong"):
            found += [f"  {part}", "    the earlier tree refuses it, so the case shows nothing", *lines[-3:]]
    for part in sorted({part for result in results for part in result}):
        lines = differences(*(result.get(part, ["absent"]) for result in results))
        found += [f"  {part}", *(f"    {line[:300]}" for line in lines[:20])] if lines else []
    return found


def compare_messages(trees: Sequence[Path]) -> list[str]:
    """Runs the default tests of two trees; returns the expected errors that only one has."""
    counts = []
    for tree in trees:
        folder = HOME / f"messages of {tree.parent.name}"
        if tree == ROOT or not folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            plugin = dict(PYTHONPATH=f"{tree}:{ROOT / 'scripts'}", SAME_AS_BEFORE_MESSAGES=str(folder))
            with contextlib.suppress(subprocess.CalledProcessError):  # failures are the suite's business
                python(tree, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "same_as_before", **plugin)
        counts.append(collections.Counter(json.loads(x) for file in folder.iterdir() for x in file.open()))
    lost, new = (sorted({*a} - {*b}) for a, b in (counts, counts[::-1]))
    return [f"  - {text}" for text in lost] + [f"  + {text}" for text in new]


def main() -> None:
    """Prints "same", or the differences of each case; exits with 1 if there are any."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--commit", default=COMMIT)
    parser.add_argument("--only", default="", help="run the cases whose name has this text")
    parser.add_argument("--messages", action="store_true", help="compare the errors that both suites expect")
    parser.add_argument("--hand_over", help=argparse.SUPPRESS)  # in the earlier tree's process
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # in a tree's process: the folder of results
    args = parser.parse_args()
    home = HOME / args.commit
    if args.hand_over is not None:
        return hand_over(args.hand_over, home / "inputs")
    if args.run is not None:
        return run_cases(json.loads((args.run / "cases.json").read_text()), args.run, args.run.parent / "inputs")
    earlier, inputs = worktree(args.commit), home / "inputs"
    if not inputs.exists():
        python(earlier, "-c", _WRITE_INPUTS, str(inputs), " ".join((*PREFERENCES, *HEADS)))
        for kept in ("run", "arena"):
            python(earlier, str(Path(__file__)), "--hand_over", kept, "--commit", args.commit)
    found = cases(sorted(path.name for path in (inputs / "families").iterdir()))
    chosen = {name: commands for name, commands in found.items() if args.only in name}
    folders = [home / kind for kind in ("first", "second", "now")]
    for tree, results in zip((earlier, earlier, ROOT), folders, strict=True):
        results.mkdir(parents=True, exist_ok=True)
        if missing := {n: c for n, c in chosen.items() if tree == ROOT or not result_file(results, n).exists()}:
            results_of(tree, results, missing)
    wrong = {name: lines for name in chosen if (lines := compare(name, folders))}
    if args.messages and (lines := compare_messages((earlier, ROOT))):
        wrong["messages"] = lines
    for name, lines in wrong.items():
        print(name, *lines, sep="\n")
    print(f"{len(wrong)} of {len(chosen)} cases differ" if wrong else f"same: {len(chosen)} cases")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
