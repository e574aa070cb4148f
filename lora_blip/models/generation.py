"""The options of text generation: the fields of transformers' `GenerationConfig` that a user may set, and their checks.

`OPTIONS` are these fields. `REFUSED` are the others, with the reason and the fix. transformers checks the values: first
in `GenerationConfig`, then in a call of `generate`, which writes two tokens with a tiny model.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

import torch
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

from lora_blip.errors import ConfigError
from lora_blip.kernels.signatures import version_of
from lora_blip.models.library import Quiet, first_line
from lora_blip.runtime.settings import Options
from lora_blip.runtime.untrusted import quoted

LARGEST_ID = 2**20  # four times the largest vocabulary of a language model
CANDIDATES = 64  # tokens of the model that checks options; a watermark with "selfhash" compares the 40 most probable ones
LEAST_GREEN = 0.4  # with this ratio, none of the 40 candidates is green at about one token in 10⁹
SELFHASH = (
    "transformers' selfhash fails at a token if none of its 40 candidates is in the green list; with the default "
    f'greenlist_ratio = 0.25, this is one token in 100,000; set "greenlist_ratio" to at least {LEAST_GREEN}, or use lefthash'
)
MOST_TEXTS = 1024  # beams, and texts for one image
NO_EFFECT = re.compile(r"^- `(\w+)`: (.*)$", re.M)  # a line of transformers' message about options without effect
Check = tuple[Callable[[Any], bool], str]


def _whole(least: int, most: int = 2**31 - 1) -> Check:
    words = f"a whole number from {least}" + f" to {most}" * (most < 2**31 - 1)
    return lambda value: type(value) is int and least <= value <= most, words


def _number(least: float, most: float, words: str) -> Check:
    return lambda value: type(value) in (int, float) and least <= value <= most, words


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST_ID


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_id, value))


def _are_biases(value: Any) -> bool:
    pairs = isinstance(value, list) and value and all(isinstance(one, list) and len(one) == 2 for one in value)
    return bool(pairs) and all(_are_ids(ids) and type(bias) in (int, float) for ids, bias in value)


FLAG: Check = lambda value: isinstance(value, bool), "true or false"
SHARE = _number(0, 1, "a number from 0 to 1")
PENALTY = _number(1e-6, 1e6, "a number above 0; 1 has no effect")
IDS: Check = _are_ids, "a list of token ids, such as [5, 7]"
OPTIONS: dict[str, Check] = {
    "max_new_tokens": _whole(1), "min_new_tokens": _whole(0), "min_length": _whole(0),
    "num_beams": _whole(1, MOST_TEXTS), "num_return_sequences": _whole(1, MOST_TEXTS),
    "early_stopping": (lambda value: isinstance(value, bool) or value == "never", 'true, false or "never"'),
    "length_penalty": _number(-1e3, 1e3, "a number; above 0 favours long texts"),
    "do_sample": FLAG, "temperature": _number(1e-6, 1e6, "a number above 0"), "top_k": _whole(0), "top_p": SHARE,
    "min_p": SHARE, "top_h": SHARE, "typical_p": SHARE, "epsilon_cutoff": SHARE, "eta_cutoff": SHARE,
    "repetition_penalty": PENALTY, "encoder_repetition_penalty": PENALTY,
    "no_repeat_ngram_size": _whole(0), "encoder_no_repeat_ngram_size": _whole(0),
    "bad_words_ids": (
        lambda value: isinstance(value, list) and bool(value) and all(map(_are_ids, value)),
        "a list of lists of token ids, such as [[5], [7, 8]]",
    ),
    "suppress_tokens": IDS, "begin_suppress_tokens": IDS,
    "forced_eos_token_id": (lambda value: _is_id(value) or _are_ids(value), "a token id, or a list of token ids"),
    "sequence_bias": (_are_biases, "a list of pairs of token ids and a number, such as [[[5, 7], -2.0]]"),
    "exponential_decay_length_penalty": (
        lambda value: isinstance(value, list) and len(value) == 2 and _whole(0)[0](value[0]) and PENALTY[0](value[1]),
        "a start and a factor, such as [10, 1.2]",
    ),
    "renormalize_logits": FLAG, "remove_invalid_values": FLAG,
    "watermarking_config": (lambda value: isinstance(value, dict), 'an object, such as {"greenlist_ratio": 0.25, "bias": 2.0}'),
}  # fmt: skip
BASIC = {"max_new_tokens", "num_beams", "do_sample"}  # they have settings of their own, and need no further check
READ_PROMPT = frozenset((  # options that depend on the prompt's token ids or their number, and therefore on padding
    "min_length", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "sequence_bias", "watermarking_config",
))  # fmt: skip
READ_ENCODER = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")  # transformers ignores them without prompt ids
WITH_IDS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")  # a token id, or lists of them

FIXED = "the model and its tokenizer define this token; remove it"
OUTPUT = "a prediction contains the texts and their scores; remove it"
SPEED = "it changes only the speed or the memory, and lora_blip chooses it; remove it"
ASSISTANT = "generation with an assistant needs a second model; remove it"
REMOVED = "transformers would load code from the hub for it; remove it"
REFUSED = {
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), FIXED),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"), OUTPUT
    ),
    **dict.fromkeys(
        ("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
         "continuous_batching_config", "low_memory", "prefill_chunk_size"), SPEED,
    ),
    **dict.fromkeys(
        ("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
         "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
         "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"), ASSISTANT,
    ),
    **dict.fromkeys(
        ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "num_beam_groups", "diversity_penalty"), REMOVED
    ),
    "max_length": "it counts the prompt too; use max_new_tokens",
    "max_time": "the text would depend on the speed of the machine; use max_new_tokens",
    "forced_bos_token_id": "the model starts each text itself; set PROMPT (--prompt) to start all texts with the same words",
    "token_healing": "it changes the prompt; end PROMPT (--prompt) with a whole word",
    "stop_strings": (
        "a score is the probability of a text with its end token, and a text that stops at a string has none; cut the "
        "predictions at the string afterwards"
    ),
    "guidance_scale": "it needs a second pass without the image for each token, which lora_blip does not have; remove it",
}  # fmt: skip


def reads_prompt(settings: Mapping[str, Any], own: Any) -> bool:
    """Return True if an option in READ_PROMPT has an effect. own: the checkpoint's config, for options not in the settings."""
    values = {name: settings.get(name, getattr(own, name, None)) for name in READ_PROMPT}
    return any(value and not (value == 1 and name.endswith("penalty")) for name, value in values.items())


