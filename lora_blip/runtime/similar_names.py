"""The setting that a wrong name means: a name from another library or command, an abbreviation, or a typing error."""

import difflib
from collections.abc import Sequence

OTHER_NAMES = {  # name in other libraries → our setting, or the setting with the value to write; {} is the given value
    "rank": "r", "lora_r": "r", "lora_rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "use_dora": "variant=dora", "use_rslora": "variant=rslora", "loraplus_lr_ratio": "lr_ratio",
    "learning_rate": "lr", "num_epochs": "epochs", "num_train_epochs": "epochs", "bs": "batch_size",
    "train_batch_size": "batch_size", "per_device_train_batch_size": "batch_size",
    "grad_accum": "accumulation", "gradient_accumulation_steps": "accumulation", "gradient_checkpointing": "checkpointing",
    "target_modules": "targets", "model_name": "model", "base_model": "model", "max_length": "max_new_tokens",
    "dtype": "precision", "fp16": "precision=fp16", "bf16": "precision=bf16", "fp32": "precision=fp32",
    "load_in_8bit": "base_dtype=int8", "load_in_4bit": "base_dtype=nf4", "gpu": "device", "cpu": "device=cpu",
    "cuda": "device=cuda", "workers": "num_workers", "beams": "num_beams", "do_sample": "sample",
    "temperature": "generation=temperature={}", "top_p": "generation=top_p={}", "top_k": "generation=top_k={}",
    "length_penalty": "generation=length_penalty={}", "repetition_penalty": "generation=repetition_penalty={}",
    "num_return_sequences": "generation=num_return_sequences={}", "no_repeat_ngram_size": "generation=no_repeat_ngram_size={}",
    "output": "output_dir", "out": "output_dir", "save_dir": "output_dir", "lora": "adapter", "adapter_path": "adapter",
    "image_dir": "image_root", "image_folder": "image_root", "images_dir": "image_root", "skip": "on_bad_data=skip",
    "resume_from_checkpoint": "resume", "model_name_or_path": "model", "pretrained_model_name_or_path": "model",
    "train_file": "annotations", "validation_file": "val_annotations", "val_split": "val_fraction",
    "validation_split": "val_fraction", "warmup_ratio": "warmup_steps", "lora_target_modules": "targets",
    "logging_steps": "log_every", "eval_steps": "validate_every", "save_total_limit": "keep_checkpoints",
    "dataloader_num_workers": "num_workers", "torch_compile": "compile", "early_stopping_patience": "patience",
    "data": "annotations", "dataset": "annotations", "train_data": "annotations", "validation_annotations": "val_annotations",
}  # fmt: skip
SAME = (("annotations", "references", "source"), ("images", "image_root"))  # names of one thing in different commands


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the name in `known` that a wrong name most likely means, or "" if none is similar.

    The result may contain a value: "precision=fp16". Then {} is the value that the user gave to the wrong name.
    """
    other = OTHER_NAMES.get(name, name)
    if other.partition("=")[0] in known:
        return other
    for group in SAME:
        if other in group and (ours := next((setting for setting in group if setting in known), "")):
            return ours
    longer = [full for full in known if len(name) > 2 and full.startswith(name)]  # `name` is an abbreviation
    return longer[0] if longer else next(iter(difflib.get_close_matches(name, known, 1)), "")
