"""The banners of a run: device, formats, trained parameters and unused options; its step; and what to run next."""

import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from pallas_kernels.attention.dispatch import choose as choose_attention
from pallas_kernels.devices import target_device
from pallas_kernels.dispatch import Choice
from pallas_kernels.formats.ggml_blocks import NVFP4_GROUP
from pallas_kernels.grouped_matmul import api as grouped_api
from pallas_kernels.grouped_matmul.groups import choose_tile
from pallas_kernels.native.library import variant
from qlora_jax.config import Config, OptimArgs, paging_of
from qlora_jax.config.methods import MERGED_FOLDERS, METHODS, uses
from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.config.schema import RouterArgs
from qlora_jax.config.sizes import format_bytes
from qlora_jax.io.export.methods import head_refusal, refusal
from qlora_jax.io.peft.writer import is_gguf
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE
from qlora_jax.models.config import DENSE, NVFP4, STORED, ModelConfig
from qlora_jax.models.decoder import SCORE
from qlora_jax.models.partition import Lora, is_table, module_of
from qlora_jax.models.precision import kept_text
from qlora_jax.models.prefetched_layers import split_host
from qlora_jax.nn.frozen_weight import OPS, ops_of
from qlora_jax.objectives.head_objective import TrainedHead, head_of
from qlora_jax.optim.schedule import warmup_steps
from qlora_jax.terminal.visible import without_passwords
from qlora_jax.training.device_mesh import mesh_size
from qlora_jax.training.early_stopping import BestEvaluation
from qlora_jax.training.session import Session
from qlora_jax.untrusted_json import JsonObject

Rows = dict[str, str]
SHORT_RUN = 10  # steps; in a longer run, the first step of a warm-up is less than a tenth


def resume_banner(session: Session, step: int, best: BestEvaluation) -> tuple[str, Rows]:
    """Returns the title and rows of the banner of a run that resumes after `step` steps."""
    rows = {"run": f"{session.run.config.output}, settings in its {CONFIG_FILE}", "device": _device(session)}
    if best.loss is not None:
        rows["lowest held-out loss"] = f"{best.loss:.3f}, at step {best.step:,}"
    return f"resuming after step {step:,} of {session.run.total_steps:,}", rows


def start_banner(session: Session) -> tuple[str, Rows]:
    """Returns the title and rows of the banner of a new run."""
    is_whole = METHODS[session.run.config.lora.method].whole_model
    return "Full finetuning" if is_whole else "QLoRA finetuning", _facts(session)


def _facts(session: Session) -> Rows:
    config = session.run.config
    return {
        "device": _device(session),
        **_peak(session),
        "base": f"{config.model.path}, {_parameters(session.run.inputs.model)}" + _base_size(session),
        **({"not loaded": parts} if (parts := session.run.inputs.source.not_loaded) else {}),
        **_whole_on_each(session),
        "weights": _weight_format(session),
        **_merged(session),
        **({"in 16 bits": kept} if (kept := kept_text(session.run.inputs.model, session.run.step.weights)) else {}),
        **_host_experts(session),
        "matmuls": _matmuls(session),
        "attention": _attention(session),
        "trained": _trained(session),
        **_new_tokens(session),
        **_router_losses(config.router),
        **_replies(session),
        "optimizer": f"{config.optim.name}, learning rate {config.optim.learning_rate:g} ({config.optim.schedule}, "
        f"warm-up {config.optim.warmup_ratio:.0%})"
        + (f", gradient norm clipped to {config.optim.max_grad_norm:g}" if config.optim.max_grad_norm else ""),
        **rate_rows(config, session.run.total_steps),
        **({"optimizer state": paging} if (paging := session.state_manager.describe()) else {}),
        "batch": f"{config.train.micro_batch_size * config.train.accumulation} "
        f"{'packs' if config.data.packing else 'rows'} = micro-batch "
        f"{config.train.micro_batch_size} x accumulation {config.train.accumulation}",
        "steps": f"{session.run.total_steps:,}",
        "run": config.output,
        "not used": ", ".join(_unused(config)) or "nothing, every option is on",
    }


