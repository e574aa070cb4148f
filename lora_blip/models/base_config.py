"""Check the files of a checkpoint before a model is built from them. They may be untrusted.

transformers loads code, kernels and quantizers that a config.json names, and allocates the sizes that it describes. Such a
config raises ModelError. Its sizes are compared with the shapes in the headers of the weights.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from lora_blip.errors import ModelError
from lora_blip.models import quantization_config
from lora_blip.models.generation import OPTIONS
from lora_blip.models.library import Quiet
from lora_blip.models.unsupported import refuse_folder, unsupported_kind
from lora_blip.models.weight_names import SAFE_INDEX, SAFE_WEIGHTS, unreadable, without_prefix
from lora_blip.runtime.runs import LARGEST_CONFIG
from lora_blip.runtime.untrusted import UnreadableError, open_regular, os_error_reason, parsed, quoted

LARGEST_INDEX = 2**26  # bytes of the index of weights in many files
LARGEST_NUMBER = 2**20  # of any number in a config; four times the largest vocabulary of known language models
LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers")
LANGUAGE_MODELS = ("opt", "t5")
ATTENTIONS = (None, "eager", "sdpa")
LARGEST_TOKENIZER = 2**26  # bytes of each file of the tokenizer and the processors; those of known models have 4 MB
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "tokenizer.model", "chat_template.jinja", "chat_template.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
# keys that make transformers load code, a kernel, a quantizer or other files
FORBIDDEN = (
    "quantization_config", "compression_config", "kernel_config", "use_kernels", "fusion_config", "per_layer_config",
    "transformers_weights", "configuration_files", "distributed_config", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "custom_generate", "constraints", "force_words_ids",
    "num_beam_groups", "penalty_alpha", "dola_layers",
)  # fmt: skip
# keys that a checkpoint's generation config may contain: they choose the next token from the logits, or have no effect here
GENERATION_KEYS = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "do_sample", "num_beams", "use_cache",
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "diversity_penalty",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "pad_token_id", "bos_token_id",
    "eos_token_id", "decoder_start_token_id", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "low_memory", "disable_compile", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
    "_from_model_config", "transformers_version",
)  # fmt: skip
# all other keys, also of later versions of transformers: they change the search for a text, the cache, or the time limit
OTHER_GENERATION = frozenset(vars(GenerationConfig())) - {*GENERATION_KEYS}
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
NO_EFFECT_IF_ONE = ("num_return_sequences", "num_beam_groups", "guidance_scale")  # keys
HARMLESS: tuple[Any, ...] = (None, False, "", [], {})
UNUSED = ("task_specific_params",)  # transformers stores them and never uses them
NUMBERED = re.compile(r"(.*\.(?:layers?|block)\.)(\d+)\.")
POSITIONS = "vision_model.embeddings.position_embedding"
ADAPTERS = re.compile(r"\.(lora|lora_A|lora_B|base_layer)\.|\.lora_[AB]$")
SPARE = 2**24  # how many weights of the model may be missing in the files, such as those of a head
FIX = "copy config.json and the weights again from one checkpoint"


def check_config(source: str) -> None:
    """Raise ModelError if a configuration file of a checkpoint is broken, too large, or loads more than weights."""
    refuse_folder(Path(source))
    config = read_json(source, "config.json")
    _check_kind(config, source)
    _check_values(config, source, "config.json")
    generation = read_json(source, "generation_config.json", needed=False)
    _check_values(generation, source, "generation_config.json")
    if _located(source, "adapter_config.json"):
        raise ModelError(
            f"{source!r} contains a PEFT adapter (adapter_config.json), and transformers would load the base that it names; "
            "give the checkpoint of that base"
        )
    check_tokenizer_files(source)


def check_tokenizer_files(source: str) -> None:
    """Raise ModelError if a file of the tokenizer or the processors is too large, empty, or no regular file.

    transformers reads such a file as a whole.
    """
    for path in (Path(source) / file_name for file_name in TOKENIZER_FILES):
        try:
            if path.exists():
                open_regular(path, LARGEST_TOKENIZER).close()
        except OSError as error:
            raise ModelError(
                f"model {source!r} cannot be loaded: {path.name}: {os_error_reason(error)}; copy it again from the checkpoint"
            ) from None


def read_json(source: str, file_name: str, needed: bool = True, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """Return the JSON object of a checkpoint's file, {} if there is no file. Raise ModelError if it is not an object."""
    path = _located(source, file_name)
    if path is None:
        if needed:
            raise ModelError(
                f"model {source!r} cannot be loaded: it has no {file_name}\n"
                "give a folder that contains config.json, or a hub name such as Salesforce/blip-image-captioning-large"
            )
        return {}
    remedy = "copy it again from where the checkpoint came from"
    try:
        with open_regular(path, largest) as file:
            value = parsed(file.read(largest + 1).decode("utf-8"))
    except UnreadableError as error:
        raise ModelError(f"model {source!r} cannot be loaded: {file_name}: {error}; {remedy}") from None
    except OSError as error:
        raise ModelError(f"model {source!r} cannot be loaded: {file_name}: {os_error_reason(error)}; {remedy}") from None
    except ValueError as error:
        raise ModelError(
            f"model {source!r} cannot be loaded: {file_name} is not JSON ({quoted(str(error))}); {remedy}"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"model {source!r} cannot be loaded: {file_name} is {quoted(value)}, expected an object; {remedy}")
    return value


