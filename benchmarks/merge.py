"""Merging a LoRA into a checkpoint on the disk: python benchmarks/merge.py 270m 1b 7b

Random Llama checkpoints in bf16 of 0.27, 2.2 and 13.5 GB with a LoRA of rank 8 on every linear layer of the blocks,
as a PEFT folder. One after the other, --rounds times (the order turns around every round), each in its own process:

cp         cp -r of the base's folder
cp, sync   the same, and everything brought to the disk, as a merge is
streaming  lightsft merge --check none, as a user runs it; "inside" is the time after Python and torch are imported
checked    lightsft merge --check tiles
in memory  lightsft's merge through the model, without a check
PEFT       AutoModelForCausalLM.from_pretrained, PeftModel.from_pretrained, merge_and_unload, save_pretrained

Medians of the wall time; peak: largest resident memory of a round, less that of Python with torch imported. The base
has been read before, so that it lies in the page cache as far as it fits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {  # hidden, intermediate, layers, heads, key and value heads, vocabulary
    "270m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}
RANK, LARGEST_FILE = 8, 5_000_000_000
SCRIPTS = {
    "torch alone": "import torch",
    "streaming": "import torch, time; began = time.perf_counter()\n"
    "from lightsft.cli.app import main; import sys\n"
    "sys.argv = ['lightsft', 'merge', '{adapter}', '--out', '{out}', '--check', 'none']\n"
    "main()\n",
    "checked": "from lightsft.cli.app import main; import sys\n"
    "sys.argv = ['lightsft', 'merge', '{adapter}', '--out', '{out}', '--check', 'tiles']\n"
    "main()\n",
    "in memory": "import transformers\n"
    "from lightsft import Backbone, artifact\n"
    "model = transformers.AutoModelForCausalLM.from_pretrained('{base}', dtype='auto')\n"
    "artifact.load('{adapter}', Backbone(model)).merge().save_pretrained('{out}')\n",
    "PEFT": "import peft, transformers\n"
    "model = transformers.AutoModelForCausalLM.from_pretrained('{base}', dtype='auto')\n"
    "peft.PeftModel.from_pretrained(model, '{adapter}').merge_and_unload().save_pretrained('{out}')\n",
}
COMMANDS = {"cp": "cp -r {base} {out}", "cp, sync": "cp -r {base} {out} && sync -f {out}"}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("sizes", nargs="+", choices=SIZES)
    made.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lightsft-merge")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--ways", default=",".join(["cp", "cp, sync", *SCRIPTS]).replace("torch alone,", ""))
    made.add_argument("--make", action="store_true", help="only make the checkpoints")
    options = made.parse_args()
    if options.make:
        for size in options.sizes:
            make(options.folder / size, size)
        return
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, medians of {options.rounds} rounds")
    print("| checkpoint | way | seconds | of cp | of cp, sync | peak above torch |")
    print("|---|---|---|---|---|---|")
    ways = [way for way in (*COMMANDS, *SCRIPTS) if way in options.ways.split(",") or way == "cp, sync"]
    floor = min(run("torch alone", {}, None)[1] for _ in range(3))
    for size in options.sizes:
        base, adapter = checkpoint(options.folder / size, size)
        found: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
        for number in range(options.rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                out = options.folder / "out"
                found[way].append(run(way, {"base": base, "adapter": adapter, "out": out}, out))
        seconds = {way: statistics.median(second for second, _ in results) for way, results in found.items()}
        for way, results in found.items():
            peak = "-" if way in COMMANDS else f"{(max(peak for _, peak in results) - floor) / 1e6:.0f} MB"
            ratios = [f"{seconds[way] / seconds[other]:.2f}" for other in COMMANDS if other in seconds]
            print(f"| {size} | {way} | {seconds[way]:.2f} | {' | '.join(ratios)} | {peak} |", flush=True)


def run(way: str, places: dict[str, Path], out: Path | None) -> tuple[float, int]:
    """(seconds, peak memory in bytes) of one way in a process of its own; what it wrote is removed."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
    command = (
        ["bash", "-c", COMMANDS[way].format(**places)]
        if way in COMMANDS
        else [sys.executable, "-W", "ignore", "-c", SCRIPTS[way].format(**places)]
    )
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status != 0:
        raise SystemExit(f"{way} ended with {status}: {' '.join(command)}")
    if out is not None:
        shutil.rmtree(out)
    return seconds, usage.ru_maxrss * 1024


def checkpoint(folder: Path, size: str) -> tuple[Path, Path]:
    """The folders of base and adapter, made once."""
    base, adapter = folder / "base", folder / "adapter"
    if not (adapter / "adapter_config.json").exists():  # elsewhere: a child's peak memory begins with its parent's
        subprocess.run([sys.executable, __file__, size, "--folder", folder.parent, "--make"], check=True)
    for file in base.iterdir():
        subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
    return base, adapter


def make(folder: Path, size: str) -> None:
    base, adapter = folder / "base", folder / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    base.mkdir(parents=True)
    adapter.mkdir()
    write_base(base, size)
    write_adapter(adapter, base, size)


def linear_layers(size: str) -> dict[str, tuple[int, int]]:
    hidden, intermediate, _, heads, pairs, _ = SIZES[size]
    narrow = hidden // heads * pairs
    attention = {"q_proj": (hidden, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden)}
    attention |= {"o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}
    return {f"self_attn.{name}": shape for name, shape in attention.items()} | {
        f"mlp.{name}": shape for name, shape in mlp.items()
    }


def weights(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, _, layers, _, _, vocabulary = SIZES[size]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        for name, shape in linear_layers(size).items():
            yield f"model.layers.{layer}.{name}.weight", shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if size != "270m":  # whose head is tied
        yield "lm_head.weight", (vocabulary, hidden)


def write_base(base: Path, size: str) -> None:
    hidden, intermediate, layers, heads, pairs, vocabulary = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": layers, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": pairs, "vocab_size": vocabulary,
        "tie_word_embeddings": size == "270m", "dtype": "bfloat16",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in weights(size):
        held = sum(2 * torch.Size(other).numel() for other in files[-1].values())
        if held + 2 * torch.Size(shape).numel() > LARGEST_FILE:
            files.append({})
        files[-1][name] = shape
    pool = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    index = {}
    for number, shapes in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        tensors = {key: _values(pool, shape, place) for place, (key, shape) in enumerate(shapes.items())}
        save_file(tensors, base / name, {"format": "pt"})
        index |= dict.fromkeys(shapes, name)
    if len(files) > 1:
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _values(pool: torch.Tensor, shape: tuple[int, ...], place: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return pool.roll(place * 1001).repeat(-(-count // len(pool)))[:count].view(shape).clone()


def write_adapter(adapter: Path, base: Path, size: str) -> None:
    random, tensors = torch.Generator().manual_seed(1), {}
    for layer in range(SIZES[size][2]):
        for name, (outputs, inputs) in linear_layers(size).items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs, generator=random).mul_(0.02)
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, RANK, generator=random).mul_(0.02)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": 2 * RANK, "target_modules": sorted(name.split(".")[1] for name in linear_layers(size)),
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