def warm_up_text(optim: OptimArgs, total_steps: int) -> str | None:
    """Returns the warm-up's steps and the learning rate of its first; None without a warm-up."""
    steps = warmup_steps(optim, total_steps)
    if not steps:
        return None
    count, first = f"{steps:,} of {total_steps:,} steps", f"{optim.learning_rate / steps:.3g}"
    if optim.warmup_start == "first":
        return f"{count}; the first has learning rate {first}"
    return (
        f"{count}; the first has learning rate 0 and changes nothing, as in transformers "
        f"(with optim.warmup_start first it has {first})"
    )


def short_run_warning(optim: OptimArgs, total_steps: int) -> str | None:
    """Returns a warning if warm-up takes a tenth of a run or more by its first step, which changes nothing."""
    if total_steps > SHORT_RUN or optim.warmup_start == "first" or not warmup_steps(optim, total_steps):
        return None
    step = "the only step" if total_steps == 1 else f"step 1 of {total_steps}"
    return (
        f"{step} will change nothing, because warm-up starts at learning rate 0. Set --optim.warmup_start first, or "
        "--optim.warmup_ratio 0"
    )


def rate_rows(config: Config, total_steps: int) -> Rows:
    """Returns rows on the warm-up, and on a learning rate that is high for the objective."""
    texts = {"warm-up": warm_up_text(config.optim, total_steps), "learning rate": _high_rate(config)}
    return {name: text for name, text in texts.items() if text is not None}


def _high_rate(config: Config) -> str | None:
    """Returns a note if an objective of preferences or rewards has the default rate, which is for supervised rows."""
    declared = OBJECTIVES[config.objective]
    is_plain = not (declared.preference or declared.policy)
    if is_plain or config.optim.learning_rate != OptimArgs().learning_rate:
        return None
    usual = "1e-5 to 5e-5 with an adapter" if declared.policy else "1e-6 to 1e-5"
    return (
        f"{config.optim.learning_rate:g} is the default of optim.learning_rate, which is high for objective "
        f"{config.objective}: usual values are {usual} (TRL's default is 1e-6)"
    )


def _replies(session: Session) -> Rows:
    """Returns rows on the teacher, on the replies that a run samples, and on what rewards them."""
    settings, policy, distilled = (getattr(session.run.config, name) for name in ("rollouts", "policy", "distillation"))
    teacher = {}
    if session.run.inputs.teacher is not None:
        kind = {0.0: "forward KL", 1.0: "reverse KL"}.get(distilled.beta, f"Jensen-Shannon, beta {distilled.beta:g}")
        name = without_passwords(" at ".join(filter(None, (distilled.teacher_model, distilled.teacher))))
        teacher["teacher"] = f"{name}, its {distilled.loss_top_k:,} likeliest tokens, {kind}"
    if session.run.inputs.rollouts is None:
        return teacher
    passes = f", {policy.num_iterations} passes over them" if policy.num_iterations > 1 else ""
    sampled = f"{settings.num_generations} per prompt, of at most {settings.max_completion_length:,} tokens"
    if teacher:
        steps = "" if distilled.lmbda == 1 else f"; in about {distilled.lmbda:.0%} of the steps, else those of the data"
        return teacher | {"replies": f"{sampled}, temperature {settings.temperature:g}{steps}"}
    redraws = f"; up to {policy.max_redraws} further draws if rewards are equal" if policy.max_redraws else ""
    functions = session.rewards
    tools = () if functions is None or functions.tools is None else functions.tools.schemas
    return {
        "replies": f"{sampled}, temperature {settings.temperature:g}{redraws}; loss {policy.loss_type}{passes}",
        "rewards": "" if functions is None else ", ".join(functions.names),
    } | ({"tools": ", ".join(schema["function"]["name"] for schema in tools)} if tools else {})


