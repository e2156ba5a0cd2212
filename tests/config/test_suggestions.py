"""Suggestions for other trainers' settings: all at once, each with what replaces it."""

import re
import shlex

import pytest

from qlora_jax import evaluate, generate, train
from qlora_jax.config import Config, ConfigError, read_arguments
from qlora_jax.config.other_trainers import REPLACEMENTS, Replacement
from qlora_jax.config.parse import from_dict, walk_settings

KEYS = [key for key, _, _ in walk_settings(Config)]

# scripts/finetune_guanaco_7b.sh of artidoro/qlora 7f4e95a.
REFERENCE = """
    --model_name_or_path huggyllama/llama-7b --use_auth --output_dir ./output/guanaco-7b --logging_steps 10
    --save_strategy steps --data_seed 42 --save_steps 500 --save_total_limit 40 --evaluation_strategy steps
    --eval_dataset_size 1024 --max_eval_samples 1000 --per_device_eval_batch_size 1 --max_new_tokens 32
    --dataloader_num_workers 1 --group_by_length --logging_strategy steps --remove_unused_columns False --do_train
    --do_eval --do_mmlu_eval --lora_r 64 --lora_alpha 16 --lora_modules all --double_quant --quant_type nf4 --bf16
    --bits 4 --warmup_ratio 0.03 --lr_scheduler_type constant --gradient_checkpointing --dataset oasst1
    --source_max_len 16 --target_max_len 512 --per_device_train_batch_size 1 --gradient_accumulation_steps 16
    --max_steps 1875 --eval_steps 187 --learning_rate 0.0002 --adam_beta2 0.999 --max_grad_norm 0.3 --lora_dropout 0.1
    --weight_decay 0.0 --seed 0 --optim paged_adamw_32bit
"""


def problems_of(words: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read_arguments(words)
    return error.value.problems


def test_every_suggested_key_is_a_setting():
    for name, found in REPLACEMENTS.items():
        key, note = (found, "") if isinstance(found, str) else found
        assert key in KEYS or (key is None and note), name
        assert name not in KEYS, name


def test_keys_in_notes_are_settings():
    sections = {key.partition(".")[0] for key in KEYS}
    notes = [found.note for found in REPLACEMENTS.values() if isinstance(found, Replacement)]
    named = [name for note in notes for name in re.findall(r"\b[a-z]+\.[a-z_]+\b", note)]
    assert {name for name in named if name.partition(".")[0] in sections} <= set(KEYS)


def test_the_command_of_the_reference_is_answered_flag_by_flag():
    words = shlex.split(REFERENCE)
    flags = [word.removeprefix("--") for word in words if word.startswith("--")]
    problems = problems_of(words)
    assert [problem.split(":")[0] for problem in problems] == flags
    assert all("did you mean" in problem or "remove it" in problem for problem in problems)
    assert "double_quant: unknown setting; did you mean model.double_quant? (command line)" in problems
    assert any(
        problem.startswith("optim: found 'paged_adamw_32bit', ") and "optim.name" in problem for problem in problems
    )


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("finetuning_type", "did you mean lora.method (lora, lora_fa, dora, ia3, "),
        ("peft_type", "pfeiffer or full)?"),
        ("lora_target", "did you mean lora.target_modules ("),
        ("quantization_bit", "did you mean model.quant_type (nf4, fp4 or int4 for 4 bits"),
        ("stage", "did you mean objective (sft, dpo, kto, or reward for rm"),
        ("pref_loss", "did you mean preference.loss_type (orpo and simpo are objectives)?"),
        ("simpo_gamma", "did you mean preference.simpo_gamma?"),
        ("ref_model", "; remove it: the reference is the model that the run starts with"),
        ("do_train", "; remove it: this command trains"),
        ("warmup_steps", "did you mean optim.warmup_ratio (a fraction of all steps, not a number of steps"),
        ("sample_packing", "did you mean data.packing?"),
        ("template", "did you mean data.chat_template (a jinja file"),
        ("lora-r", "did you mean lora.rank?"),
        ("train.lora_r", "did you mean lora.rank?"),
    ],
)
def test_settings_of_other_trainers_are_answered(name: str, answer: str):
    (problem,) = problems_of(["--model", "m", "--data.train", "t", "--output", "o", f"--{name}", "1"])
    assert problem.startswith(f"{name}: unknown setting; ") and answer in problem


# Names in the examples of each project.
AXOLOTL = """base_model model_type tokenizer_type load_in_8bit load_in_4bit strict datasets dataset_prepared_path
    val_set_size output_dir adapter lora_model_dir sequence_len sample_packing eval_sample_packing pad_to_sequence_len
    lora_r lora_alpha lora_dropout lora_target_linear lora_target_modules lora_modules_to_save peft_use_dora
    peft_use_rslora wandb_project wandb_entity wandb_name gradient_accumulation_steps micro_batch_size num_epochs
    optimizer lr_scheduler learning_rate train_on_inputs group_by_length bf16 fp16 tf32 gradient_checkpointing
    gradient_checkpointing_kwargs resume_from_checkpoint local_rank logging_steps xformers_attention flash_attention
    warmup_steps warmup_ratio evals_per_epoch saves_per_epoch weight_decay special_tokens deepspeed fsdp chat_template
    early_stopping_patience roles_to_train save_safetensors rl rl_beta orpo_alpha simpo_gamma cpo_alpha
    kto_desirable_weight kto_undesirable_weight dpo_label_smoothing"""
