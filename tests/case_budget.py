"""Limits how many cases of a large test run by default and in CI; a release runs all of them (`-m exhaustive`).

`BUDGET` maps a test to (default, CI), and cases are chosen evenly. The first number of them is unmarked, those up to
the second number are marked `slow`, and the others `exhaustive` too. Marks that the test sets itself stay.
"""

from collections import defaultdict
from collections.abc import Iterable

import pytest

NN, KERNELS, AOT = "tests/nn", "tests/pallas_kernels/nf4_matmul", "tests/pallas_kernels/aot"

BUDGET: dict[str, tuple[int, int]] = {
    # Formulas held to compiled programs: one case per adapter and rematerialization is enough between releases.
    "tests/training/cost/test_flops.py::test_products_are_exactly_those_of_the_compiled_step": (4, 14),
    "tests/training/cost/test_flops.py::test_each_part_is_its_share_of_the_compiled_step": (8, 14),
    "tests/training/cost/test_flops.py::test_arguments_and_results_are_the_formulas_bytes": (8, 14),
    "tests/training/cost/test_flops.py::test_stacks_between_forward_and_backward_are_the_saved_activations": (8, 14),
    # A mesh of every shape, dtype and rematerialization.
    "tests/training/test_step.py::test_losses_equal_one_device_to_the_bit": (0, 3),
    "tests/training/test_step.py::test_packed_weights_cross_twice_and_nothing_else_is_large": (1, 2),
    # Fifty steps against optax: budgets, schedules and modes.
    "tests/training/test_optimizer_state.py::test_fifty_steps_of_every_mode_equal_the_plain_run": (2, 8),
    "tests/optim/test_pager.py::test_fifty_steps_equal_optax_at_every_budget_and_move_p_minus_c": (2, 5),
    "tests/optim/test_pager.py::test_fifty_steps_equal_optax_with_every_schedule_clipping_and_accumulation": (1, 6),
    "tests/optim/test_pager.py::test_other_transforms_are_tried_and_refused_on_a_difference": (2, 6),
    "tests/optim/test_pager.py::test_trees_whose_leaves_differ_in_length_are_exact": (2, 3),
    "tests/e2e/test_paging.py::test_a_declared_budget_moves_p_minus_c_pages_and_changes_no_bit": (0, 1),
    # Each starts torch; golden files hold the same numbers.
    "tests/optim/test_optax_chain.py::test_learning_rates_and_steps_equal_torch": (0, 1),
    "tests/parity/test_bitsandbytes_optimizers.py::test_parameters_and_states_equal_bitsandbytes": (0, 3),
    # The campaign's sample kills a paged run, too; tiny files of every architecture run in llama.cpp in CI.
    "tests/e2e/test_kill.py::test_a_run_killed_while_a_page_moves_equals_an_uninterrupted_one": (0, 0),
    "tests/parity/test_llama_cpp.py::test_smollm2": (0, 0),
    # No run uses these products: a run gathers whole layers.
    "tests/pallas_kernels/nf4_matmul/test_sharded.py::test_on_eight_devices": (0, 0),
    # Whole runs.
    "tests/e2e/test_training.py::test_mixtures_and_windows_resume_to_the_bit": (0, 1),
    "tests/e2e/test_questions.py::test_every_evaluation_has_what_evaluate_says_of_its_checkpoint": (0, 1),
    "tests/e2e/test_questions.py::test_every_method_is_scored_as_evaluate_scores_it": (0, 1),
    "tests/e2e/test_questions.py::test_a_resumed_run_may_ask_others": (0, 0),
    "tests/e2e/test_questions.py::test_pages_change_nothing": (0, 0),
    "tests/e2e/test_new_tokens.py::test_a_resumed_run_equals_an_uninterrupted_one": (0, 1),
    "tests/e2e/test_new_tokens.py::test_whole_tables_train_resume_and_are_paged": (0, 1),
    "tests/e2e/test_new_tokens.py::test_a_merged_model_holds_them": (0, 1),
    "tests/e2e/test_new_tokens.py::test_a_padded_table_gives_its_rows": (0, 0),
    "tests/e2e/test_full_finetuning.py::test_a_model_written_in_the_dtype_of_training_computes_the_same_to_the_bit": (
        0,
        0,
    ),
    "tests/parity/test_peft.py::test_smollm2_with_its_tokenizer": (0, 0),
    "tests/parity/test_merged.py::test_a_gguf_file": (0, 0),  # tiny files of every architecture run in CI
    "tests/scripts/bench/test_plan_memory.py::test_a_plan_is_within_a_tenth_of_what_a_process_takes": (0, 0),
    "tests/io/loading/test_loader.py::test_every_leaf_is_what_was_on_disk": (2, 3),
    "tests/e2e/test_training.py::test_packed_rows_train_resume_and_waste_little": (0, 1),
    "tests/e2e/test_questions.py::test_a_resumed_run_has_each_record_once": (0, 1),
    "tests/e2e/test_notebooks.py::test_prints_what_it_shows": (0, 1),
    "tests/api/test_docs.py::test_the_examples_run_one_after_the_other": (0, 2),
    "tests/io/loading/test_loader.py::test_host_peak": (0, 1),
    "tests/parity/test_gguf_transformers.py::test_tiny_model": (1, 2),
    "tests/parity/test_peft.py::test_peft_over_the_dequantized_base": (0, 1),
    "tests/data/test_fuzz.py::test_damaged_parquet_is_read_or_told": (0, 1),
    "tests/data/test_row_store.py::test_rows_that_are_also_trained_on_are_told_from_a_cache_too": (0, 1),
    "tests/data/tokenizer/test_from_gguf.py::test_each_kind_splits_as_transformers_does": (0, 1),
    "tests/data/loss_mask/test_reference.py::test_encoder_returns_the_reference_rows": (6, 21),
    "tests/inference/test_decode.py::test_ragged_prompts_get_what_the_full_forward_pass_gives": (1, 3),
    "tests/optim/test_optimizers_8bit.py::test_optax_transforms_give_the_state_and_the_parameters_of_a_run": (0, 2),
    "tests/optim/test_paged_transform.py::test_other_transforms_are_equal": (1, 4),
    "tests/optim/test_pager.py::test_norms_of_bf16_gradients_are_the_same_in_every_program": (1, 2),
    # Shapes of attention, of adapters and of the head.
    f"{NN}/attention/test_causal.py::test_causal": (4, 6),
    f"{NN}/attention/test_causal.py::test_window": (4, 6),
    f"{NN}/attention/test_causal.py::test_a_window_that_is_traced": (3, 4),
    f"{NN}/attention/test_cpu.py::test_causal": (3, 4),
    f"{NN}/attention/test_cpu.py::test_window": (1, 5),
    f"{NN}/attention/test_cpu.py::test_head_dims": (3, 4),
    f"{NN}/attention/test_cpu_f32.py::test_causal": (3, 4),
    f"{NN}/attention/test_cpu_f32.py::test_window": (3, 4),
    f"{NN}/attention/test_cpu_f32.py::test_head_dims": (3, 4),
    f"{NN}/lm_head/test_cross_entropy.py::test_token_nll_with_rows_that_train": (2, 7),
    f"{NN}/lm_head/test_cross_entropy.py::test_token_nll": (5, 8),
    f"{NN}/adapters/test_dora.py::test_dora": (2, 3),
    f"{NN}/test_model_quantization.py::test_nnx_grad_equals_plain_jax": (1, 4),
    f"{NN}/test_model_quantization.py::test_equals_the_model_with_dequantized_kernels": (1, 4),
    f"{NN}/test_model_quantization.py::test_orbax_saves_and_restores": (2, 4),
    f"{NN}/test_model_quantization.py::test_optimizer_under_jit_trains_the_adapters_alone": (2, 4),
    # Kernels by tile, shape and card.
    f"{KERNELS}/test_contract.py::test_values_and_input_gradients": (1, 4),
    "tests/pallas_kernels/test_kernel_report.py::test_reduced_shapes_are_right": (3, 5),
    "tests/pallas_kernels/test_kernel_report.py::test_compiled_products_use_tensor_cores": (0, 1),
    f"{AOT}/test_mosaic_hopper.py::test_every_tile_is_lean_machine_code": (1, 4),
    f"{AOT}/test_mosaic_ampere.py::test_other_units_are_busy_for_less_time_than_tensor_cores": (0, 3),
    f"{AOT}/test_mosaic_step.py::test_a_jax_that_is_too_old_dequantizes_and_leaves_the_product_to_a_library": (0, 2),
    f"{AOT}/test_mosaic_step.py::test_scanned_decoding_copies_no_codes_and_makes_no_weight": (0, 1),
    f"{AOT}/test_mosaic_step.py::test_the_checks_of_a_step_can_fail": (0, 1),
    f"{AOT}/test_real_shapes.py::test_one_real_shape_of_each_kind_of_card": (0, 1),
    f"{KERNELS}/mosaic/test_hopper.py::test_the_twins_compute_the_product_without_a_race": (2, 8),
    f"{KERNELS}/mosaic/test_hopper.py::test_a_wrong_index_map_is_caught": (4, 6),
    f"{KERNELS}/mosaic/test_hopper.py::test_the_twins_on_every_reduced_shape": (0, 6),
    f"{KERNELS}/mosaic/test_ampere.py::test_the_twin_computes_the_product_without_a_race": (2, 7),
    f"{KERNELS}/mosaic/test_ampere.py::test_a_wrong_index_is_caught": (3, 4),
    f"{KERNELS}/mosaic/test_ampere.py::test_a_missing_wait_and_a_wrong_nibble_are_caught": (3, 4),
    f"{KERNELS}/mosaic/test_ampere.py::test_the_twin_on_every_reduced_shape": (0, 6),
    f"{AOT}/test_mosaic_skinny.py::test_instructions_for_a_weight_are_few": (2, 10),
    f"{AOT}/test_mosaic_ampere.py::test_every_tile_is_lean_machine_code": (2, 8),
    f"{AOT}/test_mosaic_ampere.py::test_ragged_sizes_compile": (1, 3),
    f"{AOT}/test_real_shapes.py::test_real_shapes_are_lean_machine_code": (0, 6),
    f"{AOT}/test_mosaic_step.py::test_a_scanned_step_copies_no_codes_and_makes_no_weight": (0, 3),
    f"{AOT}/test_sharded.py::test_kernels_multiply_each_cards_part_and_no_weight_is_made": (0, 1),
    f"{AOT}/test_compile.py::test_every_card_gets_its_own_code_with_tensor_core_products": (1, 4),
    f"{AOT}/test_toolchain.py::test_a_kernel_compiles_after_a_program_that_has_none": (0, 1),
    f"{AOT}/test_toolchain.py::test_either_cure_works": (0, 1),
    f"{AOT}/test_traps.py::test_jax_keeps_the_architecture_of_a_processs_first_mosaic_kernel": (0, 1),
    f"{AOT}/test_traps.py::test_a_mosaic_kernel_is_compiled_for_one_card_after_another": (0, 1),
    f"{AOT}/test_traps.py::test_a_kernel_for_hopper_is_compiled_for_hopper": (0, 1),
    # Smaller tests hold the same by default.
    "tests/e2e/test_paging.py::test_auto_leaves_all_on_a_device_with_room_and_says_what_it_assumes": (0, 1),
    "tests/data/tokenizer/test_chat_template.py::test_text_and_ids_equal_transformers": (0, 1),
    "tests/test_evaluate.py::test_three_models_side_by_side": (0, 1),
    "tests/test_evaluate.py::test_columns_can_be_chosen": (0, 1),
    "tests/api/test_end_to_end.py::test_a_plan_is_an_object_and_a_text": (0, 1),
    "tests/e2e/test_questions.py::test_later_evaluations_compile_nothing": (0, 1),
    "tests/e2e/test_report.py::test_marked_text_is_what_the_mask_decodes_to": (0, 1),
    "tests/e2e/test_new_tokens.py::test_new_tokens_have_ids_of_their_own": (0, 1),
    "tests/e2e/test_new_tokens.py::test_paged_it_is_the_same_run": (0, 1),
    f"{NN}/attention/test_causal.py::test_packed_equals_unpacked": (0, 1),
    f"{NN}/test_flax_page.py::test_the_model_learns_and_its_head_stays_dense": (0, 1),
    f"{NN}/test_model_quantization.py::test_no_dequantized_weight_is_saved_for_backward": (1, 2),
    f"{NN}/test_model_quantization.py::test_dropout_in_a_scanned_stack_draws_per_layer_and_per_call": (0, 1),
    f"{NN}/lm_head/test_cross_entropy.py::test_token_nll_with_bias_and_softcap": (2, 4),
    "tests/evaluation/tasks/test_answers.py::test_replies_are_those_of_a_plain_loop_and_are_cached": (0, 1),
    f"{NN}/test_nf4_linear.py::test_linear_general_equals_the_dense_layer": (3, 8),
    f"{KERNELS}/test_dispatch.py::test_compiling_for_an_absent_card_chooses_what_that_card_runs": (1, 2),
    "tests/inference/test_decode.py::test_a_row_does_not_depend_on_its_neighbours": (0, 1),
    "tests/data/loss_mask/test_reference.py::test_the_last_turn_alone_or_all_is_learned": (2, 4),
    "tests/api/test_evaluate.py::test_numbers_equal_those_of_the_command": (0, 1),
    "tests/e2e/test_run_plan.py::test_the_plan_comes_first": (0, 1),
    "tests/optim/test_paged_transform.py::test_updates_equal_those_of_jitted_optax_and_pages_stay_under_the_budget": (
        3,
        6,
    ),
    "tests/e2e/test_notebooks.py::test_the_flax_notebook_learns_its_second_task": (0, 1),
    f"{NN}/attention/test_causal.py::test_large_scores_neither_overflow_nor_vanish": (1, 2),
    f"{NN}/attention/test_causal.py::test_segments": (3, 6),
    f"{NN}/attention/test_causal.py::test_softcap": (2, 4),
    "tests/parity/test_merged.py::test_a_merge_that_is_off_is_refused_and_leaves_nothing": (0, 1),
    "tests/io/run_folder/test_mesh_checkpoints.py::test_a_checkpoint_of_eight_devices_is_restored_on_others": (1, 2),
    "tests/io/export/test_result.py::test_exporters_print_nothing": (0, 1),
    f"{NN}/lm_head/test_token_scores.py::test_a_frozen_head": (8, 24),
    f"{NN}/lm_head/test_token_scores.py::test_a_head_with_rows_that_train": (3, 6),
    "tests/e2e/test_training.py::test_accumulation_weighs_by_tokens": (0, 1),
    "tests/optim/test_pager.py::test_checkpoints_of_plain_and_paged_runs_are_each_others": (1, 3),
    f"{KERNELS}/mosaic/test_skinny.py::test_the_twin_computes_the_product_without_a_race": (2, 5),
    "tests/scripts/study_paging/test_memory.py::test_the_longest_row_fits_and_the_next_does_not": (0, 1),
}


def mark_cases(items: Iterable[pytest.Item]) -> None:
    """Adds marks to the cases of the tests in `BUDGET`; cases that are exhaustive already do not count."""
    by_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in BUDGET and not item.get_closest_marker("exhaustive"):
            by_test[name].append(item)
    for name, cases in by_test.items():
        default, ci = BUDGET[name]
        in_ci = spread(len(cases), ci)
        unmarked = [in_ci[index] for index in spread(len(in_ci), default)]
        for index, item in enumerate(cases):
            if index not in unmarked:
                item.add_marker(pytest.mark.slow)
            if index not in in_ci:
                item.add_marker(pytest.mark.exhaustive)


def spread(count: int, limit: int) -> list[int]:
    """Returns up to `limit` of `count` indices, the first included, evenly spread."""
    limit = min(count, limit)
    return [index * count // limit for index in range(limit)]
