"""Predict captions, answers or rankings of images in batches. Print, write and, with references, score them."""

from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from lora_blip.config import InferConfig
from lora_blip.inference import finished, output
from lora_blip.inference.batch_runner import Runner
from lora_blip.inference.blocks import BlockScheduler, ProgressDisplay, Results
from lora_blip.inference.explanation import explained, require_explainable, saved_texts, write_explanation
from lora_blip.inference.gallery import write_gallery
from lora_blip.inference.output import Output
from lora_blip.inference.prediction import Prediction, report
from lora_blip.inference.predictor import Predictor
from lora_blip.inference.setup import (
    Inputs,
    apply_adapter,
    describe,
    open_inputs,
    open_task,
    read_inputs,
    require_same_inputs,
    work_of,
)
from lora_blip.reports.explanation import TextView
from lora_blip.runtime import distributed, signals
from lora_blip.runtime.distributed import Ranks
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.progress import phase
from lora_blip.runtime.runs import GALLERY_NAME
from lora_blip.runtime.seeding import seed_everything
from lora_blip.runtime.settings import require_settings
from lora_blip.runtime.terminal import encodable_output
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.base import PredictionTask
from lora_blip.tasks.text_length import OF_BASE, TextCount


@encodable_output()
def infer(config: InferConfig) -> Path:
    """Caption, answer or rank as `config` says, and return the path of predictions.jsonl: one line per image and question.

    An image that cannot be read has a line in errors.jsonl. To resume a stopped run, use the same settings and output_dir.
    Memory does not grow with the number of images, except for the texts of the base with `compare`. Raise ConfigError,
    ModelError, AdapterError, ImageError or DataError before the first image, ConfigError if the disk is full, and
    signals.Stopped after Ctrl-C or a signal of a scheduler, as soon as the current batch is written. Raise ImageError at the
    end if no image could be read. In peft: no equivalent.

    >>> predictions = lora_blip.infer(lora_blip.InferConfig(adapter="latest", images="image_test"))
    >>> predictions.name
    'predictions.jsonl'
    """
    require_settings(config, InferConfig, "infer")
    with distributed.joined() as ranks, ExitStack() as closing:
        return infer_among(ranks, config, closing)