LLAMA_FACTORY = """model_name_or_path stage do_train finetuning_type lora_rank lora_alpha lora_dropout lora_target
    quantization_bit quantization_method double_quantization dataset dataset_dir template cutoff_len max_samples
    overwrite_cache preprocessing_num_workers dataloader_num_workers output_dir logging_steps save_steps plot_loss
    overwrite_output_dir save_only_model report_to per_device_train_batch_size gradient_accumulation_steps learning_rate
    num_train_epochs lr_scheduler_type warmup_ratio bf16 ddp_timeout resume_from_checkpoint val_size
    per_device_eval_batch_size eval_strategy eval_steps flash_attn train_on_prompt mask_history neat_packing packing
    use_rslora use_dora pissa_init additional_target adapter_name_or_path trust_remote_code enable_liger_kernel
    pref_beta pref_loss pref_ftx ref_model ref_adapters kto_chosen_weight kto_rejected_weight simpo_gamma"""
TRL = """beta loss_type label_smoothing loss_weights reference_free precompute_ref_log_probs precompute_ref_batch_size
    sync_ref_model f_divergence_type ld_alpha use_weighting disable_dropout max_length max_prompt_length
    max_completion_length truncation_mode padding_free desirable_weight undesirable_weight cpo_alpha simpo_gamma
    generate_during_eval"""
UNSLOTH = """model_name max_seq_length dtype load_in_4bit load_in_8bit full_finetuning token r target_modules lora_alpha
    lora_dropout bias use_gradient_checkpointing random_state use_rslora loftq_config dataset_text_field
    dataset_num_proc packing"""
TRANSFORMERS = """output_dir overwrite_output_dir do_train do_eval eval_strategy evaluation_strategy
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps
    learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps
    lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps logging_dir logging_strategy logging_steps
    save_strategy save_steps save_total_limit save_safetensors seed data_seed bf16 fp16 tf32 local_rank
    dataloader_num_workers dataloader_pin_memory run_name disable_tqdm remove_unused_columns load_best_model_at_end
    metric_for_best_model greater_is_better deepspeed fsdp optim group_by_length report_to ddp_find_unused_parameters
    gradient_checkpointing gradient_checkpointing_kwargs push_to_hub resume_from_checkpoint torch_compile
    neftune_noise_alpha label_smoothing_factor"""


@pytest.mark.parametrize("names", [AXOLOTL, LLAMA_FACTORY, TRL, UNSLOTH, TRANSFORMERS])
def test_every_common_name_of_another_trainer_is_answered(names: str):
    last = {key.rpartition(".")[2] for key in KEYS}
    assert [name for name in names.split() if name not in REPLACEMENTS and name not in last] == []


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training", "the section train"),
        ("trian", "the section train"),
        ("optimiser", "the section optim"),
        ("datasets", "the section data"),
        ("peft", "the section lora"),
        ("column_map", "data.columns"),  # a setting that is a mapping
        ("data.colums", "data.columns"),
    ],
)
def test_settings_under_an_unknown_name_get_the_section_that_was_meant(key: str, meant: str):
    section, _, name = key.rpartition(".")
    below = {name: {"steps": 3}}
    with pytest.raises(ConfigError) as error:
        from_dict(Config, {section: below} if section else below)
    assert f"{key}: unknown setting; did you mean {meant}?" in error.value.problems
    with pytest.raises(ConfigError, match=r"training: unknown setting; did you mean data\.train\?"):
        from_dict(Config, {"training": "rows.jsonl"})


def test_a_required_setting_is_not_missing_under_another_name():
    with pytest.raises(ConfigError) as error:
        from_dict(Config, {"base_model": "m", "datasets": "t", "output": "o"})
    assert [problem.split(":")[0] for problem in error.value.problems] == ["base_model", "datasets"]


def test_problems_of_words_and_of_settings_are_reported_together():
    problems = problems_of(["llama", "--data.packing", "--lora_r", "8", "--lora.rank", "x", "--model.path"])
    assert problems == [
        "llama: found a value without a name; write --model.path llama",
        "--data.packing: its value is missing; write --data.packing true",
        "--model.path: its value is missing; write --model.path VALUE",
        "lora_r: unknown setting; did you mean lora.rank? (command line)",
        "lora.rank: found 'x', expected a whole number (command line)",
    ]


def test_commands_without_sections_suggest_their_own_names():
    for command, name, ours in (
        (generate, "model_name_or_path", "model"),
        (evaluate, "bnb_4bit_quant_type", "quant_type"),
        (evaluate, "template", "chat_template"),
    ):
        with pytest.raises(ConfigError, match=f"{name}: unknown setting; did you mean {ours}[ ?]"):
            command.COMMAND.read([f"--{name}", "x"])
    with pytest.raises(ConfigError, match="do_train: unknown setting; --help all"):
        generate.COMMAND.read(["--model", "m", "--do_train"])


def test_names_of_columns_are_another_setting_than_the_models_to_score():
    expected = "columns: found {'question': 'problem'}, expected a list of text or null; did you mean file_columns[?]"
    with pytest.raises(ConfigError, match=expected):
        evaluate.COMMAND.read(["--model", "m", "--answers", "q.jsonl", "--columns", "{question: problem}"])
    (problem,) = problems_of(["--model", "m", "--data.train", "t", "--output", "o", "--data.columns", "{prompt: 3}"])
    assert "file_columns" not in problem


def test_a_flag_of_ours_is_still_a_flag():
    words = ["--model", "m", "--data.train", "t", "--output", "o", "--resume"]
    assert train.COMMAND.read(words)[1] == {"resume"}
