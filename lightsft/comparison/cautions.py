"""Sentences about what a comparison does not know because of how it was run."""

from __future__ import annotations

NOT_TUNED = (
    "Nothing was tuned: learning rates are the defaults or what was given, not tuned, and a strategy can look worse "
    "than it is."
)
ONE_SEED = "One seed each: nothing here says how far another seed would move a score."
