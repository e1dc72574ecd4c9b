"""Dry runs: a few tokens through any backbone, to see which modules run, with no trace left on it."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

BYTES = 256  # the vocabulary of models that read characters
ENCODER_TOKENS, DECODER_TOKENS = 7, 5  # different, so that cross attention shows in the length of its keys


def candidate_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Keyword arguments that a forward pass may accept, the likeliest first; the first that runs is the one to use.

    They differ in length (some models want a multiple of their chunk, or exactly as many tokens as they have
    positions), in the optional arguments that some models need all the same (boxes, images, sounds), and in holding
    each special token that the configuration names, which some heads look for.
    """
    main = str(getattr(model, "main_input_name", "input_ids"))
    if main == "input_ids" or "input_ids" in _accepted(model):
        positions = _positions(model)
        lengths = [(16, 8), (64, 32), *([(positions, positions)] if positions else [])]
        texts = [tiny_inputs(model)]
        texts += [_text_inputs(model, *both, 0) for both in lengths if not positions or both[0] <= positions]
        for plain in texts:
            extra = _companions(model, plain["input_ids"])
            yield plain
            if extra:
                yield plain | extra
            yield plain | extra | {"input_ids": _with_special_tokens(model, plain["input_ids"])}
        books = getattr(text_config(model), "num_codebooks", None)
        if any(isinstance(module, nn.Linear) and module.out_features == 1 for module in model.modules()):
            # it may give a number to each of several texts of an example: (batch, texts, tokens), here one text
            yield {name: value[:, None] if isinstance(value, Tensor) else value for name, value in texts[0].items()}
        if isinstance(books, int):  # sounds as several streams of tokens, one per row
            yield {"input_ids": texts[0]["input_ids"].expand(books, -1).contiguous()}
    if main != "input_ids":
        yield from _sensor_inputs(model, main)
    yield {name: value.to(model.device) for name, value in model.dummy_inputs.items()}


def tiny_inputs(
    model: PreTrainedModel,
    *,
    tokens: int = ENCODER_TOKENS,
    decoder_tokens: int = DECODER_TOKENS,
    start: int = 0,
) -> dict[str, Tensor]:
    """Keyword arguments for one forward pass on text with batch size 1, on the model's device.

    `input_ids` (1, tokens), or fewer where the model has few positions; another choice for each `start`, spread
    over the vocabulary and ending in the end-of-sequence token, which some sequence classifiers look for.
    """
    positions = _positions(model)
    if positions > 0:  # half of them: some models count from their padding id
        tokens, decoder_tokens = min(tokens, positions // 2), min(decoder_tokens, positions // 2)
    return _text_inputs(model, tokens, decoder_tokens, start)


def _text_inputs(model: PreTrainedModel, tokens: int, decoder_tokens: int, start: int) -> dict[str, Tensor]:
    inputs: dict[str, Any] = {"input_ids": _token_ids(model, tokens, start)}
    accepted = _accepted(model)
    if "attention_mask" in accepted and model.device.type != "meta":  # models look at its values
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if getattr(model.config, "is_encoder_decoder", False) and model.get_output_embeddings() is not None:
        inputs["decoder_input_ids"] = _token_ids(model, decoder_tokens, start)
    return inputs


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the part that reads tokens; where a text encoder feeds a decoder, of the decoder."""
    try:
        return model.config.get_text_config()
    except ValueError:  # it has several
        return model.config.get_text_config(decoder=True)


def _positions(model: PreTrainedModel) -> int:
    """How many positions the model has, 0 where it does not say."""
    return max(0, int(getattr(text_config(model), "max_position_embeddings", None) or 0))


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """What token ids are looked up in, or None: models of sounds and images have nothing of the kind."""
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found


def _accepted(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _companions(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Tensor]:
    """What some models want beside token ids, by the names that transformers gives such arguments."""
    batch, length = input_ids.shape
    config, place = model.config, model.device
    vision, audio = (getattr(config, name, None) or config for name in ("vision_config", "audio_config"))
    makers: dict[str, Callable[[], Tensor]] = {
        "bbox": lambda: torch.tensor([1, 2, 5, 9], device=place).expand(batch, length, 4),
        "pixel_values": lambda: _pixels(vision, model),
        "image": lambda: _pixels(vision, model),
        "input_features": lambda: _signal(model, batch, audio.num_mel_bins, 8 * length),
        "visual_feats": lambda: _signal(model, batch, 3, config.visual_feat_dim),
        "visual_pos": lambda: _signal(model, batch, 3, config.visual_pos_dim),
        "global_attention_mask": lambda: (torch.arange(length, device=place) == 0).long().expand(batch, length),
        "decoder_input_ids": lambda: input_ids[:, :DECODER_TOKENS],
    }
    found = {}
    for name in makers.keys() & _accepted(model).keys():
        with contextlib.suppress(AttributeError, TypeError):  # the configuration does not say how large
            found[name] = makers[name]()
    return found


def _with_special_tokens(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The same ids, holding each special token of the configuration once."""
    special = {
        value
        for name, value in text_config(model).to_dict().items()
        if name.endswith("_token_id") and not name.startswith("pad") and isinstance(value, int) and value >= 0
    }
    ids = input_ids.clone()
    for position, value in enumerate(sorted(special)[: ids.shape[1] - 2], start=1):
        ids[:, position] = value
    return ids


def _sensor_inputs(model: PreTrainedModel, main: str) -> Iterator[dict[str, Any]]:
    """Images and sounds, in the layouts and lengths that are in use."""
    place, config = model.device, model.config
    for source in (config, getattr(config, "vision_config", config)):
        with contextlib.suppress(AttributeError, TypeError):
            yield {main: _pixels(source, model)}
    yield {main: _signal(model, 1, 3, 224, 224)}
    sizes = [v for source in (config, getattr(config, "encoder_config", config)) for v in _widths(source)]
    for width in dict.fromkeys(sizes):
        for length in (64, 2 * int(getattr(config, "max_source_positions", 32)), getattr(config, "max_length", 64)):
            for shape in ((1, width, length), (1, length, width)):
                sound = {main: _signal(model, *shape)}
                yield sound
                yield sound | {"attention_mask": torch.ones(1, shape[1], dtype=torch.long, device=place)}
    for samples in (3200, 16000):
        yield {main: _signal(model, 1, samples)}
    patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if isinstance(patch, int):
        yield {
            main: _signal(model, 1, 16, 3 * patch * patch),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long, device=place),
            "spatial_shapes": torch.tensor([[4, 4]], device=place),
        }


