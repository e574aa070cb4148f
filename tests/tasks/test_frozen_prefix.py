"""Cached states of the frozen blocks before the first adapter equal computed states."""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_blip.data import annotations
from lora_blip.data.dataset import Caches, ImageDataset
from lora_blip.data.disk_cache import Store
from lora_blip.data.loader import CachedStates, HostBatch, loader
from lora_blip.lora import injection, targets
from lora_blip.lora.routing import disable_adapters
from lora_blip.models.precision import autocasting
from lora_blip.runtime.counts import counted
from lora_blip.tasks.frozen_prefix import Prefix, Writer, first_adapted_block
from lora_blip.tasks.registry import TASKS, default_task
from lora_blip.training.loop import train
from lora_blip.training.preflight import check_image_matters
from tests.support import tiny
from tests.support.runs import settings

PLACES = [  # kind, targets, first block with an adapter, whether only the language model has any
    ("blip", "vit", 0, False), ("blip", "vit[1:2]", 1, False), ("blip", "text", 2, False), ("blip", "vit[1:],text", 1, False),
    ("opt", "qformer", 2, False), ("opt", "lm", 2, True), ("t5", "lm", 2, True), ("opt", "vit[1:],lm", 1, False),
    ("vqa", "text", 2, False), ("itm", "text", 2, False), ("itm2", "qformer", 2, False),
]  # fmt: skip


def task_for(make, kind: str, where: str) -> Any:
    backbone = make(kind)
    for x in injection.inject(backbone.model, targets.find(backbone.model, where, 4, 8.0)).values():
        x.B.data.normal_(std=0.05)
    return TASKS[default_task(backbone.architecture)](backbone)


@pytest.mark.parametrize(("kind", "where", "first", "beyond"), PLACES)
def test_the_cut_is_before_the_first_module_that_an_adapter_can_change(kind, where, first, beyond, make):
    """The states before the first adapted block are the same bits with and without adapters. The states after it are not."""
    task = task_for(make, kind, where)
    model = task.backbone.model
    assert first_adapted_block(model) == (first, beyond)
    prefix, pixels = Prefix(task.encoder), torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad(), disable_adapters(model):
        base = [prefix.compute_states(pixels)[1], prefix.continue_from(prefix.compute_states(pixels)[0])]
    with torch.no_grad():
        adapted = [prefix.compute_states(pixels)[1], prefix.continue_from(prefix.compute_states(pixels)[0])]
    assert torch.equal(base[0], adapted[0])
    assert prefix.bytes_per_image(tiny.SIDE) == base[0][0].nbytes
    if where.startswith("vit"):
        assert not torch.equal(base[1], adapted[1])


@pytest.mark.parametrize(("kind", "where", "first", "beyond"), PLACES)
def test_features_from_fp16_states_agree_within_rounding(kind, where, first, beyond, make):  # noqa: ARG001
    task = task_for(make, kind, where)
    prefix, pixels = Prefix(task.encoder), torch.randn(3, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        computed, from_states = task.encoder.encode_images(pixels), prefix.continue_from(prefix.compute_states(pixels)[0])
    torch.testing.assert_close(from_states, computed, rtol=2e-3, atol=2e-3 * float(computed.abs().max()))


def losses_of(path: Path) -> list[float]:
    entries = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("blip", "text"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("blip", "vit[1:2]"), ("opt", "qformer"), ("t5", "lm"), ("itm", "text"))
        ),
    ],
)
def test_ten_steps_with_a_cache_have_the_losses_without_one(kind, where, checkpoints, tmp_path, monkeypatch):
    """Ten steps with a cache have the losses of ten steps without one, within 1e-3.

    Empty, full and partial caches give equal bits.
    """
    source = tiny.write_photos(tmp_path, 8)
    common = {"targets": where, "augment": False, "max_steps": 10, "epochs": 20, "batch_size": 3, "val_fraction": 0.2}
    plain = losses_of(train(settings(checkpoints[kind], source, **common, cache_gb=0.0)))
    runs = [train(settings(checkpoints[kind], source, **common, cache_gb=1.0)) for _ in range(2)]
    root = Path(settings(checkpoints[kind], source).output_dir) / ".cache"
    cached = sorted(root.rglob("*/??/*.safetensors"))
    states = [path for path in cached if "states" in (path.parent.parent / "kind.json").read_text()]
    assert len(states) >= 8
    for path in states[::2]:
        path.unlink()
    runs.append(train(settings(checkpoints[kind], source, **common, cache_gb=1.0)))
    monkeypatch.setattr(Store, "_has_room", lambda *_: False)  # another process has filled the disk
    full = settings(checkpoints[kind], source, **common, cache_gb=1.0, output_dir=str(tmp_path / "elsewhere"))
    runs.append(train(full))
    assert len(plain) >= 10 and all(losses_of(run) == losses_of(runs[0]) for run in runs[1:])
    assert losses_of(runs[0]) == pytest.approx(plain, rel=1e-3)
    assert len({(run.parent / "adapter.safetensors").read_bytes()[-1000:] for run in runs}) == 1


