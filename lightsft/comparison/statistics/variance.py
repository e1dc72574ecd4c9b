"""The squared standard error of a mean score or of a difference of two, by where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Side:
    """What the seeds of one strategy contribute: variances of its mean over seeds.

    training: sigma_seed^2 / S, by which any seed differs from others on all examples. residual: sigma_both^2 / (S E),
    by which a seed differs on some examples from what it does on others.
    """

    seeds: int
    training: float
    residual: float


@dataclass(frozen=True)
class Variance:
    """sides: one for each strategy with several seeds. examples: sigma_example^2 / E, of a difference where it is one.

    size: the number E of examples.
    """

    sides: tuple[Side, ...]
    examples: float
    size: int

    @property
    def total(self) -> float:
        """The squared standard error."""
        return sum(side.training + side.residual for side in self.sides) + self.examples

    @property
    def standard_error(self) -> float:
        """Of the mean, or of the difference."""
        return float(self.total**0.5)

    @property
    def degrees_of_freedom(self) -> float:
        """1 / df = share / nu + (1 - share) / (E - 1), where share is the part of the variance that is `training`.

        nu = (sum v_k)^2 / sum(v_k^2 / (S_k - 1)) is Welch's (1947) for the variances v_k of the sides. Satterthwaite's
        formula squares both shares. That finds more differences than there are: a variance over few seeds that is small
        by chance then counts as if it were known exactly. See docs/statistics.md.
        """
        total, training = self.total, sum(side.training for side in self.sides)
        inverse = 1 / max(1, self.size - 1)
        if training > 0:
            welch = sum((side.training / training) ** 2 / (side.seeds - 1) for side in self.sides)
            inverse += training / total * (welch - inverse)
        return 1 / inverse

    def with_seeds(self, seeds: int) -> Variance:
        """With so many seeds of each strategy, as far as can be told from these."""
        sides = [
            Side(seeds, side.training * side.seeds / seeds, side.residual * side.seeds / seeds) for side in self.sides
        ]
        return replace(self, sides=tuple(sides))

    def with_examples(self, size: int) -> Variance:
        """With so many test examples and the seeds that there are."""
        factor = self.size / size
        sides = tuple(replace(side, residual=side.residual * factor) for side in self.sides)
        return Variance(sides, self.examples * factor, size)
