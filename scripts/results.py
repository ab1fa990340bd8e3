"""Every figure that the plans of this project promised, one row each, and whether it is met: docs/results.md.

    python scripts/results.py            prints what is not met
    python scripts/results.py --write    writes docs/results.md, and its summary and the benchmark's table in README.md

A row names its source (``study/promises.py``) and its bound; what was measured and whether that is enough is read or
counted, so a figure changes here by running what makes it. A test makes the page anew and compares.
"""

import argparse
from collections.abc import Mapping, Sequence

from study.figures import (
    CPU,
    LISA,
    LISA_STUDY,
    LONG,
    LORAM,
    LORAPRUNE,
    S2,
    STREAM,
    STREAMED_70B,
    counted,
    delta_gain,
    last_quarter,
    ledger_line,
    lisa_seeds,
    loram_share,
    loram_shares,
    loraprune_seeds,
    of_file,
    on_card,
    over_loraprune,
    planned,
    ratios_of_loraprune,
    resident_layers,
    slow,
    tested,
)
from study.promises import ROOT, Row, at_least, at_most, below, cases, exactly, missed, read, summary, table
from study.record import put_between_marks

SHARE, TIMES, SECONDS, SIZE, MIB, WHOLE = "{:.1%}", "{:.3f}x", "{:,.0f} s", "{:.2f} GiB", "{:,.0f} MiB", "{:,.0f}"
PAGE, README = ROOT / "docs/results.md", ROOT / "README.md"

A = [
    slow("`scripts/quickstart.sh` from a fresh clone, two cores", at_most(360, SECONDS), "quickstart, seconds"),
    slow("its evaluation loss falls", at_least(0.25, SHARE), "quickstart, loss"),
    tested("`effitrain run` alone, offline: evaluation loss falls", "25 % in 120 s of CPU",
           "end_to_end/test_first_commands.py::test_run_alone_teaches_the_built_in_model"),
    slow("`scripts/test.sh` (ruff, mypy, tests) from a fresh clone", at_most(720, SECONDS), "test.sh, seconds")
    .because("On a machine half as fast as the one before, where it took 555 s; within the 15 minutes of the design."),
    slow("stories3M learns Alpaca in 60 steps: evaluation loss falls", at_least(0.15, SHARE), "Alpaca"),
    slow("the same on GSM8K text", at_least(0.4, SHARE), "GSM8K"),
    tested("a run writes every file of the contract", "all",
           "end_to_end/test_run.py::test_every_file_of_the_contract_is_there_and_no_other"),
    tested("stock peft on stock transformers gives the adapter's logits, fp32 and NF4", "1e-4",
           "end_to_end/test_real_data.py::test_stock_peft_gives_the_same_logits"),
    tested("30 steps lose like transformers + peft + AdamW, with and without accumulation", "1e-4",
           "train/test_loop.py::test_thirty_steps_of_a_plain_peft_loop"),
    tested("one batch of 8 is 8 of 1", "1e-5", "train/test_loop.py::test_one_batch_of_eight_is_eight_of_one"),
    tested("a changed sample leaves the logits of its neighbours alone", "every bit",
           "model/test_decoder.py::test_perturbing_one_segment_leaves_the_others_bit_identical"),
    tested("packed and unpacked losses agree", "1e-5", "train/test_loop.py::test_packed_and_unpacked_losses_agree"),
    tested("every format trains from a real file", "all",
           "end_to_end/test_real_data.py::test_a_real_file_of_every_format_trains"),
    slow("kill -9 and resume leave the same adapter", at_least(20, WHOLE), "kills of a run"),
    tested("the same after 3 kills", "every bit", "end_to_end/test_kill.py::test_kill_9_at_any_moment_costs_nothing"),
    tested("logits of stock Llama, Mistral, Qwen2, Qwen3", "every bit",
           "model/test_decoder.py::test_logits_of_stock_transformers_bit_for_bit"),
    tested("tied, untied and `lm_head`-only files load", "all",
           "model/test_decoder.py::test_real_models_and_tied_files_with_only_a_head"),
    tested("`--help` answers without torch", "0.5 s of CPU", "test_house.py::test_help_answers_in_half_a_second",
           "test_house.py::test_starting_up_loads_nothing_heavy"),
    counted("bad inputs that give one message and exit 2 or 3", at_least(40, WHOLE), "pytest tests/cli -k bad",
            lambda: cases("cli/test_bad_inputs.py", "USAGE", "DATA", "TOO_SMALL")
            + cases("cli/test_bad_folders.py", "MODEL", "FOLDERS")),
    of_file("tokens/s over Trainer + peft, 100M shape on a CPU", at_least(1.2, TIMES), CPU,
            "ratios/effitrain/tokens_per_second"),
    of_file("step memory over Trainer + peft", at_most(0.75, TIMES), CPU, "ratios/effitrain/memory"),
    of_file("tokens/s with recomputation", at_least(0.85, TIMES), CPU, "ratios/effitrain_recompute/tokens_per_second"),
    of_file("step memory with recomputation", at_most(0.5, TIMES), CPU, "ratios/effitrain_recompute/memory"),
    of_file("the same loss curve, relative", at_most(1e-3, "{:.0e}"), CPU,
            "ratios/effitrain/largest_relative_loss_difference"),
    tested("lines of the largest file", "under 400", "test_house.py::test_no_file_is_long"),
]  # fmt: skip

