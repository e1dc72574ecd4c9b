"""Merged checkpoints that any other tool loads, each with a certificate."""
