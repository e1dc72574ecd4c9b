"""Regenerate `adapterhub.safetensors`: what AdapterHub's bottleneck adapters compute, as values.

Two tiny random models (BERT with a classification head, Llama with a language-model head) each
carry one bottleneck adapter per case. The file holds the inputs, the base weights, every adapter's
weights, the logits, and the gradient of `loss = logits.square().mean()` with respect to each
adapter weight, so that the tests compare with AdapterHub without having it installed.

AdapterHub pins an old transformers, so this runs in an environment of its own (Python 3.11):

    python -m venv adapterhub-env
    adapterhub-env/bin/pip install torch==2.13.0
    adapterhub-env/bin/pip install adapters==1.3.0 transformers==4.57.6 safetensors==0.8.0
    adapterhub-env/bin/python tests/reference/make_adapterhub_reference.py

The result is the same bytes at every run on one machine; another processor may round differently.

Keys, where MODEL is `bert` or `llama` and CASE a key of `CASES`:

    MODEL/input_ids, MODEL/attention_mask    (2, 9), the second row right-padded by 3
    MODEL/base/NAME                          the base model's state dict
    MODEL/base_logits                        without an adapter; BERT (2, 3), Llama (2, 9, 100)
    MODEL/CASE/adapter/NAME                  the adapter, under AdapterHub's parameter names
    MODEL/CASE/logits                        with that adapter active
    MODEL/CASE/grad/NAME                     d loss / d adapter weight

The metadata's one entry, `reference`, is JSON: the package versions, the model configurations and
the adapter configurations.
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

import adapters

OUTPUT = Path(__file__).with_name("adapterhub.safetensors")

MODEL_SEED = 0
INPUT_SEED = 1
ADAPTER_SEED = 2

# Wider than the usual 0.02: activations of order one, so that no adapter weight is without effect.
INITIALIZER_RANGE = 0.2
ADAPTER_STD = 0.1

BATCH_SIZE, SEQUENCE_LENGTH, PADDING = 2, 9, 3

BERT = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=100,
    max_position_embeddings=64,
    num_labels=3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    classifier_dropout=0.0,
    initializer_range=INITIALIZER_RANGE,
    attn_implementation="eager",
)
LLAMA = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    vocab_size=100,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    attention_dropout=0.0,
    use_cache=False,
    initializer_range=INITIALIZER_RANGE,
    attn_implementation="eager",
)
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BERT),
    "llama": lambda: LlamaForCausalLM(LLAMA),
}

HOULSBY = adapters.BnConfig(
    mh_adapter=True,
    output_adapter=True,
    original_ln_before=False,
    original_ln_after=True,
    residual_before_ln=True,
    adapter_residual_before_ln=False,
    ln_before=False,
    ln_after=False,
    is_parallel=False,
    non_linearity="swish",
    reduction_factor=4,
    scaling=1.0,
    dropout=0.0,
)
CASES = {
    "houlsby": HOULSBY,
    "pfeiffer": HOULSBY.replace(mh_adapter=False),
    "parallel": HOULSBY.replace(mh_adapter=False, is_parallel=True, non_linearity="relu", scaling=4.0),
    "houlsby_norms": HOULSBY.replace(ln_before=True, ln_after=True, non_linearity="gelu"),
}


def build_model(name: str) -> PreTrainedModel:
    """Return the base model `name` in eval mode, with the same random weights at every call."""
    torch.manual_seed(MODEL_SEED)
    model = BUILDERS[name]()
    model.eval()
    return model


def make_inputs() -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, both (2, 9); the second row ends in 3 paddings."""
    generator = torch.Generator().manual_seed(INPUT_SEED)
    input_ids = torch.randint(1, 100, (BATCH_SIZE, SEQUENCE_LENGTH), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -PADDING:] = 0
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


def add_random_adapter(model: Any, case: str, config: adapters.BnConfig) -> dict[str, Tensor]:
    """Add and activate the adapter `case`; return its parameters, all drawn from N(0, 0.1^2).

    `model` is a `PreTrainedModel`; `adapters.init` gives it, at run time, the methods used here.
    Each parameter has one name here. AdapterHub's state dict repeats the norm before the
    bottleneck: `adapter_norm_before` is also `adapter_down.0`.
    """
    adapters.init(model)
    model.add_adapter(case, config=config)
    model.set_active_adapters(case)
    parameters: dict[str, Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if f".adapters.{case}." in name
    }
    generator = torch.Generator().manual_seed(ADAPTER_SEED)
    for name in sorted(parameters):
        torch.nn.init.normal_(parameters[name], std=ADAPTER_STD, generator=generator)
    return parameters


def case_reference(
    model_name: str, case: str, config: adapters.BnConfig, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return one adapter's weights, its logits and its gradients, keyed without `MODEL/CASE/`."""
    model = build_model(model_name)
    parameters = add_random_adapter(model, case, config)
    model.eval()
    logits = model(**inputs).logits
    gradients = torch.autograd.grad(logits.square().mean(), list(parameters.values()))
    return {
        **{f"adapter/{name}": parameter for name, parameter in parameters.items()},
        "logits": logits,
        **{f"grad/{name}": grad for name, grad in zip(parameters, gradients, strict=True)},
    }


def model_reference(model_name: str) -> dict[str, Tensor]:
    """Return everything stored for one model, keyed without `MODEL/`."""
    model = build_model(model_name)
    inputs = make_inputs()
    reference = {
        **inputs,
        **{f"base/{name}": weight for name, weight in model.state_dict().items()},
        "base_logits": model(**inputs).logits,
    }
    for case, config in CASES.items():
        tensors = case_reference(model_name, case, config, inputs)
        reference |= {f"{case}/{name}": tensor for name, tensor in tensors.items()}
        change = (tensors["logits"] - reference["base_logits"]).abs().max().item()
        print(f"{model_name}/{case}: the adapter changes the logits by up to {change:.2f}")
    return reference


def model_description(config: PretrainedConfig) -> dict[str, object]:
    """Return the configuration's non-default values, with the attention implementation."""
    return {**config.to_diff_dict(), "attn_implementation": config._attn_implementation}


def main() -> None:
    """Write `adapterhub.safetensors` next to this script."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    description = {
        "versions": {name: version(name) for name in ("adapters", "transformers", "torch")},
        "models": {"bert": model_description(BERT), "llama": model_description(LLAMA)},
        "adapters": {case: config.to_dict() for case, config in CASES.items()},
    }
    tensors = {
        f"{model_name}/{name}": tensor.detach().contiguous()
        for model_name in BUILDERS
        for name, tensor in model_reference(model_name).items()
    }
    # One metadata entry: safetensors writes several in no fixed order.
    save_file(tensors, OUTPUT, metadata={"reference": json.dumps(description, sort_keys=True)})
    print(f"{OUTPUT.name}: {len(tensors)} tensors, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