B = [
    tested("`plan` for a 70B without torch", "1 s of CPU",
           "core/test_plan.py::test_planning_is_quick_and_needs_no_torch"),
    planned("NF4 linears of a 70B", exactly(35_311_779_840, WHOLE + " B"),
            "--model llama-70b --fit resident", ledger_line("frozen linears")),
    planned("adapters of rank 16 on all linears of a 70B, weights", exactly(207_093_760, WHOLE),
            "--model llama-70b --fit resident", lambda plan: ledger_line("adapter weights")(plan) / 4),
    tested("resident is refused at 20 and 24 GiB", "both",
           "core/test_plan.py::test_llama_70b_is_refused_at_20_and_24_gib"),
    tested("figures of streaming and pruning a 70B agree with published ones", "10 %",
           "core/test_plan.py::test_ways_of_a_70b_agree_with_the_published_estimate"),
    slow("combinations of model, way, length and optimizer off the step on shapes by more than 3 %",
         exactly(0, WHOLE), "proof, off"),
    tested("a covering part of them", "3 %",
           "train/test_proof.py::test_predicted_peaks_are_within_three_percent_of_the_step_run_on_shapes"),
    slow("what CI takes for that part, CPU time", at_most(90, SECONDS), "proof in CI, CPU seconds"),
    tested("twins of 8-bit AdamW have its bytes", "exactly",
           "train/test_proof.py::test_the_twin_of_the_8bit_optimizer_has_its_states"),
    tested("prediction against a real CPU step, stories3M and 100M", "5 %",
           "train/test_proof.py::test_predicted_peaks_are_within_five_percent_of_a_real_step",
           "train/test_proof.py::test_the_same_of_a_hundred_million_parameters"),
    tested("8B at 8,192 tokens: no tensor of tokens x vocabulary, no fp32 copy of a frozen one", "none",
           "train/test_proof.py::test_no_logits_of_all_tokens_and_no_fp32_copy_of_a_frozen_tensor"),
    tested("one byte too small is refused with the shortfall and a way out", "1 B",
           "core/test_plan.py::test_one_byte_too_little_is_refused_with_the_shortfall_and_the_way_out"),
    tested("a budget that the probe disproves never starts training", "0 steps",
           "end_to_end/test_budget.py::test_a_budget_that_nothing_keeps_never_starts_training"),
    tested("peak grows with tokens, rank, layers; a larger budget gives no worse plan; fixed choices stay", "always",
           "core/test_plan.py::test_peak_grows_with_tokens_rank_and_layers",
           "core/test_plan.py::test_a_larger_budget_never_gives_a_worse_plan",
           "core/test_plan.py::test_fixed_choices_survive"),
    tested("README's memory table is the script's", "to the letter",
           "scripts/test_results.py::test_the_memory_table_is_that_of_its_script"),
    tested("the report shows predicted beside measured", "both", "report/test_html.py::test_says_what_was_measured"),
    on_card("measured against predicted peaks under caps of 8 to 20 GiB", "reported"),
]  # fmt: skip

