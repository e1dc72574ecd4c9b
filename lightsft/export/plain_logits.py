"""Run as a script in a fresh process: load a folder with plain transformers and write its logits.

    python plain_logits.py CHECKPOINT AUTO_CLASS BATCHES.safetensors LOGITS.safetensors [OFFLOAD]

With OFFLOAD, a folder, weights stay on the disk: those of one layer at a time are in memory.
lightsft is made unimportable first, so what loads here loads anywhere. Batches are stored as "<number>.<argument>".
"""

import sys

sys.modules["lightsft"] = sys.modules["lightsft_adapters"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def main(checkpoint: str, auto_class: str, batches: str, logits: str, offload: str = "") -> None:
    """Load, compute in the checkpoint's own type, write."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.AutoTokenizer.from_pretrained(checkpoint)
    on_disk = {"device_map": {"": "disk"}, "offload_folder": offload} if offload else {}
    model = getattr(transformers, auto_class).from_pretrained(checkpoint, dtype="auto", **on_disk).eval()
    inputs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(batches).items():
        number, _, argument = key.partition(".")
        inputs.setdefault(number, {})[argument] = tensor
    with torch.no_grad():
        save_file({number: model(**batch).logits.float().contiguous() for number, batch in inputs.items()}, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
