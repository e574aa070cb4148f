"""Checkpoints and files that lora_blip does not load: what each is, and what to give instead."""

from pathlib import Path
from typing import Any

from lora_blip.errors import ModelError
from lora_blip.runtime.runs import is_adapter
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.runtime.untrusted import UnreadableError, open_regular, parsed, quoted

GIVE_BLIP = (
    "lora_blip supports BLIP and BLIP-2; give a checkpoint such as Salesforce/blip-image-captioning-base or "
    "Salesforce/blip2-opt-2.7b"
)
QUESTION_IN_QFORMER = (
    "its Q-Former also reads the question, so its image features depend on the text, and lora_blip computes them once for an "
    "image; give BLIP-2 with the same kind of language model: Salesforce/blip2-flan-t5-xl"
)
REASONS = {  # model type → why it is not supported, and what to use
    "instructblip": QUESTION_IN_QFORMER,
    "instructblipvideo": QUESTION_IN_QFORMER,
    "xgenmm": "BLIP-3 (xGen-MM) has another architecture, and its own Python code, which is never run; give BLIP-2",
    "blip_text_model": "it is only the text part of BLIP; give the whole checkpoint",
    "blip_vision_model": "it is only the vision part of BLIP; give the whole checkpoint",
    "blip_2_vision_model": "it is only the vision part of BLIP-2; give the whole checkpoint",
    "blip_2_qformer": "it is only the Q-Former of BLIP-2; give the whole checkpoint",
}
ORIGINAL = (".pth", ".pt", ".ckpt")  # files of LAVIS and of other training programs
CONVERT = (
    "give the converted checkpoint of the Hugging Face hub, such as Salesforce/blip-image-captioning-base; for your own file, "
    "use convert_blip_original_pytorch_to_hf.py or convert_blip_2_original_to_pytorch.py of transformers "
    "(https://github.com/huggingface/transformers/tree/v4.57.0/src/transformers/models), and give the folder that it writes"
)
PEFT, DIFFUSERS = "adapter_config.json", "model_index.json"
LARGEST_PEFT_CONFIG = 2**20  # bytes


def unsupported_kind(model_type: Any, name: str, own_code: bool = False) -> str:
    """Return the message for a config.json with another model type."""
    reason = REASONS.get(model_type, "") if isinstance(model_type, str) else ""
    code = "; its own Python code is never run" if own_code else ""
    article = "an" if str(model_type)[:1] in "aeiou" else "a"
    return f"{name!r} is {article} {quoted(model_type)} model{code}: {reason or GIVE_BLIP}"


def refuse_loaded(name: object) -> None:
    """Raise ModelError if a Python caller gives a loaded model instead of the name of a base."""
    if not isinstance(name, str | Path):
        calls = 'lora_blip.inject(model, "vit") or lora_blip.Captioner.from_adapter(None, base=model)'
        fix = f"it is loaded already: use it as it is, as in {calls}"
        fix = fix if hasattr(name, "named_parameters") or hasattr(name, "model") else "give a hub name or a folder"
        raise ModelError(f"the base is of type {type(name).__name__}; {fix}")


def refuse_adapter(name: str) -> None:
    """Raise ModelError if the name of a base is that of an adapter of lora_blip."""
    if is_adapter(name):
        raise ModelError(
            f"{quoted(name)} is an adapter, and not a base. In Python, lora_blip.Captioner.from_adapter({quoted(name)}) loads "
            f"both; in commands and settings, give it as ADAPTER (--adapter {quoted_for_shell(name)})"
        )


def refuse_file(path: Path) -> None:
    """Raise ModelError if `path` is a file: a checkpoint is a folder."""
    if not path.is_file():
        return
    if path.suffix in ORIGINAL:
        raise ModelError(f"{str(path)!r} is a PyTorch file of LAVIS or of another program, and is not opened; {CONVERT}")
    raise ModelError(f"{str(path)!r} is a file; give the folder of a checkpoint, which contains config.json and the weights")


def refuse_folder(folder: Path) -> None:
    """Raise ModelError if a folder without config.json contains something that is not a checkpoint."""
    if (folder / "config.json").exists() or not folder.is_dir():
        return
    if (folder / PEFT).exists():
        raise ModelError(
            f"{str(folder)!r} is a PEFT adapter ({PEFT}), and not a checkpoint: its base is {quoted(peft_base(folder))}. Give "
            f"the base as MODEL (--model), and this folder as ADAPTER (--adapter {quoted_for_shell(str(folder))})"
        )
    if (folder / DIFFUSERS).exists():
        raise ModelError(f"{str(folder)!r} is a pipeline of diffusers ({DIFFUSERS}); {GIVE_BLIP}")
    files = sorted(path.name for path in folder.iterdir() if path.suffix in ORIGINAL)
    if files:
        raise ModelError(
            f"{str(folder)!r} has no config.json, but {quoted(files[0])}, a PyTorch file of LAVIS or of another program, "
            f"which is not opened; {CONVERT}"
        )


def peft_base(folder: Path) -> Any:
    """Return the base that a PEFT adapter names, or "unknown"."""
    try:
        with open_regular(folder / PEFT, LARGEST_PEFT_CONFIG) as file:
            return parsed(file.read().decode()).get("base_model_name_or_path") or "unknown"
    except (OSError, UnreadableError, ValueError, AttributeError):
        return "unknown"