C = [
    slow("streamed steps bit-identical to resident under delays, seeds", at_least(200, WHOLE), "streamed seeds"),
    tested("20 of them; any number of resident layers, 1 to 3 slots; stories3M", "every bit",
           "stream/test_streamer.py::test_random_models_placements_and_delays",
           "stream/test_streamer.py::test_any_number_of_resident_layers", "stream/test_streamer.py::test_a_real_model"),
    tested("a slot released early is caught", "always",
           "stream/test_streamer.py::test_a_slot_released_early_is_caught_and_would_be_wrong"),
    tested("bytes copied a step are those of the plan of holds", "exactly",
           "stream/test_streamer.py::test_bytes_copied_are_those_of_the_plan",
           "stream/test_schedule.py::test_number_of_copies"),
    tested("weight bytes from the device to the host", "0",
           "stream/test_streamer.py::test_what_waits_on_the_host_is_never_written"),
    tested("allocations in steady state, and `report.json` says so", "0",
           "stream/test_memory.py::test_no_storage_is_made_in_steady_state",
           "end_to_end/test_stream.py::test_run_eval_and_chat"),
    of_file("copies of 0.8 of a layer's forward: step over resident", at_most(1.15, TIMES), STREAM, "hidden/ratio"),
    of_file("copies of 3 times the step's forward: layer order is faster", at_least(2, TIMES), STREAM,
            "orders/speedup"),
    of_file("streaming, copies of 3 times one micro-batch's forward: layer order is faster", at_least(2, TIMES), STREAM,
            "orders_of_one/speedup").because("Computing bounds it: `benchmarks/slow_checks.md`."),
    planned("peak of a streamed 70B, no layer resident, 2,048 tokens", at_most(9.2, SIZE), STREAMED_70B + "2048"),
    planned("the same at 8,192 tokens", at_most(12, SIZE), STREAMED_70B + "8192"),
    tested("both by the step run on shapes", "9.2 and 12.0 GiB",
           "train/test_proof.py::test_a_streamed_70b_takes_what_is_promised"),
    planned("resident layers of a 70B at 20 GiB, samples of 4,096 one by one", at_least(20, WHOLE),
            "--model llama-70b --gpu-mem 20G --max-seq-len 4096 --batch-size 1", resident_layers),
    planned("resident layers of a 70B at 20 GiB and 4,096 tokens, micro-batch by the plan", at_least(20, WHOLE),
            "--model llama-70b --gpu-mem 20G --max-seq-len 4096", resident_layers)
    .because("It takes four samples at once, which it has 2 % faster than 25 layers that stay."),
    tested("the peak does not grow with the layers", "exactly",
           "core/test_choices.py::test_the_peak_of_streaming_does_not_grow_with_the_layers"),
    slow("building a 1B store from bf16, above torch", at_most(1536, MIB), "store from bf16, MiB"),
    slow("the same from fp32", at_most(1536, MIB), "store from fp32, MiB"),
    slow("kills after which the store is byte-identical", at_least(10, WHOLE), "kills of a store"),
    tested("the same after 2; a flipped byte is named; a full disk leaves nothing half-written", "all",
           "stream/test_build.py::test_kill_9_at_any_moment_costs_nothing",
           "io/test_store.py::test_a_flipped_byte_is_named",
           "stream/test_build.py::test_a_full_disk_leaves_nothing_half_written"),
    tested("stopping, resuming, evaluating streamed equal resident", "every bit",
           "end_to_end/test_stream.py::test_a_stopped_run_goes_on_to_the_same_bytes",
           "end_to_end/test_stream.py::test_run_eval_and_chat"),
    tested("a 405B within 24 and 64 GiB: a plan by way of the disk, and its tokens at 7 GB/s", "fits",
           "core/test_plan.py::test_a_405b_streams_from_the_disk"),
    slow("1B shape with 2 GiB of host memory: adapters of the same bytes", exactly(3, WHOLE), "2 GiB of host memory"),
    tested("the same in small", "every bit", "end_to_end/test_stream.py::test_short_host_memory_reads_from_disk"),
    on_card("8B streamed against resident: loss and gradients", "every bit"),
    on_card("70B at a cap of 20 GiB: peak, tokens/s, copy and compute time", "reported"),
]  # fmt: skip

