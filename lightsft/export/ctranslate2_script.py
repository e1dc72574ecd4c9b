"""Run as a script in the environment of CTranslate2, without lightsft.

    python -P ctranslate2_script.py known                       the configurations that its converter knows, as JSON
    python -P ctranslate2_script.py convert OPTIONS             its own ct2-transformers-converter
    python -P ctranslate2_script.py run MODEL INPUTS OUTPUTS    what a converted model computes

INPUTS is JSON: "kind" (generator, translator or encoder), "batches" of rows of tokens, "targets" for a translator and
"types" for an encoder (null without token types). OUTPUTS is safetensors, a tensor for each row, by its number: the
logits of each token, the log probabilities of the target and of the end, or the last hidden states.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def known() -> None:
    """Print {configuration: class that is converted}, as the last line."""
    from ctranslate2.converters import transformers

    print(json.dumps({name: loader.architecture_name for name, loader in transformers._MODEL_LOADERS.items()}))


def convert() -> None:
    """The command line of its converter."""
    from ctranslate2.converters import transformers

    transformers.main()


def run(folder: str, inputs: str, outputs: str) -> None:
    """Compute every row, write, and print the type that was computed in."""
    import ctranslate2
    from safetensors.numpy import save_file

    with open(inputs, encoding="utf-8") as file:
        given = json.load(file)
    kind = {"generator": ctranslate2.Generator, "translator": ctranslate2.Translator, "encoder": ctranslate2.Encoder}
    model = kind[given["kind"]](folder, device="cpu")
    rows = {"generator": _logits, "translator": _scores, "encoder": _states}[given["kind"]](model, given)
    save_file({str(number): np.ascontiguousarray(row, dtype=np.float32) for number, row in enumerate(rows)}, outputs)
    print(json.dumps(model.compute_type))


def _logits(model: Any, given: Mapping[str, Any]) -> Iterator[np.ndarray]:
    for batch in given["batches"]:
        found = np.array(model.forward_batch(batch))  # (rows, longest, vocabulary)
        yield from (logits[: len(row)] for row, logits in zip(batch, found, strict=True))


def _scores(model: Any, given: Mapping[str, Any]) -> Iterator[np.ndarray]:
    for batch, targets in zip(given["batches"], given["targets"], strict=True):
        yield from (np.array(result.log_probs) for result in model.score_batch(batch, targets))


def _states(model: Any, given: Mapping[str, Any]) -> Iterator[np.ndarray]:
    for batch, types in zip(given["batches"], given["types"], strict=True):
        found = np.array(model.forward_batch(batch, token_type_ids=types).last_hidden_state)
        yield from (states[: len(row)] for row, states in zip(batch, found, strict=True))


if __name__ == "__main__":
    command = sys.argv.pop(1)
    if command == "run":
        run(*sys.argv[1:])
    else:
        {"known": known, "convert": convert}[command]()
