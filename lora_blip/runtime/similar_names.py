"""The setting that a wrong name means: a name from another library or command, an abbreviation, or a typing error."""

import difflib
import re
from collections import deque
from collections.abc import Collection, Sequence

OTHER_NAMES = {  # name in other libraries → our setting, also for lower-case names in a script
    "rank": "r", "lora_r": "r", "lora_rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "use_dora": "variant=dora", "use_rslora": "variant=rslora", "loraplus_lr_ratio": "lr_ratio",
    "learning_rate": "lr", "num_epochs": "epochs", "num_train_epochs": "epochs", "bs": "batch_size",
    "train_batch_size": "batch_size", "per_device_train_batch_size": "batch_size",
    "grad_accum": "accumulation", "gradient_accumulation_steps": "accumulation", "gradient_checkpointing": "checkpointing",
    "target_modules": "targets", "model_name": "model", "base_model": "model", "max_length": "max_new_tokens",
    "beams": "num_beams", "dtype": "precision", "workers": "num_workers", "output": "output_dir",
}  # fmt: skip
FLAGS = {  # name of a flag or setting → our setting, or "setting=value"; {} is the value that the user gave
    "fp16": "precision=fp16", "bf16": "precision=bf16", "fp32": "precision=fp32", "load_in_8bit": "base_dtype=int8",
    "load_in_4bit": "base_dtype=nf4", "cpu": "device=cpu", "cuda": "device=cuda", "gpu": "device=cuda", "do_sample": "sample",
    "temperature": "generation=temperature={}", "top_p": "generation=top_p={}", "top_k": "generation=top_k={}",
    "length_penalty": "generation=length_penalty={}", "repetition_penalty": "generation=repetition_penalty={}",
    "num_return_sequences": "generation=num_return_sequences={}", "no_repeat_ngram_size": "generation=no_repeat_ngram_size={}",
    "out": "output_dir", "save_dir": "output_dir", "lora": "adapter", "adapter_path": "adapter", "skip": "on_bad_data=skip",
    "image_dir": "image_root", "image_folder": "image_root", "images_dir": "image_root", "image_column": "image_key",
    "caption_column": "text_key", "text_column": "text_key", "resume_from_checkpoint": "resume", "resolution": "image_size",
    "model_name_or_path": "model", "pretrained_model_name_or_path": "model", "lora_target_modules": "targets",
    "train_file": "annotations", "validation_file": "val_annotations", "val_split": "val_fraction",
    "validation_split": "val_fraction", "logging_steps": "log_every", "eval_steps": "validate_every",
    "save_total_limit": "keep_checkpoints", "dataloader_num_workers": "num_workers", "torch_compile": "compile",
    "early_stopping_patience": "patience", "data": "annotations", "dataset": "annotations", "train_data": "annotations",
}  # fmt: skip
SAME = (("annotations", "references", "source"), ("images", "image_root"))  # names of one thing in different commands
TASKS = {"itm": "retrieval", "itr": "retrieval", "search": "retrieval", "questions": "vqa", "qa": "vqa"}  # values of TASK
NEGATIVE_NUMBER = re.compile(r"-\d*\.?\d+.*")
FALSE = ("false", "0", "no", "off")
SIMILAR = 0.75  # difflib's ratio of two names that are suggested for each other


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the name in `known` that a wrong name most likely means, or "" if none is similar.

    The result may contain a value: "precision=fp16". Then {} is the value that the user gave to the wrong name.
    """
    other = (OTHER_NAMES | FLAGS | TASKS).get(name, name)
    if other.partition("=")[0] in known:
        return other
    for group in SAME:
        if other in group and (ours := next((setting for setting in group if setting in known), "")):
            return ours
    abbreviated = [full for full in known if min(len(name), len(full)) > 2 and (full.startswith(name) or name.startswith(full))]
    return next(iter(abbreviated or difflib.get_close_matches(name, known, 1, SIMILAR)), "")


def flag_meant(word: str, known: Sequence[str]) -> tuple[str, str]:
    """Return the flag that a wrong one most likely means, or "" if none is similar; and the value of `FLAGS`, or ""."""
    name = word.partition("=")[0].lstrip("-").replace("-", "_").lower()
    negated = name.startswith("no_")
    near, _, template = nearest(name.removeprefix("no_") if negated else name, known).partition("=")
    return f"--{'no-' * negated}{near.replace('_', '-')}" if near else "", template


def corrected(given: Sequence[str], unknown: Collection[str], known: Sequence[str]) -> list[str]:
    """Return the words of a command with the right flag for each unknown one. Leave out an unknown flag without a similar one.

    unknown: the words that are not known flags or their values. The result may still have wrong values.
    """
    wrong, words = set(unknown), deque(given)
    result, options = list[str](), list[str]()  # options: the values of --generation
    while words:
        word = words.popleft()
        flag, has_value, value = word.partition("=")
        is_wrong, template = word in wrong and _is_flag(word), ""
        if is_wrong:
            flag, template = flag_meant(word, known)
        elif flag != "--generation":
            result.append(word)
            continue
        needs_value = template or not flag or flag == "--generation"
        if needs_value and not has_value and words and not _is_flag(words[0]):
            value = words.popleft()
        if flag == "--generation":
            options.append(template.format(value) if template else value)
        elif template:
            result += [flag, template] if value.lower() not in FALSE and not flag.startswith("--no-") else []
        elif flag:
            result += [flag, value] if has_value else [flag]
    return result + (["--generation", ",".join(options)] if options else [])


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not NEGATIVE_NUMBER.fullmatch(word)