D = [
    tested("parameter counts of pruned models, five rows at 70B and one at 13B", "to the digit",
           "core/test_cut.py::test_published_parameter_counts_to_the_digit"),
    planned("a 70B pruned by 0.85, 2,048 tokens, rank 16", at_most(16.2, SIZE),
            "--model llama-70b --fit prune --prune-ratio 0.85 --max-seq-len 2048 --batch-size 1 --optimizer adamw"),
    tested("planner rows for 0.5, 0.65, 0.75, 0.85, 0.95", "all",
           "end_to_end/test_prune.py::test_planner_rows_for_every_ratio_of_the_table"),
    tested("a 70B pruned by 0.85 fits 12 and 8 GiB streamed", "both",
           "end_to_end/test_prune.py::test_70b_at_085_fits_and_streams_where_that_is_not_enough"),
    tested("masked model = cut model", "1e-5", "pruning/test_cut.py::test_cut_is_masked"),
    tested("gradients of the small adapter are slices of the masked full model's", "1e-4",
           "pruning/test_recover.py::test_gradients_equal_those_of_the_masked_full_model"),
    tested("prune, recover, prune returns the factors", "every bit",
           "pruning/test_recover.py::test_the_update_stands_in_the_kept_slices_alone",
           "adapters/test_contract.py::test_recovery_scatters_along_named_axes"),
    tested("ratio 0 is plain QLoRA", "every bit", "end_to_end/test_prune.py::test_ratio_zero_is_plain_qlora"),
    tested("a planted query head brings its KV group to the top", "always",
           "pruning/test_score.py::test_a_planted_query_head_brings_its_kv_group_to_the_top"),
    tested("streamed cut and Taylor scores equal those in memory", "every bit",
           "pruning/test_cut.py::test_the_folder_holds_the_view_byte_for_byte_and_loads",
           "pruning/test_score.py::test_streamed_taylor_is_bit_for_bit_that_of_a_resident_model"),
    slow("cutting the 1B shape, above torch", at_most(1536, MIB), "cut, MiB"),
    tested("a cut survives kill -9", "always",
           "pruning/test_cut_process.py::test_a_kill_leaves_nothing_under_the_targets_name_and_the_next_cut_cleans_up"),
    of_file("LoRAM's share of the gain, `ffn` 0.25, mean of seeds", at_least(0.94, "{:.3f}"), LORAM,
            loram_share("ffn", "none", 0.25)),
    of_file("the same, `ffn` 0.5", at_least(0.85, "{:.3f}"), LORAM, loram_share("ffn", "none", 0.5)),
    of_file("the same, `ffn` 0.5 aligned", at_least(0.9, "{:.3f}"), LORAM, loram_share("ffn", "lsq", 0.5)),
    of_file("the same, `ffn` 0.75 aligned", at_least(0.75, "{:.3f}"), LORAM, loram_share("ffn", "lsq", 0.75)),
    of_file("seeds of pruned KV groups beside it, `ffn+kv` 0.5 aligned", at_least(3, WHOLE), LORAM,
            lambda known: len(loram_shares(known["runs"])["ffn+kv", "wanda", "lsq", 0.5])),
    of_file("LoRAPrune's perplexity over magnitude's, half of stories3M", below(1, TIMES), LORAPRUNE,
            over_loraprune("magnitude")),
    of_file("LoRAPrune's perplexity over Wanda's, half of stories3M", below(1, TIMES), LORAPRUNE,
            over_loraprune("wanda")).because("`docs/pruning.md` says what was found."),
    of_file("fewest seeds of LoRAPrune, Wanda, magnitude, Taylor", at_least(3, WHOLE), LORAPRUNE, loraprune_seeds),
    of_file("ratios from 0.2 to 0.7 at which LoRAPrune and one-shot pruning were measured",
            at_least(6, WHOLE), LORAPRUNE, ratios_of_loraprune)
    .because("`scripts/study_loraprune.py -o docs --curve` adds them."),
    tested("the recovered adapter in stock peft", "1e-4",
           "pruning/test_recover.py::test_written_for_stock_peft_with_the_bases_fingerprint"),
    tested("the report shows base, small and full with the adapter", "all three",
           "end_to_end/test_prune.py::test_files_and_report_of_one_command",
           "end_to_end/test_prune.py::test_the_reports_losses_are_those_of_the_full_model"),
    tested("one command or three: the same adapter", "every byte",
           "end_to_end/test_prune.py::test_three_commands_give_the_same_adapter_byte_for_byte"),
    counted("bad inputs of pruning that give one message", at_least(20, WHOLE), "pytest tests/cli/test_bad_pruning.py",
            lambda: cases("cli/test_bad_pruning.py", "RUNS", "RECOVERIES")),
]  # fmt: skip

