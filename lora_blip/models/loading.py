"""Backbones: load BLIP or BLIP-2 frozen, by hub name or folder, with what turns text and images into tensors."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from lora_blip.errors import ConfigError, ModelError
from lora_blip.kernels import switch
from lora_blip.kernels.plain import is_plain, plain
from lora_blip.lora import attached
from lora_blip.lora.routing import checkpoint_context
from lora_blip.lora.sites import compiled
from lora_blip.models.base_config import check_config, check_sizes
from lora_blip.models.image_size import check_size, fit_processor, own_size, resize_positions
from lora_blip.runtime.limits import is_process_limit
from lora_blip.runtime.untrusted import printable, quoted

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SMALLEST_VOCABULARY = 100  # transformers builds an empty tokenizer where the files are missing
WORD_EMBEDDINGS = ("word_embeddings", "embed_tokens", "shared")  # names of the tables that token ids select from
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")
# model type → its architectures; the first is taken where a config names none
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], ...]] = {
    "blip": (BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval),
    "blip-2": (Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval),
}
REPOSITORY = Path(__file__).resolve().parents[2]
_IMPORTED_IN = os.getpid()


@dataclass
class Backbone:
    """A frozen model, its tokenizer and image processor, and where and how it computes."""

    model: Any  # a PreTrainedModel, whose parts its own types do not name
    tokenizer: Any
    image_processor: Any
    name: str
    device: torch.device
    samples: dict[str, Any] | None = None  # fingerprints of weights that were cast or spread over ranks, taken before
    fast: bool = True  # attention without stored scores, texts packed; false: transformers' own way, to compare with
    own_image_size: int = 0  # pixels; that of the checkpoint, whatever was chosen
    chose_image_size: bool = False  # an adapter that was trained at another size is then loaded all the same

    @property
    def image_size(self) -> int:
        """Height and width of the images that the model reads, in pixels."""
        return self.model.config.vision_config.image_size

    @property
    def chosen_size(self) -> int:
        """`image_size`, or 0 if it is the checkpoint's own: what a run's identity keeps."""
        return self.image_size if self.own_image_size not in (0, self.image_size) else 0

    @property
    def family(self) -> str:
        return self.model.config.model_type  # "blip" or "blip-2"

    @property
    def architecture(self) -> str:
        return type(self.model).__name__  # "BlipForQuestionAnswering": what decides which tasks it can do


def pick_device(device: str) -> torch.device:
    """ "auto" is cuda, then mps, then cpu. Raises ModelError when the device named is not there."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used here ({first_line(error)}); try 'auto' or 'cpu'") from None
    return chosen


def pick_precision(precision: str, device: torch.device) -> str:
    """ "auto" is bf16 on a CUDA device that has it, fp16 on an older one, fp32 elsewhere."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def emulated(precision: str, device: torch.device) -> bool:
    """Whether a CPU has no instructions for this precision, so that it computes right but many times slower than fp32."""
    if device.type != "cpu" or precision == "fp32":
        return False
    support = {"bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported, "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported}
    return not support[precision]()


def pick_base_dtype(wanted: str, config: PretrainedConfig, precision: str) -> str:
    """Frozen weights in 16 bits halve BLIP-2's memory; BLIP is small, and stays exact in fp32."""
    if wanted == "auto":
        return precision if config.model_type == "blip-2" else "fp32"
    if {wanted, precision} == {"fp16", "bf16"}:
        raise ConfigError(f"base_dtype = {wanted!r} with precision {precision!r}: set both to the same 16 bits, or one to fp32")
    return wanted


