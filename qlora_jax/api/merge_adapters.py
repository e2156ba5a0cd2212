"""`merge_adapters`: several adapters of one base as one."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qlora_jax.api.export import write_export
from qlora_jax.api.settings import loading_bar
from qlora_jax.config.adapter_merges import AdapterMergeArgs, check_adapter_merge
from qlora_jax.config.exports import ExportOptions
from qlora_jax.config.parse import from_dict
from qlora_jax.io.export.merged_adapter import merge, merge_problems, run_of
from qlora_jax.io.export.result import ExportResult
from qlora_jax.io.export.verify import PROMPTS, compare_logits, prompt_logits, tokenize_prompts
from qlora_jax.io.pretrained import OpenedModel, apply_adapter, load_base, open_finetuned
from qlora_jax.io.run_folder.checkpoint import saved_steps
from qlora_jax.models.partition import partition


def merge_adapters(
    runs: Sequence[str | Path],
    folder: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear",
    density: float | None = None,
    rank: int | None = None,
    last: int | None = None,
    seed: int = 0,
    model: str | None = None,
    progress: bool = False,
) -> ExportResult:
    """Merges adapters of one base into a new PEFT adapter, and compares its logits with those at full rank.

    >>> _ = q.save_peft(q.add_adapter(model), "adapter")
    >>> result = q.merge_adapters(["adapter", "adapter"], "merged", weights=[0.7, 0.3], rank=16)
    >>> (result.path / "adapter_config.json").exists()
    True

    Args:
      runs: folders of runs and PEFT adapters.
      folder: a new folder.
      weights: a factor for each adapter; None: equal ones, so that the result is a mean.
      method: "linear", the weighted sum of the changes of weights; "ties", "dare_linear" or "dare_ties".
      density: the share of each change's elements that "ties" and DARE keep.
      rank: of the result, by singular values; None: the sum of the adapters' ranks, with which "linear" is exact.
      last: merge the newest checkpoints of each run, this many; None: the newest one.
      seed: chooses the elements that DARE keeps.
      model: path of the base, if it moved after training.
      progress: show a progress bar while the base is read.

    Returns:
      The path, notes, and the difference between the logits of the written adapter and those of one of full rank.

    Raises:
      ValueError: settings contradict each other, adapters cannot be read or merged, or the folder exists; all problems
        of one kind are listed.
    """
    given = dict(method=method, density=density, rank=rank, last=last, seed=seed, model=model, output=str(folder))
    given |= dict(run=[*map(str, runs)], weights=None if weights is None else [*map(float, weights)])
    settings = from_dict(AdapterMergeArgs, given)
    check_adapter_merge(settings)
    adapters, output = _open(settings), Path(folder)
    first, mean = adapters[0], 1.0 if method.endswith("ties") else 1 / len(adapters)
    factors = settings.weights or [mean] * len(adapters)
    with loading_bar(progress) as report:
        base = load_base(first, dataclasses.replace(first.args, compute_dtype="float32"), report)
        merged = merge(adapters, factors, settings, report)
    result = write_export(dataclasses.replace(first, run=merged.run), output, "peft", ExportOptions())
    written = run_of(open_finetuned(output, base=str(first.source.path)))
    prompts = tokenize_prompts(first.tokenizer, PROMPTS)
    without = prompt_logits(partition(base), prompts)
    found, whole = (prompt_logits(apply_adapter(base, run), prompts) for run in (written, merged.whole))
    difference = compare_logits(found, whole, without)
    if merged.kept == 1 and not difference.is_small:
        shutil.rmtree(output)
        raise ValueError(f"{output}: the written adapter is not the merge: {difference}")
    parts = " + ".join(f"{factor:.3g} * {run_of(one).label}" for one, factor in zip(adapters, factors, strict=True))
    args, share = merged.run.lora_args, "all" if merged.kept == 1 else f"{merged.kept:.2%}"
    lines = [
        f"{method} merge of {parts}: {output}",
        *result.lines[1:],
        f"rank {args.rank}, alpha {args.alpha:g}: it keeps {share} of the Frobenius norm of the merged changes",
        f"compared with the merge at full rank, {difference}",
    ]
    if not difference.is_small:
        lines.append(f"rank {args.rank} leaves out more than a quarter of this effect. Give a larger --rank")
    if len({one.tokenizer.chat_template for one in adapters}) > 1:
        lines.append(f"the chat templates differ: it has that of {run_of(first).label}")
    return ExportResult(path=output, lines=tuple(lines), difference=difference)


def _open(settings: AdapterMergeArgs) -> list[OpenedModel]:
    """Opens all adapters; raises ValueError with all problems."""
    exists = Path(settings.output).exists()
    problems = [f"output: {settings.output} exists. Give a new folder"] if exists else []
    adapters: list[OpenedModel] = []
    for run in settings.run:
        steps = saved_steps(Path(run))[-settings.last :] if settings.last else [None]
        if len(steps) < (settings.last or 1):
            problems.append(f"{run}: --last: found the checkpoints {steps}, expected {settings.last}. Reduce it")
            continue
        try:
            adapters += [open_finetuned(run, base=settings.model, step=step) for step in steps]
        except (OSError, ValueError) as error:
            problems.append(str(error))
    problems += merge_problems(adapters) if adapters else []
    if problems:
        raise ValueError("\n".join(problems))
    return adapters