def _peak(session: Session) -> Rows:
    peak, devices = session.run.utilization.peak, mesh_size(session.run.mesh).devices
    whose = "the device's peak" if devices == 1 else f"the peak of {devices} devices"
    return {} if peak is None else {"MFU": f"relative to {peak / 1e12:,.0f} TFLOP/s, {whose} for dense 16-bit matmuls"}


def _parameters(model: ModelConfig) -> str:
    active = f", {model.active_parameters():,} of them per token" if model.experts else ""
    return f"{model.parameters():,} parameters{active}"


def _base_size(session: Session) -> str:
    base = session.parts.base
    if METHODS[session.run.config.lora.method].whole_model:
        return ""
    size = f", {_megabytes(base)}"
    return size if session.run.mesh is None else f"{size}, {_share(jax.tree.leaves(base)) / 1e6:,.0f} MB on each device"


def _host_experts(session: Session) -> Rows:
    """Returns a row on the experts in host memory."""
    stacks, _ = split_host(session.parts.base)
    size = format_bytes(sum(leaf.nbytes for leaf in jax.tree.leaves(stacks)))
    return {"experts": f"in host memory, {size}; the device holds two layers of them"} if stacks else {}


def _router_losses(router: RouterArgs) -> Rows:
    factors = {"load balancing": router.aux_loss_coef, "z-loss": router.z_loss_coef}
    text = ", ".join(f"{factor:g} x {name}" for name, factor in factors.items() if factor)
    return {"router losses": text} if text else {}


