"""Select rows of a tensor so that the gradient has the same bits in each run."""

from torch import Tensor


def select_rows(values: Tensor, index: Tensor) -> Tensor:
    """Return values[index].

    If a row is taken twice, its gradient is a sum. On a CPU, the backward pass of `values[index]` adds in several threads, in a
    random order, and that of `index_select` in the order of the index. On a GPU, it is the other way round.
    """
    return values.index_select(0, index) if values.is_cpu else values[index]
