"""Names of fields: as flags, and what a name that is none was probably meant to be."""

import difflib
from collections.abc import Iterable

# By our name, what transformers, peft, trl, axolotl, LLaMA-Factory, unsloth and torchtune call the same.
ELSEWHERE = {
    "model": (
        *("model_name_or_path", "pretrained_model_name_or_path", "base_model", "base_model_name_or_path"),
        *("model_name", "model_id", "model_path"),
    ),
    "dataset": ("datasets", "dataset_name", "dataset_path", "dataset_dir", "data", "data_path", "train_file"),
    "eval_dataset": ("eval_file", "validation_file", "test_datasets", "val_dataset"),
    "eval_fraction": ("val_size", "val_set_size", "test_size", "validation_split_percentage"),
    "eval_every": ("eval_steps", "evaluation_steps", "evals_per_epoch", "steps_per_eval"),
    "columns": ("dataset_text_field", "field_mapping"),
    "template": ("chat_template", "prompt_template"),
    "train_on_prompt": ("train_on_inputs", "train_on_input", "completion_only_loss", "assistant_only_loss"),
    "truncation": ("truncation_side", "truncation_mode"),
    "packing": ("sample_packing", "neat_packing", "packed"),
    "output_dir": ("output", "out", "out_dir", "output_path", "save_dir", "adapter_path"),
    "save_every": ("save_steps", "saves_per_epoch", "save_interval", "checkpoint_every"),
    "keep_checkpoints": ("save_total_limit",),
    "resume": ("resume_from_checkpoint", "auto_resume_from_checkpoints", "resume_from"),
    "report_to": ("logger", "tracker", "log_with"),
    "gpu_mem": ("gpu_memory", "gpu_memory_limit", "max_memory", "vram", "max_gpu_memory"),
    "host_mem": ("cpu_mem", "cpu_memory", "host_memory", "ram", "max_cpu_memory"),
    "quant": ("load_in_4bit", "load_in_8bit", "quantization", "quantization_bit", "quantize", "bnb_4bit_quant_type"),
    "dtype": ("torch_dtype", "bf16", "fp16", "precision", "compute_dtype", "pure_bf16"),
    "recompute": ("gradient_checkpointing", "use_gradient_checkpointing", "enable_activation_checkpointing"),
    "offload_activations": ("activation_offloading", "enable_activation_offloading"),
    "max_seq_len": (
        *("cutoff_len", "max_length", "max_seq_length", "sequence_len", "seq_len", "seq_length"),
        *("model_max_length", "block_size", "context_length"),
    ),
    "batch_size": ("per_device_train_batch_size", "micro_batch_size", "train_batch_size"),
    "grad_accum": ("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches", "accumulation_steps"),
    "lr": ("learning_rate", "peak_lr", "max_lr"),
    "schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule"),
    "warmup": ("warmup_ratio", "warmup_steps", "num_warmup_steps", "lr_warmup_steps"),
    "epochs": ("num_train_epochs", "num_epochs", "n_epochs"),
    "max_steps": ("max_train_steps", "iters", "steps", "max_iters", "num_steps"),
    "seed": ("random_seed", "random_state", "data_seed"),
    "max_grad_norm": ("gradient_clipping", "clip_grad_norm", "max_norm", "grad_clip"),
    "optimizer": ("optim", "optimiser"),
    "method": ("finetuning_type", "peft_type", "peft_method", "train_type", "tuner_type", "fine_tune_type"),
    "lora_r": ("lora_rank", "rank", "r", "lora_dim", "peft_r"),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "lora_targets": ("target_modules", "lora_target", "lora_target_modules", "lora_modules", "target_linears"),
    "lora_rslora": ("use_rslora", "rslora"),
    "init_adapter": ("adapter_name_or_path", "lora_model_dir", "resume_adapter_file"),
}
_OURS = {theirs: ours for ours, names in ELSEWHERE.items() for theirs in names}


def flag_of(field: str) -> str:
    """The flag of a recipe's field."""
    return "--" + field.replace("_", "-")


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``name`` stands for: as other tools call it, or by the spelling of either; None for no
    idea.
    """
    known = list(known)
    spelt = {**{theirs: ours for theirs, ours in _OURS.items() if ours in known}, **{own: own for own in known}}
    if name in spelt:
        return spelt[name]
    # The names of other tools are so many that one is somewhat like any word: they have to be more alike than ours.
    alike = [*difflib.get_close_matches(name, known, 1, 0.5), *difflib.get_close_matches(name, spelt, 1, 0.75)]
    near = difflib.get_close_matches(name, alike, 1, 0.5)
    return spelt[near[0]] if near else None
