"""Every thread and asyncio task has its own choice of adapters, and no weight changes while any of them has one."""

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_blip.errors import LoRAError
from lora_blip.lora import attached, injection, merging
from lora_blip.lora.routing import checkpoint_context, disable_adapters, use_adapters
from lora_blip.lora.sites import Site
from tests.support.networks import line, plus

CLOSE = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def test_each_asyncio_task_has_its_own_adapters():
    """Two tasks of one thread inside `use_adapters` at once, which leave in the order in which they came; nothing stays."""
    model, x, found = line("a", "b"), torch.randn(2, 4), {}
    both = model(x)

    async def ask(name: str, came: asyncio.Event, other: asyncio.Event) -> None:
        with use_adapters(model, name):
            came.set()
            await other.wait()
            found[name] = model(x)
            await asyncio.sleep(0.002 if name == "b" else 0.001)
            assert torch.equal(model(x), found[name])

    async def serve() -> None:
        one, two = asyncio.Event(), asyncio.Event()
        await asyncio.gather(ask("a", one, two), ask("b", two, one))

    asyncio.run(serve())
    for name in "ab":
        CLOSE(found[name], plus(model, x, name))
    assert torch.equal(model(x), both)
    merging.merge(model)


def test_a_task_that_is_started_inside_a_block_keeps_its_choice():
    """As with any ContextVar: it has the choice of the place where it was made, also in a thread of `to_thread`."""
    model, x = line("a", "b"), torch.randn(2, 4)

    async def later() -> torch.Tensor:
        await asyncio.sleep(0.001)
        return model(x)

    async def serve() -> list[torch.Tensor]:
        with use_adapters(model, "a"):
            task = asyncio.create_task(later())
            inside = await asyncio.to_thread(model, x)
        with use_adapters(model, "b"):
            return [inside, await task]

    for found in asyncio.run(serve()):
        CLOSE(found, plus(model, x, "a"))


def test_a_merge_that_a_started_task_does_not_know_of_is_an_error_there():
    model, x = line("a", "b"), torch.randn(2, 4)

    async def serve() -> None:
        with use_adapters(model, "a"):
            task = asyncio.create_task(asyncio.sleep(0.001))
            task = asyncio.create_task(asyncio.to_thread(lambda: model(x)))
        merging.merge(model)
        with pytest.raises(LoRAError, match="were merged after"):
            await task

    asyncio.run(serve())


@pytest.mark.parametrize("block", [lambda m: use_adapters(m, "a"), lambda m: use_adapters(m, ["a", None]), disable_adapters])
@pytest.mark.parametrize("write", [merging.merge, merging.bake])
def test_nothing_is_merged_while_any_thread_is_inside_a_block(block, write):
    model = line("a", "b")
    weight, inside, done = model[0].weight.clone(), threading.Event(), threading.Event()

    def serve() -> None:
        with block(model):
            inside.set()
            done.wait(20)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert inside.wait(20)
        with pytest.raises(LoRAError, match="another thread or task"):
            write(model)
        assert torch.equal(model[0].weight, weight) and attached.names(model) == ["a", "b"]
    finally:
        done.set()
        thread.join()
    write(model)
    assert not torch.equal(model[0].weight, weight)


def test_nothing_is_merged_while_another_task_is_inside_a_block():
    model = line("a")
    weight = model[0].weight.clone()

    async def serve() -> None:
        inside, done = asyncio.Event(), asyncio.Event()

        async def request() -> None:
            with use_adapters(model, "a"):
                inside.set()
                await done.wait()

        task = asyncio.create_task(request())
        await inside.wait()
        with pytest.raises(LoRAError, match="leave that block first"):
            merging.merge(model)
        done.set()
        await task
        merging.merge(model)

    asyncio.run(serve())
    assert not torch.equal(model[0].weight, weight)


def test_a_block_waits_for_a_merge_and_then_says_that_adapters_are_merged():
    """No request gets in between the check and the last weight that is written."""
    model = line("a")
    pool = ThreadPoolExecutor(1)
    with model[0].lora.routing.lock:
        request = pool.submit(use_adapters(model, "a").__enter__)
        time.sleep(0.01)
        assert not request.done()
        merging.merge(model)
    with pytest.raises(LoRAError, match="restore"):
        request.result(20)


def test_an_adapter_in_use_by_a_request_is_not_ejected():
    model, x = line("a", "b"), torch.randn(2, 4)
    for names in ("a", ["a", None]):
        with use_adapters(model, names):
            before = model(x)
            for name in ("a", None):
                with pytest.raises(LoRAError, match="names the adapter"):
                    injection.eject(model, name)
            assert torch.equal(model(x), before)
    with use_adapters(model, "a"):
        injection.eject(model, "b")  # nobody asked for it
        assert attached.names(model) == ["a"]


