"""Regenerate `adapterhub_folders/`: adapters as AdapterHub's library saves them, and the logits that it computes.

Five tiny models with random weights each carry one adapter per case; `save_adapter` writes it, with the prediction
head that the model has. So the tests read files of AdapterHub's own without having it installed.

AdapterHub pins an old transformers, so this runs in an environment of its own: see `make_adapterhub_reference.py`.

    adapterhub-env/bin/python tests/reference/make_adapterhub_folders.py

    bases/MODEL/                 the model without an adapter, as `save_pretrained` writes it, in half precision
    CASE/                        what `save_adapter` writes; MODEL is the first part of CASE
    reference.safetensors        input_ids and attention_mask (2, 7), the second row right-padded by 2; for each CASE
                                 the logits in fp32, or the last hidden state of a model without a head

Everything computes with eager attention: with sdpa the library's prefixes have no effect on a Llama that gets a boolean
mask, which `compose_single` in `methods/prefix_tuning.py` extends by its inverse.
"""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import adapters

OUTPUT = Path(__file__).with_name("adapterhub_folders")
MODEL_SEED, INPUT_SEED, ADAPTER_SEED = 0, 1, 2
STD, ADAPTER_STD = 0.3, 0.4  # wide: activations of order one, so that no weight is without effect
VOCABULARY = 24
LABELS = ["no", "perhaps", "yes"]

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "initializer_range": STD,
    "pad_token_id": 0,
}
CLASSES: dict[str, Any] = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "bert": transformers.BertConfig(**SIZES, **CLASSES),
    "roberta": transformers.RobertaConfig(**SIZES | CLASSES | {"pad_token_id": 1, "max_position_embeddings": 18}),
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    "distilbert": transformers.DistilBertConfig(
        dim=16,
        n_layers=2,
        n_heads=4,
        hidden_dim=24,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        initializer_range=STD,
        pad_token_id=0,
        **CLASSES,
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, n_inner=24, vocab_size=VOCABULARY, n_positions=16, initializer_range=STD
    ),
}
HEADS: dict[str, Callable[..., Any]] = {
    "bert": transformers.BertForSequenceClassification,
    "roberta": transformers.RobertaForSequenceClassification,
    "llama": transformers.LlamaForCausalLM,
    "distilbert": transformers.DistilBertForSequenceClassification,
    "gpt2": transformers.GPT2LMHeadModel,
}
FLEXIBLE: dict[str, Callable[..., Any]] = {
    "bert": adapters.BertAdapterModel,
    "roberta": adapters.RobertaAdapterModel,
}


@dataclass(frozen=True)
class Case:
    """An adapter's configuration; the head of a `...AdapterModel` (None: the model of transformers, with its own)."""

    config: adapters.AdapterConfig
    flexible_head: dict[str, Any] | None = None
    safe: bool = True  # safetensors, rather than a pickle: not for tensors with several names (prefixes, norms)


