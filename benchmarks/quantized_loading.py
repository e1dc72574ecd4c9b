"""Peak memory of quantizing while loading: python benchmarks/quantized_loading.py

Llama-3.2-1B with random bf16 weights, in shards of 500 MB, loaded on the CPU by a fresh process for each scheme: the
memory of its own at its highest and when the model is there, sampled every 5 ms, above what the imports took; and with
it the pages of the checkpoint that are mapped, which the system takes back when it needs them. Size: the bytes of all
parameters, buffers and scales.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

WAYS = [("int8", False), ("nf4", False), ("nf4", True), ("fp4", False)]


def write(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

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
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="500MB")


def resident() -> tuple[int, int]:
    """(own, all): all resident memory, and that part of it that no file backs."""
    _, pages, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (pages - of_files) * resource.getpagesize(), pages * resource.getpagesize()


class Sampler(threading.Thread):
    """The highest of both, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.running = (0, 0), True
        self.start()

    def run(self) -> None:
        while self.running:
            self.highest = tuple(map(max, self.highest, resident()))
            time.sleep(0.005)


def load(folder: str, scheme: str, double: str) -> None:
    """In a process of its own."""
    import bitsandbytes  # noqa: F401
    import transformers

    from lightsft import Backbone

    transformers.AutoModelForCausalLM  # noqa: B018 - imported before the count begins
    kind = transformers.LlamaForCausalLM
    before, started, sampler = resident(), time.perf_counter(), Sampler()
    backbone = Backbone.load(
        folder, task=None, kind=kind, dtype="bfloat16", quantization=scheme, double_quantization=double == "True"
    )
    seconds, after = time.perf_counter() - started, resident()
    sampler.running = False
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(backbone.model))
    found = {"peak": sampler.highest[0] - before[0], "peak_mapped": sampler.highest[1] - before[1]}
    print(json.dumps(found | {"seconds": seconds, "size": size, "after": after[0] - before[0]}))


def tensors(model: torch.nn.Module):
    seen = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[id(tensor)] = tensor
        state = getattr(tensor, "quant_state", None)
        for part in (getattr(tensor, "SCB", None), getattr(state, "absmax", None)):
            if part is not None:
                seen[id(part)] = part
    return seen.values()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        print("| scheme | size | peak | limit 1.15 x size + 0.5 GB | after | peak with mapped pages | seconds |")
        print("|---|---|---|---|---|---|---|")
        for scheme, double in WAYS:
            command = [sys.executable, __file__, folder, scheme, str(double)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            size, peak, after, mapped = (found[name] / 1e9 for name in ("size", "peak", "after", "peak_mapped"))
            cells = [f"{value:.2f} GB" for value in (size, peak, 1.15 * size + 0.5, after, mapped)]
            name = f"{scheme}{', double' if double else ''}"
            print("| " + " | ".join([name, *cells, f"{found['seconds']:.1f}"]) + " |", flush=True)


if __name__ == "__main__":
    load(*sys.argv[1:]) if len(sys.argv) > 1 else main()
