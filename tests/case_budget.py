"""Limits how many cases of a large test run by default and in CI; a release runs all of them (`-m exhaustive`).

`BUDGET` maps a test to (default, CI), and cases are chosen evenly. The first number of them is unmarked, those up to
the second number are marked `slow`, and the others `exhaustive` too. Marks that the test sets itself stay.
"""

from collections import defaultdict
from collections.abc import Iterable

import pytest

NN, KERNELS, AOT = "tests/nn", "tests/pallas_kernels/nf4_matmul", "tests/pallas_kernels/aot"
ATTENTION = "tests/pallas_kernels/attention"

BUDGET: dict[str, tuple[int, int]] = {
    # Formulas held to compiled programs: one case per adapter and rematerialization is enough between releases.
    "tests/training/cost/test_flops.py::test_products_are_exactly_those_of_the_compiled_step": (2, 6),
    "tests/training/cost/test_flops.py::test_each_part_is_its_share_of_the_compiled_step": (3, 8),
    "tests/training/cost/test_flops.py::test_arguments_and_results_are_the_formulas_bytes": (3, 8),
    "tests/training/cost/test_flops.py::test_stacks_between_forward_and_backward_are_the_saved_activations": (3, 8),
    # A mesh of every shape, dtype and rematerialization.
    "tests/training/test_step.py::test_losses_equal_one_device_to_the_bit": (0, 2),
    "tests/training/test_step.py::test_packed_weights_cross_twice_and_nothing_else_is_large": (0, 2),
    # Fifty steps against optax: budgets, schedules and modes.
    "tests/training/test_optimizer_state.py::test_fifty_steps_of_every_mode_equal_the_plain_run": (2, 8),
    "tests/optim/test_pager.py::test_fifty_steps_equal_optax_at_every_budget_and_move_p_minus_c": (2, 5),
    "tests/optim/test_pager.py::test_fifty_steps_equal_optax_with_every_schedule_clipping_and_accumulation": (1, 6),
    "tests/optim/test_pager.py::test_other_transforms_are_tried_and_refused_on_a_difference": (1, 6),
    "tests/optim/test_pager.py::test_trees_whose_leaves_differ_in_length_are_exact": (1, 3),
    "tests/e2e/test_paging.py::test_a_declared_budget_moves_p_minus_c_pages_and_changes_no_bit": (0, 1),
    # Each starts torch; golden files hold the same numbers.
    "tests/optim/test_optax_chain.py::test_learning_rates_and_steps_equal_torch": (0, 1),
    "tests/parity/test_bitsandbytes_optimizers.py::test_parameters_and_states_equal_bitsandbytes": (0, 1),
    # The campaign's sample kills a paged run, too; tiny files of every architecture run in llama.cpp in CI.
    "tests/e2e/test_kill.py::test_a_run_killed_while_a_page_moves_equals_an_uninterrupted_one": (0, 0),
    "tests/parity/test_llama_cpp.py::test_smollm2": (0, 0),
    # No run uses these products: a run gathers whole layers.
    "tests/pallas_kernels/nf4_matmul/test_sharded.py::test_on_eight_devices": (0, 0),
    # Ten losses, each with one or two of the three forms of a batch.
    "tests/parity/test_trl_distillation.py::test_losses_and_gradients_equal_trl": (0, 11),
    # Whole runs.
    "tests/e2e/test_resume.py::test_mixtures_and_windows_resume_to_the_bit": (0, 0),
    "tests/e2e/test_questions.py::test_every_evaluation_has_what_evaluate_says_of_its_checkpoint": (0, 1),
    "tests/e2e/test_questions.py::test_every_method_is_scored_as_evaluate_scores_it": (0, 0),
    "tests/e2e/test_questions.py::test_a_resumed_run_may_ask_others": (0, 0),
    "tests/e2e/test_questions.py::test_pages_change_nothing": (0, 0),
    "tests/e2e/test_new_tokens.py::test_a_resumed_run_equals_an_uninterrupted_one": (0, 1),
    "tests/e2e/test_new_tokens.py::test_whole_tables_train_resume_and_are_paged": (0, 0),
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
    "tests/parity/test_gguf_transformers.py::test_tiny_model": (0, 2),
    "tests/data/test_fuzz.py::test_damaged_parquet_is_read_or_told": (0, 1),
    "tests/data/test_row_store.py::test_rows_that_are_also_trained_on_are_told_from_a_cache_too": (0, 1),
    "tests/data/tokenizer/test_gguf_tokenizer.py::test_each_kind_splits_as_transformers_does": (0, 1),
    "tests/data/loss_mask/test_reference.py::test_encoder_returns_the_reference_rows": (6, 12),
    "tests/inference/test_decode.py::test_ragged_prompts_get_what_the_full_forward_pass_gives": (1, 3),
    "tests/optim/test_optimizers_8bit.py::test_optax_transforms_give_the_state_and_the_parameters_of_a_run": (0, 2),
    "tests/optim/test_paged_transform.py::test_other_transforms_are_equal": (0, 4),
    "tests/optim/test_pager.py::test_norms_of_bf16_gradients_are_the_same_in_every_program": (1, 2),
    # Real models and whole runs; CI has the same contract on a tiny model, or in a smaller run.
    "tests/parity/test_perplexity.py::test_strided_windows_and_letters_are_what_torch_computes": (0, 0),
    "tests/parity/test_generate_transformers.py::test_smollm2": (0, 0),
    "tests/inference/test_result_cache.py::test_killed_again_and_again_it_ends_as_one_that_was_not": (0, 0),
    "tests/e2e/test_paging.py::test_an_8_bit_run_goes_on_paged_or_not_to_the_bit": (0, 0),
    "tests/pallas_kernels/mosaic/test_installation.py::test_a_run_says_at_its_start_what_is_too_old": (0, 0),
    # Attention, by tiles and by each variant of the C++ loops; of these only the best is not slow.
    f"{ATTENTION}/test_contract.py::test_causal": (8, 12),
    f"{ATTENTION}/test_contract.py::test_window": (6, 12),
    f"{ATTENTION}/test_contract.py::test_a_window_that_is_traced": (4, 8),
    f"{ATTENTION}/test_contract.py::test_softcap": (4, 8),
    f"{ATTENTION}/test_contract.py::test_segments": (4, 8),
    f"{ATTENTION}/test_contract.py::test_head_dims": (6, 12),
    f"{ATTENTION}/test_contract.py::test_bfloat16": (4, 12),
    f"{ATTENTION}/test_contract.py::test_large_scores_neither_overflow_nor_vanish": (2, 4),
    f"{ATTENTION}/test_contract.py::test_the_future_has_no_influence": (2, 4),
    f"{ATTENTION}/test_contract.py::test_a_window_of_the_whole_length_is_none": (2, 4),
    f"{ATTENTION}/test_branching.py::test_random_trees": (4, 8),
    f"{ATTENTION}/test_branching.py::test_windows_count_positions_of_the_text": (4, 4),
    f"{ATTENTION}/test_sinks.py::test_bfloat16": (2, 4),
    f"{ATTENTION}/test_cpu.py::test_vmap_and_checkpoint": (0, 1),
    f"{ATTENTION}/test_tiles.py::test_absent_cards_visit_chunks_and_store_no_square": (0, 1),
    # Shapes of adapters and of the head.
    f"{NN}/lm_head/test_cross_entropy.py::test_token_nll_with_rows_that_train": (1, 7),
    f"{NN}/lm_head/test_cross_entropy.py::test_token_nll": (3, 8),
    "tests/methods/test_dora.py::test_dora": (1, 3),
    f"{NN}/test_model_quantization.py::test_nnx_grad_equals_plain_jax": (1, 5),
    f"{NN}/test_model_quantization.py::test_equals_the_model_with_dequantized_kernels": (1, 5),
    f"{NN}/test_model_quantization.py::test_orbax_saves_and_restores": (2, 5),
    f"{NN}/test_model_quantization.py::test_optimizer_under_jit_trains_the_adapters_alone": (2, 5),
    # Kernels by tile, shape and card.
    f"{KERNELS}/test_contract.py::test_values_and_input_gradients": (1, 2),
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
    f"{KERNELS}/mosaic/test_ampere.py::test_the_twin_computes_the_product_without_a_race": (1, 7),
    f"{KERNELS}/mosaic/test_ampere.py::test_a_wrong_index_is_caught": (3, 4),
    f"{KERNELS}/mosaic/test_ampere.py::test_a_missing_wait_and_a_wrong_nibble_are_caught": (3, 4),
    f"{KERNELS}/mosaic/test_ampere.py::test_the_twin_on_every_reduced_shape": (0, 6),
    f"{AOT}/test_mosaic_skinny.py::test_instructions_for_a_weight_are_few": (2, 5),
    f"{AOT}/test_mosaic_ampere.py::test_every_tile_is_lean_machine_code": (2, 8),
    f"{AOT}/test_mosaic_ampere.py::test_ragged_sizes_compile": (1, 3),
    f"{AOT}/test_real_shapes.py::test_real_shapes_are_lean_machine_code": (0, 3),
    f"{AOT}/test_mosaic_step.py::test_a_scanned_step_copies_no_codes_and_makes_no_weight": (0, 1),
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
    f"{NN}/test_flax_page.py::test_the_model_learns_and_its_head_stays_dense": (0, 1),
    f"{NN}/test_model_quantization.py::test_no_dequantized_weight_is_saved_for_backward": (1, 2),
    f"{NN}/test_model_quantization.py::test_dropout_in_a_scanned_stack_draws_per_layer_and_per_call": (0, 1),
    f"{NN}/lm_head/test_cross_entropy.py::test_token_nll_with_bias_and_softcap": (1, 4),
    "tests/evaluation/tasks/test_answers.py::test_replies_are_those_of_a_plain_loop_and_are_cached": (0, 1),
    f"{NN}/test_nf4_linear.py::test_linear_general_equals_the_dense_layer": (1, 8),
    "tests/pallas_kernels/test_dispatch.py::test_compiling_for_an_absent_card_chooses_what_that_card_runs": (1, 2),
    "tests/inference/test_decode.py::test_a_row_does_not_depend_on_its_neighbours": (0, 1),
    "tests/data/loss_mask/test_reference.py::test_the_last_turn_alone_or_all_is_learned": (2, 4),
    "tests/api/test_evaluate.py::test_numbers_equal_those_of_the_command": (0, 1),
    "tests/e2e/test_run_plan.py::test_the_plan_comes_first": (0, 0),
    "tests/optim/test_paged_transform.py::test_updates_equal_those_of_jitted_optax_and_pages_stay_under_the_budget": (
        2,
        6,
    ),
    "tests/e2e/test_notebooks.py::test_the_flax_notebook_learns_its_second_task": (0, 1),
    "tests/parity/test_merged.py::test_a_merge_that_is_off_is_refused_and_leaves_nothing": (0, 1),
    "tests/io/run_folder/test_mesh_checkpoints.py::test_a_checkpoint_of_eight_devices_is_restored_on_others": (1, 2),
    "tests/io/export/test_result.py::test_exporters_print_nothing": (0, 1),
    f"{NN}/lm_head/test_token_scores.py::test_a_frozen_head": (4, 24),
    f"{NN}/lm_head/test_token_scores.py::test_a_head_with_rows_that_train": (1, 6),
    "tests/e2e/test_training.py::test_accumulation_weighs_by_tokens": (0, 1),
    "tests/optim/test_pager.py::test_checkpoints_of_plain_and_paged_runs_are_each_others": (1, 3),
    f"{KERNELS}/mosaic/test_skinny.py::test_the_twin_computes_the_product_without_a_race": (2, 5),
    "tests/scripts/study_paging/test_memory.py::test_the_longest_row_fits_and_the_next_does_not": (0, 1),
    # A second or more each. CI runs them all.
    "tests/e2e/test_paging.py::test_a_run_goes_on_with_another_budget_or_mode": (0, 1),
    f"{NN}/lm_head/test_cross_entropy.py::test_token_nll_with_scaled_logits": (0, 1),
    "tests/data/batching/test_packing.py::test_losses_and_gradients_are_those_of_the_rows_alone": (0, 1),
    "tests/e2e/test_new_tokens.py::test_rows_start_at_the_mean_and_train": (0, 1),
    "tests/parity/test_transformers_logits.py::test_random_models_of_every_feature": (0, 1),
    "tests/e2e/test_template_date.py::test_a_run_resumes_on_another_day_and_notices_another_template": (0, 1),
    "tests/inference/test_decode.py::test_repeated_prompts_draw_anew_and_another_seed_draws_otherwise": (0, 1),
    "tests/inference/test_decode.py::test_more_prompts_than_a_batch_come_back_in_order": (0, 1),
    "tests/inference/test_decode.py::test_prompts_of_several_chunks": (0, 1),
    "tests/evaluation/test_loglikelihood.py::test_rows_of_many_lengths": (0, 1),
    "tests/evaluation/test_loglikelihood.py::test_a_score_does_not_depend_on_its_batch": (0, 1),
    f"{AOT}/test_mosaic_skinny.py::test_warps_wait_before_they_read_each_others_sums": (0, 1),
    f"{AOT}/test_mosaic_skinny.py::test_weights_of_less_than_a_step_compile": (0, 2),
    f"{AOT}/test_mosaic_skinny.py::test_bytes_in_flight_cover_latency_times_bandwidth": (0, 4),
    f"{AOT}/test_mosaic_skinny.py::test_nothing_but_sums_is_written": (0, 2),
    f"{AOT}/test_mosaic_hopper.py::test_integer_units_are_busy_for_less_time_than_tensor_cores": (0, 5),
    f"{AOT}/test_mosaic_hopper.py::test_a_mapped_product_is_one_kernel": (0, 1),
    f"{AOT}/test_collectives.py::test_a_program_for_absent_cards": (0, 1),
    f"{AOT}/test_toolchain.py::test_a_plugin_that_was_refused_once_stays_away": (0, 1),
    "tests/optim/test_optimizers_8bit.py::test_blocks_do_not_cross_from_one_tensor_into_the_next": (0, 1),
    "tests/optim/test_optimizers_8bit.py::test_near_the_same_in_32_bits": (1, 2),
    "tests/optim/test_schedule.py::test_the_first_step_trains_only_from_the_first_share": (1, 4),
    "tests/api/test_end_to_end.py::test_the_callers_models_stay_valid_and_unchanged": (0, 1),
    "tests/test_imports.py::test_public_names_survive_the_import_of_every_submodule": (0, 1),
    "tests/test_imports.py::test_public_names_do_not_initialize_a_backend": (0, 1),
    "tests/config/test_command_line.py::test_the_package_lists_its_commands": (0, 1),
    "tests/e2e/test_mesh.py::test_what_cannot_be_is_refused_before_data_and_weights_are_read": (0, 1),
    "tests/methods/test_oft.py::test_oft": (2, 8),
    "tests/evaluation/tasks/test_labels.py::test_the_likeliest_label_is_predicted": (1, 3),
    "tests/evaluation/tasks/test_pairs.py::test_a_reference_costs_one_more_forward_pass": (0, 1),
    "tests/data/tokenizer/test_gguf_tokenizer.py::test_real_gguf_gives_tokenizer_json_back": (0, 1),
    "tests/api/test_evaluate.py::test_heads_are_evaluated_also_those_of_other_libraries": (0, 1),
    "tests/api/test_evaluate.py::test_plain_text_without_the_chat_template_has_other_scores": (0, 1),
    "tests/studies/tournament/ratings/test_bradley_terry.py::test_with_ties_is_the_log_linear_fit_of_statsmodels": (
        1,
        2,
    ),
    "tests/io/run_folder/test_orbax_threads.py::test_failures_print_no_traceback": (0, 1),
    "tests/models/test_layer_runs.py::test_losses_and_gradients_equal_those_of_zeros_elsewhere": (1, 2),
    f"{NN}/lm_head/test_token_scores.py::test_logits_of_a_16_bit_model_are_not_rounded_to_16_bits": (0, 1),
    "tests/training/test_step.py::test_tables_that_are_cut_change_losses_by_rounding_alone": (0, 1),
    "tests/training/test_corrected_state.py::test_pages_change_no_bit": (0, 2),
    "tests/scripts/campaign/test_isolation.py::test_each_planted_fault_gets_its_verdict": (0, 1),
    "tests/data/readers/test_hub_rows.py::test_a_local_folder_through_the_library": (0, 1),
    "tests/parity/test_merged.py::test_what_is_told": (0, 1),
    "tests/io/hf/test_reader.py::test_reads_what_transformers_wrote": (0, 1),
    "tests/test_generate.py::test_a_prompt_is_answered_on_standard_output": (0, 1),
    f"{KERNELS}/test_contract.py::test_stacks_and_transforms": (2, 4),
    "tests/io/loading/test_mesh_weights.py::test_other_formats": (1, 2),
    "tests/e2e/test_resume.py::test_resuming_otherwise_is_refused_with_each_difference": (0, 1),
    "tests/training/test_step_spec.py::test_the_compiled_program_takes_a_runs_arrays": (0, 1),
    "tests/inference/test_decode.py::test_a_full_context_ends_the_reply_and_says_so": (0, 1),
    "tests/inference/test_decode.py::test_compilations_are_as_many_as_stated": (0, 1),
    "tests/evaluation/test_loglikelihood.py::test_exact_and_begins": (0, 1),
    "tests/models/test_layer_runs.py::test_stacks_have_the_chosen_layers": (0, 1),
    f"{AOT}/test_traps.py::test_an_array_in_host_memory_stays_there": (0, 1),
    f"{AOT}/test_toolchain.py::test_without_a_driver_and_JAX_PLATFORMS_the_variable_is_named": (0, 1),
    "tests/optim/test_paged_transform.py::test_extra_arguments_reach_each_page": (0, 1),
    "tests/data/readers/test_parquet_rows.py::test_a_value_that_all_rows_share_is_in_few_of_them_at_once": (0, 1),
    "tests/test_generate.py::test_the_command_shows_no_traceback": (0, 1),
    "tests/test_predict.py::test_a_file_and_python_get_the_outputs_of_the_head": (0, 1),
    "tests/inference/test_replies.py::test_samples_differ_and_are_cached": (0, 1),
    "tests/e2e/test_paging.py::test_a_long_batch_sends_away_what_it_needs_and_nothing_else_moves": (0, 1),
    "tests/parity/test_mesh_inference.py::test_letters_are_those_of_one_device": (0, 1),
    f"{NN}/lm_head/test_sharded_vocabulary.py::test_token_nll_of_a_head_that_is_cut": (0, 2),
    f"{NN}/lm_head/test_sharded_vocabulary.py::test_token_nll_of_logits_beyond_exp": (0, 1),
    f"{NN}/lm_head/test_cross_entropy.py::test_token_nll_of_logits_beyond_exp": (0, 1),
    "tests/scripts/study_paging/test_policies.py::test_zigzag_moves_p_minus_c_and_nothing_moves_less": (1, 4),
    "tests/training/plan/test_plan_on_a_mesh.py::test_more_cards_keep_the_rows_of_an_optimizer_step": (0, 1),
    "tests/training/plan/test_plan_on_a_mesh.py::test_more_cards_are_proposed_where_no_setting_helps": (0, 1),
    "tests/training/test_step.py::test_each_device_has_its_share": (0, 1),
    # Each takes 20 to 75 s of a processor without AVX-512, and others in CI compare the same with the same oracle.
    **dict.fromkeys(
        (
            "tests/parity/test_peft_methods.py::test_some_layers",
            "tests/parity/test_peft_methods.py::test_families_under_their_own_names",
            "tests/parity/test_peft_initial.py::test_what_is_exported_is_what_was_trained",
            "tests/parity/test_bnb_checkpoints.py::test_layers_that_were_left_in_16_bit_stay_so",
            "tests/parity/test_merged.py::test_gguf_files_from_folders",
            "tests/parity/test_replies.py::test_options_and_answers_are_as_likely_as_torch_finds_them",
            "tests/e2e/test_notebooks.py::test_the_chat_notebook_finetunes_and_answers",
            "tests/e2e/test_training.py::test_rematerialization_changes_memory_and_not_gradients",
            "tests/e2e/test_question_memory.py::test_a_plan_tells_what_questions_need_and_refuses_what_does_not_fit",
            "tests/e2e/test_run_plan.py::test_it_starts_where_it_is_told_to",
            "tests/models/test_offloaded_experts.py::"
            "test_losses_and_gradients_equal_those_on_the_device_if_types_of_blocks_differ",
            "tests/scripts/bench/gpu/test_run.py::test_the_benchmark_rehearses_all_that_it_does_on_a_card",
            "tests/scripts/bench/profile/test_train_step.py::test_bytes_for_an_absent_card",
            "tests/parity/test_gguf_transformers.py::test_smollm2",
            "tests/parity/test_llama_cpp.py::test_architectures_without_a_run",
            "tests/parity/test_peft.py::test_peft_over_the_dequantized_base",
            "tests/hosts/test_processes.py::test_four_processes_of_slurm_train_and_leave_well_although_one_comes_late",
            "tests/training/plan/test_step_memory.py::test_the_update_of_65b_in_8_bits_takes_no_more_scratch_than_it_did",
            "tests/training/test_step_spec.py::test_the_step_of_smollm2_compiles_for_an_h100",
            "tests/training/plan/test_step_memory.py::test_the_step_takes_no_more_than_it_did",
            "tests/parity/test_transformers_logits.py::test_smollm2",
            "tests/e2e/test_merge_into.py::test_a_checkpoint_from_before_the_first_rounded_step_is_not_exported",
            "tests/e2e/test_merge_into.py::test_rounding_may_begin_after_a_share_of_the_steps",
            "tests/e2e/test_rollouts.py::test_a_resumed_run_draws_the_same_replies",
            "tests/e2e/test_verifiers_environments.py::test_an_environment_that_fails_names_the_row",
            "tests/e2e/test_distillation.py::test_completions_in_place_of_replies_have_the_loss_of_supervised_rows",
            "tests/e2e/test_distillation.py::test_packed_runs_read_the_predictions_of_others",
            "tests/e2e/test_preferences.py::test_a_resumed_run_has_the_same_reference_to_the_bit",
            "tests/e2e/test_hub.py::test_every_command_takes_a_name",
            "tests/e2e/test_reasoning_chats.py::test_only_the_held_out_rows_are_trees",
            "tests/parity/test_llama_cpp.py::test_every_dtype",
        ),
        (0, 0),
    ),
    "tests/e2e/test_families.py::test_a_whole_run": (0, 0),
    "tests/e2e/test_resume_bases.py::test_four_steps_are_two_and_two": (1, 1),
    "tests/e2e/test_training.py::test_activations_that_wait_in_host_memory_change_no_bit": (0, 1),
    "tests/training/cost/test_flops.py::test_layers_before_the_first_adapter_have_no_backward_pass": (0, 1),
    "tests/e2e/test_methods.py::test_training_goes_on_from_the_exported_adapter": (0, 1),
    # One case in CI. Methods of each kind are resumed and exported there, too.
    "tests/parity/test_peft_initial.py::test_loftq_begins_as_pefts": (0, 1),
    "tests/e2e/test_methods.py::test_8_bit_state": (0, 1),
    "tests/e2e/test_methods.py::test_pages_change_no_bit": (0, 1),
    "tests/e2e/test_optim_methods.py::test_a_resumed_paged_run_equals_an_uninterrupted_one": (0, 1),
    "tests/training/test_loss_scale.py::"
    "test_steps_that_overflow_change_nothing_and_a_resumed_run_is_equal_to_the_bit": (0, 1),
    f"{AOT}/test_mosaic_codes_of_files.py::test_a_scanned_step_copies_no_codes_and_makes_no_weight": (1, 1),
    f"{AOT}/test_mosaic_ampere.py::test_every_tile_is_lean_machine_code_with_tma": (1, 3),
    "tests/server/test_tools.py::test_a_required_call_has_the_form_of_the_template": (1, 6),
    "tests/e2e/test_report.py::test_a_browser_runs_nothing_and_fits_the_page_with_letters_of_one_size": (0, 4),
    "tests/training/test_step_spec.py::test_steps_of_real_models_compile_for_every_card": (0, 0),
    "tests/training/plan/test_step_memory.py::test_the_estimate_is_near_what_is_compiled_for_a_card": (0, 0),
    "tests/studies/tournament/test_agreement.py::test_kappas_and_correlations_are_those_of_statsmodels_and_scipy": (
        0,
        1,
    ),
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
