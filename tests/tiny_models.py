"""Tiny random models of six families, seeded, in eval mode, with batches that fit them.

Weights are drawn ten times wider than usual (0.2), so that activations are of order one and no tensor is without
effect. Dropout stays at its default: it acts in train mode only.
"""

import torch
import transformers

VOCABULARY, LABELS, PAD, EOS = 100, 3, 0, 2


def _bert(**options):
    return transformers.BertConfig(**(_SIZES | _LABELS | options))


def _roberta(**options):
    ids = {"pad_token_id": 1, "eos_token_id": EOS, "bos_token_id": 3}
    return transformers.RobertaConfig(**(_SIZES | _LABELS | ids | options))


def _llama(**options):
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 1}
    return transformers.LlamaConfig(**(_SIZES | ids | {"num_key_value_heads": 2} | options))


def _gpt2(**options):
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 1}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    return transformers.GPT2Config(**(sizes | ids | options))


def _t5(**options):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    ids = {"vocab_size": VOCABULARY, "decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": EOS}
    return transformers.T5Config(**(sizes | ids | {"relative_attention_num_buckets": 8} | options))


def _bart(**options):
    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 1, "eos_token_id": EOS, "decoder_start_token_id": EOS}
    return transformers.BartConfig(
        **(sizes | heads | ids | _LABELS | {"init_std": 0.2, "forced_eos_token_id": None} | options)
    )


_LABELS = {"num_labels": LABELS}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_FAMILIES = {
    "bert": (_bert, transformers.BertForSequenceClassification),
    "llama": (_llama, transformers.LlamaForCausalLM),
    "gpt2": (_gpt2, transformers.GPT2LMHeadModel),
    "t5": (_t5, transformers.T5ForConditionalGeneration),
    "bart": (_bart, transformers.BartForSequenceClassification),
    "roberta": (_roberta, transformers.RobertaForSequenceClassification),
}
NAMES = tuple(_FAMILIES)


def tiny(name, *, seed=0, dtype=torch.float32, **options):
    """The tiny model of a family; `options` go to its configuration."""
    config, kind = _FAMILIES[name]
    torch.manual_seed(seed)
    model = kind(config(**options))
    for module in model.modules():  # where every norm's weight is 1 and every bias 0, mistakes in them would hide
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
            torch.nn.init.normal_(module.weight, 1.0, 0.1)
        if getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias, 0.0, 0.1)
    for parameter in model.parameters():  # not the buffers: from_pretrained keeps rotary frequencies in fp32
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def batch(model, *, rows=2, length=9, seed=0, labels=True):
    """Inputs that fit the model; every second row is right-padded by 3 and each ends in its end token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, -3:] = 0
    pad = model.config.pad_token_id
    ids[torch.arange(rows), mask.sum(1) - 1] = EOS
    ids[mask == 0] = PAD if pad is None else pad
    inputs = {"input_ids": ids, "attention_mask": mask}
    sequence_labels = torch.where(mask == 1, ids, -100)
    if model.get_output_embeddings() is None:
        return inputs | ({"labels": torch.arange(rows) % LABELS} if labels else {})
    if model.config.is_encoder_decoder and not labels:
        return inputs | {"decoder_input_ids": ids[:, :5]}
    if model.config.is_encoder_decoder:
        return inputs | {"labels": sequence_labels[:, :5].contiguous()}
    return inputs | ({"labels": sequence_labels} if labels else {})


def logits(model, **options):
    """The logits of `batch(model)`, without a gradient."""
    with torch.no_grad():
        return model(**batch(model, labels=False, **options)).logits


def gradients(model, parameters):
    """d loss / d parameter for `batch(model)`, by the names that `parameters` gives."""
    loss = model(**batch(model)).loss
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, values, strict=True))


def gradients_with_and_without_checkpointing(injection, *, use_reentrant=False):
    """(plain, checkpointed) gradients in train mode, with the same dropout masks.

    They are the same bits in a single stack; in an encoder-decoder the encoder's gradient is summed in another order.
    """
    model, found = injection.model.train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(0)
        model(**batch(model)).loss.backward()
        found.append({key: parameter.grad.clone() for key, parameter in injection.named_parameters().items()})
    return tuple(found)


def furthest(actual, expected):
    """The largest difference between two sets of tensors, in units of the largest expected magnitude of all.

    Some gradients are zero but for rounding (a key's bias cancels in the softmax), so each on its own says little.
    """
    assert actual.keys() == expected.keys()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    return max(float((tensor - expected[key]).abs().max()) for key, tensor in actual.items()) / scale


def randomise(injection, *, seed=0, scale=0.1):
    """Noise on every trainable tensor, so that no part of the strategy is at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)
    return injection


def off(actual, expected):
    """The largest difference, in units of the largest expected magnitude."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
