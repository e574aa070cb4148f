"""The settings of train.py, infer.py and the commands. All are checked once, before any work."""

from dataclasses import dataclass
from typing import Any, Literal

from lora_blip.errors import ConfigError
from lora_blip.runtime.setting_checks import check_prediction, check_training
from lora_blip.runtime.settings import Options, check, require, setting, share_options

Precision = Literal["auto", "fp16", "bf16", "fp32"]
BaseDtype = Literal["auto", "fp16", "bf16", "fp32", "int8", "nf4"]


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run. The first five groups are those that most runs change.

    Raise ConfigError for an invalid value. In peft: `LoraConfig`, with the `TrainingArguments` of transformers.

    >>> config = lora_blip.TrainConfig(targets="vit,text", r=4)
    >>> config.alpha
    32.0
    """

    model: str = setting(
        "assets/tiny-blip", 'hub name or folder: "Salesforce/blip-image-captioning-large", "Salesforce/blip2-opt-2.7b"',
        group="Base and task", path="if it exists",
    )  # fmt: skip
    task: str = setting("auto", '"caption", "vqa" or "retrieval"; "auto": the task that the checkpoint was trained for')

    annotations: str = setting(
        "annotations.jsonl",
        'lines of {"image": "red_1.jpg", "text": "a red cube"}; vqa: "question" and "answers"',
        group="Data", path="always",
    )  # fmt: skip
    image_root: str = setting("", "folder that image paths are relative to; empty: the annotations' folder", path="always")
    val_fraction: float = setting(0.1, "share of the images held out for validation; 0: none")
    prompt: str = setting("", 'text before every caption, not in the loss; vqa: a template, "Question: {question} Answer:"')

    targets: str = setting(
        "vit", 'modules to adapt: "vit", "vit,qformer", "text", "lm", "vit.q,vit.v", "vit[8:12]", "text:r=4", a regex',
        group="Adapter",
    )  # fmt: skip
    r: int = setting(8, "rank of the update")
    alpha: float = setting(32.0, "the update is scaled by alpha / r")
    dropout: float = setting(0.0, "probability with which dropout zeroes an element of the adapters' input")

    epochs: int = setting(30, "passes over the training images", group="Training")
    max_steps: int = setting(0, "stop after this number of optimizer steps; 0: after the epochs")
    batch_size: int = setting(8, "images in a micro-batch; retrieval: lines")
    accumulation: int = setting(1, "micro-batches in an optimizer step")
    lr: float = setting(0.0, "peak learning rate; 0: 1e-4, and for a tiny base 3e-3 (BLIP) or 1.5e-3 (BLIP-2)")

    output_dir: str = setting("lora_blip_output", "folder in which each run creates its own folder", group="Run", path="always")
    resume: str = setting(
        "auto",
        '"auto": the newest interrupted run with these settings; a run\'s folder: that run; "off": a new run',
        path="if it exists",
    )
    device: str = setting("auto", '"auto", "cpu", "cuda", "cuda:1", "mps"')
    precision: Precision = setting("auto", '"fp16", "bf16" or "fp32"; "auto": the best for the device')
    seed: int = setting(0, "seed of the split, the order, the augmentation and the initial adapters")

    image_size: int = setting(
        0, "side of the square images in pixels, with interpolated positions; 0: the model's own size", group="More: images"
    )
    augment: bool = setting(
        True, "shift, scale and brighten images a little at random; also mirror, unless a text contains left or right"
    )
    views: int = setting(
        0, "number of augmented versions of each image, cached and used in turn; 0: a new version in every epoch"
    )
    val_annotations: str = setting("", "annotations of the validation images; empty: VAL_FRACTION of the images", path="always")
    group_by: str = setting(
        "", 'keep the images of a group together: "folder", a column such as "video", or a regex such as "(video[0-9]+)"'
    )
    image_key: str = setting("", "column or key of the image path; empty: a common name, such as image or file_name")
    text_key: str = setting("", "column or key of the text; empty: a common name, such as text or caption")
    question_key: str = setting("", "column or key of the question; empty: question")
    answer_key: str = setting("", "column or key of the answers; empty: answers or answer")
    on_bad_data: Literal["stop", "skip"] = setting("stop", 'if a line of the annotations is invalid: "stop" or "skip" the line')
    check_images: Literal["all", "lazy"] = setting(
        "all", '"all": decode all images before the first step; "lazy": decode when needed, stop at a broken image'
    )
    num_workers: int = setting(
        -1, "processes that load images; 0: none; -1: none for a model on the CPU, else one per core, up to 16"
    )

    variant: str = setting(
        "lora",
        '"lora"; "rslora": scaled by alpha / √r; "dora": trains the norms of W\'s rows too; see docs/variants.md',
        group="More: adapter",
    )  # fmt: skip
    lr_ratio: float = setting(1.0, "LoRA+: learning rate of B as a multiple of that of A; 1: equal rates")

    warmup_steps: int = setting(
        20, "optimizer steps of linear warm-up before the cosine decay; at most a fifth of all steps", group="More: optimizer"
    )
    weight_decay: float = setting(0.01, "AdamW's decoupled weight decay of the adapters")
    max_grad_norm: float = setting(1.0, "clip gradients to this norm; 0: do not clip")
    max_skipped: int = setting(
        10, "stop after this many steps in a row whose loss or gradient is not finite (at the end of the run: 3)"
    )

    validate_every: int = setting(
        0, "steps between validations; 0: a tenth of the run, at least 10; the last step is always validated",
        group="More: validation and generation",
    )  # fmt: skip
    best_by: str = setting("auto", 'score that selects best.safetensors: "loss", "exact_match", "cider" …; "auto": the task\'s')
    patience: int = setting(0, "stop after this many validations without a better BEST_BY; 0: never")
    min_improvement: float = setting(1e-4, "smallest gain in BEST_BY that counts as better for PATIENCE")
    max_new_tokens: int = setting(
        0, "largest number of generated tokens, stored in the adapter; 0: the longest text plus a margin"
    )
    num_beams: int = setting(1, "beams of beam search, for validation and stored in the adapter; 1: greedy search")
    generation: dict[str, Any] = setting(
        Options(), 'more options, stored in the adapter: {"repetition_penalty": 1.2}; see docs/generation.md'
    )

    fast: bool = setting(
        True, "faster attention, faster adapter updates and packed texts; False: the plain computation, for comparison",
        group="More: speed and memory",
    )  # fmt: skip
    compile: bool = setting(
        False, "torch.compile the training step (retrieval: the ViT): a slower start, and faster steps of small models"
    )
    cache_gb: float = setting(
        10.0, "GB of disk for images and ViT states that repeat between epochs, in OUTPUT_DIR/.cache; 0: no cache"
    )
    base_dtype: BaseDtype = setting(
        "auto", 'frozen weights: "fp32", "bf16", "fp16", "int8" or "nf4"; "auto": 16 bits if the precision is fp16 or bf16'
    )
    checkpointing: bool = setting(
        False, "recompute activations in the backward pass, which needs less memory and is a third slower"
    )
    shard: bool = setting(
        False, "shard the frozen weights over torchrun's processes (FSDP2), for a model too large for one GPU"
    )

    checkpoint_seconds: float = setting(
        60.0, "seconds between checkpoints; 0: after every micro-batch", group="More: checkpoints and logs"
    )
    keep_checkpoints: int = setting(2, "number of newest checkpoints to keep")
    allow_changed: bool = setting(False, "resume even if settings, data or base have changed; the result then differs")
    init_adapter: str = setting(
        "",
        'continue from the weights of an adapter, with a new schedule: a run folder, a file or "latest"',
        path="if it exists",
    )
    log_every: int = setting(10, "optimizer steps between lines of metrics.jsonl")
    tensorboard: bool = setting(False, 'also write TensorBoard event files: pip install "lora_blip[tensorboard]"')

    def __post_init__(self) -> None:
        check(self)
        require(bool(self.output_dir), "output_dir", self.output_dir, 'a folder, such as "lora_blip_output"')
        share_options(self, {"num_beams": "num_beams", "max_new_tokens": "max_new_tokens"})
        check_training(self)


@dataclass(frozen=True)
class InferConfig:
    """All settings of inference: captions, answers, or a ranking of texts.

    Raise ConfigError for an invalid value. In peft: no equivalent.

    >>> config = lora_blip.InferConfig(images="photos", adapter="latest")
    >>> config.batch_size
    16
    """

    model: str = setting(
        "", "hub name or folder of the base; empty: the base that the adapter was trained on",
        group="Model and task", path="if it exists",
    )  # fmt: skip
    adapter: str = setting(
        "latest", 'an adapter file or run folder; "latest": the newest run of the task; "none": the base', path="if it exists"
    )
    scale: float = setting(1.0, "factor of the change that the adapter makes; 1: as trained; 0: the base")
    task: str = setting("auto", '"caption", "vqa" or "retrieval"; "auto": the adapter\'s task, or that of the checkpoint')

    images: str = setting(
        "image_test", 'a file, a folder, a glob, a list (.txt, .jsonl) or shards ("shards/{0000..0031}.tar")',
        group="Input", path="always",
    )  # fmt: skip
    question: str = setting(
        "", 'vqa: one question for all images, or a file with lines {"image": …, "question": …}', path="if it exists"
    )
    texts: str = setting(
        "", "rank these texts for every image: a file with a text per line, or texts separated by |", path="if it exists"
    )
    prompt: str = setting("", 'start of every caption; empty: the adapter\'s prompt; "none": no prompt')
    image_size: int = setting(0, "side of the square images in pixels; 0: the adapter's setting, or the model's size")

    output_dir: str = setting(
        "", "folder of predictions.jsonl; empty: a new folder in lora_blip_output", group="Output", path="always"
    )
    resume: bool = setting(True, "continue an interrupted run in the same OUTPUT_DIR; False: stop if the folder has a run")
    references: str = setting("", "annotations with the right texts; the task's score is then printed", path="always")
    image_root: str = setting(
        "", "folder that image paths of references or of a list are relative to; empty: the folder of the file", path="always"
    )
    image_key: str = setting("", "column or key of the image path; empty: a common name, such as image or file_name")
    text_key: str = setting("", "column or key of the text; empty: a common name, such as text or caption")
    question_key: str = setting("", "column or key of the question; empty: question")
    answer_key: str = setting("", "column or key of the answers; empty: answers or answer")
    compare: bool = setting(False, "run the base as well, and print both side by side")
    explain: bool = setting(False, "write explain.html: each word with its probability and attention; at most 20 images")

    max_new_tokens: int = setting(0, "largest number of generated tokens; 0: the adapter's setting, or 40", group="Generation")
    num_beams: int = setting(0, "beams of beam search; 0: the adapter's setting, or 1")
    sample: bool = setting(False, "sample tokens at random; False: the adapter's setting, or greedy or beam search")
    seed: int = setting(0, "seed of sampling")
    generation: dict[str, Any] = setting(
        Options(), 'more options: {"num_beams": 3, "num_return_sequences": 3}; see docs/generation.md; empty: the adapter\'s'
    )

    device: str = setting("auto", '"auto", "cpu", "cuda", "cuda:1", "mps"', group="Speed and memory")
    precision: Precision = setting("auto", '"fp16", "bf16" or "fp32"; "auto": the best for the device')
    base_dtype: BaseDtype = setting(
        "auto", 'frozen weights: "fp32", "bf16", "fp16", "int8" or "nf4"; "auto": as trained, or by the precision'
    )
    batch_size: int = setting(16, "images per batch; halved if the device runs out of memory")
    merge: bool = setting(True, "merge the adapter into the weights, which is faster; False: keep its hooks")
    fast: bool = setting(
        True, "faster attention and matrix products, equal to transformers' up to rounding; False: transformers' own"
    )

    runs: str = "lora_blip_output"  # not a setting: the folder in which "latest" is searched and new output folders are created

    def __post_init__(self) -> None:
        check(self)
        share_options(self, {"num_beams": "num_beams", "max_new_tokens": "max_new_tokens", "do_sample": "sample"})
        check_prediction(self)


@dataclass(frozen=True)
class EvaluateConfig:
    """All settings of an evaluation, which compares the base and the adapter on images with reference texts.

    Raise ConfigError for an invalid value, or if there are no references. In peft: no equivalent.

    >>> config = lora_blip.EvaluateConfig(references="annotations.jsonl")
    >>> config.adapter
    'latest'
    """

    references: str = setting("", "annotations with the right texts, in the format of training", group="Data", path="always")
    image_root: str = setting("", "folder that image paths are relative to; empty: the references' folder", path="always")
    image_key: str = setting("", "column or key of the image path; empty: a common name, such as image or file_name")
    text_key: str = setting("", "column or key of the text; empty: a common name, such as text or caption")
    question_key: str = setting("", "column or key of the question; empty: question")
    answer_key: str = setting("", "column or key of the answers; empty: answers or answer")
    train_annotations: str = setting(
        "", 'training data to search for the same images; empty: the adapter\'s; "none": no search', path="always"
    )
    train_image_root: str = setting(
        "", "folder that these image paths are relative to; empty: the folder of TRAIN_ANNOTATIONS, or as in training",
        path="always",
    )  # fmt: skip
    on_bad_data: Literal["stop", "skip"] = setting("stop", 'if a line of the references is invalid: "stop" or "skip" the line')
    output_dir: str = setting("", "folder of the report; empty: a new folder in lora_blip_output", path="always")

    adapter: str = setting(
        "latest", 'an adapter file or run folder; "latest": the newest run of the task; "none": the base',
        group="Model and task", path="always",
    )  # fmt: skip
    scale: float = setting(1.0, "factor of the change that the adapter makes; 1: as trained; 0: the base")
    base: bool = setting(True, "also score the base")
    model: str = setting("", "hub name or folder of the base; empty: the base that the adapter was trained on", path="always")
    task: str = setting("auto", '"caption", "vqa" or "retrieval"; "auto": the adapter\'s task, or that of the checkpoint')

    prompt: str = setting("", 'start of every caption; empty: the adapter\'s prompt; "none": no prompt', group="Generation")
    max_new_tokens: int = setting(0, "largest number of generated tokens; 0: the adapter's setting, or 40")
    num_beams: int = setting(0, "beams of beam search; 0: the adapter's setting, or 1")
    generation: dict[str, Any] = setting(
        Options(), 'more options: {"repetition_penalty": 1.2}; see docs/generation.md; empty: the adapter\'s'
    )
    image_size: int = setting(0, "side of the square images in pixels; 0: the adapter's setting, or the model's size")
    seed: int = setting(0, "seed of the bootstrap and of sampling")

    device: str = setting("auto", '"auto", "cpu", "cuda", "cuda:1", "mps"', group="Speed and memory")
    precision: Precision = setting("auto", '"fp16", "bf16" or "fp32"; "auto": the best for the device')
    base_dtype: BaseDtype = setting(
        "auto", 'frozen weights: "fp32", "bf16", "fp16", "int8" or "nf4"; "auto": as trained, or by the precision'
    )
    batch_size: int = setting(16, "images per batch; halved if the device runs out of memory")
    fast: bool = setting(
        True, "faster attention and matrix products, equal to transformers' up to rounding; False: transformers' own"
    )

    def __post_init__(self) -> None:
        check(self)
        share_options(self, {"num_beams": "num_beams", "max_new_tokens": "max_new_tokens"})
        check_prediction(self)
        if not self.references:
            raise ConfigError(
                "references is empty; give the annotations file (in Python: EvaluateConfig(references='test.jsonl')) with the "
                "right texts: --references test.jsonl"
            )