def _share(leaves: list[jax.Array]) -> int:
    """Returns the bytes of a device's parts of arrays on a mesh."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _whole_on_each(session: Session) -> Rows:
    """Returns a row on what every device holds whole although the base is cut, and why."""
    shards = mesh_size(session.run.mesh).fsdp
    if shards == 1:
        return {}
    whole = [leaf for leaf in jax.tree.leaves(session.parts.base) if leaf.sharding.is_fully_replicated]
    trained = any(is_table(name) for name in session.parts.lora)
    tables = {name.rpartition(".")[2]: leaf for name, leaf in _tables(session) if leaf.sharding.is_fully_replicated}
    why = "whose rows train" if trained else _undivided({len(leaf) for leaf in tables.values()}, shards)
    named = f", with {' and '.join(tables)}, {why}" if tables else ""
    return {"whole on each": f"{format_bytes(_share(whole))} of the base{named}"}


def _undivided(rows: set[int], shards: int) -> str:
    """Returns why tables are whole, and the values of mesh.fsdp up to 16 that divide their rows."""
    values = [n for n in range(2, 17) if all(count % n == 0 for count in rows)]
    others = f" (they do by {', '.join(map(str, values))})" if values else ""
    return f"whose {' and '.join(f'{count:,}' for count in sorted(rows))} rows do not divide by {shards}{others}"


def _tables(session: Session) -> Iterator[tuple[str, jax.Array]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(session.parts.base):
        if is_table(module := module_of(path)):
            yield module, leaf


def _trained(session: Session) -> str:
    lora, trained, frozen = (
        session.run.config.lora,
        sum(leaf.size for leaf in jax.tree.leaves(session.parts.trained)),
        session.run.inputs.model.parameters(),
    )
    size = f"{_megabytes(session.parts.trained)} in {lora.dtype}"
    if METHODS[lora.method].whole_model:
        return f"all {trained:,} parameters, {size}"
    declared = METHODS[lora.method]
    share = f"{trained:,} {declared.title} parameters, {trained / (trained + frozen):.2%} of all, {size}"
    head = ", and a head" if SCORE in session.parts.lora else ""
    return f"{share}; {_rank(session.run.config)}on {_module_count(session.parts.lora)} {declared.modules}{head}"


def _rank(config: Config) -> str:
    return f"rank {config.lora.rank} " if uses(config.lora.method, "rank") else ""


def _module_count(lora: Lora) -> int:
    return sum(not is_table(name) and name != SCORE for name in lora)


def _new_tokens(session: Session) -> Rows:
    model = session.run.config.model
    tokens = [*model.new_tokens, *model.new_special_tokens]
    where = "the tied embedding" if session.run.inputs.model.tie_embeddings else "embedding and head"
    rows = {"new tokens": f"{', '.join(tokens)}; their rows in {where} are trained"} if tokens else {}
    modules = session.run.config.lora.modules_to_save
    return rows | ({"trained fully": ", ".join(modules)} if modules else {})


def _megabytes(tree: object) -> str:
    return f"{sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6:,.0f} MB"


def _device(session: Session) -> str:
    device, size = jax.devices()[0], mesh_size(session.run.mesh)
    kind = "" if device.device_kind == device.platform else f" ({device.device_kind})"
    several = "" if session.run.mesh is None else f"{size.devices} x "
    axes = "" if session.run.mesh is None else f": {size}"
    return f"{several}{device.platform}{kind}{axes}, computes in {session.run.step.weights.dtype}"


def _weight_format(session: Session) -> str:
    weights, args = session.run.step.weights, session.run.config.model
    formats = weights.stored or [(name, [DENSE] * len(layers)) for name, layers in weights.dense]
    dense = sum(list(each).count(DENSE) for _, each in formats)
    why = "model.keep_16bit names" if args.keep_16bit else "the files store in 16 bit"
    unquantized = f"{dense} linear layers that {why}, " if dense else ""
    rest = f"{unquantized}norms, embedding and head in {weights.dtype}"
    if weights.quant_type is None:
        return f"{weights.dtype}, not quantized"
    if weights.quant_type == STORED:
        return f"the codes of the file: {session.run.stored_types}; {rest}"
    scales = "double-quantized scales" if weights.double_quant else "float32 scales"
    block = f"blocks of {args.block_size}, {scales}"
    if weights.quant_type == NVFP4:
        block = f"blocks of {NVFP4_GROUP}, e4m3 scales"
    again = f" (quantized again, from {session.run.stored_types}; model.quant_type=stored keeps these codes)"
    twice = again if session.run.stored_types else ""
    return f"{weights.quant_type} in {block}{twice}; {rest}"


def _merged(session: Session) -> Rows:
    """Returns a row on the format of the merged weights that products are with."""
    if (form := session.run.config.lora.merge_into) is None:
        return {}
    first = session.run.first_rounded
    since = f", from step {first + 1:,} on" if first else ""
    return {"merged": f"products are with base and adapter merged and rounded to {form}, as exported{since}"}


def _matmuls(session: Session) -> str:
    """Returns the implementations that multiply by packed weights, and why the preferred ones are not used."""
    device, micro_batch_size = target_device(), session.run.config.train.micro_batch_size
    rows = micro_batch_size // mesh_size(session.run.mesh).devices * max(session.run.inputs.lengths)
    leaves = jax.tree.leaves(session.parts.base, is_leaf=_has_kernel)
    packed, dtype = [leaf for leaf in leaves if _has_kernel(leaf)], session.run.step.weights.dtype
    plain = [leaf for leaf in packed if len(leaf.stack_shape) < 2]
    found = []
    for kind in sorted({type(leaf) for leaf in plain}, key=[*OPS].index):
        ops = OPS[kind]
        assert ops.choice is not None, "only such weights were collected"
        chosen = _chosen([ops.choice(device, rows, dtype, leaf) for leaf in plain if type(leaf) is kind])
        found.append(f"{chosen}, from the weights' blocks" if ops.of_file else chosen)
    if grouped := [leaf for leaf in packed if len(leaf.stack_shape) == 2]:
        experts = session.run.inputs.model.experts
        assert experts is not None, "weights with two leading axes are experts"
        tile = choose_tile(device, rows * experts.per_token, experts.count)
        choices = [grouped_api.choose_implementation(device, "forward", dtype, leaf, tile) for leaf in grouped]
        found.append(f"experts: {_chosen(choices)}, {tile} rows per tile")
    return "; ".join(filter(None, found)) or "XLA, dense weights"


def _has_kernel(leaf: object) -> bool:
    return ops_of(leaf).choice is not None


def _chosen(choices: Sequence[Choice]) -> str:
    """Returns the implementations, and why others before them are not used."""
    names = dict.fromkeys(_shown_name(choice) for choice in choices)
    refusals = dict.fromkeys(
        f"; not {name}: {reason}" for choice in choices for name, reason in choice.refusals.items()
    )
    return ", ".join(names) + "".join(refusals)


def _attention(session: Session) -> str:
    step = session.run.step
    choice = choose_attention(target_device(), step.weights.dtype, step.model.head_dim)
    return "; ".join([_shown_name(choice), *choice.refusals.values()])


def _shown_name(choice: Choice) -> str:
    """Returns an implementation's name; for the C++ loops with their instruction set."""
    return {"cpu": f"C++ ({variant()})", "tiles": "XLA, tiled"}.get(name := str(choice.name), name)


