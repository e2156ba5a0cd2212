"""Reverts each mend of reliability alone: a test must fail without it. `tests/mutation_check.py` runs these, too."""

from tests.mutation import Mutation

MENDS = [
    # Damage that was silent
    Mutation(
        "qlora_jax/data/readers/json_rows.py",
        "if len(found) < len(pairs):",
        "if False:",
        "tests/data/readers/test_json_rows.py",
    ),
    Mutation(
        "qlora_jax/io/run_folder/checkpoint_reader.py",
        "if differences := changes(found, expected or {}):",
        "if differences := changes({}, {}):",
        "tests/io/run_folder/test_checkpoint_reader.py",
    ),
    Mutation(
        "qlora_jax/io/read_back.py",
        "if written.get(name) != found.get(name)]",
        "if written.keys() != found.keys()]",
        "tests/io/test_read_back.py",
    ),
    Mutation("qlora_jax/atomic_files.py", "if stage.read_bytes() != data:", "if False:", "tests/test_atomic_files.py"),
    Mutation(
        "qlora_jax/data/row_store.py",
        '!= facts["files"].get(name):',
        "is None:",
        "tests/data/test_row_store.py",
    ),
    Mutation(
        "qlora_jax/inference/result_cache.py",
        "!= stored[:_DIGEST_BYTES]:",
        "is None:",
        "tests/inference/test_result_cache.py",
    ),
    Mutation(
        "qlora_jax/io/pretrained.py",
        "if chat_template is None and run.template_digest not in",
        "if False and run.template_digest not in",
        "tests/e2e/test_template_date.py",
    ),
    # Damaged checkpoints, and two processes
    Mutation(
        "qlora_jax/io/run_folder/checkpoint.py",
        "if found in (left := saved_steps(path)):",
        "if left := saved_steps(path):",
        "tests/io/run_folder/test_checkpoint_reader.py",
    ),
    Mutation(
        "qlora_jax/io/run_folder/checkpoint.py",
        "            todelete_subdir=REMOVED,\n",
        "",
        "tests/io/run_folder/test_checkpoint.py",
    ),
    Mutation(
        "qlora_jax/io/run_folder/checkpoint.py",
        "if len(damage) > 1:",
        "if len(damage) > 2:",
        "tests/io/run_folder/test_checkpoint.py",
    ),
    Mutation(
        "qlora_jax/io/run_folder/run_lock.py",
        "fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(lock.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "tests/io/run_folder/test_run_lock.py",
    ),
    Mutation(
        "qlora_jax/io/run_folder/run_lock.py",
        "if not _is_open_file(self.file, self.descriptor):",
        "if False:",
        "tests/io/run_folder/test_run_lock.py",
    ),
    Mutation(
        "qlora_jax/studies/record_file.py",
        "if not self._file.is_in_place():",
        "if False:",
        "tests/studies/test_record_file.py",
    ),
    Mutation(
        "qlora_jax/studies/record_file.py",
        "mkdir(exist_ok",
        "mkdir(parents=True, exist_ok",
        "tests/studies/test_record_file.py",
    ),
    Mutation(
        "qlora_jax/evaluation/quantization_cost/files.py",
        "write_text(folder / COSTS_FILE, ",
        "(folder / COSTS_FILE).write_text(",
        "tests/test_atomic_files.py",
    ),
    Mutation(
        "qlora_jax/io/run_folder/checkpoint.py",
        "sync_tree(self.folder / str(step))",
        "self._remove_old(step)",
        "tests/io/run_folder/test_checkpoint.py",
    ),
    # Peers that are slow or endless
    Mutation(
        "qlora_jax/bounded_request.py", "settimeout(seconds)", "settimeout(None)", "tests/test_bounded_request.py"
    ),
    Mutation("qlora_jax/bounded_request.py", "if self._left < 0:", "if False:", "tests/test_bounded_request.py"),
    Mutation(
        "qlora_jax/bounded_request.py",
        "done.result(seconds + LAST_SECONDS)",
        "done.result()",
        "tests/test_bounded_request.py",
    ),
    # Replies that were paired with the wrong prompts
    Mutation(
        "qlora_jax/studies/tournament/replies.py",
        "unknown[name] = row.place",
        "pass",
        "tests/studies/tournament/test_replies.py",
    ),
    # Exit statuses after signals
    Mutation(
        "qlora_jax/config/command_line.py",
        "signal.signal(number, _interrupt)",
        "pass",
        "tests/config/test_command_line.py tests/studies/comparison/test_dispatch.py",
    ),
    Mutation(
        "qlora_jax/config/command_line.py",
        'if frame.f_code.co_filename.startswith("<frozen importlib"):',
        "if False:",
        "tests/config/test_command_line.py",
    ),
    Mutation("qlora_jax/hosts/watchdog.py", "received[0] if received", "15 if received", "tests/e2e/test_kill.py"),
    Mutation(
        "qlora_jax/hosts/watchdog.py",
        "self._minimum(-self._asked())",
        "self._minimum(-(self._asked() > 0))",
        "tests/hosts/test_agreed_minimum.py",
    ),
    # A page whose words were broken
    Mutation(
        "qlora_jax/studies/variance/variance.html.jinja",
        '<div class="scroll">',
        "<div>",
        "tests/studies/variance/test_page.py",
    ),
    Mutation(
        "qlora_jax/studies/variance/variance.html.jinja",
        ".end { white-space: nowrap; }",
        "",
        "tests/studies/variance/test_page.py",
    ),
    # Hints
    Mutation(
        "qlora_jax/inference/terminal_chat.py",
        "if sys.stdin.isatty():",
        "if True:",
        "tests/inference/test_terminal_chat.py",
    ),
    Mutation(
        "qlora_jax/training/display/banner.py",
        "if is_plain and is_served",
        "if is_served",
        "tests/training/display/test_next_commands.py",
    ),
    Mutation(
        "qlora_jax/training/display/banner.py",
        "if is_plain and is_served",
        "if False",
        "tests/training/display/test_next_commands.py",
    ),
    # A step that changes nothing
    Mutation(
        "qlora_jax/training/plan/run_plan.py",
        "if text := short_run_warning(config.optim, total_steps):",
        "if text := None:",
        "tests/e2e/test_report.py",
    ),
    # Programs from strangers
    Mutation(
        "qlora_jax/data/tokenizer/template_worker.py",
        "    seal_if_possible(jinja2)",
        "    pass",
        "tests/data/tokenizer/test_template_process.py",
    ),
    Mutation(
        "qlora_jax/data/tokenizer/template_process.py",
        "env=python_environment()",
        "env={**os.environ, **python_environment()}",
        "tests/data/tokenizer/test_template_process.py",
    ),
    Mutation("qlora_jax/training/loop.py", "= reporter.flush()", "= {}", "tests/e2e/test_training.py"),
    # Records that are lost
    Mutation(
        "qlora_jax/training/metrics/metrics_file.py",
        "if content.startswith(head) and _is_saved(head, saved):",
        "if True:",
        "tests/training/metrics/test_lost_records.py",
    ),
    Mutation("qlora_jax/training/resume.py", "records=saved.get(RECORDS, {}),", "", "tests/e2e/test_resume.py"),
    Mutation("qlora_jax/atomic_files.py", "    if is_new:\n", "    if False:\n", "tests/test_atomic_files.py"),
    Mutation("qlora_jax/atomic_files.py", "in missing:\n", "in []:\n", "tests/test_atomic_files.py"),
    *(
        Mutation("qlora_jax/data/tokenizer/validation.py", old, new, "tests/data/tokenizer/test_validation.py")
        for old, new in (
            ("if (growth := _growth(own)) > MAX_GROWTH:", "if (growth := 0.0) > MAX_GROWTH:"),
            ("if ((blocks | 255)[inner] >= len(units)).any():", "if False:"),
            ("{*_patterns(steps)} <= _known_patterns()", "True"),
            ('if dropout := model.get("dropout"):', "if dropout := None:"),
        )
    ),
    Mutation(
        "qlora_jax/data/tokenizer/tokenizer.py",
        'if type(error).__name__ != "PanicException":',
        "if True:",
        "tests/data/tokenizer/test_validation.py",
    ),
    # Small inputs that take long or need much memory
    Mutation(
        "qlora_jax/data/tokenizer/template_worker.py",
        "resource.RLIMIT_AS: limits.memory,",
        "resource.RLIMIT_AS: 2 * limits.memory,",
        "tests/data/tokenizer/test_template_process.py",
    ),
    Mutation(
        "qlora_jax/data/tokenizer/template_worker.py",
        "if written > allowed:",
        "if written > 1000 * allowed:",
        "tests/data/tokenizer/test_template_process.py",
    ),
    Mutation(
        "qlora_jax/config/yaml_files.py",
        "if event.anchor in (anchor for anchor, _ in opened):",
        "if False:",
        "tests/config/test_yaml_files.py",
    ),
    Mutation(
        "qlora_jax/data/readers/gzip_file.py",
        "if self.tell() > self._max_unpacked:",
        "if False:",
        "tests/data/readers/test_gzip_file.py tests/data/readers/test_files.py",
    ),
    Mutation(
        "qlora_jax/data/readers/gzip_file.py",
        "if members > max(MAX_MEMBERS, size // MIN_MEMBER):",
        "if False:",
        "tests/data/readers/test_gzip_file.py",
    ),
    Mutation("qlora_jax/regex.py", "_parser.parse(pattern)", "re.compile(pattern)", "tests/test_regex.py"),
    Mutation(
        "qlora_jax/regex.py", "size += _compiled(pattern).programsize", "_compiled(pattern)", "tests/test_regex.py"
    ),
    # Errors instead of tracebacks and crashes
    Mutation(
        "qlora_jax/config/yaml_files.py",
        "(ValueError, LookupError, AttributeError, OverflowError)",
        "ValueError",
        "tests/config/test_yaml_files.py",
    ),
    Mutation(
        "qlora_jax/untrusted_json.py", "if _depth(structure) > MAX_DEPTH:", "if False:", "tests/test_untrusted_json.py"
    ),
    Mutation(
        "qlora_jax/data/readers/parquet_rows.py",
        "if read != file.metadata.num_rows:",
        "if False:",
        "tests/data/readers/test_parquet_rows.py",
    ),
    # Texts and links from elsewhere
    Mutation(
        "qlora_jax/training/report/plot.py",
        "axes.set_title(title, parse_math=False)",
        "axes.set_title(title)",
        "tests/training/report/test_plot.py",
    ),
    Mutation(
        "qlora_jax/atomic_files.py",
        "os.O_APPEND | os.O_NOFOLLOW |",
        "os.O_APPEND |",
        "tests/test_atomic_files.py",
    ),
    Mutation(
        "qlora_jax/terminal/visible.py",
        "return text.translate(VISIBLE)",
        "return text",
        "tests/terminal/test_visible.py",
    ),
    Mutation(
        "qlora_jax/terminal/visible.py",
        'return _USERINFO.sub("***@", text)',
        "return text",
        "tests/terminal/test_visible.py",
    ),
    Mutation(
        "qlora_jax/terminal/visible.py",
        "if len(line) <= _LONGEST_LINE:",
        "if True:",
        "tests/config/test_command_line.py",
    ),
    # Tokens
    Mutation(
        "qlora_jax/data/tokenizer/embedding_rows.py",
        "if number >= rows}",
        "if number > rows}",
        "tests/data/tokenizer/test_embedding_rows.py",
    ),
    Mutation(
        "qlora_jax/data/tokenizer/gguf_tokenizer.py",
        'return [SPACE * len(token) if token and set(token) == {" "} else token for token in tokens]',
        "return tokens",
        "tests/data/tokenizer/test_gguf_tokenizer.py",
    ),
    Mutation(
        "qlora_jax/api/export.py",
        "stop_ids(opened.tokenizer, opened.stop_ids, chat=True)",
        "{*opened.stop_ids}",
        "tests/api/test_export.py",
    ),
    Mutation(
        "qlora_jax/data/tokenizer/chat_template.py",
        "if missing:",
        "if False:",
        "tests/data/tokenizer/test_named_templates.py",
    ),
    # Data of a new user
    Mutation(
        "qlora_jax/data/formats/columns.py",
        "return +found",
        "return {}",
        "tests/data/formats/test_chat_like_text.py",
    ),
    # Processors without AVX-512
    Mutation(
        "qlora_jax/nn/lm_head/divergence.py",
        "return lax.optimization_barrier((ours, others))",
        "return ours, others",
        "tests/nn/lm_head/test_divergence.py",
    ),
    Mutation(
        "pallas_kernels/native/build.py",
        "and limit not in variant.hidden_by",
        "and limit in variant.hidden_by",
        "tests/pallas_kernels/native/test_library.py",
    ),
    # Claims that were too wide
    Mutation(
        "qlora_jax/quant/double_quant.py",
        "for _ in range(3):",
        "for _ in range(2):",
        "tests/quant/test_double_quant.py",
    ),
    Mutation(
        "qlora_jax/quant/double_quant.py",
        "lax.optimization_barrier(count) if xp is jnp else count",
        "count",
        "tests/quant/test_double_quant.py",
    ),
    Mutation(
        "qlora_jax/nn/model_quantization.py",
        "for paths in nnx.find_duplicates(model, only=nnx.Variable)",
        "for paths in ()",
        "tests/nn/test_model_quantization.py",
    ),
    # Tried as a new user would
    Mutation(
        "pallas_kernels/native/library.py",
        "if not library_path(found).exists() and (failure := _build_failure(found)):",
        "if not library_path(found).exists() and (failure := BUILD):",
        "tests/pallas_kernels/native/test_library.py",
    ),
    Mutation(
        "qlora_jax/io/hf/hub.py",
        "    before_weights()\n    _snapshot(name, DESCRIPTION)",
        "    _snapshot(name, DESCRIPTION)",
        "tests/e2e/test_hub.py",
    ),
    Mutation(
        "qlora_jax/io/hf/reader.py",
        "model_config(without_drafts(config), str(config_path))",
        "str((config, config_path))",
        "tests/io/hf/test_reader.py",
    ),
    Mutation(
        "qlora_jax/training/resume.py",
        "_refuse(config, state, _changed_settings(config, saved))",
        "_changed_settings(config, saved)",
        "tests/e2e/test_resume.py",
    ),
    Mutation(
        "scripts/bench/train.py",
        '[*command, "--dtype", row.dtype()]',
        '[*command, "--dtype", "bfloat16"]',
        "tests/scripts/bench/test_train.py",
    ),
    Mutation(
        "scripts/bench/support/interleave.py",
        'phase(f"{name}: block {block + 1} of {blocks}")',
        "pass",
        "tests/scripts/bench/support/test_progress.py",
    ),
    Mutation(
        "qlora_jax/data/truncation.py",
        "row.supervised[span[-1] : span[-1] + 2].sum()) == 2",
        "row.supervised[span[-1] : span[-1] + 1].sum()) == 1",
        "tests/data/test_truncation.py",
    ),
    Mutation(
        "qlora_jax/data/readers/files.py",
        'alike.setdefault(_TOKENS.sub("", problem), [])',
        "alike.setdefault(problem, [])",
        "tests/data/test_truncation.py",
    ),
    Mutation(
        "qlora_jax/data/readers/json_rows.py",
        "problem = early if _ends_early(error, text) else",
        "problem =",
        "tests/data/readers/test_json_rows.py",
    ),
    Mutation(
        "qlora_jax/config/parse.py",
        "suggest_section if isinstance(value, Mapping) else suggest_key",
        "suggest_key",
        "tests/config/test_suggestions.py",
    ),
    Mutation(
        "qlora_jax/measures/statistics.py",
        "(values - value) / errors,",
        "(values - value) / error,",
        "tests/measures/test_statistics.py",
    ),
]