DOUBLE = adapters.DoubleSeqBnConfig(reduction_factor=4)
SINGLE = adapters.SeqBnConfig(reduction_factor=4, original_ln_before=False)
AFTER_SUM = adapters.SeqBnConfig(reduction_factor=4)  # the default: original_ln_before
PARALLEL = adapters.ParBnConfig(reduction_factor=4)
LORA = adapters.LoRAConfig(r=2, alpha=6)
EVERYWHERE = LORA.replace(attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True)
PREFIX = adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=4)
CASES = {
    "bert_double": Case(DOUBLE),
    "bert_norms": Case(
        SINGLE.replace(ln_before=True, ln_after=True, non_linearity="gelu", scaling="learned"), safe=False
    ),
    "bert_single": Case(
        SINGLE.replace(non_linearity="leakyrelu", reduction_factor={"1": 8, "default": 2}, leave_out=[0])
    ),
    "bert_parallel": Case(PARALLEL),
    "bert_lora": Case(EVERYWHERE),
    "bert_prefix": Case(PREFIX, safe=False),
    "bert_flexible": Case(DOUBLE, {"num_labels": 3, "id2label": dict(enumerate(LABELS))}),
    "bert_pooler": Case(LORA, {"num_labels": 3, "layers": 1, "use_pooler": True}),
    "bert_headless": Case(DOUBLE, {}),
    "roberta_double": Case(DOUBLE.replace(scaling=0.5, residual_before_ln=False)),
    "roberta_parallel": Case(PARALLEL.replace(scaling="learned"), safe=False),
    "roberta_flat": Case(PREFIX.replace(flat=True, leave_out=[0]), safe=False),
    "roberta_flexible": Case(LORA.replace(attn_matrices=["k"]), {"num_labels": 2}),
    "llama_double": Case(DOUBLE),
    "llama_lora": Case(EVERYWHERE.replace(leave_out=[1])),
    "llama_prefix": Case(PREFIX.replace(non_linearity="relu"), safe=False),
    "gpt2_double": Case(DOUBLE.replace(non_linearity="tanh")),
    "gpt2_lora": Case(EVERYWHERE.replace(attn_matrices=["q", "v"])),
    "gpt2_key": Case(LORA.replace(attn_matrices=["k"], alpha=60)),
    "gpt2_flat": Case(PREFIX.replace(flat=True), safe=False),
    "bert_default": Case(AFTER_SUM),
    "bert_twice": Case(DOUBLE.replace(original_ln_before=True)),
    "roberta_default": Case(
        AFTER_SUM.replace(ln_before=True, ln_after=True, scaling="learned", leave_out=[0]), safe=False
    ),
    "distilbert_default": Case(AFTER_SUM),
    "distilbert_twice": Case(DOUBLE.replace(original_ln_before=True, ln_before=True), safe=False),
    "distilbert_parallel": Case(PARALLEL),
    "gpt2_default": Case(AFTER_SUM),
    "gpt2_parallel": Case(PARALLEL),
    "llama_default": Case(AFTER_SUM.replace(non_linearity="gelu")),
    "llama_twice": Case(DOUBLE.replace(original_ln_before=True, scaling=0.5)),
    "llama_parallel": Case(PARALLEL.replace(ln_before=True, scaling="learned"), safe=False),
    "bert_mam": Case(adapters.MAMConfig(PREFIX, PARALLEL), safe=False),
    "bert_ia3": Case(adapters.IA3Config()),
    "gpt2_ia3": Case(adapters.IA3Config(alpha=2, leave_out=[1])),
    "llama_union": Case(adapters.ConfigUnion(AFTER_SUM, LORA.replace(intermediate_lora=True, output_lora=True))),
}


def make_inputs() -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, both (2, 7), without the ids of any padding but where there is some."""
    input_ids = torch.randint(4, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(INPUT_SEED))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -2:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def randomise(parameters: dict[str, Tensor], seed: int, std: float) -> None:
    """Draw every parameter anew; values are exact in half precision."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(parameters):
        mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        drawn = torch.empty_like(parameters[name]).normal_(mean, std, generator=generator)
        parameters[name].copy_(drawn.half())


def build_model(name: str, flexible_head: dict[str, Any] | None) -> Any:
    """Return the model with the same base weights at every call, and a random head."""
    torch.manual_seed(MODEL_SEED)
    config = copy.deepcopy(CONFIGS[name])  # the library notes heads in it
    config._attn_implementation = "eager"
    model = HEADS[name](config) if flexible_head is None else FLEXIBLE[name](config)
    randomise({n: p for n, p in model.named_parameters() if not n.startswith("heads")}, MODEL_SEED, STD)
    randomise(dict(model.base_model.named_parameters()), MODEL_SEED, STD)
    return model.eval()


def save_base(name: str) -> None:
    """Write the base model: a classifier's without its head."""
    model = build_model(name, None)
    part = model if name in ("llama", "gpt2") else model.base_model
    part.half().save_pretrained(OUTPUT / "bases" / name)


def run_case(case: str) -> Tensor:
    """Write the folder of one case; return what its model computes."""
    made, name = CASES[case], case.partition("_")[0]
    model = build_model(name, made.flexible_head)
    adapters.init(model)
    model.add_adapter(case, config=made.config)
    if made.flexible_head:
        model.add_classification_head(case, **made.flexible_head)
    model.set_active_adapters(case)
    added = {n: p for n, p in model.named_parameters() if f".{case}." in n}
    randomise(added, ADAPTER_SEED, ADAPTER_STD)
    model.eval()
    model.save_adapter(str(OUTPUT / case), case, use_safetensors=made.safe)
    with torch.no_grad():
        computed = _output(model(**make_inputs()))
        model.set_active_adapters(None)
        without = _output(model(**make_inputs()))
    print(f"{case}: the adapter changes the output by up to {(computed - without).abs().max().item():.2f}")
    return computed


def _output(computed: Any) -> Tensor:
    """Return the logits, or the last hidden state."""
    return getattr(computed, "logits", computed[0]).contiguous()


def main() -> None:
    """Write `adapterhub_folders` next to this script."""
    torch.set_num_threads(1)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    for name in CONFIGS:
        save_base(name)
    logits = {case: run_case(case) for case in CASES}
    save_file({**make_inputs(), **logits}, OUTPUT / "reference.safetensors")
    print(f"{sum(file.stat().st_size for file in OUTPUT.rglob('*') if file.is_file())} bytes")


if __name__ == "__main__":
    main()
