"""Define `Captioner`, the Python interface for captions, answers and rankings. Several threads can share one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch

from lora_blip.config import InferConfig
from lora_blip.errors import InputError, LoRAError
from lora_blip.inference.adapter_choice import given_adapter
from lora_blip.inference.arguments import (
    CALLS,
    OTHERS,
    VERBS,
    checked_question,
    checked_questions,
    checked_texts,
    refuse_base,
    refuse_more,
    refuse_more_texts,
    refuse_swapped,
)
from lora_blip.inference.batch_runner import Runner
from lora_blip.inference.image_inputs import ImageInput, as_list, check_input, each_of, name_of, snapshot
from lora_blip.inference.image_requests import predict_requests
from lora_blip.inference.other_runs import newest_of_task
from lora_blip.inference.prediction import Prediction
from lora_blip.inference.predictor import AdapterPredictor
from lora_blip.inference.setup import apply_adapter, open_task, task_of
from lora_blip.inference.shared_base import MERGED, SharedAdapter, check_settings, shared
from lora_blip.lora import attached
from lora_blip.lora.adapter_file import Adapter
from lora_blip.lora.routing import adapters_of_rows, check_block
from lora_blip.lora.sites import name_of as owner_of
from lora_blip.models.loading import Backbone, as_backbone
from lora_blip.models.precision import dtype_of
from lora_blip.runtime.counts import counted
from lora_blip.runtime.terminal import print_on_stderr
from lora_blip.tasks.base import PredictionTask

Many = list[Any] | tuple[Any, ...] | Iterator[Any]  # several images, each an ImageInput


class Captioner:
    """Caption images, answer questions about them, or rank texts, with one adapter or with a base alone.

    An image is a path, a PIL image, the bytes of a file, or a file that is open for reading bytes, such as io.BytesIO. It can
    also be an array (height, width) or (height, width, 1, 3 or 4). It can be a tensor (height, width) or (1, 3 or 4, height,
    width). Arrays and tensors are uint8, or float from 0 to 1. One image returns one `Prediction`. A list returns a list in the
    same order. An image that cannot be read keeps its position: its prediction has the reason in `error`, or `strict=True`
    raises ImageError. Raise InputError, with the position, for anything that is not an image.

    Threads and asyncio tasks can share a captioner. Images are decoded in parallel, and the model computes one batch at a time.
    Several captioners can share a base: load it once and give it as `base`. In peft: no equivalent; it has no inference.

    >>> captioner = lora_blip.Captioner.from_adapter("latest")
    >>> prediction = captioner("image_test/000.png")
    """

    def __init__(
        self, task: PredictionTask, batch_size: int = 16, precision: str = "fp32", adapter: Adapter | None = None
    ) -> None:
        """Predict with a loaded task. To open an adapter, use `from_adapter`."""
        if not isinstance(task, PredictionTask):
            shown = repr(task) if isinstance(task, str | Path) else "None, base=backbone"
            raise InputError(f"a Captioner is created by lora_blip.Captioner.from_adapter({shown})")
        self.shared_base = shared(task.backbone.model)  # first, because it refuses to be pickled
        self.adapter, self.batch_size = adapter, batch_size
        self.runner = Runner(task, batch_size, precision, report=print_on_stderr)
        self.shared_adapter: SharedAdapter | None = None  # the adapter, if the caller loaded the base
        self.sites = len(adapter.sites) if adapter and attached.names(self.backbone.model) else 0  # 0: the adapter is merged

    @classmethod
    def from_adapter(
        cls,
        adapter: str | Path | Adapter | None = "latest",
        *,
        scale: float = 1.0,
        base: Any = "",
        processor: Any = None,
        device: str = "auto",
        precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto",
        batch_size: int = 16,
        task: str = "auto",
        prompt: str = "",
        max_new_tokens: int = 0,
        num_beams: int = 0,
        generation: Mapping[str, Any] | None = None,
        seed: int = 0,
        image_size: int = 0,
        base_dtype: Literal["auto", "fp16", "bf16", "fp32", "int8", "nf4"] = "auto",
        merge: bool = True,
        fast: bool = True,
    ) -> "Captioner":
        """Open an adapter with its base.

        adapter: a run folder, a file, a folder of peft, a hub name, "latest" for the newest run (of `task`), or None.
        scale: factor of the change that the adapter makes; 1: as trained, 0: the base.
        base: None or "" for the base that the adapter was trained on; a hub name; a folder; a result of `load_backbone`; or a
        model of transformers, with its `processor`. A loaded base keeps its weights, device, dtype, image size and kernels, and
        a `device`, `image_size`, `base_dtype` or `fast` that differs raises InputError. The adapter is then not merged, and is
        active only in calls of this captioner. If `adapter` is None, the adapters that are already on a loaded base are active.
        generation: options of text generation, such as {"num_beams": 3}; see docs/generation.md. They replace the adapter's.
        seed: the seed of sampling, if `generation` has `do_sample`. The other arguments: as in infer.py.
        Raise AdapterError if there is no such adapter or if it does not fit the base, ModelError if the base cannot be loaded,
        and ConfigError or InputError for an invalid argument. In peft: `PeftModel.from_pretrained`.

        >>> captioner = lora_blip.Captioner.from_adapter(None, base="assets/tiny-blip", batch_size=4)
        >>> captioner.task
        'caption'
        """
        refuse_base(adapter, base, processor)
        base = "" if base is None else base
        is_name = isinstance(base, str | Path)
        if not isinstance(generation, Mapping | None):
            raise InputError(f'generation is {generation!r}; give a dict, such as generation={{"num_beams": 3}}')
        content = given_adapter(adapter, scale, task)
        config = InferConfig(
            model=str(base) if is_name else "loaded", adapter="latest" if content else "none", device=device,
            precision=precision, batch_size=batch_size, task=task, scale=scale, prompt=prompt, max_new_tokens=max_new_tokens,
            num_beams=num_beams, generation=dict(generation or {}), seed=seed, image_size=image_size, base_dtype=base_dtype,
            merge=merge, fast=fast,
        )  # fmt: skip
        if not is_name:
            return cls._on_loaded_base(base if isinstance(base, Backbone) else as_backbone(base, processor), content, config)
        opened, chosen_precision = open_task(config, content)
        captioner = cls(opened, batch_size, chosen_precision, content)  # before a merge: the fast path is checked once per base
        if content:
            apply_adapter(opened, content, merge, chosen_precision)
            captioner.sites = len(content.sites) * bool(attached.names(opened.backbone.model))
        captioner.runner.reload_on_cpu = lambda: open_task(config, content, adapted=True, device="cpu")[0]
        return captioner

    @classmethod
    def _on_loaded_base(cls, backbone: Backbone, adapter: Adapter | None, config: InferConfig) -> "Captioner":
        """Return a captioner on a base that the caller has loaded. The caller may also use the base without the captioner."""
        own = shared(backbone.model)

        def opened() -> "Captioner":
            check_settings(backbone, config)
            shared_adapter = own.load(backbone, adapter) if adapter else None
            precision = dtype_of(backbone.model) if config.precision == "auto" else config.precision
            captioner = cls(task_of(backbone, adapter, config), config.batch_size, precision, adapter)
            captioner.shared_adapter = shared_adapter
            return captioner

        return own.changing(backbone.model, opened)

    @property
    def adapter_name(self) -> str | None:
        """Return the name of the adapter on the base, if the caller loaded the base. Otherwise return None."""
        return self.shared_adapter.name if self.shared_adapter else None

    @property
    def task(self) -> str:
        """Return the name of the task: "caption", "vqa" or "retrieval"."""
        return self.runner.task.name

    @property
    def backbone(self) -> Backbone:
        """Return the backbone. `backbone.model` is the model of transformers."""
        return self.runner.task.backbone

    @property
    def device(self) -> torch.device:
        """Return the device of the backbone."""
        return self.backbone.device

    def __repr__(self) -> str:
        adapter = str(self.adapter.path) if self.adapter else None
        return f"Captioner(task={self.task!r}, base={self.backbone.name!r}, adapter={adapter!r}, device={str(self.device)!r})"

    # ---- calls

    @overload
    def __call__(self, images: ImageInput, *, strict: bool = False) -> Prediction: ...
    @overload
    def __call__(self, images: Many, *, strict: bool = False) -> list[Prediction]: ...
    def __call__(self, images: Any, *others: Any, strict: bool = False, **options: Any) -> Prediction | list[Prediction]:
        """Return the caption of an image, or the captions of a list of images.

        Raise InputError if the adapter has another task, or if an input is not an image.

        >>> captions = captioner(["image_test/000.png", "image_test/001.png"])
        >>> assert [str(caption.image) for caption in captions] == ["image_test/000.png", "image_test/001.png"]
        """
        refuse_more(self.task, self._kind, images, others, options)
        self._require("caption")
        listed, single = as_list(images)
        predictions = list(self._predict(((*each, "") for each in listed), [], strict))
        return predictions[0] if single else predictions

    @overload
    def answer(self, images: ImageInput, question: str, *, strict: bool = False) -> Prediction: ...
    @overload
    def answer(self, images: Many, question: str | Sequence[str], *, strict: bool = False) -> list[Prediction]: ...
    @overload
    def answer(self, images: ImageInput, question: list[str], *, strict: bool = False) -> list[Prediction]: ...
    def answer(self, images: Any, question: Any, *, strict: bool = False) -> Prediction | list[Prediction]:
        """Return the answer to a question about an image.

        Give one question for all images, several questions about one image, or one question for each image. A question that
        the model cannot read has its reason in `error`. Raise InputError if the adapter has another task, if the numbers of
        images and questions differ, or if an input is not an image or a question.

        >>> vqa = lora_blip.Captioner.from_adapter(None, base="assets/tiny-blip-vqa")
        >>> answer = vqa.answer("image_test/000.png", "what color is the cube?")
        """
        self._require("vqa")
        refuse_swapped(images, question, CALLS["vqa"])
        listed, one_image = as_list(images)
        questions, one_question = checked_questions(question)
        listed, questions = listed * (len(questions) if one_image else 1), questions * (len(listed) if one_question else 1)
        if len(questions) != len(listed):
            counts = f"{counted(len(listed), 'image')} and {counted(len(questions), 'question')}"
            raise InputError(f"{counts}; give one question as a text, or a list with one question for each image")
        requests = ((*each, text) for each, text in zip(listed, questions, strict=True))
        predictions = list(self._predict(requests, [], strict))
        return predictions[0] if one_image and one_question else predictions

    @overload
    def rank(self, images: ImageInput, texts: Sequence[str], *, question: str = "", strict: bool = False) -> Prediction: ...
    @overload
    def rank(self, images: Many, texts: Sequence[str], *, question: str = "", strict: bool = False) -> list[Prediction]: ...
    def rank(
        self, images: Any, texts: Any, *others: Any, question: str = "", strict: bool = False
    ) -> Prediction | list[Prediction]:
        """Rank texts by how well they fit an image. `ranking` has each text once with its probability, the most probable first.

        The probabilities of the texts sum to 1. `text` is the best text and `score` is its probability. An adapter of any task
        can rank. A VQA adapter ranks answers to `question`. Raise InputError if the model cannot read a text, or if an
        input is not an image.

        >>> itm = lora_blip.Captioner.from_adapter(None, base="assets/tiny-blip-itm")
        >>> best = itm.rank("image_test/000.png", ["a red circle", "a blue square"]).text
        """
        refuse_more_texts(texts, others)
        refuse_swapped(images, texts, CALLS["retrieval"])
        question = checked_question(question)
        texts = self._checked_texts(texts, question)
        listed, single = as_list(images)
        predictions = list(self._predict(((*each, question) for each in listed), texts, strict))
        return predictions[0] if single else predictions

    def stream(
        self, images: Iterable[Any], *, question: str = "", texts: Sequence[str] = (), strict: bool = False
    ) -> Iterator[Prediction]:
        """Yield a prediction for each image of any iterable, or of one image. Memory does not grow with the number of images.

        With `texts`, rank them. With only a `question`, answer it. The errors are those of the other methods; each is raised
        when the iteration reaches the image that causes it.

        >>> import itertools
        >>> first = next(captioner.stream(itertools.repeat("image_test/000.png")))
        """
        question = checked_question(question)
        if not texts:
            self._require("vqa" if question else "caption")
        texts = self._checked_texts(texts, question) if texts else []
        named = ((name_of(each, n), each) for n, each in enumerate(each_of(images)))
        requests = ((check_input(each, name), snapshot(each, name), question) for name, each in named)
        yield from self._predict(requests, texts, strict)

    def _require(self, task: str) -> None:
        """Raise InputError, whose message gives the right call, if the adapter has another task."""
        if self.task != task:
            run = newest_of_task(task)
            other = f". For a run of the task {task}: lora_blip.Captioner.from_adapter({run!r})" if run else OTHERS[task]
            raise InputError(f"this {self._kind} {VERBS[self.task]}; call {CALLS[self.task]}{other}")

    @property
    def _kind(self) -> str:
        return "adapter" if self.adapter else "model"

    def _checked_texts(self, texts: Any, question: str) -> list[str]:
        with self.shared_base.lock:  # a tokenizer is not thread-safe
            return checked_texts(self.runner.task, self._kind, texts, question, self.runner.report)

    def _predict(self, requests: Iterable[tuple[str, Any, str]], texts: list[str], strict: bool) -> Iterator[Prediction]:
        """Yield a prediction for each (name, image, question)."""
        own, lock = self.adapter_name, self.shared_base.lock
        each = [] if own else adapters_of_rows(self.backbone.model)
        predictor = AdapterPredictor(texts, self.shared_base, own, by_group=bool(each))
        yield from predict_requests(self.runner, requests, predictor, lock, self.batch_size, strict, self._check_adapter, each)

    def _check_adapter(self) -> None:
        """Raise LoRAError if the caller has removed the adapter from the base, or has merged another one into it."""
        if not self.adapter:
            check_block(self.backbone.model)
            return
        stacks = [linear.lora for linear in attached.adapted_linears(self.backbone.model).values()]  # one walk for both checks
        if sum(owner_of(key) == (self.adapter_name or "default") for s in stacks for key in s) < self.sites:
            raise LoRAError(
                f"the adapter of this captioner, {self.adapter.path}, was removed from its base by lora_blip.eject or "
                f"lora_blip.bake; open it again: lora_blip.Captioner.from_adapter({str(self.adapter.path)!r}, base=backbone); "
                "after bake, load the base again first, because its weights have changed"
            )
        if self.shared_adapter and any(stack.merged for stack in stacks):
            raise LoRAError(MERGED)