def _located(source: str, file_name: str) -> Path | None:
    """Return the path of a checkpoint's file, or None if there is none."""
    path = Path(source) / file_name
    return path if path.exists() else None


def _check_kind(config: Mapping[str, Any], source: str) -> None:
    kind = config.get("model_type")
    if kind not in ("blip", "blip-2"):
        raise ModelError(unsupported_kind(kind, source, bool(config.get("auto_map"))))
    for part in ("vision_config", "text_config", "qformer_config"):
        if not isinstance(config.get(part, {}), dict | None):
            raise ModelError(f"config.json of {source!r}: {part} is {quoted(config[part])}, expected an object; {FIX}")
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(each, str) for each in named)):
        raise ModelError(f"config.json of {source!r}: architectures is {quoted(named)}, expected a list of names; {FIX}")
    if kind == "blip" and (config.get("text_config") or {}).get("is_decoder", True) is not True:
        raise ModelError(
            f"config.json of {source!r}: is_decoder of text_config is not true, so its text model would not read the "
            "image; set it to true"
        )
    language = (config.get("text_config") or {}).get("model_type", "opt")
    if kind == "blip-2" and language not in LANGUAGE_MODELS:
        raise ModelError(
            f"{source!r} has a {quoted(language)} language model; give one with OPT or T5, such as Salesforce/blip2-opt-2.7b"
        )


def _check_values(config: Mapping[str, Any], source: str, file_name: str) -> None:
    if file_name == "config.json":
        quantization_config.check(config, source)
    for place, key, value in _entries(config):
        where = f"{file_name} of {source!r}: {quoted(place)[1:-1]} is {quoted(value)}"
        if key in ATTENTION_KEYS and not (value is None or (isinstance(value, str) and value in ATTENTIONS)):
            raise ModelError(f"{where}, which may load a kernel; remove the key")
        if key == quantization_config.KEY and place == key and file_name == "config.json":
            continue  # checked above
        default = value in HARMLESS or (key in NO_EFFECT_IF_ONE and value == 1)
        if key in FORBIDDEN and not default:
            raise ModelError(f"{where}, which lora_blip does not load; remove the key, or give a plain checkpoint")
        if key in OTHER_GENERATION and not default:
            if key in OPTIONS:  # a user may set it; in a checkpoint, it would change texts without a message
                raise ModelError(f"{where}; remove the key, and set it in GENERATION (--generation {key}=…)")
            raise ModelError(f"{where}, and lora_blip does not generate in this way; remove the key")
        if key == "auto_map" and place != "auto_map":
            raise ModelError(f"{where}: code of a checkpoint is never run; remove the key")
        if isinstance(value, int) and value > LARGEST_NUMBER and not isinstance(value, bool):
            raise ModelError(f"{where}; the largest models have {LARGEST_NUMBER:,} at most: copy the file again")


