"""A change of the adapters waits for the lock of the model, and an adapter of a captioner is never active by itself."""

import copy
import itertools
import linecache
import os
import sys
import threading
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import nn

import lora_blip
from lora_blip.inference.shared_base import shared
from lora_blip.lora import adapter_file, attached, injection, model_lock
from lora_blip.lora.model_lock import LOCKS, changing, lock_of
from lora_blip.lora.sites import Site
from lora_blip.models.loading import Backbone


def tree() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))


def saved(backbone: Backbone, targets: str, folder: Path) -> adapter_file.Adapter:
    """Return the content of the file of a new adapter with random B."""
    for lora in lora_blip.inject(backbone, targets).values():
        nn.init.normal_(lora.B)
    return adapter_file.read(lora_blip.save_adapter(folder / "adapter.safetensors", backbone))


def check_waits(held: AbstractContextManager[Any], function: Any, model: nn.Module) -> None:
    """Call a function in a thread while `held` is entered. Check that it waits, and that it ends after that."""
    thread = threading.Thread(target=function, args=(model,))
    with held:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()


CHANGES: dict[str, Any] = {
    "inject": lambda model: lora_blip.inject(model, [Site("0.0", 2)], name="another"),
    "eject": lora_blip.eject,
    "merge": lora_blip.merge,
    "restore": lora_blip.restore,
    "bake": lora_blip.bake,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("of_part", (False, True), ids=("the model", "a part of it"))
def test_a_change_waits_until_the_lock_of_the_model_is_free(name, of_part):
    part = tree()
    model = nn.Sequential(part, nn.Linear(4, 4)) if of_part else part
    lora_blip.inject(part, [Site("0.0", 2)])
    check_waits(lock_of(model), CHANGES[name], part)


def test_models_without_a_common_module_do_not_wait_for_each_other():
    with lock_of(tree()):
        thread = threading.Thread(target=lambda: lora_blip.inject(tree(), [Site("1", 2)]))
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


def test_a_captioner_and_a_change_of_a_part_do_not_wait_for_each_other(make, tmp_path):
    """The part has the older lock. Both threads acquire it first."""
    source, backbone = make("blip"), make("blip")
    adapter = saved(source, "vit", tmp_path)
    lock_of(backbone.model.vision_model)
    base = shared(backbone.model)

    def load() -> None:
        for _ in range(30):
            base.load(backbone, adapter)

    def change() -> None:
        for _ in range(60):
            lora_blip.inject(backbone.model.vision_model, [Site("encoder.layers.0.mlp.fc1", 2)], name="own")
            lora_blip.eject(backbone.model.vision_model, "own")

    threads = [threading.Thread(target=work, daemon=True) for work in (load, change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)


def test_an_adapter_of_a_captioner_stays_dormant_if_a_part_of_the_model_loses_its_adapters(make, tmp_path):
    source, backbone = make("blip"), make("blip")
    adapter = saved(source, "text", tmp_path)
    loaded = shared(backbone.model).load(backbone, adapter)
    lora_blip.inject(backbone, "vit", name="own")
    routing = next(iter(attached.adapted_linears(backbone.model).values())).lora.routing
    lora_blip.eject(backbone.model.vision_model, "own")
    assert routing.dormant == {loaded.name}
    with lora_blip.disable_adapters(nn.ModuleList([backbone.model, source.model])):
        pass  # both models now share one routing
    lora_blip.eject(source)
    assert routing.dormant == {loaded.name}
    lora_blip.eject(backbone.model, loaded.name)
    assert not attached.names(backbone.model) and not routing.dormant


def test_a_captioner_without_an_adapter_waits_for_a_change_that_has_started():
    whole = tree()
    thread = threading.Thread(target=shared, args=(whole,))

    def change() -> None:  # it does not hold the lock of `whole`, which does not exist yet
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()

    changing(whole[0], change)
    thread.join(10)
    assert not thread.is_alive()


def test_two_threads_that_change_overlapping_models_do_not_wait_forever():
    whole = tree()
    parts = [whole, whole[0], whole[1], nn.Sequential(whole[0], whole[1])]

    def work(part: nn.Module) -> None:
        for _ in range(300):
            changing(part, lambda: None)

    threads = [threading.Thread(target=work, args=(part,), daemon=True) for part in (*parts, *reversed(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("name", [*CHANGES, "load_adapter"])
def test_ctrl_c_at_any_line_of_a_change_leaves_no_lock_held(name, tmp_path, monkeypatch):
    """Another thread, such as that of a captioner, would otherwise wait forever."""
    monkeypatch.setattr(model_lock, "LOCKS", WeakKeyDictionary())  # without the many models of other tests, which take long
    source = tree()
    nn.init.normal_(lora_blip.inject(source, [Site("0.0", 2)])["0.0"].B)
    path = lora_blip.save_adapter(tmp_path / "adapter.safetensors", source)
    lora_blip.eject(source)
    change = CHANGES.get(name) or (lambda model: lora_blip.load_adapter(model, path, name="loaded"))
    for stop in itertools.count(1, 7):  # every seventh line of the package and of context managers
        part = copy.deepcopy(source)
        whole = nn.Sequential(part, nn.Linear(4, 4))
        lora_blip.inject(part, [Site("0.0", 2)])
        locks, lines = [lock_of(part), lock_of(whole)], 0

        def interrupt(frame: Any, event: str, _argument: Any) -> Any:
            nonlocal lines
            file = frame.f_code.co_filename
            if "lora_blip/lora" not in file and not file.endswith("/contextlib.py"):
                return None
            # at its end, a `with` has an event before __exit__ is called; a signal is never handled there
            if event == "line" and not linecache.getline(file, frame.f_lineno).strip().startswith("with "):
                lines += 1
                if lines == stop:
                    raise KeyboardInterrupt
            return interrupt

        sys.settrace(interrupt)
        try:
            change(part)
        except BaseException:
            done = False
        else:
            done = True
        finally:
            sys.settrace(None)
            torch.set_grad_enabled(True)  # an interrupted torch.no_grad may leave them off
        free: list[bool] = []
        thread = threading.Thread(target=lambda: free.extend(lock.acquire(timeout=5) for lock in locks))
        thread.start()
        thread.join()
        assert free == [True, True], stop
        if done:
            break
    assert stop > 30


def test_a_captioner_and_a_change_use_the_same_lock():
    model = tree()
    assert shared(model).lock is lock_of(model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_process_does_not_wait_for_a_thread_of_its_parent():
    model = tree()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_of(model):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    child = os.fork()
    if not child:
        os._exit(0 if lock_of(model).acquire(timeout=5) else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_the_table_keeps_no_model_alive():
    before = len(LOCKS)
    model = tree()
    lock_of(model)
    del model
    assert len(LOCKS) == before


@pytest.mark.parametrize("in_block", (False, True), ids=("without a block", "in a block of another adapter"))
def test_an_adapter_of_a_captioner_is_never_active_by_itself(make, tmp_path, monkeypatch, in_block):
    """Another thread may run the model after each linear that gets the adapter."""
    source, backbone = make("blip"), make("blip")
    adapter = saved(source, "vit", tmp_path)
    x = torch.randn(1, 3, backbone.image_size, backbone.image_size)
    run = lambda: backbone.model.vision_model(x).last_hidden_state  # noqa: E731
    attach, outputs = injection.attach, list[torch.Tensor]()

    def observed(*args: Any) -> None:
        attach(*args)
        outputs.append(run())

    with torch.no_grad(), ExitStack() as blocks:
        if in_block:
            lora_blip.inject(backbone, "vit", name="other")
            blocks.enter_context(lora_blip.use_adapters(backbone, "other"))
        expected = run()
        monkeypatch.setattr(injection, "attach", observed)
        name = shared(backbone.model).load(backbone, adapter).name
        assert outputs and all(torch.equal(each, expected) for each in outputs) and torch.equal(run(), expected)
        monkeypatch.setattr(injection, "attach", attach)
        blocks.close()
        with lora_blip.use_adapters(backbone, name):
            assert not torch.equal(run(), expected)
