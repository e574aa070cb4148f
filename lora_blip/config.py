"""The settings of train.py, infer.py and the commands. All are checked once, before any work."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from lora_blip.errors import ConfigError

TASK_NAMES = ("caption", "vqa", "retrieval")

Precision = Literal["auto", "fp16", "bf16", "fp32"]
LARGEST_INT = 2**31 - 1
LARGEST = {  # largest sensible values, by setting
    "r": 2**16, "seed": 2**32 - 1, "num_workers": 1024,
    "lr": 10.0, "alpha": 1e6, "weight_decay": 100.0, "max_grad_norm": 1e30, "cache_gb": 1e9, "checkpoint_seconds": 1e12,
    "min_improvement": 1e6,
}  # fmt: skip


def setting(default: Any, doc: str) -> Any:
    """Return a dataclass field with a help text, which is also the comment in train.py or infer.py."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run."""

    model: str = setting("assets/tiny-blip", "hub name or folder of a BLIP or BLIP-2 checkpoint")
    task: str = setting("auto", f"what to learn: {', '.join(TASK_NAMES)}; auto: the natural task of the checkpoint")
    annotations: str = setting("annotations.jsonl", 'lines of {"image": …, "text": …}, or with question and answers')
    image_root: str = setting("", "folder that image paths are relative to; empty: the annotations' folder")
    prompt: str = setting("", "text before every caption, not in the loss; vqa: a template that contains {question}")
    image_size: int = setting(0, "side of the square images in pixels, with interpolated positions; 0: the model's own size")
    val_fraction: float = setting(0.1, "share of the images held out for validation; 0: none")
    val_annotations: str = setting("", "annotations of the validation images; empty: val_fraction of the images")
    output_dir: str = setting("lora_blip_output", "folder in which each run creates its own folder")
    targets: str = setting("vit", "modules to adapt: vit, qformer, text, lm, vit.q, vit[8:12], text:r=4, a name or a regex")
    r: int = setting(8, "rank of the update")
    alpha: float = setting(32.0, "the update is scaled by alpha / r")
    dropout: float = setting(0.0, "dropout on the adapters' input")
    epochs: int = setting(30, "passes over the training images")
    max_steps: int = setting(0, "stop after this number of optimizer steps; 0: after the epochs")
    batch_size: int = setting(8, "images in a micro-batch")
    accumulation: int = setting(1, "micro-batches in an optimizer step")
    lr: float = setting(0.0, "peak learning rate; 0: 1e-4, and for a tiny base 3e-3 (BLIP) or 1.5e-3 (BLIP-2)")
    warmup_steps: int = setting(20, "optimizer steps of linear warm-up before the cosine decay; at most a fifth of all steps")
    weight_decay: float = setting(0.01, "AdamW's decoupled weight decay of the adapters")
    max_grad_norm: float = setting(1.0, "clip gradients to this norm; 0: do not clip")
    precision: Precision = setting("auto", "precision of autocast: fp16, bf16 or fp32; auto: the best for the device")
    base_dtype: Precision = setting("auto", "dtype of the frozen weights; auto: 16 bits if autocast reads them in 16 bits")
    checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, a third slower")
    augment: bool = setting(True, "small random shift, scale and brightness; mirror, unless a text says left or right")
    views: int = setting(0, "versions of each augmented image, used in turn; 0: always a new one")
    cache_gb: float = setting(
        10.0, "GB of disk in output_dir/.cache for images and ViT states that repeat between epochs; 0: no cache"
    )
    fast: bool = setting(True, "use faster attention, updates and texts; false: the plain computation")
    compile: bool = setting(False, "torch.compile the ViT's blocks: slow start, faster steps on some machines")
    validate_every: int = setting(0, "steps between validations; 0: a tenth of the run, at least 10. The end is validated")
    best_by: str = setting("auto", "score that selects best.safetensors: loss, exact_match, cider …; auto: the task's own")
    patience: int = setting(0, "stop after this many validations without a better best_by; 0: never")
    min_improvement: float = setting(1e-4, "smallest gain in best_by that patience counts as better")
    tensorboard: bool = setting(False, "also write TensorBoard event files (pip install 'lora_blip[tensorboard]')")
    max_new_tokens: int = setting(0, "most tokens of a generated text, kept in the adapter; 0: longest text and a margin")
    num_beams: int = setting(1, "beams of generation, in validation and stored in the adapter")
    max_skipped: int = setting(10, "stop after this many steps in a row with a non-finite loss or gradient")
    shard: bool = setting(False, "shard the frozen weights over torchrun's processes (FSDP2), for a large model")
    resume: str = setting("auto", "auto: the newest interrupted run with these settings; a run's folder; off: a new run")
    allow_changed: bool = setting(False, "resume although settings, data or base have changed; the result differs")
    checkpoint_seconds: float = setting(60.0, "seconds between checkpoints; 0: a checkpoint after every micro-batch")
    keep_checkpoints: int = setting(2, "number of newest checkpoints to keep")
    seed: int = setting(0, "seed of the split, the order, the augmentation and the initial adapters")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    num_workers: int = setting(-1, "processes that load images; 0: none; -1: none for a model on the CPU, else 4")
    log_every: int = setting(10, "optimizer steps between lines of metrics.jsonl")
    on_bad_data: Literal["stop", "skip"] = setting("stop", "if a line of the annotations is invalid")
    check_images: Literal["all", "lazy"] = setting(
        "all", "all: decode each before the first step; lazy: decode when needed, and stop at a broken one"
    )

    def __post_init__(self) -> None:
        check(self)
        require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "a share from 0 to below 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a share from 0 to below 1")
        require(self.task in ("auto", *TASK_NAMES), "task", self.task, f"one of auto, {', '.join(TASK_NAMES)}")
        for name in (
            "r",
            "alpha",
            "epochs",
            "batch_size",
            "accumulation",
            "log_every",
            "max_skipped",
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
            "max_new_tokens",
            "min_improvement",
            "views",
            "cache_gb",
            "image_size",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(self.num_workers >= -1, "num_workers", self.num_workers, "at least -1")


@dataclass(frozen=True)
class InferConfig:
    """All settings of inference: captions, answers, or a ranking of texts."""

    model: str = setting("", "hub name or folder of the base; empty: the base that the adapter was trained on")
    adapter: str = setting("latest", "an adapter file or a run folder; latest: the newest run; none: the base alone")
    task: str = setting("auto", f"{', '.join(TASK_NAMES)}; auto: the adapter's task, or the natural task of the checkpoint")
    images: str = setting("image_test", "a file, a folder, a glob, a list (.txt, .jsonl) or shards (.tar, {0000..0031}.tar)")
    question: str = setting("", 'vqa: a question about every image; or a file with lines {"image": …, "question": …}')
    texts: str = setting("", "rank these texts for every image: a file with a text per line, or texts separated by |")
    prompt: str = setting("", "start of every caption; empty: the adapter's prompt; none: no prompt")
    max_new_tokens: int = setting(0, "most tokens of a text; 0: the adapter's setting, or 40")
    num_beams: int = setting(0, "beams; 0: the adapter's setting, or 1")
    image_size: int = setting(0, "side of the square images in pixels; 0: the adapter's setting, or the model's size")
    sample: bool = setting(False, "sample tokens at random instead of taking the likeliest")
    batch_size: int = setting(16, "images per batch; halved if the device runs out of memory")
    merge: bool = setting(True, "merge the adapter into the weights, which is faster; false: keep its hooks")
    fast: bool = setting(True, "faster attention and products, equal to transformers' up to rounding; false: transformers' own")
    compare: bool = setting(False, "run the base as well, and print both side by side")
    references: str = setting("", "annotations with the right texts; the task's score is then printed")
    image_root: str = setting("", "folder that the references' image paths are relative to; empty: their folder")
    output_dir: str = setting("", "folder of predictions.jsonl; empty: a new folder in lora_blip_output")
    resume: bool = setting(True, "continue an interrupted run in the same output_dir; false: refuse its folder")
    precision: Precision = setting("auto", "fp16, bf16 or fp32; auto: the best for the device")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    seed: int = setting(0, "seed of sampling")

    def __post_init__(self) -> None:
        check(self)
        _check_predicting(self)


@dataclass(frozen=True)
class EvaluateConfig:
    """All settings of an evaluation, which compares base and adapter on images with known texts."""

    references: str = setting("", "annotations with the right texts, in the format of training")
    image_root: str = setting("", "folder that image paths are relative to; empty: the references' folder")
    adapter: str = setting("latest", "an adapter file or a run folder; latest: the newest run; none: the base alone")
    model: str = setting("", "hub name or folder of the base; empty: the base that the adapter was trained on")
    task: str = setting("auto", f"{', '.join(TASK_NAMES)}; auto: the adapter's task, or the natural task of the checkpoint")
    prompt: str = setting("", "as for infer.py")
    max_new_tokens: int = setting(0, "most tokens of a text; 0: the adapter's setting, or 40")
    num_beams: int = setting(0, "beams; 0: the adapter's setting, or 1")
    image_size: int = setting(0, "side of the square images in pixels; 0: the adapter's setting, or the model's size")
    batch_size: int = setting(16, "images per batch; halved if the device runs out of memory")
    base: bool = setting(True, "also score the base")
    fast: bool = setting(True, "as for infer.py")
    train_annotations: str = setting("", "annotations to search for leaks; empty: those of the training; none: no search")
    train_image_root: str = setting("", "folder that their image paths are relative to; empty: as in the training")
    output_dir: str = setting("", "folder of the report; empty: a new folder in lora_blip_output")
    on_bad_data: Literal["stop", "skip"] = setting("stop", "if a line of the references is invalid")
    precision: Precision = setting("auto", "fp16, bf16 or fp32; auto: the best for the device")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    seed: int = setting(0, "seed of the bootstrap")

    def __post_init__(self) -> None:
        check(self)
        _check_predicting(self)
        if not self.references:
            raise ConfigError("references is empty; give the annotations file with the right texts (--references)")


def _check_predicting(config: "InferConfig | EvaluateConfig") -> None:
    require(config.batch_size > 0, "batch_size", config.batch_size, "above 0")
    require(config.task in ("auto", *TASK_NAMES), "task", config.task, f"one of auto, {', '.join(TASK_NAMES)}")
    for name in ("max_new_tokens", "num_beams", "image_size", "seed"):
        require(getattr(config, name) >= 0, name, getattr(config, name), "at least 0")
    if config.adapter in ("", "none") and not config.model:
        raise ConfigError("model is empty, and without an adapter there is no default; set MODEL (--model)")


def check(config: Any) -> None:
    """Raise ConfigError if a field has a wrong type, is not finite, or is too large."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name == "targets" and isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
            value = ",".join(value)
            object.__setattr__(config, "targets", value)
        if get_origin(entry.type) is Literal:
            require(value in get_args(entry.type), entry.name, value, f"one of {', '.join(get_args(entry.type))}")
        elif entry.type is float and type(value) is int:
            require(abs(value) < 1e30, entry.name, value, "a smaller number")
            object.__setattr__(config, entry.name, float(value))
        elif type(value) is not entry.type:
            raise ConfigError(f"{entry.name} = {value!r}: expected {type(entry.default).__name__}")
        if isinstance(value, str):
            require("\0" not in value, entry.name, value, "a text without a NUL character")
        elif entry.type in (int, float):
            require(math.isfinite(value), entry.name, value, "a finite number")
            largest = LARGEST.get(entry.name, LARGEST_INT)
            require(value <= largest, entry.name, value, f"at most {largest:,}")


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value!r}: expected {expected}")
