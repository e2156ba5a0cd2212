"""Shows that CI's tests notice mistakes: breaks the code in one place at a time and expects a test to fail.

    python -m tests.mutation_check            # all mutations
    python -m tests.mutation_check pager      # those whose file or change contains a word

Each mutation is made in a copy of the checkout, and the named tests run there with the selection of CI. The command
fails if a mutation survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutation import Mutation
from tests.reverted_mends import MENDS

ROOT = Path(__file__).resolve().parent.parent
SELECTION = "not gpu and not exhaustive"  # the default suite and CI's slow tests


MUTATIONS = [
    Mutation("qlora_jax/quant/blockwise.py", "normalized > midpoint", "normalized >= midpoint", "tests/quant"),
    Mutation("qlora_jax/quant/double_quant.py", "xp.concat([absmax - offset,", "xp.concat([absmax,", "tests/quant"),
    Mutation(
        "pallas_kernels/formats/layouts.py",
        "return codes >> 4, codes & 15",
        "return codes & 15, codes >> 4",
        "tests/pallas_kernels/formats",
    ),
    Mutation(
        "pallas_kernels/frozen_product.py",
        'return one_way("backward", dy, weights',
        'return one_way("backward", dy * 2, weights',
        "tests/pallas_kernels/nf4_matmul/test_contract.py",
    ),
    Mutation(
        "qlora_jax/nn/lora.py",
        "d_xa_MR = _scaled(d_xa_MR, scalings, lora_bs, dtype)",
        "d_xa_MR = d_xa_MR.astype(dtype)",
        "tests/nn/test_lora.py",
    ),
    Mutation(
        "pallas_kernels/attention/tile_mask.py",
        "return behind >= 0 if",
        "return behind > 0 if",
        "tests/pallas_kernels/attention/test_contract.py",
    ),
    Mutation(
        "pallas_kernels/attention/mosaic/mask.py",
        "seen &= key >= spread(",
        "seen &= key > spread(",
        "tests/pallas_kernels/attention/mosaic/test_twin.py",
    ),
    Mutation(
        "qlora_jax/nn/rope.py",
        "return _turn(dy_BTNH, cos, -sin",
        "return _turn(dy_BTNH, cos, sin",
        "tests/nn/test_rope.py",
    ),
    Mutation(
        "qlora_jax/objectives/sft.py",
        "jnp.sum(nll_M.reshape(weights_BT.shape) * weights_BT, axis=1)",
        "jnp.mean(nll_M.reshape(weights_BT.shape) * weights_BT, axis=1)",
        "tests/objectives/test_sft.py",
    ),
    Mutation(
        "qlora_jax/data/batching/batches.py",
        "first + row.segments[-1] + 1",
        "first + row.segments[-1]",
        "tests/data/batching",
    ),
    Mutation(
        "qlora_jax/data/branch_tree.py",
        "ids[:-1], ids[1:], supervised[1:]",
        "ids[:-1], ids[1:], supervised[:-1]",
        "tests/data/batching",
    ),
    Mutation(
        "qlora_jax/data/loss_mask/reference.py",
        "first = owner_of_character[begin + spaces]",
        "first = owner_of_character[begin]",
        "tests/data/loss_mask",
    ),
    Mutation("qlora_jax/optim/schedule.py", "(step + first) / max", "(step + first + 1) / max", "tests/optim"),
    Mutation(
        "qlora_jax/optim/pager.py", "    pool.evict_to(budget_bytes)\n", "    pass\n", "tests/optim/test_pager.py"
    ),
    Mutation(
        "qlora_jax/inference/fast_decoding.py",
        "if not _same(codes, rows):",
        "if not codes:",
        "tests/inference/test_fast_decoding.py",
    ),
    Mutation(
        "pallas_kernels/nf4_matmul/api.py",
        "(INTEGER, *order) if implementation == FAST else order",
        "(INTEGER, *order) if implementation == INTEGER else order",
        "tests/pallas_kernels/nf4_matmul/test_cpu.py",
    ),
    Mutation(
        "pallas_kernels/formats/block_encoders.py",
        "jnp.floor(jnp.abs(scaled) + np.float32(0.5))",
        "jnp.round(jnp.abs(scaled))",
        "tests/pallas_kernels/formats/test_block_encoders.py",
    ),
    Mutation(
        "qlora_jax/inference/engine/token_sampler.py",
        "mass, top_p_R * mass(lowest_R), least",
        "mass, 0.999 * top_p_R * mass(lowest_R), least",
        "tests/inference/engine/test_token_sampler.py",
    ),
    Mutation(
        "qlora_jax/inference/engine/grammar.py",
        "never_W & ~matcher.ends_W",
        "never_W",
        "tests/inference/engine/test_grammar.py",
    ),
    Mutation("qlora_jax/measures/statistics.py", "(0.025, 0.975)", "(0.05, 0.95)", "tests/measures/test_statistics.py"),
    Mutation(
        "qlora_jax/methods/lora.py", '"lora_A.weight", np.transpose', '"lora_A.weight", np.asarray', "tests/io/peft"
    ),
    Mutation(
        "qlora_jax/io/gguf/reader.py",
        "2).swapaxes(1, 2).reshape(rows)",
        "2).swapaxes(0, 1).reshape(rows)",
        "tests/io/gguf",
    ),
    Mutation(
        "qlora_jax/io/pretrained.py",
        "if loaded.fingerprint != run.fingerprint:",
        "if False:",
        "tests/test_generate.py tests/test_evaluate.py tests/parity/test_peft.py",
    ),
    Mutation(
        "qlora_jax/config/parse.py",
        'problems.append(f"{key}: unknown setting',
        'str(f"{key}: unknown setting',
        "tests/config",
    ),
    Mutation(
        "qlora_jax/training/resume.py",
        '"position": position,',
        '"position": position | {"index": 0},',
        "tests/e2e/test_resume.py",
    ),
    *MENDS,
]


def copy_of_checkout(folder: Path) -> None:
    """Copies the tracked files, and links the environments."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for library in (ROOT / "pallas_kernels/native").glob("*.so"):
        shutil.copy2(library, folder / "pallas_kernels/native")
    for environment in (".venv", ".oracle", ".llama_cpp"):
        if (ROOT / environment).exists():
            (folder / environment).symlink_to(ROOT / environment)


def is_caught(mutation: Mutation, folder: Path) -> bool:
    """Returns True if a test fails with the mutation; restores the file.

    Raises:
      ValueError: the file does not contain the text to replace, or no test ran.
    """
    path = folder / mutation.file
    source = path.read_text(encoding="utf-8")
    if mutation.old not in source:
        raise ValueError(f"{mutation.file}: does not contain {mutation.old!r}. Update tests/mutation_check.py.")
    path.write_text(source.replace(mutation.old, mutation.new, 1), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", SELECTION, *mutation.tests.split()]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(folder)}
    )
    path.write_text(source, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise ValueError(f"{mutation.file}: pytest ended with status {done.returncode}:\n{done.stdout[-1000:]}")
    return done.returncode != 0


def main() -> None:
    """Checks the mutations that match the words of the command line; exits with 1 if one survives."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in "".join(m) for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        copy_of_checkout(Path(name))
        for mutation in chosen:
            caught = is_caught(mutation, Path(name))
            survivors += not caught
            change = f"{mutation.old.strip()!r} -> {mutation.new.strip()!r}"
            print(f"{'caught  ' if caught else 'SURVIVED'} {mutation.file}: {change}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
