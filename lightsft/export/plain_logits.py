"""Run as a script in a fresh process: load a folder with plain transformers and write its logits.

    python plain_logits.py CHECKPOINT AUTO_CLASS READER BATCHES.safetensors LOGITS.safetensors [OFFLOAD]

READER is the auto class of what turns rows into inputs: a tokenizer, an image processor, a feature extractor.

With OFFLOAD, a folder, weights stay on the disk: those of one layer at a time are in memory.
lightsft is made unimportable, so what loads here loads anywhere. Batches are stored as "<number>.<argument>".
"""

import sys
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file


def main_output(outputs: Any) -> torch.Tensor:
    """In fp32: the logits; start and end of a span as (batch, tokens, 2); the last states of a model without a head."""
    if outputs.get("logits") is not None:
        found: torch.Tensor = outputs["logits"]
    elif outputs.get("start_logits") is not None:
        found = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=-1)
    else:
        found = outputs["last_hidden_state"]
    return found.float()


def main(checkpoint: str, auto_class: str, reader: str, batches: str, logits: str, offload: str = "") -> None:
    """Load, compute in the checkpoint's own type, write."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    getattr(transformers, reader).from_pretrained(checkpoint)
    on_disk = {"device_map": {"": "disk"}, "offload_folder": offload} if offload else {}
    model = getattr(transformers, auto_class).from_pretrained(checkpoint, dtype="auto", **on_disk).eval()
    inputs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(batches).items():
        number, _, argument = key.partition(".")
        inputs.setdefault(number, {})[argument] = tensor
    with torch.no_grad():
        save_file({number: main_output(model(**batch)).contiguous() for number, batch in inputs.items()}, logits)


if __name__ == "__main__":
    sys.modules["lightsft"] = sys.modules["lightsft_adapters"] = None  # type: ignore[assignment]
    main(*sys.argv[1:])