def infer_among(ranks: Ranks, config: InferConfig, closing: ExitStack) -> Path:
    """Run inference in one process, alone or under torchrun. The main process reads the images and writes the files.

    closing: closes the output files and the signal handlers when the caller closes it.
    """
    seed_everything(config.seed)
    inputs = ranks.together(lambda: read_inputs(config))
    adapter, texts = inputs.adapter, inputs.texts
    # raise an error now if the folder contains another run; create the folder later, before the first line is written
    folder: Path = ranks.broadcast(ranks.on_main(lambda: output.folder_of(config, ranks.count)))
    config = replace(config, device=ranks.device(config.device), compare=config.compare or config.explain)
    task, precision, examples, run_identity = ranks.together(lambda: open_inputs(config, inputs))
    ranks.together(lambda: require_explainable(config, examples))
    if ranks.count > 1:
        require_same_inputs(ranks, config, task, run_identity, examples)

    stop_request = closing.enter_context(signals.catch_signals())
    out: Any = ranks.on_main(lambda: closing.enter_context(output.opened(folder, run_identity, config.resume)))
    with phase(f"counting the images of {config.images}"):
        count = ranks.on_main(lambda: sum(1 for _ in takewhile(lambda _: not stop_request.signal, examples))) or 0
    remaining = count - (out.lines_before if out else 0)
    for line in filter(None, (inputs.images.others_line(), inputs.images.moved_line)):
        print(line)
    start_line = printable(f"{folder}: {out.describe_start() if out else ''}")
    print(describe(task, adapter, remaining, precision), start_line, sep="\n", flush=True)
    runner = Runner(task, config.batch_size, precision, lambda: open_task(config, adapter, adapted=False, device="cpu")[0])
    scheduler = BlockScheduler(ranks, runner, stop_request, out)
    unit = "question" if task.takes_question else "image"  # an image may have several questions
    base: dict[int, str] = {}
    cut = {"base": TextCount(), "texts": TextCount()}
    if config.compare and adapter:
        with ProgressDisplay("base", count, out, unit=unit) as display:
            scheduler.run(examples, Predictor(texts), partial(record_base_texts, base, display, cut["base"]))
    views: list[dict[int, TextView]] = []
    if config.explain and adapter and ranks.main:
        views += explained(runner, examples, lambda: saved_texts(out.path, "base_text") | base, "base")
    if adapter:
        task = runner.task
        ranks.together(lambda: apply_adapter(task, adapter, config.merge, runner.precision))
        runner.reload_on_cpu = lambda: open_task(config, adapter, adapted=True, device="cpu")[0]
        runner.checked = not runner.fast
    with ProgressDisplay(task.name, count, out, unit=unit) as display:
        scheduler.run(examples, Predictor(texts), partial(write_results, out, base, display, cut["texts"]))
    if ranks.main:
        print(display.speed_line(), end="")
        for name, count_of_cut in ((OF_BASE, cut["base"]), ("texts" if adapter else OF_BASE, cut["texts"])):
            for line in count_of_cut.warnings(task, name, [*chain.from_iterable(inputs.references.values())]):
                print(f"warning: {line}")
        out.finish()
        if config.explain:
            views += explained(runner, examples, lambda: saved_texts(out.path, "text"), "adapter" if adapter else "base")
        conclude(out, config, task, inputs, precision, examples, count, views)
    ranks.on_main(lambda: out.require_predictions())  # noqa: PLW0108 (out is None on the other ranks)
    return folder / output.FILE_NAME


def conclude(
    out: Output, config: InferConfig, task: PredictionTask, inputs: Inputs, precision: str, examples: Any, count: int,
    views: list[dict[int, TextView]],
) -> None:  # fmt: skip
    """Print the scores if there are references, write the pages, and print their paths and that of the predictions.

    views: the explained texts of each model; empty: do not write explain.html.
    """
    adapter, model_name = inputs.adapter, "adapted" if inputs.adapter else "base"
    if references := inputs.references:
        texts = finished.texts_of(out.path, task.subject, references, model_name)
        attempt("scores", lambda: report(task, references, texts, inputs.texts))
    facts = {"images": config.images, "base": task.backbone.name, "precision": precision}
    facts |= {"adapter": str(adapter.path), "trained": work_of(adapter)} if adapter else {}
    facts["task"] = task.name
    facts |= {"predictions": str(out.path), "date": f"{datetime.now():%Y-%m-%d %H:%M}"}
    with phase(f"writing {GALLERY_NAME}"):
        page = attempt("gallery", lambda: write_gallery(out.folder, task, examples, references, facts, model_name, count))
    print(printable(out.describe_end()))
    if page:
        print(f"gallery: {page.resolve().as_uri()}")
    if views and (page := attempt("explanation", lambda: write_explanation(out.folder, task, examples, views, facts))):
        print(f"explanation: {page.resolve().as_uri()}")


def record_base_texts(base: dict[int, str], display: ProgressDisplay, cut: TextCount, results: Results) -> None:
    """Record the texts of the base in `base`. They are printed and written next to those of the adapter."""
    cut.add([result.text for _, result in results if isinstance(result, Prediction)])
    base |= {finished.key_of(example): result.text for example, result in results if isinstance(result, Prediction)}
    display.count_results(results)


def write_results(out: Output, base: dict[int, str], display: ProgressDisplay, cut: TextCount, results: Results) -> None:
    """Write the results to the files of the run and print the first ones."""
    cut.add([result.text for _, result in results if isinstance(result, Prediction)])
    out.write(results, base)
    display.show(results, base)