def check_generation(options: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the fix, if a name or a value cannot be used."""
    if fault := generation_fault(options):
        raise ConfigError(fault)


def generation_fault(options: Mapping[str, Any]) -> str:
    """Return why options cannot be used, with the fix, or "". An option that is None counts as missing."""
    for name, value in options.items():
        if name not in OPTIONS:
            return f"generation: {_why_not(name)}"
        fits, expected = OPTIONS[name]
        if value is not None and not fits(value):
            return f"generation: {name} = {quoted(value)}: expected {expected}"
    used = Options({name: value for name, value in options.items() if value is not None})
    fault = _fault(used) if used.keys() - BASIC else ""
    return f"generation = {quoted(dict(used))}: {fault}" if fault else ""


def check_for_model(options: Mapping[str, Any], architecture: str, vocabulary: int, reads_encoder_ids: bool) -> None:
    """Raise ConfigError for a token id outside the vocabulary, and for an option that transformers ignores with this model."""
    if (largest := max(ids_in(options), default=0)) >= vocabulary:
        raise ConfigError(f"generation: there is no token {largest}; the ids of {architecture} are below {vocabulary}")
    for name in READ_ENCODER:
        if not reads_encoder_ids and options.get(name) not in (None, 0, 1):
            other = name.removeprefix("encoder_")
            raise ConfigError(f"generation: transformers ignores {name} for a {architecture}; remove it, or use {other}")


def _why_not(name: str) -> str:
    """Return why a name is no option, with the fix."""
    if name in REFUSED:
        return f"{name} cannot be set: {REFUSED[name]}"
    if name in vars(GenerationConfig()) and not name.startswith("_") and name != "transformers_version":
        return f"{name} is new in {version_of(GenerationConfig)}, and this lora_blip has not been tested with it; remove it"
    near = difflib.get_close_matches(name, [*OPTIONS, *REFUSED], 1, 0.0)[0]
    return f"{quoted(name)} is not a field of transformers' GenerationConfig; did you mean {near}?"


@lru_cache(maxsize=64)
def _fault(options: Options) -> str:
    """Return why our checks or transformers refuse the options, or ""."""
    least, most = options.get("min_new_tokens", 0), options.get("max_new_tokens", 2**31)
    if least > most:
        return f"min_new_tokens is {least}, more than max_new_tokens = {most}; lower it"
    watermark = options.get("watermarking_config") or {}
    if watermark.get("seeding_scheme") == "selfhash" and watermark.get("greenlist_ratio", 0.25) < LEAST_GREEN:
        return SELFHASH
    ids = ids_in(options)
    small = {name: min(options[name], 4) for name in ("num_beams", "num_return_sequences") if name in options}
    lengths = {"min_new_tokens": 0, "min_length": 0, "max_new_tokens": 2, "pad_token_id": 1, "eos_token_id": 2}
    try:
        with Quiet("."), torch.random.fork_rng(devices=[]):  # sampling would change the draws of the run's seed
            GenerationConfig(**options)
            model = _tiny_model(max(ids, default=0) + CANDIDATES)
            model.generate(torch.full((1, 2), 3), **options | small | lengths)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        return f"{first_line(error)} Change it in GENERATION (--generation)"
    return ""


def ids_in(options: Mapping[str, Any]) -> list[int]:
    """Return the token ids in the values of the options."""

    def flat(value: Any) -> list[int]:
        return [id for one in value for id in flat(one)] if isinstance(value, list) else [value]

    of_biases = [id for ids, _ in options.get("sequence_bias") or [] for id in ids]
    others = [id for name in WITH_IDS if options.get(name) is not None for id in flat(options[name])]
    return of_biases + others


@cache
def _tiny_model(vocabulary: int) -> Any:
    """Return an OPT with two heads and a few weights, to check options before the user's model is loaded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = OPTConfig(
            vocab_size=vocabulary, hidden_size=4, word_embed_proj_dim=4, ffn_dim=4, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16,
        )  # fmt: skip
        return OPTForCausalLM(config).eval()


def ignored_lines(generation: Mapping[str, Any]) -> list[str]:
    """Return a line for each option that has no effect."""
    return [f"generation: {name} has no effect: {reason}" for name, reason in without_effect(Options(generation)).items()]


def unused_lines(config: Any) -> list[str]:
    """Return a line with the settings of generation that a config sets, for a run that ranks texts and generates none."""
    least = {"num_beams": 2, "max_new_tokens": 1, "sample": 1}
    names = [name for name, value in least.items() if getattr(config, name, 0) >= value] + list(
        getattr(config, "generation", ())
    )
    effect = "has no effect" if len(names) == 1 else "have no effect"
    return [f"generation: {', '.join(names)} {effect}: texts are ranked, and none is generated"] if names else []


@lru_cache(maxsize=64)
def without_effect(options: Options) -> dict[str, str]:
    """Return {name: reason} for options that transformers ignores, such as top_p without do_sample."""
    with Quiet("."):
        config = GenerationConfig(**options)
        try:
            config.validate(strict=True)
        except ValueError as error:
            return dict(NO_EFFECT.findall(str(error)))
    return {}
