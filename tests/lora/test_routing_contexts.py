"""Each thread and asyncio task has its own choice of adapters. `merge` is refused while any of them is inside a block."""

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
    """Two tasks of one thread inside `use_adapters` at the same time each use their own adapter. Afterwards both act again."""
    model, x, outputs = line("a", "b"), torch.randn(2, 4), {}
    both = model(x)

    async def request(name: str, entered: asyncio.Event, other: asyncio.Event) -> None:
        with use_adapters(model, name):
            entered.set()
            await other.wait()
            outputs[name] = model(x)
            await asyncio.sleep(0.002 if name == "b" else 0.001)
            assert torch.equal(model(x), outputs[name])

    async def serve() -> None:
        one, two = asyncio.Event(), asyncio.Event()
        await asyncio.gather(request("a", one, two), request("b", two, one))

    asyncio.run(serve())
    for name in "ab":
        CLOSE(outputs[name], plus(model, x, name))
    assert torch.equal(model(x), both)
    merging.merge(model)


def test_a_task_started_inside_a_block_uses_the_adapters_of_the_block():
    """A task or `to_thread` call copies the context in which it is created, so it uses that choice after the block too."""
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

    for output in asyncio.run(serve()):
        CLOSE(output, plus(model, x, "a"))


def test_a_task_whose_adapters_are_merged_after_it_started_raises_lora_error():
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


def test_a_block_waits_for_a_running_merge_and_is_then_refused():
    """`use_adapters` waits for the lock that `merge` holds, then raises LoRAError because the adapter is merged."""
    model = line("a")
    pool = ThreadPoolExecutor(1)
    with model[0].lora.routing.lock:
        request = pool.submit(use_adapters(model, "a").__enter__)
        time.sleep(0.01)
        assert not request.done()
        merging.merge(model)
    with pytest.raises(LoRAError, match="restore"):
        request.result(20)


def test_an_adapter_that_a_block_names_is_not_ejected():
    model, x = line("a", "b"), torch.randn(2, 4)
    for names in ("a", ["a", None]):
        with use_adapters(model, names):
            before = model(x)
            for name in ("a", None):
                with pytest.raises(LoRAError, match="names the adapter"):
                    injection.eject(model, name)
            assert torch.equal(model(x), before)
    with use_adapters(model, "a"):
        injection.eject(model, "b")  # no block names "b"
        assert attached.names(model) == ["a"]


def test_blocks_may_end_in_any_order():
    """Blocks in generators may be closed oldest first, in another thread, or by garbage collection."""
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
    """Blocks of two models may be nested. The innermost block of a model applies to it."""
    one, two, x = line("a", "b"), line("a", "b"), torch.randn(2, 4)
    with use_adapters(one, "a"), use_adapters(two, "b"):
        CLOSE(one(x), plus(one, x, "a")), CLOSE(two(x), plus(two, x, "b"))
        with use_adapters(one, ["b", None]):
            CLOSE(two(x), plus(two, x, "b"))
        with pytest.raises(LoRAError, match="leave that block first"):
            merging.merge(two)
    with use_adapters(one, "a"):
        merging.merge(two)


def test_parts_with_open_blocks_cannot_share_a_choice():
    """`use_adapters` on a model raises LoRAError if its parts have separate routings with open blocks."""
    parts = nn.Sequential(line("a"), line("a"))
    x = torch.randn(3, 4)
    with ExitStack() as blocks:
        for part in parts:
            blocks.enter_context(disable_adapters(part))
        before = parts[0](x)
        with pytest.raises(LoRAError, match="leave these blocks first"), use_adapters(parts, "a"):
            pass
        assert torch.equal(parts[0](x), before)


def test_an_adapter_injected_on_an_earlier_linear_is_not_active_in_the_open_block():
    """The first linear gets an adapter inside a block of the second linear. It shares the routing, with fast off."""
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
    """Autograd recomputes checkpointed layers in a separate thread per device. `checkpoint_context` sets the adapters there."""
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
        recomputed = pool.submit(recompute).result(20)
        CLOSE(model(x), plus(model, x))
    CLOSE(recomputed, expected)
    assert checkpoint_context(nn.Linear(2, 2))


def test_nested_checkpoints_recompute_with_the_batch_size_of_the_call():
    """A layer that flattens tokens, as in OPT, is recomputed with the number of rows of the call of the model."""

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
def test_compiled_models_use_the_chosen_adapters():
    """A compiled model equals the eager model, also if the choice of adapters changes between calls."""
    model, x = line("a", "b"), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager")
    for names in (None, "a", ["a", None], None, "b", [None, "b"]):
        with use_adapters(model, names):
            CLOSE(compiled(x), model(x))
    with disable_adapters(model):
        CLOSE(compiled(x), plus(model, x))