def autocasting(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """The context to compute in, made anew at each call."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, DTYPES[precision])


def load_backbone(
    name: str, device: str = "auto", dtype: str = "fp32", checkpointing: bool = False, fast: bool = True, image_size: int = 0
) -> Backbone:
    """Load a checkpoint frozen, in eval mode: one that captions, answers questions or matches texts with images.

    name: hub name or folder. dtype: of the weights: "fp32", "fp16" or "bf16". checkpointing: recompute
    activations in the backward pass (non-reentrant: the reentrant kind leaves adapters without gradients). fast: use the
    fast attention, update and texts; if false, everything is computed as transformers and `layer.lora_hook` do.
    image_size: height and width of the images in pixels, a multiple of the patch size; the positions are interpolated.
    0: the checkpoint's own.

    The model's own dropout is set to 0: a frozen backbone gains nothing from it, and training then
    computes what inference computes. Raises ModelError for a checkpoint that is not there, is of
    another kind, lacks weights or image placeholders, or is a T5 in fp16. Raises ConfigError for an `image_size` that is
    not a multiple of the patch size.
    """
    source = locate_model(name)
    return _load(name, source, load_config(source), pick_device(device), dtype, checkpointing, fast, image_size)


def open_backbone(
    name: str, device: str, precision: str, base_dtype: str = "auto", checkpointing: bool = False, fast: bool = True,
    image_size: int = 0,
) -> tuple[Backbone, str]:  # fmt: skip
    """A backbone as the settings ask for it, and the precision to compute in; training and inference agree by this.

    Raises ModelError and ConfigError as `load_backbone` does, and ConfigError for two kinds of 16 bits at once.
    """
    where = pick_device(device)
    precision = pick_precision(precision, where)
    if emulated(precision, where):
        print(f"this CPU emulates {precision}, which is many times slower than fp32")
    source = locate_model(name)
    config = load_config(source)
    refuse_t5_fp16(config, name, precision)  # under AMP as well, whatever the weights' dtype
    dtype = pick_base_dtype(base_dtype, config, precision)
    return _load(name, source, config, where, dtype, checkpointing, fast, image_size), precision


def _load(
    name: str, source: str, config: PretrainedConfig, where: torch.device, dtype: str, checkpointing: bool, fast: bool,
    image_size: int,
) -> Backbone:  # fmt: skip
    _refuse(config, name, dtype)
    own = own_size(config, name)
    if image_size:
        check_size(image_size, config)
    size = image_size or own
    _silence_dropout(config)
    with Quiet(source):
        check_sizes(_architecture(config), config, source)
    model = _load_model(_architecture(config), source, config, DTYPES[dtype])
    if size != own:
        resize_positions(model, size)
    model.requires_grad_(False).eval().to(where)
    switch.fast(model, fast)
    attached.fast(model, fast)
    if checkpointing:
        with Quiet(source):
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": partial(recompute_contexts, model)})
            model.disable_input_require_grads()  # only the reentrant kind needs them, and BLIP adds positions in place
    tokenizer, image_processor = _load_processors(source)
    check_vocabulary(model, tokenizer, name)
    other = fit_processor(image_processor, size, name)
    if size != own:
        print(f"images are resized to {size}×{size}; the positions of {name!r} are interpolated from {own}×{own}")
    elif other:
        print(f"images are resized to {size}×{size}, which the model {name!r} reads; its image processor {other}")
    return Backbone(
        model, tokenizer, image_processor, name, where, fast=fast, own_image_size=own, chose_image_size=bool(image_size)
    )


def recompute_contexts(model: Any) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a checkpointed forward and of its recomputation, which may run in another thread."""
    forward, recompute = checkpoint_context(model)
    return forward, both(recompute, plain(is_plain()))


@contextmanager
def both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter two contexts."""
    with first, second:
        yield


def load_config(source: str) -> PretrainedConfig:
    """The checkpoint's configuration; ModelError says what to do when there is none."""
    try:
        with Quiet(source):
            check_config(source)
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # values of a stranger's file, each of which fails in another place of transformers
        raise ModelError(
            f"model {source!r} cannot be loaded: {first_line(error)}\n"
            "give a folder that holds config.json, or a hub name such as Salesforce/blip-image-captioning-large"
        ) from None


def locate_model(name: str) -> str:
    """The folder, if there is one here or in the repository (so that assets/tiny-blip works from anywhere)."""
    if Path(name).is_dir():
        return name
    if (REPOSITORY / name / "config.json").is_file():
        return str(REPOSITORY / name)
    if name.startswith(("/", ".", "~", "assets/")):
        raise ModelError(f"model folder {name!r} does not exist")
    return name


def _refuse(config: PretrainedConfig, name: str, dtype: str) -> None:
    if config.model_type not in ARCHITECTURES:
        raise ModelError(f"{name!r} is a {config.model_type!r} model; lora_blip trains BLIP ('blip') and BLIP-2 ('blip-2')")
    known = [kind.__name__ for kind in ARCHITECTURES[config.model_type]]
    if config.architectures and not set(known) & set(config.architectures):
        raise ModelError(
            f"{name!r} is a {quoted(config.architectures[0])}, which has no task here; give one of {', '.join(known)}"
        )
    if _architecture(config) is Blip2ForConditionalGeneration:
        if config.image_token_index is None:
            raise ModelError(
                f"{name!r} has no image_token_index in its config, so its language model would never see the image; "
                "use a newer revision of the checkpoint, or set it to the id of the tokenizer's <image>"
            )
        refuse_t5_fp16(config, name, dtype)


def _architecture(config: PretrainedConfig) -> type[PreTrainedModel]:
    named = config.architectures or []
    kinds = ARCHITECTURES[config.model_type]
    return next((kind for kind in kinds if kind.__name__ in named), kinds[0])


def refuse_t5_fp16(config: PretrainedConfig, name: str, precision: str) -> None:
    """Flan-T5 overflows fp16 to NaN, in the weights as under AMP."""
    if precision == "fp16" and getattr(config, "text_config", None) is not None and config.text_config.model_type == "t5":
        raise ModelError(f"{name!r} has a T5 language model, which gives NaN in fp16; set the precision to bf16 or fp32")


def _silence_dropout(config: PretrainedConfig) -> None:
    for part in [config, *(getattr(config, key, None) for key in ("text_config", "vision_config", "qformer_config"))]:
        for key, value in list(vars(part).items()) if part is not None else []:
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)


