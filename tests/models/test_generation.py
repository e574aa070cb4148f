"""Options of generation: transformers' own names and checks, and the texts of transformers' own `generate`."""

import re
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from lora_blip.errors import ConfigError
from lora_blip.lora import attached
from lora_blip.lora.routing import disable_adapters
from lora_blip.models.generation import OPTIONS, REFUSED, _fault, check_generation, ignored_lines
from lora_blip.models.token_rows import by_length
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.vqa import VqaTask
from tests.support.hugging_face import hugging_face, hugging_face_answers
from tests.support.models import EACH, PROMPTS, carry, inject
from tests.support.questions import ASKED, examples, pictures

LENGTHS = {"max_new_tokens": 8, "min_new_tokens": 5}
SETS: list[dict[str, Any]] = [
    {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2, **LENGTHS},
    {"num_beams": 3, "length_penalty": -2.0, "max_new_tokens": 8},
    {"num_beams": 4, "early_stopping": True, "num_return_sequences": 3, "repetition_penalty": 1.4, "max_new_tokens": 8},
    {"suppress_tokens": [5, 6, 7], "begin_suppress_tokens": [40], "bad_words_ids": [[30], [31, 32]], **LENGTHS},
    {"sequence_bias": [[[20], 3.0], [[21, 22], -5.0]], "exponential_decay_length_penalty": [2, 1.5], "max_new_tokens": 8},
    {"num_beams": 2, "watermarking_config": {"bias": 5.0}, "min_length": 4, "max_new_tokens": 8},
    {"watermarking_config": {"seeding_scheme": "selfhash", "greenlist_ratio": 0.4, "bias": 6.0}, **LENGTHS},
    {"forced_eos_token_id": 2, "renormalize_logits": True, "remove_invalid_values": True, "max_new_tokens": 5},
]


def several(task: Any, images: torch.Tensor, prompts: list[str], **settings: Any) -> list[str]:
    """Return all texts of all rows, in the order of transformers."""
    return [str(text) for texts in task.language.generate_scored(images, prompts, **settings) for text, _ in texts]


