"""The settings of train.py and infer.py: every field documented, checked once, before any work."""

import argparse
import difflib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

TASK_NAMES = ("caption", "vqa", "retrieval")

Precision = Literal["auto", "fp16", "bf16", "fp32"]
Settings = TypeVar("Settings")


class ConfigError(ValueError):
    """A setting with a value that it cannot have; the message names it."""


def setting(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run."""

    model: str = setting("assets/tiny-blip", "hub name or folder of a BLIP or BLIP-2 checkpoint")
    task: str = setting("auto", f"what is learned: {', '.join(TASK_NAMES)}; auto: what the checkpoint was made for")
    annotations: str = setting("annotations.jsonl", 'a line each {"image": …, "text": …}, or with question and answers')
    image_root: str = setting("", "folder that image paths are relative to; empty: the annotations' own")
    prompt: str = setting("", "text before every caption, never in the loss; vqa: a template with {question} in it")
    image_size: int = setting(0, "side of the square images in pixels, positions are interpolated; 0: the model's own size")
    val_fraction: float = setting(0.1, "share of the images held out for validation; 0: none")
    output_dir: str = setting("lora_blip_output", "each run gets a folder of its own in here")
    targets: str = setting("vit", "where adapters go: vit, qformer, text, lm, vit.q, vit[8:12], text:r=4, a name or a regex")
    r: int = setting(8, "rank of the update")
    alpha: float = setting(32.0, "the update is scaled by alpha / r")
    dropout: float = setting(0.0, "dropout on the adapters' input")
    epochs: int = setting(30, "passes over the training images")
    max_steps: int = setting(0, "stop after so many optimizer steps; 0: after the epochs")
    batch_size: int = setting(8, "images in a micro-batch")
    accumulation: int = setting(1, "micro-batches in an optimizer step")
    lr: float = setting(0.0, "peak learning rate; 0: 1e-4, and for a tiny base 3e-3 (BLIP) or 1.5e-3 (BLIP-2)")
    warmup_steps: int = setting(20, "optimizer steps of linear warm-up, at most a fifth of all, before the cosine decay")
    weight_decay: float = setting(0.01, "AdamW's decoupled weight decay, on the adapters")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0: never")
    precision: Precision = setting("auto", "arithmetic under autocast: fp16, bf16 or fp32; auto: what the device does best")
    base_dtype: Precision = setting("auto", "dtype of the frozen weights; auto: in 16 bits what is read in 16 bits")
    checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, a third slower")
    augment: bool = setting(True, "gentle random mirror, shift, scale and brightness; no mirror if a text says left or right")
    views: int = setting(0, "versions of each augmented picture, which come in turn and can be kept; 0: always another")
    cache_gb: float = setting(
        10.0, "disk in output_dir/.cache for pictures and what comes before the first adapter, if it repeats; 0: none"
    )
    fast: bool = setting(True, "the same sums by faster ways: attention, update, texts; false: the plain ways, to compare with")
    compile: bool = setting(False, "torch.compile the ViT's blocks: some seconds at the start, faster steps on some machines")
    validate_every: int = setting(0, "steps between validations; 0: a tenth of the run, or 10; the end is always validated")
    best_by: str = setting("auto", "score that picks best.safetensors: loss, exact_match, cider …; auto: the task's own")
    patience: int = setting(0, "stop after so many validations without a better score; 0: never")
    tensorboard: bool = setting(False, "write TensorBoard's event files too (pip install 'lora_blip[tensorboard]')")
    max_new_tokens: int = setting(40, "longest text that is generated, here and by default with the adapter")
    num_beams: int = setting(1, "beams of generation, here and by default with the adapter")
    max_skipped: int = setting(10, "stop after so many steps in a row with a loss or gradient that is not finite")
    shard: bool = setting(False, "spread the frozen weights over torchrun's processes (FSDP2), for one too large for each")
    resume: str = setting("auto", "auto: go on with the newest interrupted run of these settings; a run's folder; off")
    allow_changed: bool = setting(False, "go on with a run though settings, data or base have changed, so not exactly")
    checkpoint_seconds: float = setting(60.0, "seconds between checkpoints, each to go on from; 0: at every micro-batch")
    keep_checkpoints: int = setting(2, "how many of them stay, the newest")
    seed: int = setting(0, "decides the split, the order, the augmentation and the adapters' start")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    num_workers: int = setting(-1, "processes that load images; 0: none; -1: none beside a model on the CPU, else 4")
    log_every: int = setting(10, "optimizer steps between lines of metrics.jsonl")
    on_bad_data: Literal["stop", "skip"] = setting("stop", "when a line of the annotations is no good")
    check_images: Literal["all", "lazy"] = setting(
        "all", "all: each is decoded before the first step; lazy: when needed, and a broken one stops the run"
    )

    def __post_init__(self) -> None:
        check(self)
        require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "a share from 0 up to, not including, 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "from 0 up to, not including, 1")
        require(self.task in ("auto", *TASK_NAMES), "task", self.task, f"one of auto, {', '.join(TASK_NAMES)}")
        for name in (
            "r",
            "alpha",
            "epochs",
            "batch_size",
            "accumulation",
            "log_every",
            "max_skipped",
            "max_new_tokens",
            "num_beams",
            "keep_checkpoints",
        ):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in (
            "lr",
            "checkpoint_seconds",
            "max_steps",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "seed",
            "validate_every",
            "patience",
            "views",
            "cache_gb",
            "image_size",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.num_workers >= -1, "num_workers", self.num_workers, "-1 or more")


@dataclass(frozen=True)
class InferConfig:
    """Everything that decides a run over images: captions, answers, or a ranking of texts."""

    model: str = setting("", "hub name or folder of the base; empty: the one that the adapter was trained on")
    adapter: str = setting("latest", "an adapter's file or run folder; latest: the newest run; none: the base as it is")
    task: str = setting("auto", f"{', '.join(TASK_NAMES)}; auto: the adapter's own, or what the checkpoint was made for")
    images: str = setting("image_test", "a file, a folder, a glob, a list (.txt, .jsonl) or shards (.tar, {0000..0031}.tar)")
    question: str = setting("", 'vqa: asked of every image; or a file of lines {"image": …, "question": …}')
    texts: str = setting("", "rank these texts for every image: a file, a text a line, or texts with | between them")
    prompt: str = setting("", "text that every caption goes on from; empty: the adapter's own; none: no prompt")
    max_new_tokens: int = setting(0, "longest text; 0: the adapter's own setting, or 40")
    num_beams: int = setting(0, "beams; 0: the adapter's own setting, or 1")
    image_size: int = setting(0, "side of the square images in pixels; 0: the adapter's own, or the model's")
    sample: bool = setting(False, "draw words at random instead of taking the likeliest")
    batch_size: int = setting(16, "images at a time; halved when the device's memory runs out")
    merge: bool = setting(True, "write the adapter into the weights first, which is faster; false: leave it on hooks")
    fast: bool = setting(
        True, "attention and products by faster ways, equal to transformers' own up to rounding; false: transformers' own"
    )
    compare: bool = setting(False, "ask the base as well, and show both side by side")
    references: str = setting("", "an annotations file with the right texts: adds the task's score to what is printed")
    image_root: str = setting("", "folder that the references' image paths are relative to; empty: their own")
    output_dir: str = setting("", "where predictions.jsonl goes; empty: a new folder in lora_blip_output")
    resume: bool = setting(True, "go on where a run into the same output_dir was stopped; false: refuse its folder")
    precision: Precision = setting("auto", "fp16, bf16 or fp32; auto: what the device does best")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    seed: int = setting(0, "for sampling")

    def __post_init__(self) -> None:
        check(self)
        _check_predicting(self)


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything that decides an evaluation: base beside adapter, on images with known texts."""

    references: str = setting("", "annotations file with the right texts, as for training")
    image_root: str = setting("", "folder that image paths are relative to; empty: the references' own")
    adapter: str = setting("latest", "an adapter's file or run folder; latest: the newest run; none: the base alone")
    model: str = setting("", "hub name or folder of the base; empty: the one that the adapter was trained on")
    task: str = setting("auto", f"{', '.join(TASK_NAMES)}; auto: the adapter's own, or what the checkpoint was made for")
    prompt: str = setting("", "as for infer.py")
    max_new_tokens: int = setting(0, "longest text; 0: the adapter's own setting, or 40")
    num_beams: int = setting(0, "beams; 0: the adapter's own setting, or 1")
    image_size: int = setting(0, "side of the square images in pixels; 0: the adapter's own, or the model's")
    batch_size: int = setting(16, "images at a time; halved when the device's memory runs out")
    base: bool = setting(True, "score the base beside the adapter")
    fast: bool = setting(True, "as for infer.py")
    train_annotations: str = setting("", "where to look for leaks; empty: what the adapter was trained on, if it is here; none")
    train_image_root: str = setting("", "folder that their image paths are relative to; empty: as the adapter was trained")
    output_dir: str = setting("", "where the report goes; empty: a new folder in lora_blip_output")
    on_bad_data: Literal["stop", "skip"] = setting("stop", "when a line of the references is no good")
    precision: Precision = setting("auto", "fp16, bf16 or fp32; auto: what the device does best")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    seed: int = setting(0, "of the bootstrap")

    def __post_init__(self) -> None:
        check(self)
        _check_predicting(self)
        if not self.references:
            raise ConfigError("references is empty; give the annotations file with the right texts (--references)")


def _check_predicting(config: "InferConfig | EvaluateConfig") -> None:
    require(config.batch_size > 0, "batch_size", config.batch_size, "above 0")
    require(config.task in ("auto", *TASK_NAMES), "task", config.task, f"one of auto, {', '.join(TASK_NAMES)}")
    for name in ("max_new_tokens", "num_beams", "image_size", "seed"):
        require(getattr(config, name) >= 0, name, getattr(config, name), "0 or more")
    if config.adapter in ("", "none") and not config.model:
        raise ConfigError("model is empty and there is no adapter to name it; set MODEL (or --model)")


def parse(
    kind: type[Settings], script: dict[str, Any], arguments: list[str] | None = None, doc: str = "", program: str | None = None
) -> Settings:
    """Settings from the capitals at the top of a script, overridden by flags of the same names."""
    parser = argparse.ArgumentParser(prog=program, description=doc, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    known: Any = fields(kind)  # type: ignore[arg-type]  # a dataclass
    _refuse_misspelt(script, [entry.name.upper() for entry in known])
    script = {entry.name: script.get(entry.name.upper(), entry.default) for entry in known}
    for entry in known:
        flag = f"--{entry.name.replace('_', '-')}"
        text = f"{entry.metadata['doc']} (now: {script[entry.name]!r})".replace("%", "%%")
        if entry.type is bool:
            parser.add_argument(flag, nargs="?", const=True, type=_bool, help=text, metavar="true|false")
            parser.add_argument(f"--no-{flag[2:]}", dest=entry.name, action="store_false", help=argparse.SUPPRESS)
        elif get_origin(entry.type) is Literal:
            parser.add_argument(flag, choices=get_args(entry.type), help=text)
        else:
            parser.add_argument(flag, type=entry.type, help=text, metavar=type(entry.default).__name__)
    return kind(**script | vars(parser.parse_args(arguments)))


def _refuse_misspelt(script: dict[str, Any], known: list[str]) -> None:
    """EPOCH = 3 beside the setting EPOCHS would be ignored without a word."""
    for name in script:
        if name.isupper() and name not in known and (close := difflib.get_close_matches(name, known, 1, 0.8)):
            raise ConfigError(f"{name} is no setting; {close[0]} is")


def refuse_unwritable(folder: str) -> None:
    """ConfigError if a folder cannot be made or written; nothing is made yet."""
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"output_dir = {folder!r}: {there} is no folder that can be written")


def _bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def check(config: Any) -> None:
    """Every field has its type: settings come from scripts that users edit."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name == "targets" and isinstance(value, list | tuple):
            value = ",".join(value)
            object.__setattr__(config, "targets", value)
        if get_origin(entry.type) is Literal:
            require(value in get_args(entry.type), entry.name, value, f"one of {', '.join(get_args(entry.type))}")
        elif entry.type is float and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(config, entry.name, float(value))
        elif type(value) is not entry.type:
            raise ConfigError(f"{entry.name} = {value!r}: expected {type(entry.default).__name__}")


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value!r}: expected {expected}")