def _widths(config: Any) -> Iterator[int]:
    """Plausible numbers of features per frame of sound."""
    for name in ("num_mel_bins", "feature_projection_input_dim", "input_dim", "feature_size"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            yield value
    yield 64
    yield 80


@torch.no_grad()
def find_moving_buffers(model: PreTrainedModel, inputs: Mapping[str, Any] | None) -> list[str]:
    """Names of the buffers in the state dict that one pass in training mode writes to; their values are put back."""
    buffers = set(_saved_buffers(model))
    if not buffers or model.device.type == "meta":
        return []
    with evaluating(model), buffers_kept(model) as moved:
        model.train()
        with contextlib.suppress(Exception):  # a batch of one is too small for some: what ran so far has been seen
            model(**(inputs or {}))
    normalised = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        for name in module._buffers
    }
    return sorted(buffers & {*moved, *normalised})


def _saved_buffers(model: nn.Module) -> Iterator[str]:
    """Names of the buffers in the state dict, which is not asked for: quantized layers repack themselves for it."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[list[str]]:
    """On leaving, every buffer is the same object with the same values as before; yields the names of those moved."""
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers() if not buffer.is_meta}
    moved: list[str] = []
    try:
        yield moved
    finally:
        now = dict(model.named_buffers())
        for name, (buffer, value) in before.items():  # by value: batch normalisation does not count its writes
            if now.get(name) is not buffer or not torch.equal(buffer, value):
                owner, _, attribute = name.rpartition(".")
                with torch.no_grad():
                    model.get_submodule(owner)._buffers[attribute] = buffer.copy_(value)
                moved.append(name)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it no dropout; on leaving, every module's mode, its buffers and the random state are as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), buffers_kept(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        forget_derived(model)


@contextmanager
def visible_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it attention is made of torch's own functions, since inside a kernel nothing shows."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    chosen = [(config, getattr(config, "_attn_implementation_internal", None)) for config in configs.values()]
    hidden = [(config, name) for config, name in chosen if name not in (None, "eager", "sdpa")]
    for config, _ in hidden:
        config._attn_implementation_internal = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    try:
        yield
    finally:
        for config, name in hidden:
            config._attn_implementation_internal = name


def forget_derived(model: nn.Module) -> None:
    """Let modules drop what they computed from their weights for evaluation (a table of attention biases, say).

    They do when training begins, in a `train` of their own; every module's mode stays what it is.
    """
    for module in list(model.modules()):
        if type(module).train not in (nn.Module.train, PreTrainedModel.train):
            modes = [(inner, inner.training) for inner in module.modules()]
            module.train(True)
            for inner, training in modes:
                inner.training = training


@contextmanager
def training_without_chance(model: nn.Module) -> Iterator[None]:
    """Within it training mode, but no dropout and no moving statistics; evaluation mode on leaving."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm):
            module.eval()
    try:
        yield
    finally:
        model.eval()


def _token_ids(model: PreTrainedModel, tokens: int, start: int) -> Tensor:
    embeddings = input_embeddings(model)
    config = text_config(model)
    vocabulary = int(getattr(embeddings, "num_embeddings", 0) or getattr(config, "vocab_size", BYTES))
    low = min(20, vocabulary // 4)  # special tokens usually come first
    ids = low + ((torch.arange(tokens) + start * tokens) * 7919) % (vocabulary - low)
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[ids == end] = low
        ids[-1] = end
    return ids[None].to(model.device)


def _pixels(config: Any, model: PreTrainedModel) -> Tensor:
    """A black image of the configured size."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = int(getattr(config, "num_channels", 3))
    return _signal(model, 1, channels, int(height), int(width))


def _signal(model: PreTrainedModel, *shape: int) -> Tensor:
    """A smooth signal without two equal neighbours: zeros would hide what depends on the input."""
    return torch.sin(torch.arange(math.prod(shape)) * 0.7).reshape(shape).to(model.device, model.dtype)


def predictions(outputs: Any) -> list[Tensor]:
    """The tensors a model predicts with: `logits` where there are any, else every floating-point output."""
    if isinstance(outputs, ModelOutput) and isinstance(outputs.get("logits"), Tensor):
        return [outputs["logits"]]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return list(_floating(values))


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


def _floating(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, tuple | list):
            yield from _floating(value)