@pytest.mark.parametrize("kind", ["blip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("opt", "t5"))])
def test_captions_with_options_are_those_of_transformers(make, kind):
    """Captions with generation options equal those of transformers. `predict` returns the first of several texts."""
    task, images = CaptionTask(make(kind)), pictures(2)
    inject(task.backbone)
    plain = {prompt: task.language.generate(images, [prompt] * 2, **LENGTHS) for prompt in ("", "a picture of")}
    changed = 0
    for number, options in enumerate(SETS):
        task.prompt, named = list(plain)[number % 2], options | {"do_sample": False}
        count = options.get("num_return_sequences", 1)
        expected = hugging_face(task, images, task.prompt, **named)
        assert several(task, images, [task.prompt] * 2, **named) == expected and any(expected)
        task.generation = Generation.of(named)
        assert task.predict(images, examples()[:2]) == expected[::count]
        changed += expected[::count] != plain[task.prompt]
    assert changed >= len(SETS) - 2


def test_answers_with_options_are_those_of_transformers(make):
    """Answers with generation options, for several questions about one image, equal those for each question alone."""
    task, images = VqaTask(make("vqa")), pictures(2)[[0, 1, 0, 0]]
    inject(task.backbone)
    questions = [question for question, _ in ASKED]
    for options in SETS:
        named = options | {"do_sample": False}
        assert several(task, images, questions, **named) == hugging_face_answers(task, images, questions, **named)


@pytest.mark.parametrize("kind", ["blip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("opt", "t5"))])
def test_options_in_a_mixed_batch_are_those_of_each_adapter_alone(make, kind):
    """Options act in a batch of mixed adapters and prompt lengths as they act for each adapter alone."""
    backbone = carry(make(kind))
    task, images = CaptionTask(backbone), pictures(4)[[0, 1, 0, 2, 3]]
    for options in (SETS[0], SETS[2], {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0, **LENGTHS}):
        scored = task.language.generate_scored(images, PROMPTS, EACH, **options)
        for row, name in enumerate(EACH):
            with disable_adapters(backbone.model, *(other for other in attached.names(backbone.model) if other != name)):
                alone = task.language.generate_scored(images[row : row + 1], PROMPTS[row : row + 1], **options)[0]
            assert [text for text, _ in scored[row]] == [text for text, _ in alone]
            assert [score for _, score in scored[row]] == pytest.approx([score for _, score in alone], rel=1e-3)


@pytest.mark.parametrize("beams", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("kind", ["blip", pytest.param("opt", marks=pytest.mark.slow)])
def test_prompts_of_different_lengths_are_one_batch(make, kind, beams):
    """Prompts of different lengths are one left-padded batch with unchanged texts and scores.

    Prompts with little room, or with an option that reads the prompt, are batched separately.
    """
    language, images = CaptionTask(carry(make(kind))).language, pictures(5)
    calls: list[int] = []
    real = language.generate_ids
    language.generate_ids = lambda features, *rest: (calls.append(len(features)), real(features, *rest))[1]
    named = {"max_new_tokens": 8, "num_beams": beams}
    scored = language.generate_scored(images, PROMPTS, **named)
    assert calls == [5]
    alone = [language.generate_scored(images[row : row + 1], PROMPTS[row : row + 1], **named)[0][0] for row in range(5)]
    assert [text for ((text, _),) in scored] == [text for text, _ in alone] and len({text for text, _ in alone}) > 2
    assert [score for ((_, score),) in scored] == pytest.approx([score for _, score in alone], rel=1e-4)
    for more in ({"no_repeat_ngram_size": 2}, {"min_length": 9}, {"watermarking_config": {"bias": 8.0, "context_width": 2}}):
        calls.clear()
        texts = language.generate(images, PROMPTS, **named, **more)
        lengths = [len(group) for group in by_length([language.prompt_ids(prompt) for prompt in PROMPTS])]
        assert calls == lengths and len(lengths) == 3
        assert texts == [language.generate(images[n : n + 1], PROMPTS[n : n + 1], **named, **more)[0] for n in range(5)]
    calls.clear()
    long = "a " * (language.room("") - 3)
    language.generate(images[:3], ["", long, "a photo of"], **named)
    assert calls == [2, 1]
    language.generator.generation_config.repetition_penalty = 1.3  # of the checkpoint
    calls.clear()
    language.generate(images, PROMPTS, **named)
    assert len(calls) == 3


def test_every_field_of_transformers_is_an_option_or_has_a_reason() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert fields == OPTIONS.keys() | REFUSED.keys() and not OPTIONS.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_option_has_its_reason(name):
    with pytest.raises(ConfigError, match=f"generation: {name} cannot be set: .*(remove it|use |set PROMPT|end PROMPT|cut )"):
        check_generation({name: 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beam": 3}, "'num_beam' is not a field of transformers' GenerationConfig; did you mean num_beams?"),
        ({"topp": 0.9}, "did you mean top_p?"),
        ({"_from_model_config": True}, "'_from_model_config' is not a field"),
        ({"top_p": 7}, "generation: top_p = 7: expected a number from 0 to 1"),
        ({"temperature": "hot"}, "generation: temperature = 'hot': expected a number above 0"),
        ({"num_beams": True}, "generation: num_beams = True: expected a whole number from 1 to 1024"),
        ({"num_beams": 10**6}, "num_beams = 1000000: expected"),
        ({"bad_words_ids": [5]}, "bad_words_ids = [5]: expected a list of lists of token ids"),
        ({"suppress_tokens": [2**40]}, "expected a list of token ids"),
        ({"sequence_bias": [[5, 1.0]]}, "expected a list of pairs"),
        ({"exponential_decay_length_penalty": [1]}, "expected a start and a factor"),
        ({"num_return_sequences": 3}, "Greedy methods"),  # transformers' own words
        ({"num_return_sequences": 3, "num_beams": 2}, "has to be smaller or equal to `num_beams`"),
        ({"do_sample": True, "typical_p": 0}, "`typical_p` has to be a float > 0"),
        ({"suppress_tokens": [4], "forced_eos_token_id": 4}, "is also in `suppress_tokens`"),
        ({"watermarking_config": {"seeding_scheme": "none"}}, "seeding_scheme"),
        ({"watermarking_config": {"seeding_scheme": "selfhash"}}, "selfhash fails at a token if none of its 40 candidates"),
        (
            {"watermarking_config": {"seeding_scheme": "selfhash", "greenlist_ratio": 0.3}},
            'set "greenlist_ratio" to at least 0.4',
        ),
        ({"min_new_tokens": 9, "max_new_tokens": 4}, "min_new_tokens is 9, more than max_new_tokens = 4"),
    ],
)
def test_a_wrong_option_is_one_error(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        check_generation(options)
    assert str(error.value).startswith("generation") and "\n" not in str(error.value)


def test_the_check_of_sampling_options_draws_no_random_number_of_the_run():
    """The check samples with a tiny model. The adapters of a run are drawn afterwards, from the seed of the run."""
    _fault.cache_clear()
    before = torch.get_rng_state()
    check_generation({"do_sample": True, "top_p": 0.9})
    assert _fault.cache_info().misses == 1 and torch.equal(torch.get_rng_state(), before)


def test_an_option_without_effect_is_reported_and_not_passed_on(capfd):
    """An option without effect is reported once and not passed to transformers. The adapter stores it for later sampling."""
    generation = Generation.of({"num_beams": 3, "repetition_penalty": 1.2, "top_p": 0.9})
    (line,) = ignored_lines(generation.stored())
    assert line.startswith("generation: top_p has no effect: `do_sample` is not set")
    assert "top_p" not in generation.arguments() and generation.stored()["top_p"] == 0.9
    assert Generation.of(generation.stored() | {"do_sample": True}).arguments()["top_p"] == 0.9
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["blip", "opt", "t5", "vqa"])
def test_an_option_that_this_model_ignores_is_an_error(make, kind):
    """transformers ignores penalties for the encoder's input unless it gets ids; a token must be in the vocabulary."""
    backbone, task = make(kind), VqaTask if kind == "vqa" else CaptionTask
    generation = Generation.of({"encoder_repetition_penalty": 1.5, "max_new_tokens": 5})
    if kind == "blip":
        captioning = CaptionTask(backbone, "a red cube", generation)
        expected = hugging_face(captioning, pictures(2), "a red cube", encoder_repetition_penalty=1.5, max_new_tokens=5)
        assert captioning.predict(pictures(2), examples()[:2]) == expected
    else:
        with pytest.raises(ConfigError, match=r"ignores encoder_repetition_penalty for a Blip.*use repetition_penalty"):
            task(backbone, "", generation)
    with pytest.raises(ConfigError, match=r"there is no token 90000; the ids of Blip\w+ are below \d+"):
        task(backbone, "", Generation.of({"suppress_tokens": [3, 90_000]}))