E = [
    slow("interpreter and compile tests in CI, both workers together", at_most(150, SECONDS),
         "kernels in CI, CPU seconds"),
    slow("deliberate faults caught", at_least(15, WHOLE), "mutations"),
    slow("compilations of the full sweep without spills, within shared memory", at_least(250, WHOLE), "compilations"),
    tested("the same of those in CI, with a committed table", "all",
           "aot/test_compile.py::test_compiles_within_the_card",
           "aot/test_compile.py::test_the_table_has_every_case_and_no_other"),
    tested("no store outside a kernel's outputs: guards in every interpreter test", "0 cells",
           "kernels/test_lora_mlp.py::test_kernel", "kernels/test_lora_qkv.py::test_kernel",
           "kernels/test_nf4_linear.py::test_fused"),
    tested("the engine with kernels on and off: LoRA on NF4, packed, streamed, pruned", "1e-4",
           "kernels/test_engine.py::test_loss_and_gradients", "kernels/test_engine.py::test_streamed_layers",
           "kernels/test_engine.py::test_a_pruned_model"),
    tested("a Llama layer keeps of what stock peft keeps", "half",
           "kernels/test_saved_bytes.py::test_at_most_half_of_what_peft_keeps"),
    tested("fallbacks: without triton, without a card, on an old card", "all",
           "kernels/test_backend.py::test_every_file_imports_and_computes_without_triton",
           "kernels/test_checks.py::test_the_doctor_without_a_card",
           "kernels/test_checks.py::test_the_doctor_on_an_old_card"),
    tested("the GPU suite's parts run on a CPU", "all",
           "scripts/test_gpu_suite.py::test_resident_streamed_and_pruned_runs",
           "scripts/test_gpu_suite.py::test_streamed_against_resident"),
    on_card("no kernel is slower or larger than what it replaces", "1x", "effitrain bench kernels"),
    on_card("each kernel is deterministic", "every bit", "pytest -m gpu tests/kernels"),
    on_card("8B step against transformers + peft + bitsandbytes", "not slower, not larger", "effitrain bench step"),
    on_card("aim: `nf4_dequantize` of a copy's bandwidth", "85 %", "effitrain bench kernels"),
    on_card("aim: `lora_linear` over the plain product", "1.10x", "effitrain bench kernels"),
    on_card("aim: the step's tokens/s and memory", "1.5x and 0.5x", "effitrain bench step"),
]  # fmt: skip

