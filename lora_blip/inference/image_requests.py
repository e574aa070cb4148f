"""Predict images from memory or disk: decode them in threads, compute them in batches, and return them in order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from lora_blip.data.example import Example
from lora_blip.data.image_folders import example_of
from lora_blip.data.prefetch import MOST_THREADS, Lookahead
from lora_blip.data.preprocessing import pixels_of
from lora_blip.errors import InputError
from lora_blip.inference.batch_runner import Runner, Work
from lora_blip.inference.image_inputs import decode
from lora_blip.inference.prediction import Prediction, prediction_of
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import quoted


@dataclass(frozen=True)
class Request:
    """An image and its question. A thread of the pool decodes the image."""

    example: Example
    picture: "Future[Any]"  # pixel values (3, H, W), or the ImageError


def predict_requests(
    runner: Runner,
    requests: Iterable[tuple[str, Any, str]],
    work: Work,
    lock: RLock,
    batch_size: int,
    strict: bool,
    check: Callable[[], None],
    adapters: Sequence[str | None] = (),
) -> Iterator[Prediction]:
    """Yield a prediction for each (name, image, question), in order. The next batch is decoded while the model computes.

    lock: held while a batch uses the model or its tokenizer. check: called at the start of each batch, while the lock is held.
    adapters: the adapter of each request, which becomes the `group` of its example; empty: one adapter for all.
    Raise InputError if `strict` is not a truth value, or if the numbers of requests and adapters differ.
    """
    if not isinstance(strict, bool):
        raise InputError(f"strict = {quoted(strict)}; expected True or False")
    if adapters:
        requests = list(islice(requests, len(adapters) + 1))
        if len(requests) != len(adapters):
            given = "there are more images" if len(requests) > len(adapters) else f"{counted(len(requests), 'image')} given"
            raise InputError(f"use_adapters names {counted(len(adapters), 'adapter')}, but {given}; name one for each image")
    groups = chain((name or "" for name in adapters), repeat(""))
    pixels = pixels_of(runner.task.backbone.image_processor)
    pool = ThreadPoolExecutor(MOST_THREADS, "lora_blip_images")
    try:
        source = Lookahead(
            Request(replace(example_of(name, question), group=group), pool.submit(decode, image, name, pixels))
            for (name, image, question), group in zip(requests, groups, strict=False)
        )
        while batch := source.take(batch_size):
            source.peek(batch_size)
            yield from _predict_batch(runner, batch, work, lock, strict, check)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _predict_batch(
    runner: Runner, requests: list[Request], work: Work, lock: RLock, strict: bool, check: Callable[[], None]
) -> Iterator[Prediction]:
    """Yield the predictions of a batch. Without `strict`, an invalid image or question gives a prediction with `error`."""
    results = [request.picture.result() for request in requests]
    with lock:
        check()
        check_question = getattr(runner.task, "check_question", None)
        for n, request in enumerate(requests):
            question = request.example.question
            if check_question and question and (reason := check_question(request.example)):
                results[n] = InputError(reason)
            elif question and (warning := runner.task.checker.warning(question)):
                runner.report(warning)
        good = [n for n, result in enumerate(results) if isinstance(result, Tensor)]
        if good:
            pictures, examples = torch.stack([results[n] for n in good]), [requests[n].example for n in good]
            for n, prediction in zip(good, runner.compute(pictures, examples, work), strict=True):
                results[n] = prediction
    for request, result in zip(requests, results, strict=True):
        if not isinstance(result, Exception):
            yield result
        elif strict:
            raise result
        else:
            yield replace(prediction_of(request.example, ""), error=str(result))
