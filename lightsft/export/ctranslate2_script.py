"""Run as a script in the environment of CTranslate2, without lightsft.

    python -P ctranslate2_script.py known                              the configurations that it knows, as JSON
    python -P ctranslate2_script.py convert MODEL OUT TYPE SETTINGS    its own converter of transformers' models
    python -P ctranslate2_script.py run MODEL INPUTS OUTPUTS           what a converted model computes

SETTINGS is JSON: what the configuration says beside what transformers makes of it. INPUTS is JSON: "kind" (generator,
translator or encoder), "batches" of rows of tokens, "targets" for a translator and "types" for an encoder (null without
token types). OUTPUTS is safetensors, a tensor TYPE.NUMBER for each type computed in and each row: the logits of
its tokens, the log probabilities of target and end, or the last hidden states.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np


def known() -> None:
    """Print {configuration: class that is converted}, as the last line."""
    from ctranslate2.converters import transformers

    print(json.dumps({name: loader.architecture_name for name, loader in transformers._MODEL_LOADERS.items()}))


def convert(model: str, out: str, type: str, settings: str) -> None:
    """What ct2-transformers-converter does, with more settings in the configuration of the model that was loaded."""
    from ctranslate2.converters import TransformersConverter

    class Told(TransformersConverter):  # type: ignore[misc]  # ctranslate2 is not installed here
        def load_model(self, *arguments: Any, **options: Any) -> Any:
            """The model as it is loaded, its configuration completed."""
            loaded = super().load_model(*arguments, **options)
            for name, value in json.loads(settings).items():
                setattr(loaded.config, name, value)
            return loaded

    Told(model, load_as_float16=type in ("float16", "int8_float16")).convert(out, quantization=type)


def run(folder: str, inputs: str, outputs: str) -> None:
    """Compute every row with the weights as fp32, and in what CTranslate2 takes by default where that is another type;
    write, and print the types in this order."""
    import ctranslate2
    from safetensors.numpy import save_file

    with open(inputs, encoding="utf-8") as file:
        given = json.load(file)
    kind = {"generator": ctranslate2.Generator, "translator": ctranslate2.Translator, "encoder": ctranslate2.Encoder}
    compute = {"generator": _logits, "translator": _scores, "encoder": _states}[given["kind"]]
    found: dict[str, np.ndarray] = {}
    types: list[str] = []
    for wanted in ("float32", "default"):
        model = kind[given["kind"]](folder, device="cpu", compute_type=wanted)
        if model.compute_type not in types:
            types.append(model.compute_type)
            for number, row in enumerate(compute(model, given)):
                found[f"{types[-1]}.{number}"] = np.array(row, dtype=np.float32)
    save_file(found, outputs)
    print(json.dumps(types))


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
    commands: dict[str, Callable[..., None]] = {"known": known, "convert": convert, "run": run}
    commands[sys.argv[1]](*sys.argv[2:])