F = [
    tested("LISA: between switches exactly the sampled layers change", "every bit",
           "train/test_lisa.py::test_between_switches_exactly_the_sampled_layers_change"),
    tested("all layers sampled is full tuning", "1e-6",
           "train/test_lisa.py::test_all_layers_at_a_time_are_full_tuning"),
    tested("a layer first sampled in round 5 moves; stored weights are rounded masters", "always",
           "train/test_lisa.py::test_a_layer_first_trained_in_round_five_moves",
           "train/test_lisa.py::test_after_a_switch_what_is_stored_is_the_rounded_master"),
    tested("state bytes over 20 switches", "constant, the ledger's",
           "train/test_lisa.py::test_bytes_are_constant_over_twenty_switches_and_those_of_the_ledger"),
    tested("visit rates", "4 sigma", "train/test_sampling.py::test_every_layer_comes_as_often_as_it_should"),
    tested("resume repeats the sequence", "every bit",
           "end_to_end/test_lisa.py::test_a_run_resumed_within_a_round_or_at_its_end_ends_in_the_same_bytes"),
    of_file("fewest seeds of LISA, LoRA, full tuning on Alpaca and GSM8K", at_least(3, WHOLE), LISA_STUDY, lisa_seeds),
    of_file("step memory of LISA, embeddings frozen, over LoRA's", at_most(1.1, TIMES), LISA,
            "sides/lisa/memory_of_lora"),
    of_file("lisa-delta at rank 64 of LISA's gain, Alpaca", at_least(0.9, SHARE), LISA_STUDY, delta_gain("alpaca")),
    of_file("the same, GSM8K", at_least(0.9, SHARE), LISA_STUDY, delta_gain("gsm8k")),
    tested("S2 is attention with a segment mask, ragged, odd KV heads", "1e-5",
           "kernels/test_shifted_attention.py::test_equals_the_mask",
           "kernels/test_shifted_attention.py::test_float32_equals_the_mask"),
    tested("gradients to future positions", "0",
           "kernels/test_shifted_attention.py::test_no_token_sees_a_later_one"),
    tested("packed = separate; groups are crossed by shifted heads only; whole at evaluation", "all",
           "kernels/test_shifted_attention.py::test_samples_together_are_samples_apart",
           "kernels/test_shifted_attention.py::test_information_flows_through_the_shifted_heads_alone",
           "kernels/test_shifted_attention.py::test_in_the_model_it_is_for_training_alone"),
    of_file("attention time of an S2 step at 8,192 tokens over full attention's", at_most(0.4, TIMES), S2,
            "one row/attention_ratio"),
    slow("untouched stories3M past its 512 positions on stories: perplexity", at_least(100, "{:.0f}"),
         "past the length, perplexity"),
    of_file("extended to 2,048: last quarter's loss off 256-512", at_most(0.03, SHARE), LONG,
            last_quarter("trained, s2", at=1)),
    of_file("the same off full attention", at_most(0.02, SHARE), LONG,
            last_quarter("trained, s2", over="trained, full attention")),
    tested("a 70B at 32k tokens within 24 GiB, streamed", "fits",
           "core/test_plan.py::test_a_70b_at_32k_tokens_streams_within_24_gib_and_64_gib"),
    tested("new flags change something, contradictory ones are refused", "all",
           "cli/test_every_flag.py::test_the_flag_shows",
           "core/test_rules.py::test_what_cannot_both_be_had_for_long_context",
           "end_to_end/test_longlora.py::test_what_does_not_go_together_is_refused"),
]  # fmt: skip

