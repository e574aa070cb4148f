"""Check `adapter_config.json`, the settings of an adapter of peft, before they are used: the file may be untrusted."""

from dataclasses import dataclass
from typing import Any

from lora_blip.lora.header import HeaderError, is_flag, is_object, number, whole
from lora_blip.lora.peft_names import Budget, Targets, Values
from lora_blip.lora.sites import MOST_DROPOUT, MOST_RANK
from lora_blip.runtime.adapter_names import HUB_NAME
from lora_blip.runtime.untrusted import WITH_NAN, is_path, parsed, quoted

LARGEST = 2**20  # bytes of adapter_config.json; one with 700 names has 60,000
MOST_NAMES = 2048  # in a list or a pattern
LONGEST_NAME = 1000
MERGE = (
    "merge it into its base in peft, model.merge_and_unload().save_pretrained(folder), save the processor of the base too, "
    "AutoProcessor.from_pretrained(base).save_pretrained(folder), and give that folder as MODEL, without an adapter"
)
# a merge would change the output layer too: it has the weight of the embeddings in BLIP and OPT
EMBEDDINGS = (
    "train the adapter again without the embeddings. A merge in peft is no way out for BLIP and OPT: it would change the "
    "output layer too, which shares their weight"
)
# value of init_lora_weights with which peft changes no weight of the base; a text that begins with one of CHANGES does
KEEPS = (True, None, False, "gaussian", "orthogonal", "eva", "mica")
CHANGES = ("pissa", "olora", "corda", "loftq", "lora_ga")
TASK_OF = {  # base class → the only task of such checkpoints; a BLIP-2 captions and answers questions
    "BlipForConditionalGeneration": "caption",
    "BlipForQuestionAnswering": "vqa",
    "BlipForImageTextRetrieval": "retrieval",
    "Blip2ForImageTextRetrieval": "retrieval",
}
# settings that change what is computed, with what they are
REFUSED = {
    "modules_to_save": "whole modules that were trained beside LoRA",
    "lora_bias": "a bias in B",
    "trainable_token_indices": "trained rows of the embeddings",
    "target_parameters": "LoRA on parameters that are no linear",
    "fan_in_fan_out": "weights of shape (in, out), as in Conv1D",
    "layer_replication": "a base with repeated layers",
    "megatron_config": "parallel linears of Megatron",
    "alora_invocation_tokens": "an update that begins at a token",
    "use_qalora": "QA-LoRA, which pools the input",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "routing by Arrow",
    "loftq_config": "a base that LoftQ has changed",
    "corda_config": "a base that CorDA has changed",
    "lora_ga_config": "a base that LoRA-GA has changed",
}
READ = (  # settings that are used
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "revision", "auto_mapping",
    "init_lora_weights", "bias", "peft_version",
)  # fmt: skip
WITHOUT_EFFECT = ("task_type", "inference_mode", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying")
OFF: tuple[Any, ...] = (None, False, "", [], {})


@dataclass(frozen=True)
class PeftConfig:
    """The settings of an adapter of peft that `peft_format` uses."""

    ranks: Values
    alphas: Values
    targets: Targets
    dropout: float
    use_rslora: bool
    use_dora: bool
    base: str  # a path or a name on the hub, perhaps with @revision; "" if the file names none
    architecture: str  # the class of the base; "" if the file does not name it
    version: str


def parse_config(text: str) -> PeftConfig:
    """Return the settings. Raise HeaderError, which names the setting and a fix, if one is invalid or not supported."""
    try:
        config = parsed(text, WITH_NAN)
    except ValueError as error:
        raise HeaderError(f"it is not JSON ({error}); copy it again") from None
    if not is_object(config):
        raise HeaderError(f"it is {quoted(config)}, expected an object; copy it again")
    _refuse_others(config)
    r = _read(config, "r", 8, whole(1, MOST_RANK), f"a whole number from 1 to {MOST_RANK}")
    alpha = _read(config, "lora_alpha", 8, _is_alpha, "a positive number")
    mapping = _read(config, "auto_mapping", {}, is_object, "an object")
    architecture, budget = mapping.get("base_model_class"), Budget()
    return PeftConfig(
        Values("rank_pattern", _pattern(config, "rank_pattern", whole(1, MOST_RANK)), r, budget),
        Values("alpha_pattern", _pattern(config, "alpha_pattern", _is_alpha), alpha, budget),
        Targets(
            _read(config, "target_modules", None, _is_names, "a regex or a list of names"),
            _read(config, "exclude_modules", None, _is_names, "a regex or a list of names"),
            _listed(_read(config, "layers_to_transform", None, _is_numbers, "a list of numbers")),
            _listed(_read(config, "layers_pattern", None, _is_names, "a list of names")),
            budget,
        ),
        _read(config, "lora_dropout", 0.0, number(0, MOST_DROPOUT), "a number from 0 to below 1"),
        _read(config, "use_rslora", False, is_flag, "true or false"),
        _read(config, "use_dora", False, is_flag, "true or false"),
        _base(config),
        architecture if isinstance(architecture, str) and len(architecture) <= LONGEST_NAME else "",
        quoted(config.get("peft_version") or "unknown").strip("'"),
    )


def _refuse_others(config: dict[str, Any]) -> None:
    """Raise HeaderError if the adapter is not a LoRA, or if a setting adds something that lora_blip does not compute."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise HeaderError(f"its peft_type is {quoted(kind)}, and lora_blip reads LORA; {MERGE}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES):
        raise HeaderError(
            f"it started on a changed base (init_lora_weights = {quoted(start)}), so it does not fit the original one; convert "
            "it in peft, if the initial adapter was saved before the training: model.save_pretrained(folder, "
            f"path_initial_model_for_weight_conversion=initial_folder); otherwise {MERGE}"
        )
    if start not in KEEPS and not (isinstance(start, str) and start.lower() in KEEPS):
        raise HeaderError(
            f"its init_lora_weights is {quoted(start)}, which is unknown here, so it may need another base; {MERGE}"
        )
    for name, what in REFUSED.items():
        if config.get(name) not in OFF:
            way_out = EMBEDDINGS if name == "trainable_token_indices" else MERGE
            raise HeaderError(f"it uses {name} ({what}), which lora_blip does not have; {way_out}")
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise HeaderError(f"its bias is {quoted(bias)}, expected 'none', 'all' or 'lora_only'; copy it again")
    known = {*READ, *WITHOUT_EFFECT, *REFUSED}
    for name, value in config.items():
        if name not in known and value not in OFF:
            raise HeaderError(
                f"it uses {quoted(name)} = {quoted(value)}, which is unknown here, so its effect is unknown; {MERGE}"
            )


def _read(config: dict[str, Any], name: str, default: Any, fits: Any, expected: str) -> Any:
    """Return a setting, or the default if it is missing or null. Raise HeaderError if it is not valid."""
    value = config.get(name)
    if value is None:
        return default
    if not fits(value):
        raise HeaderError(f"its {name} is {quoted(value)}, expected {expected}; copy it again")
    return value


def _pattern(config: dict[str, Any], name: str, fits: Any) -> dict[str, Any]:
    """Return `rank_pattern` or `alpha_pattern`: {regex: value}."""
    pattern: dict[str, Any] = _read(config, name, {}, is_object, "an object")
    if len(pattern) > MOST_NAMES:
        raise HeaderError(f"its {name} has {len(pattern):,} entries, more than {MOST_NAMES:,}; {MERGE}")
    for text, value in pattern.items():
        if len(text) > LONGEST_NAME or not fits(value):
            raise HeaderError(
                f"its {name} has {quoted(text)}: {quoted(value)}, expected a name and a positive number; copy it again"
            )
    return pattern


def _is_alpha(value: Any) -> bool:
    return number(0, 1e300)(value) and value != 0


def _is_names(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= LARGEST
    return (
        isinstance(value, list)
        and len(value) <= 2 * MOST_NAMES
        and all(isinstance(name, str) and len(name) <= LONGEST_NAME for name in value)
    )


def _is_numbers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return len(numbers) <= MOST_NAMES and all(map(whole(0, 2**31), numbers))


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else [value]


def _base(config: dict[str, Any]) -> str:
    """Return the name of the base, with "@revision" for a revision on the hub that is not the default one."""
    name: str = _read(config, "base_model_name_or_path", "", is_path, "a name or path")
    revision: str = _read(config, "revision", "", is_path, "a name")
    is_on_hub = HUB_NAME.fullmatch(name) is not None
    return f"{name}@{revision}" if is_on_hub and revision not in ("", "main") else name
