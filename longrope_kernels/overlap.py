"""Whether elements of tensors share memory, told by their strides alone; what cannot be told apart so counts as shared.

Views that people make can be told: of one projection to queries, keys and values, of tokens, heads or sequences.
"""

from __future__ import annotations

from torch import Tensor

_Steps = list[
    tuple[int, int]
]  # (stride, size) of each dimension in bytes, largest stride first; an element is the last


def within(x: Tensor) -> bool:
    """Whether two elements of x may share memory, as those of an expanded tensor do."""
    steps = _steps(x)
    return x.numel() > 0 and any(stride < _span(steps[place + 1 :]) for place, (stride, _) in enumerate(steps))


def between(x: Tensor, y: Tensor) -> bool:
    """Whether an element of x and one of y may share memory."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    start = min(x.data_ptr(), y.data_ptr())
    places = [(tensor.data_ptr() - start, _steps(tensor)) for tensor in (x, y)]
    while True:
        (first, first_steps), (second, second_steps) = places
        if first + _span(first_steps) <= second or second + _span(second_steps) <= first:
            return False
        # Where both fit into a period of the largest stride, they meet if they do within one.
        period = max(first_steps[0][0], second_steps[0][0])
        places = [(at % period, steps[steps[0][0] == period :]) for at, steps in places]
        if period == 1 or any(at + _span(steps) > period for at, steps in places):
            return True


def _steps(x: Tensor) -> _Steps:
    size = x.element_size()
    dims = [(stride * size, count) for stride, count in zip(x.stride(), x.shape, strict=True) if count > 1]
    return [*sorted(dims, reverse=True), (1, size)]


def _span(steps: _Steps) -> int:
    """Bytes from the first one to the last."""
    return 1 + sum(stride * (size - 1) for stride, size in steps)