def test_in_later_epochs_the_blocks_before_the_first_adapter_do_not_run(make, tmp_path):
    """From the second epoch on, neither the blocks before the first adapter run nor are the images opened."""
    task = task_for(make, "blip", "vit[1:2]")
    examples, _ = annotations.read(tiny.write_photos(tmp_path, 4))
    prefix = Prefix(task.encoder, Store(tmp_path / "cache", {"of": "states"}, 10**8))
    pictures = ImageDataset(examples, task.backbone.image_processor, False, 0, caches=Caches(None, prefix.store))
    batches, ran = loader(pictures, 2, True, 0, 0, pin=False), []
    for number, block in enumerate(task.backbone.model.vision_model.encoder.layers):
        block.register_forward_pre_hook(lambda _, args, number=number: ran.append((number, len(args[0]))))
    first = [task.loss(task.batch(host_batch, prefix)).item() for host_batch in batches]
    prefix.writer.close()
    assert ran.count((0, 1)) == 4 and ran.count((1, 2)) == 2
    ran.clear()
    for example in examples:
        example.image.rename(example.image.with_suffix(".bak")), example.image.symlink_to(example.image.with_suffix(".bak"))
    batches.batch_sampler.epoch = 0
    again = [task.loss(task.batch(host_batch, prefix)).item() for host_batch in batches]
    assert again == first and ran == [(1, 2), (1, 2)]


def test_states_beyond_fp16_are_not_kept_and_not_clipped(make, tmp_path):
    """The states of an image that overflow fp16 are used without rounding and not stored. Those of its neighbour are."""
    task = task_for(make, "blip", "vit[1:2]")
    store = Store(tmp_path / "cache", {"of": "states"}, 10**9)
    prefix, pixels = Prefix(task.encoder, store, chunk=2), torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    pixels[1] *= 1e6
    task.backbone.model.vision_model.encoder.layers[0].layer_norm1.weight.zero_()
    features = prefix.continue_from(prefix.states_of(pixels, CachedStates(torch.empty(0), [], ["aa0", "bb1"])))
    prefix.writer.close()
    assert "aa0" in store and "bb1" not in store
    whole = task.encoder.encode_images(pixels)
    torch.testing.assert_close(features[0], whole[0], rtol=2e-3, atol=2e-3 * float(whole[0].detach().abs().max()))
    torch.testing.assert_close(features[1], whole[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "where"), [("blip", "vit[1:2]"), ("opt", "qformer"), ("opt", "lm"), ("t5", "lm")])
def test_states_depend_neither_on_the_other_images_nor_on_the_place(kind, where, precision, make):
    """Any order of seven images, with any of them in the cache, gives each image the same bits."""
    task = task_for(make, kind, where)
    prefix, pixels = Prefix(task.encoder, chunk=4), torch.randn(7, 3, tiny.SIDE, tiny.SIDE)
    with autocasting(task.backbone.device, precision)():
        states, kept = prefix.compute_states(pixels)
        for seed in range(6):
            draw = random.Random(seed)
            order = draw.sample(range(7), draw.randint(2, 7))
            cached = sorted(draw.sample(range(len(order)), draw.randint(0, len(order))))
            others = [place for place in range(len(order)) if place not in cached]
            known = kept[[order[place] for place in cached]] if cached else torch.empty(0)
            missing = pixels[[order[place] for place in others]]
            assert torch.equal(prefix.states_of(missing, CachedStates(known, cached, [""] * len(others))), states[order])


