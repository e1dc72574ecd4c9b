"""Whether vLLM serves a LoRA folder as it is. It was not run: this says what its documents and sources say.

Relied on, from docs.vllm.ai (versions 0.10 to 0.32) and the project's issues:

- `vllm.lora.peft_helper`: r, lora_alpha and target_modules have to be there; modules_to_save has to be empty, use_dora
  false and bias "none"; every option that it does not know, rank_pattern and alpha_pattern among them, is ignored, so
  one scaling lora_alpha / r (or / sqrt(r) with use_rslora) applies to all layers.
- `vllm.config.lora`: --max-lora-rank is one of RANKS, 16 unless given; a folder of a higher rank is refused.
- `vllm.lora.utils`: a tensor that is neither lora_A nor lora_B is an "unsupported LoRA weight" (issues 9280, 21500).
- `vllm.lora.lora_model`: a module whose last name is not one of the model's is refused ("expected target modules in",
  issue 7344). Which these are depends on the model; MODULES are the linear layers of the Llama-like ones, and of
  others that it serves. A name outside of them may do on a model that has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lightsft.adapter_files import KEY_PREFIX, PEFT_SETTINGS, TENSORS, read_peft_settings

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MODULES = frozenset(
    (
        "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "gate_proj", "up_proj", "down_proj",
        "gate_up_proj", "fc1", "fc2", "dense", "query_key_value", "dense_h_to_4h", "dense_4h_to_h", "W_pack", "lm_head",
    )
)  # fmt: skip
_ENDINGS = (".lora_A.weight", ".lora_B.weight")


def vllm_problems(folder: Path) -> list[str]:
    """What keeps vLLM from serving this folder as a LoRA; empty if nothing is known to."""
    config = read_peft_settings(folder)
    if config is None:
        return [f"there is no {PEFT_SETTINGS}"]
    if config.get("peft_type") != "LORA":
        return [f"it is a {config.get('peft_type')}, and vLLM serves LoRA"]
    return [*_of_configuration(config), *_of_tensors(_shapes(folder), config.get("r"))]


def largest_rank(rank: int) -> int | None:
    """The --max-lora-rank to serve this rank with; None where there is none."""
    return next((allowed for allowed in RANKS if rank <= allowed), None)


def _of_configuration(config: Mapping[str, Any]) -> Iterator[str]:
    missing = [name for name in ("r", "lora_alpha", "target_modules") if not config.get(name)]
    if missing:
        yield f"{PEFT_SETTINGS} does not say {', '.join(missing)}"
    elif largest_rank(config["r"]) is None:
        yield f"rank {config['r']} is above {RANKS[-1]}, the highest of --max-lora-rank"
    if config.get("use_dora"):
        yield "it is a DoRA (use_dora)"
    if config.get("bias", "none") != "none":
        yield f"it trains biases (bias={config['bias']!r})"
    if config.get("modules_to_save"):
        yield f"modules_to_save holds {_some(config['modules_to_save'])}"
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    if patterns:
        yield f"{' and '.join(patterns)} set other values for some layers, and vLLM reads one r and lora_alpha for all"


def _of_tensors(shapes: Mapping[str, tuple[int, ...]], rank: int | None) -> Iterator[str]:
    others = [name for name in shapes if not name.endswith(_ENDINGS)]
    if others:
        yield f"it holds more than lora_A and lora_B: {_some(others)}"
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(_ENDINGS[0])}
    if ranks - {rank}:
        yield f"its factors have rank {_some(sorted(ranks))}, not r={rank}"
    modules = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in shapes if name.endswith(_ENDINGS)}
    unknown = sorted(modules - MODULES)
    if unknown:
        yield f"vLLM's models name no linear layer {_some(unknown)}"


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / TENSORS, framework="pt") as file:
        names = list(file.keys())
        return {name.removeprefix(KEY_PREFIX): tuple(file.get_slice(name).get_shape()) for name in names}


def _some(values: Iterable[Any]) -> str:
    """The first values, and how many more there are."""
    shown = [str(value) for value in values]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
