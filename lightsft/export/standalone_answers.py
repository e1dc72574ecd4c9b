"""Run as a script in a fresh process: load a folder with its own code, and write what it answers.

    python standalone_answers.py REQUEST.json BATCHES.safetensors ANSWERS.safetensors TOKENS.json

lightsft is made unimportable first, so what runs here runs anywhere. The request says the folder, the class that loads
it, which outputs count, and texts; batches are stored as "<number>.<argument>", those of "prompt" are generated from.
"""

import json
import sys

sys.modules["lightsft"] = sys.modules["lightsft_adapters"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def main(request_file: str, batches: str, answers: str, tokens: str) -> None:
    """Load, compute in the checkpoint's own type, write."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    folder = request["folder"]
    kind = getattr(transformers, request["auto_class"])
    model = kind.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
    inputs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(batches).items():
        number, _, argument = key.partition(".")
        inputs.setdefault(number, {})[argument] = tensor
    prompt = inputs.pop("prompt", None)
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for number, batch in inputs.items():
            result = model(**batch)
            found |= {f"{number}.{name}": result[name].float() for name in request["outputs"]}
    if prompt is not None:
        generated = model.generate(**prompt, **request["generation"])
        found |= {"prompt.tokens": generated.sequences, "prompt.logits": torch.stack(generated.logits, 1).float()}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, answers)
    ids = None
    if request["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        ids = [tokenizer(text)["input_ids"] for text in request["texts"]]
    with open(tokens, "w", encoding="utf-8") as file:
        json.dump(ids, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