G = [
    slow("combinations that agree with their simplest equivalent or are refused before loading",
         at_least(547, WHOLE), "matrix"),
    tested("a covering part of them", "all", "end_to_end/test_matrix.py::test_few_cells"),
    tested("every flag changes something or is refused", "all",
           "cli/test_every_flag.py::test_every_flag_of_every_verb_has_a_case_and_no_case_is_without_its_flag",
           "cli/test_every_flag.py::test_the_flag_shows"),
    slow("flags that a plan turns into a run: each shows in it or is refused", at_least(30, WHOLE), "flags"),
    tested("the journeys of the guide, and the notebook, run as they read", "all",
           "docs/test_pages.py::test_page_runs_as_it_reads", "docs/test_walkthrough.py::test_every_cell_runs"),
    tested("this page and README are what the script makes", "to the letter",
           "scripts/test_results.py::test_the_pages_are_what_the_script_makes"),
    tested("`effitrain doctor`, or a test, for each known trap", "all",
           "evals/test_traps.py::test_every_trap_is_watched"),
    tested("no upward or circular import", "none", "test_house.py::test_no_room_imports_upward_or_sideways",
           "test_house.py::test_no_circular_import"),
    tested("median file and function, lines", "120 and 12", "test_house.py::test_no_function_is_long"),
    tested("public docstrings complete", "all", "test_house.py::test_public_docstrings_are_complete"),
    tested("files of the reading order that lead from the command to the training step", "3",
           "docs/test_names.py::test_three_files_lead_from_the_command_to_the_training_step"),
    tested("a toy variant trained, resumed, planned, recovered and saved from one file, with no edit", "all",
           "adapters/test_variants.py::test_it_trains_and_is_no_lora",
           "adapters/test_variants.py::test_killed_it_goes_on_to_the_same_bytes",
           "adapters/test_variants.py::test_its_plan_is_proved_by_the_real_step",
           "adapters/test_variants.py::test_trained_on_a_pruned_model_it_is_recovered",
           "adapters/test_variants.py::test_saved_it_is_a_plain_lora_that_needs_no_file"),
    of_file("aim: tokens/s over Trainer + peft", at_least(1.5, TIMES), CPU, "ratios/effitrain/tokens_per_second")
    .because("An aim, not a bound. Products and attention, the same on both sides, allow the `at_most` of the JSON."),
]  # fmt: skip

PARTS: Mapping[str, Sequence[Row]] = {
    "It runs, and the adapter is right": A,
    "The plan is a promise": B,
    "Streaming": C,
    "Pruning": D,
    "Kernels": E,
    "LISA and long context": F,
    "One house": G,
}
ABOUT = """# Results

Every figure that the plans of this project promised, part by part, with its bound and what came of it. Made by
`python scripts/results.py --write` from committed JSONs, `benchmarks/slow_checks.md`, plans and tests, and compared by
`tests/scripts/test_results.py`. "By test" means that every CI run checks the bound, where it needs real data only if
`EFFITRAIN_DATA` names them. Paths of tests are below `tests`; scripts were run with `OMP_NUM_THREADS=1`.
"""


def main() -> None:
    """Print what is not met, or write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
        put_between_marks(README, "results", summary(PARTS))
        put_between_marks(README, "bench", bench(read(CPU)))
    else:
        print(*missed(PARTS), sep="\n")


def page() -> str:
    """The whole of docs/results.md."""
    return "\n".join([ABOUT, summary(PARTS), *(f"\n## {name}\n\n{table(rows)}" for name, rows in PARTS.items())]) + "\n"


def bench(report: Mapping) -> str:
    """The CPU benchmark as a table: ratios are medians of each turn's own."""
    lines = ["| | tokens/s | tokens per CPU second | peak of a step |", "|---|---:|---:|---:|"]
    names = {
        "trainer_peft": "Trainer + peft",
        "effitrain": "effitrain",
        "effitrain_recompute": "effitrain, `--recompute layer`",
    }
    for side, name in names.items():
        of, ratio = report["sides"][side], report["ratios"].get(side)
        speeds = [(f"{of[key]:.0f}", key) for key in ("tokens_per_second", "tokens_per_cpu_second")]
        cells = [*speeds, (f"{of['step_peak_bytes'] / 2**30:.2f} GiB", "memory")]
        shown = " | ".join(f"{text} ({ratio[key]:.2f}x)" if ratio else text for text, key in cells)
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