def _load_processors(source: str) -> tuple[Any, Any]:
    """Tokenizer and image processor (Pillow's: the same on every machine, with no need of torchvision)."""
    try:
        with Quiet(source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    except Exception as error:  # as for the config
        raise ModelError(f"the tokenizer or image processor of {source!r} cannot be loaded: {first_line(error)}") from None
    if len(tokenizer) < SMALLEST_VOCABULARY:
        raise ModelError(f"{source!r} has no tokenizer files (tokenizer.json or vocab.txt); copy them beside its weights")
    return tokenizer, image_processor


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Raise ModelError if a token of the tokenizer or a token id of the config has no row in the text embeddings.

    A tokenizer with fewer tokens than rows is fine. So is an image token without a row in a model that matches images with
    texts, because that model never embeds it.
    """
    tables = [part for path, part in model.named_modules() if path.rpartition(".")[2] in WORD_EMBEDDINGS]
    rows = min(table.num_embeddings for table in tables)
    generates = not isinstance(model, Blip2ForImageTextRetrieval)  # the other has a text_config that it does not use
    image = getattr(model.config, "image_token_index", None)
    if image is not None and not (is_id(image, rows) or (is_id(image) and not generates)):
        raise ModelError(no_embedding(name, "image_token_index", image, rows))
    past = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= rows and id_ != image)
    if past:
        raise ModelError(
            f"{name!r}: the tokenizer has {len(past)} tokens that the model has no embeddings for (first: "
            f"{quoted(past[0][1])}, id {past[0][0]}; the model has {rows} rows); use the tokenizer that was saved with "
            "this model, or call model.resize_token_embeddings(len(tokenizer)) in transformers and save both again"
        )
    if not generates:
        return
    for key in TOKEN_IDS:
        value = getattr(model.config.text_config, key, None)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and not is_id(each, rows):
                raise ModelError(no_embedding(name, f"{key} of text_config", each, rows))


def is_id(value: Any, rows: int = sys.maxsize) -> bool:
    """Return True if a value is a token id below `rows`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows


def no_embedding(name: str, key: str, value: object, rows: int) -> str:
    """Return the message for a token id that has no row in the text embeddings."""
    return (
        f"{name!r}: {key} in config.json is {quoted(value)}, but the model has {rows} embeddings; set it to an id of the "
        f"tokenizer, from 0 to {rows - 1}"
    )


def _load_model(kind: type[PreTrainedModel], source: str, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    model: Any
    report: Any
    from_pretrained: Any = kind.from_pretrained  # returns a pair when asked for its report
    restart_thread_pool()
    try:
        with Quiet(source):
            model, report = from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False
            )
    except Exception as error:  # as for the config
        if is_process_limit(error):
            raise
        raise ModelError(
            f"the weights of {source!r} cannot be loaded: {first_line(error)}\nonly safetensors are read: a .bin can run "
            f"code; `{kind.__name__}.from_pretrained(…).save_pretrained(…)` in transformers writes them"
        ) from None
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise ModelError(
            f"{source!r} lacks {len(missing)} weights of {kind.__name__} ({', '.join(missing[:3])} …); they would be "
            "random: this is a checkpoint for another task, or a broken download"
        )
    return model


def restart_thread_pool() -> None:
    """Create PyTorch's thread pool again in the calling thread if this process was forked after our import.

    The first operation after a fork creates the pool again, without a lock. transformers reads weights in several threads.
    Two threads that start at the same time can find no pool ("Invalid thread pool", ATen/ParallelOpenMP.cpp). Servers that
    import everything and then fork their workers (gunicorn's `preload_app`) are in this situation.
    """
    if os.getpid() != _IMPORTED_IN:
        torch.set_num_threads(torch.get_num_threads())


def first_line(error: Exception) -> str:
    """Return the first line of a message on one line that is safe to print: it may quote a stranger's file."""
    return printable((str(error).splitlines() or [""])[0] or type(error).__name__)


def compile_blocks(model: Any, first: int = 0) -> None:
    """torch.compile for the blocks of the ViT from `first` on, with the hooks they carry now: later ones would be ignored."""
    for block in model.vision_model.encoder.layers[first:]:
        block.compile()


def uncompiled(model: Any) -> AbstractContextManager[Any]:
    """Inside the block a model that was compiled runs as it is written: other shapes, hooks to look at it, merged weights."""
    return torch.compiler.set_stance("force_eager") if compiled(model) else nullcontext()


class Quiet(warnings.catch_warnings):
    """Loading without transformers' advice, and from a folder without its bars; a download keeps its own."""

    def __init__(self, source: str) -> None:
        super().__init__(record=False)
        self.local = Path(source).is_dir()

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        self.level = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        if self.local:
            transformers_logging.disable_progress_bar()

    def __exit__(self, *error: Any) -> None:
        transformers_logging.set_verbosity(self.level)
        if self.bars:
            transformers_logging.enable_progress_bar()
        super().__exit__(*error)