def _entries(config: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) of every entry, including nested ones."""
    items = config.items() if isinstance(config, Mapping) else enumerate(config)
    for key, value in items:
        if key in UNUSED:
            continue
        path = f"{place}.{key}" if place else str(key)
        yield path, str(key), value
        if isinstance(value, dict | list):
            yield from _entries(value, path)


# ---------------------------------------------------------------- sizes


def check_sizes(kind: type[PreTrainedModel], config: PretrainedConfig, source: str) -> None:
    """Raise ModelError if the config does not describe the model whose weights are in the checkpoint.

    The model is built without memory, on the meta device. Do nothing if there are no safetensors.
    """
    shapes = without_prefix(weight_shapes(source))
    if not shapes:
        return
    _check_keys(shapes, source)
    for part in (config, *(getattr(config, name, None) for name in ("vision_config", "text_config", "qformer_config"))):
        for key in LAYERS:
            layers = getattr(part, key, None)
            if layers is not None and not 0 < layers <= len(shapes):
                raise ModelError(
                    f"config.json of {source!r}: {key} is {layers}, and its weights have {len(shapes)} tensors in all; {FIX}"
                )
    try:
        model = skeleton_of(kind, config).state_dict()
    except Exception as error:  # transformers does not check that sizes fit each other
        message = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"config.json of {source!r} does not describe a model ({type(error).__name__}: {quoted(message)}); {FIX}"
        ) from None
    shapes = quantization_config.unpacked(shapes, model)
    for name, tensor in model.items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            fix = _image_size_fix(shapes[name], config) if name == POSITIONS else FIX
            raise ModelError(
                f"{source!r}: {name} is {tuple(tensor.shape)} by its config.json, and {shapes[name]} in its weights; {fix}"
            )
    _check_layers(model, shapes, source)
    count = sum(map(math.prod, shapes.values()))
    absent = sum(tensor.numel() for name, tensor in model.items() if name not in shapes)
    if absent > count + SPARE:
        raise ModelError(
            f"{source!r}: its config.json describes {absent:,} weights that are not in its files, which have {count:,}; {FIX}"
        )


def skeleton_of(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Return the model without memory, on the meta device."""
    with Quiet("."), torch.random.fork_rng(devices=[]), torch.device("meta"):
        return kind(config)


def _image_size_fix(shape: tuple[int, ...], config: Any) -> str:
    """Return how to correct a config whose image size is not that of the position embeddings (1, 1 + patches, width)."""
    side = math.isqrt(max(shape[1] - 1, 0)) if len(shape) == 3 else 0
    if not side or side**2 != shape[1] - 1 or shape[2] != config.vision_config.hidden_size:
        return FIX
    size = side * config.vision_config.patch_size
    return f'they are for images of {size}×{size}: set "image_size": {size} in the vision_config of its config.json'


def weight_shapes(source: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a checkpoint's safetensors, from their headers; {} if there are none."""
    files = []
    if path := _located(source, SAFE_WEIGHTS):
        files = [path]
    elif _located(source, SAFE_INDEX):
        index = read_json(source, SAFE_INDEX, largest=LARGEST_INDEX).get("weight_map")
        names = set(index.values()) if isinstance(index, dict) and all(map(_is_plain, index.values())) else set()
        if not names:
            raise ModelError(f"{SAFE_INDEX} of {source!r} names no files; copy it again")
        paths = {name: _located(source, name) for name in names}
        if missing := sorted(name for name, path in paths.items() if path is None):
            raise ModelError(f"the weights of {source!r} lack {quoted(missing[0])}; download the checkpoint again")
        files = [path for path in paths.values() if path]
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with open_regular(path), safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise unreadable(source, path.name, error) from None
    return shapes


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\\" not in name


def _check_keys(shapes: Mapping[str, Any], source: str) -> None:
    of_adapters = [name for name in shapes if ADAPTERS.search(name)]
    if of_adapters:
        raise ModelError(
            f"{source!r} was saved from a model with adapters on it ({quoted(of_adapters[0])}), which would be ignored. "
            "Call lora_blip.bake(model) before model.save_pretrained(…); or load the base, and the adapter from its own file"
        )


def _check_layers(skeleton: Mapping[str, Any], shapes: Mapping[str, Any], source: str) -> None:
    """Raise ModelError if the weights have more layers than the config, because the extra layers would be ignored."""
    described: dict[str, int] = {}
    for match in filter(None, map(NUMBERED.match, skeleton)):
        described[match[1]] = max(described.get(match[1], 0), int(match[2]) + 1)
    for name in shapes:
        numbered = NUMBERED.match(name)
        if numbered and int(numbered[2]) >= described.get(numbered[1], 2**63):
            raise ModelError(
                f"{source!r}: its weights contain {quoted(name)}, but its config.json describes {described[numbered[1]]} "
                f"such layers; {FIX}"
            )