def test_blocks_may_end_in_any_order():
    """Two generators of one thread, each inside a block, the older one closed first; then one closed in another thread."""
    model, x = line("a", "b"), torch.randn(2, 4)
    both = model(x)

    def inside(name: str) -> Iterator[torch.Tensor]:
        with use_adapters(model, name):
            while True:
                yield model(x)

    one, two = inside("a"), inside("b")
    next(one), CLOSE(next(two), plus(model, x, "b"))
    one.close()
    CLOSE(next(two), plus(model, x, "b"))
    two.close()
    assert torch.equal(model(x), both)
    three = inside("a")
    CLOSE(next(three), plus(model, x, "a"))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(three.close).result(20)
    assert torch.equal(model(x), both)
    four = inside("a")
    next(four)
    del four
    gc.collect()
    assert torch.equal(model(x), both)
    merging.merge(model)


def test_two_models_in_one_context_do_not_share_a_choice():
    """Blocks of different models nest in any way, and each model has its innermost one."""
    one, two, x = line("a", "b"), line("a", "b"), torch.randn(2, 4)
    with use_adapters(one, "a"), use_adapters(two, "b"):
        CLOSE(one(x), plus(one, x, "a")), CLOSE(two(x), plus(two, x, "b"))
        with use_adapters(one, ["b", None]):
            CLOSE(two(x), plus(two, x, "b"))
        with pytest.raises(LoRAError, match="leave that block first"):
            merging.merge(two)
    with use_adapters(one, "a"):
        merging.merge(two)


def test_parts_inside_blocks_are_not_joined():
    parts = nn.Sequential(line("a"), line("a"))
    x = torch.randn(3, 4)
    with ExitStack() as blocks:
        for part in parts:
            blocks.enter_context(disable_adapters(part))
        before = parts[0](x)
        with pytest.raises(LoRAError, match="leave these blocks first"), use_adapters(parts, "a"):
            pass
        assert torch.equal(parts[0](x), before)


def test_an_adapter_before_the_others_joins_the_block_that_is_in_force():
    """The first linear of the model gets its adapter last, inside a block and with the fast way switched off."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    injection.inject(model, [Site("1", 2)], name="a")["1"].B.data.normal_()
    attached.fast(model, False)
    with use_adapters(model, ["a", None]):
        before = model(x)
        injection.inject(model, [Site("0", 2)], name="b")["0"].B.data.normal_()
        assert torch.equal(model(x), before)
    assert not torch.equal(model(x), before) and not model[0].lora.routing.fast


@pytest.mark.parametrize("names", ["a", ["a", "b"]])
def test_a_recomputation_in_another_thread_uses_the_adapters_of_the_forward(names):
    """Autograd computes checkpointed layers again in a thread of its own for each device."""
    model, x = line("a", "b"), torch.randn(2, 4)
    with use_adapters(model, names):
        expected = model(x)
        _, again = checkpoint_context(model)

    def recompute() -> torch.Tensor:
        with again:
            with pytest.raises(LoRAError, match="leave that block first"):
                merging.merge(model)
            return model(x)

    with ThreadPoolExecutor(1) as pool, disable_adapters(model):
        found = pool.submit(recompute).result(20)
        CLOSE(model(x), plus(model, x))
    CLOSE(found, expected)
    assert checkpoint_context(nn.Linear(2, 2))


def test_a_checkpoint_inside_a_checkpoint_knows_its_batch():
    """A layer that flattens its tokens, as OPT's does, is computed again with the rows of the call it was part of."""

    class Flat(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            context = partial(checkpoint_context, self)
            again = partial(checkpoint, use_reentrant=False, context_fn=context)
            return again(lambda flat: again(self.inner, flat), x.flatten(0, 1)).view(*x.shape[:2], -1)

    inner = line("a", "b")
    model, x = Flat(inner), torch.randn(2, 3, 4, requires_grad=True)
    with use_adapters(model, ["a", None]):
        y = model(x)
    CLOSE(y, torch.stack([plus(inner, x[0], "a"), plus(inner, x[1])]))
    y.square().sum().backward()
    assert attached.adapters(model, "a")["0"].B.grad.any() and attached.adapters(model, "b")["0"].B.grad is None


@pytest.mark.slow
def test_compiled_models_follow_the_choice():
    """Of one adapter, of rows, and of none, also when the choice changes after the first compiled call."""
    model, x = line("a", "b"), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager")
    for names in (None, "a", ["a", None], None, "b", [None, "b"]):
        with use_adapters(model, names):
            CLOSE(compiled(x), model(x))
    with disable_adapters(model):
        CLOSE(compiled(x), plus(model, x))
