"""What every evaluation does alike: the weights and, beside them, their moving average, over all batches of a split."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vit_flax.step import TrainState
from vit_flax.typing import PyTree

Figures = dict[str, float]


def raw_and_average(state: TrainState, evaluate: Callable[[PyTree], Figures]) -> Figures:
    """The figures of the parameters, and those of their moving average, where there is one, as "ema_<name>".

    The average comes last, so that what `evaluate` leaves behind is about the weights one would use.
    """
    figures = evaluate(state.params)
    if state.ema is not None:
        figures |= {f"ema_{name}": value for name, value in evaluate(state.ema).items()}
    return figures


def one_late(measure: Callable[[Any], Any], batches: Iterable[Any], put: Callable[[Any], Any]) -> Iterator[Any]:
    """Pairs (host batch, what was measured on it), each handed out when the next one has been dispatched.

    The device is never idle, and never holds more than two batches.
    """
    late = None
    for batch in batches:
        dispatched = (batch, measure(put(batch)))
        if late is not None:
            yield late
        late = dispatched
    if late is not None:
        yield late
