"""The weights that a quantized backbone's codes were made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightsft.backbone import Backbone, _gguf_options, loading, locate
from lightsft.errors import BackboneError, ConfigurationError
from lightsft.quantization import dequantized, describe, matrix

OTHER_WEIGHTS = 0.5  # of the norm of W: codes of 4 bits lose a tenth to a sixth, codes of another W 1.4
_LOAD_QUANTIZED = "load the backbone with Backbone.load(path, quantization=...), which remembers where they are"
Originals = Callable[[str], Tensor]  # the name of a layer -> W (out, in)


def originals(backbone: Backbone) -> Originals:
    """W (out, in), in fp32 on the CPU, that the codes of a layer were made of, by the layer's name.

    The source is loaded once more, in the types that it is stored in, and kept as long as what is returned here.
    Raises ConfigurationError where the source is unknown, gone, or does not hold such weights.
    """
    model = _unquantized(type(backbone.model), backbone.source)

    @torch.no_grad()
    def original(name: str) -> Tensor:
        exact, held = matrix(model.get_submodule(name)).float(), dequantized(backbone.module(name)).cpu()
        if exact.shape != held.shape or bool((exact - held).norm() > OTHER_WEIGHTS * exact.norm()):
            raise ConfigurationError(
                f"the codes of {name} were not made of what {backbone.source} holds there",
                expected="the weights that the backbone was quantized from",
                todo=_LOAD_QUANTIZED,
            )
        return exact

    return original


def _unquantized(kind: type[PreTrainedModel], source: str | None) -> PreTrainedModel:
    """The checkpoint in floating point, on the CPU."""
    expected = "a checkpoint in floating point, which the codes were made of"
    if source is None:
        raise ConfigurationError("the backbone does not know its source", expected=expected, todo=_LOAD_QUANTIZED)
    try:
        folder, gguf = locate(source)
        with loading(source), torch.random.fork_rng(devices=[]):
            model = kind.from_pretrained(folder, dtype="auto", ignore_mismatched_sizes=True, **_gguf_options(gguf))
    except BackboneError as error:
        raise ConfigurationError(
            f"the original weights cannot be loaded: {error.found}", expected=expected, todo=_LOAD_QUANTIZED
        ) from error
    if describe(model) is not None:
        raise ConfigurationError(f"{source} is quantized itself", expected=expected, todo=_LOAD_QUANTIZED)
    return model
