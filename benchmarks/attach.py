"""Time to attach a LoRA to a 1B-parameter model, probe included, against PEFT's: python benchmarks/attach.py

Llama-3.2-1B's shapes (16 blocks, width 2048) with random weights, rank 8 on every linear layer in the blocks. Attaching
alternates A B A B ... on the same model, which is ejected (unloaded) in between; medians of 7.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightsft import Backbone
from lightsft_adapters import LoRA

PAIRS = 7


def model_of_1b(dtype: torch.dtype) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    return model.eval()


def ours(model: PreTrainedModel) -> tuple[float, Callable[[], object]]:
    started = time.perf_counter()
    injection = LoRA(rank=8).inject(Backbone(model))
    return time.perf_counter() - started, injection.eject


def peft(model: PreTrainedModel) -> tuple[float, Callable[[], object]]:
    started = time.perf_counter()
    inject_adapter_in_model(LoraConfig(r=8, target_modules=r".*layers.*_proj"), model)
    seconds = time.perf_counter() - started

    def unload() -> None:
        for name, module in list(model.named_modules()):
            if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base_layer)
        model.requires_grad_(True)
        del model.peft_config

    return seconds, unload


def main() -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of_1b(dtype)
        seconds: dict[str, list[float]] = {"lightsft": [], "peft": []}
        for _ in range(PAIRS):
            for name, attach in (("lightsft", ours), ("peft", peft)):
                taken, undo = attach(model)
                undo()
                gc.collect()
                seconds[name].append(taken)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = statistics.median(a / b for a, b in zip(seconds["lightsft"], seconds["peft"], strict=True))
        parameters = sum(p.numel() for p in model.parameters()) / 1e9
        print(
            f"{dtype} ({parameters:.2f}B): lightsft {medians['lightsft']:.2f} s "
            f"({min(seconds['lightsft']):.2f}-{max(seconds['lightsft']):.2f}), "
            f"PEFT {medians['peft']:.2f} s, ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