def _unused(config: Config) -> list[str]:
    """Returns the options that are off in this run."""
    options = {
        "quantization": config.model.quant_type == "none",
        "dropout": config.lora.dropout == 0,
        "rematerialization": config.train.remat == "none",
        "gradient clipping": config.optim.max_grad_norm == 0,
        "weight decay": config.optim.weight_decay == 0,
        "held-out rows": config.data.eval is None and config.data.eval_fraction == 0,
        "packing": not config.data.packing,
        "optimizer paging": paging_of(config.optim) == "off",
    }
    return [name for name, off in options.items() if off]


PROGRAM = "qlora-jax"


def next_commands(config: Config, base: JsonObject, *, finished: bool) -> dict[str, str]:
    """Returns commands to type next, quoted for a shell, by their purpose; none that the run's settings refuse.

    Args:
      base: config.json of the base.
    """
    run = shlex.quote(config.output)
    if not finished:
        given = {"reward": config.reward, "tool": config.tool, "environment": filter(None, [config.environment])}
        code = "".join(f" --{flag} {shlex.quote(each)}" for flag, values in given.items() for each in values)
        settings = shlex.quote(str(Path(config.output) / CONFIG_FILE))
        return {"resume": f"{PROGRAM} train --config {settings}{code} --resume"}
    head = head_of(config.objective, (), config.head.pooling)
    found = _use(head, run)
    for form in _forms(config):
        if refusal(config.lora.method, form) is None and head_refusal(head, form, base) is None:
            with_base = " --with_base" if form == "peft" and is_gguf(config.model.path) else ""  # peft loads no GGUF
            return found | {"export": f"{PROGRAM} export --run {run} --format {form}{with_base}"}
    return found


def _forms(config: Config) -> tuple[str, ...]:
    """The formats of an export, the best first: that for the very file whose codes a LoRA was trained on, if it can."""
    if config.lora.merge_into is not None:  # the adapter alone is not the model
        return ("hf",) if config.lora.merge_into in MERGED_FOLDERS else ("gguf",)
    tables = (*config.model.new_tokens, *config.model.new_special_tokens, *config.lora.modules_to_save)
    is_plain = (METHODS[config.lora.method].stored_as or config.lora.method) == "lora" and not tables
    is_served = config.model.quant_type == STORED and is_gguf(config.model.path)
    return ("gguf-lora", "peft", "hf") if is_plain and is_served else ("peft", "hf")


def _use(head: TrainedHead | None, run: str) -> dict[str, str]:
    if head is None:
        return {"try it": f"{PROGRAM} generate --run {run}"}
    return {
        "predict": f"{PROGRAM} predict --run {run} --rows FILE",
        "evaluate": f"{PROGRAM} evaluate --run {run} --{OBJECTIVES[head.objective].task} FILE",
    }
