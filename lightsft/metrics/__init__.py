"""Scores as pure functions of outcomes per example: arrays (examples, width) whose rows may be resampled."""
