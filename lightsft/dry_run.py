"""Dry runs: a few tokens through any backbone, to see which modules run, with no trace left on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

ENCODER_TOKENS, DECODER_TOKENS = 7, 5  # different, so that cross attention shows in the length of its keys


def tiny_inputs(
    model: PreTrainedModel,
    *,
    tokens: int = ENCODER_TOKENS,
    decoder_tokens: int = DECODER_TOKENS,
    start: int = 0,
) -> dict[str, Tensor]:
    """Keyword arguments for one forward pass with batch size 1, on the model's device.

    Text: `input_ids` (1, tokens), or fewer where the model has few positions; another choice for each `start`, spread
    over the vocabulary and ending in the end-of-sequence token, which some sequence classifiers look for. Images:
    zeros of the configured size. Otherwise transformers' own dummy inputs.
    """
    wanted = str(getattr(model, "main_input_name", "input_ids"))
    if wanted == "pixel_values":
        return {"pixel_values": torch.zeros(1, *_image_shape(model), dtype=model.dtype, device=model.device)}
    if wanted != "input_ids":
        return {name: value.to(model.device) for name, value in model.dummy_inputs.items()}
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    if positions > 0:  # half of them: some models count from their padding id
        tokens, decoder_tokens = min(tokens, positions // 2), min(decoder_tokens, positions // 2)
    inputs = {"input_ids": _token_ids(model, tokens, start)}
    accepted = inspect.signature(model.forward).parameters
    if "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if getattr(model.config, "is_encoder_decoder", False) and model.get_output_embeddings() is not None:
        inputs["decoder_input_ids"] = _token_ids(model, decoder_tokens, start)
    return inputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it no dropout; on leaving, every module's mode and the random state are as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _token_ids(model: PreTrainedModel, tokens: int, start: int) -> Tensor:
    embeddings = model.get_input_embeddings()
    vocabulary = int(getattr(embeddings, "num_embeddings", 0) or model.config.get_text_config().vocab_size)
    low = min(20, vocabulary // 4)  # special tokens usually come first
    ids = low + ((torch.arange(tokens) + start * tokens) * 7919) % (vocabulary - low)
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[ids == end] = low
        ids[-1] = end
    return ids[None].to(model.device)


def _image_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(getattr(model.config, "num_channels", 3)), int(height), int(width)


def predictions(outputs: Any) -> list[Tensor]:
    """The tensors a model predicts with: `logits` where there are any, else every floating-point output."""
    if isinstance(outputs, ModelOutput) and isinstance(outputs.get("logits"), Tensor):
        return [outputs["logits"]]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return list(_floating(values))


def _floating(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, tuple | list):
            yield from _floating(value)