def test_a_slow_disk_delays_the_steps_instead_of_filling_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "put", lambda *_: time.sleep(0.02))
    writer, most = Writer(), 0
    for number in range(12):
        writer.write(Store(tmp_path, {}, 10**9), [f"{number:02d}"], torch.zeros(1, 2, 2))
        most = max(most, sum(not each.done() for each in writer.waiting))
    writer.close()
    assert most <= Writer.MOST and not writer.waiting


@pytest.mark.parametrize(("augment", "views", "count"), [(False, 0, 4), (True, 0, 2), (True, 3, 8)])
def test_states_that_do_not_fit_the_limit_are_not_cached(augment, views, count, checkpoints, tmp_path, capsys):
    """The run says so before the first step, with the setting that allows it, and stores no states."""
    source = tiny.write_photos(tmp_path, 4)
    common = {"targets": "text", "max_steps": 2, "val_fraction": 0.5, "augment": augment, "views": views}
    train(settings(checkpoints["blip"], source, **common, cache_gb=1e-6))
    printed = capsys.readouterr().out
    assert f"Caching their output for {counted(count, 'image')} needs 0.1 GB" in printed
    assert "the limit is 1e-06 GB. To cache it, set CACHE_GB = 1 (--cache-gb 1)" in printed
    kinds = [
        path.read_text() for path in (Path(settings(checkpoints["blip"], source).output_dir) / ".cache").rglob("kind.json")
    ]
    assert not any("states" in kind for kind in kinds)


def test_augmented_images_are_cached_only_with_views(make, tmp_path):
    """With VIEWS = 2, an image has two cached versions in turn. Without VIEWS, augmented images are not cached."""
    examples, _ = annotations.read(tiny.write_photos(tmp_path, 3))
    processor = make("blip").image_processor

    def pixels(views: int, store: Store | None) -> list[torch.Tensor]:
        pictures = ImageDataset(examples, processor, True, 0, views=views, caches=Caches(store))
        return [pictures[epoch, 1].pixel_values for epoch in range(4)]

    store = Store(tmp_path / "cache", {"of": "pictures"}, 10**8)
    endless = pixels(0, store)
    assert not list((tmp_path / "cache").rglob("*.safetensors")) and not any(
        torch.equal(endless[i], endless[j]) for i in range(4) for j in range(i)
    )
    one, two, again, twice = pixels(2, store)
    assert torch.equal(one, again) and torch.equal(two, twice) and not torch.equal(one, two)
    assert len(list((tmp_path / "cache").rglob("??/*.safetensors"))) == 2
    assert all(map(torch.equal, pixels(2, store), pixels(2, None)))


def test_states_of_another_configuration_are_not_used(checkpoints, tmp_path):
    """The same weights with another layer_norm_eps in config.json do not use the cached states."""
    source, folder = tiny.write_photos(tmp_path, 4), tmp_path / "base"
    shutil.copytree(checkpoints["blip"], folder)
    common = {"targets": "text", "augment": False, "max_steps": 4, "batch_size": 2, "val_fraction": 0.0, "resume": "off"}
    where, losses = folder / "config.json", []
    for epsilon, cache in ((1e-5, 1.0), (0.5, 1.0), (0.5, 0.0)):
        config = json.loads(where.read_text())
        config["vision_config"]["layer_norm_eps"] = epsilon
        where.write_text(json.dumps(config))
        losses.append(losses_of(train(settings(folder, source, **common, cache_gb=cache))))
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[2], rel=1e-3)


def test_the_preflight_check_writes_no_states_to_the_cache(make, tmp_path):
    """The preflight check, which swaps the images of a batch, writes no states to the cache."""
    task = task_for(make, "blip", "text")
    prefix = Prefix(task.encoder, Store(tmp_path / "kept", {"of": "states"}, 10**9))
    examples, _ = annotations.read(tiny.write_photos(tmp_path, 2))
    pixels = torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    host_batch = HostBatch(examples[:2], pixels, None, CachedStates(torch.empty(0, 1, 1), [], ["aa0", "bb1"]))
    batch = task.batch(host_batch, prefix)
    check_image_matters(task, batch)
    assert not list(tmp_path.rglob("*.safetensors"))
    batch.encode_images(task.encoder)
    prefix.writer.close()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2  # it would have kept them
