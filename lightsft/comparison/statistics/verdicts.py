"""What comparisons mean, in sentences."""

from __future__ import annotations

import math

from lightsft.comparison.statistics.non_inferiority import NonInferior
from lightsft.comparison.statistics.paired import Comparison, Difference
from lightsft.metrics.units import Unit

UNDEFINED = "the score is undefined on most draws of these test examples, or there is only one"


def verdict(found: Comparison, unit: Unit, resolve: float) -> str:
    """Which of two is better and by how much; or that it is not seen, and what it would take."""
    gap = found.measured
    if gap.parts is None or not math.isfinite(gap.difference):
        return f"{gap.first} and {gap.second} cannot be compared: {UNDEFINED}"
    if found.outcome == "undecided":
        size = unit.measured(gap.difference, gap.interval)
        return f"no detectable difference between {gap.first} and {gap.second}: {size}{_notes(found, unit, resolve)}"
    winner, loser = (gap.first, gap.second) if found.outcome == "better" else (gap.second, gap.first)
    low, high = gap.interval or (gap.difference, gap.difference)
    ends = (low, high) if found.outcome == "better" else (-high, -low)
    alone = f" ({_one_seed(gap)})" if _one_seed(gap) else ""
    return f"{winner} beats {loser} by {unit.measured(abs(gap.difference), ends)}{alone}"


def within_verdict(found: NonInferior, others: int, unit: Unit) -> str:
    """Who can stand in for the best one."""
    margin = unit.amount(found.margin)
    if not others:
        return f"{found.best} is alone"
    within = [label for label in found.within if label != found.best]
    if not within:
        return f"no other strategy is shown to be within {margin} of {found.best}"
    listed = " and ".join(filter(None, (", ".join(within[:-1]), within[-1])))
    return f"{listed} {'is' if len(within) == 1 else 'are'} within {margin} of {found.best}"


def _notes(found: Comparison, unit: Unit, resolve: float) -> str:
    low, high = found.measured.interval or (-1.0, 1.0)
    near = low > 0 or high < 0
    multiple = f"not beyond chance among {found.tests} comparisons" if near and found.tests > 1 else ""
    few = (
        f"{found.measured.parts.size} examples decide nothing" if near and not multiple and found.measured.parts else ""
    )
    notes = [note for note in (multiple, few, _needed(found, unit.amount(resolve))) if note]
    return f" ({'; '.join(notes)})" if notes else ""


def _needed(found: Comparison, amount: str) -> str:
    """What would resolve a difference of `amount`."""
    parts = found.measured.parts
    if parts is None or not parts.total > 0:
        return ""
    if found.measured.one_seed:
        return _one_seed(found.measured)
    present = min((side.seeds for side in parts.sides), default=0)
    if found.seeds_needed and found.seeds_needed <= present:
        return f"{amount} would have been seen"
    if found.seeds_needed:
        return f"needs about {found.seeds_needed} seeds to resolve {amount}"
    start = f"no number of seeds resolves {amount} with these {parts.size:,} examples"
    if found.examples_needed is None:
        return f"{start}, nor does any number of examples with these seeds"
    return f"{start}; about {_two_digits(found.examples_needed):,} examples would"


def _one_seed(gap: Difference) -> str:
    return f"one seed of {' and '.join(gap.one_seed)}: nothing is known of others" if gap.one_seed else ""


def _two_digits(count: int) -> int:
    """Rounded up to two significant digits."""
    step = int(10 ** max(0, math.floor(math.log10(count)) - 1))
    return -(-count // step) * step
