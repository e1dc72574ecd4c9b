"""CTranslate2's own converter and runtime, in an environment of their own."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lightsft.errors import ConfigurationError, MergeError
from lightsft.export.checkpoint_files import read_checkpoint
from lightsft.export.tool_environment import Package, in_environment, tool_environment
from lightsft.files import read_json, write_json

CTRANSLATE2 = Package("ctranslate2", "4.8.5")
PACKAGES = (CTRANSLATE2,)
SCRIPT = Path(__file__).with_name("ctranslate2_script.py")
SETTINGS, KNOWN = "config.json", "known.json"
_NAMES = ("bos_token", "eos_token", "unk_token")
_LAST_LINES = 3


@dataclass(frozen=True)
class Conversion:
    """One call of the converter; `by_hand` is what the user can run instead."""

    checkpoint: Path
    out: Path
    type: str
    by_hand: str

    def with_another(self) -> str:
        """What the user can do without us."""
        return f"nothing was written; with another version of ctranslate2 or transformers: {self.by_hand}"


def command(checkpoint: str | Path, type: str) -> str:
    """The converter's own, for a shell in which ctranslate2 is installed."""
    options = ["--model", str(checkpoint), "--output_dir", "converted", "--quantization", type]
    return shlex.join(["ct2-transformers-converter", *options])


def known() -> dict[str, str]:
    """The configurations that the converter knows, with the class that it reads for each: asked of itself, once."""
    kept = tool_environment("ctranslate2", PACKAGES) / KNOWN
    if kept.is_file():
        found: dict[str, str] = read_json(kept)
        return found
    done = _run("known")
    if done.returncode != 0:
        raise ConfigurationError(
            f"{CTRANSLATE2.requirement} does not run here: {_last(done)}",
            expected="a machine that its wheels are made for",
            todo="export with --to onnx or --to gguf",
        )
    found = json.loads(done.stdout.splitlines()[-1])
    write_json(kept, found)
    return found


def convert(conversion: Conversion) -> None:
    """Write model.bin, its config.json and its vocabulary.

    Raises ConfigurationError, with what the converter said last, where it fails; OSError where the disk is full.
    """
    settings = json.dumps(old_settings(conversion.checkpoint))
    done = _run("convert", str(conversion.checkpoint), str(conversion.out), conversion.type, settings)
    if os.strerror(errno.ENOSPC) in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if done.returncode != 0 or not (conversion.out / "model.bin").is_file():
        raise ConfigurationError(
            f"the converter of CTranslate2 ({CTRANSLATE2.requirement}) fails with transformers "
            f"{version('transformers')}:\n{_last(done)}",
            expected="a model that it converts",
            todo=conversion.with_another(),
        )
    _name_nothing(conversion.out / SETTINGS)


def read_back(folder: Path, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """What a converted model makes of each row, by the type that it was computed in: float32 comes first."""
    with tempfile.TemporaryDirectory() as scratch:
        given, written = Path(scratch) / "inputs.json", Path(scratch) / "outputs.safetensors"
        given.write_text(json.dumps(inputs), encoding="utf-8")
        done = _run("run", str(folder), str(given), str(written))
        if done.returncode != 0:
            raise MergeError(
                f"CTranslate2 cannot run what its converter wrote: {_last(done)}",
                expected="a model that it loads",
                todo="nothing was written; report it with the model's name",
            )
        found = load_file(written)
        types = json.loads(done.stdout.splitlines()[-1])
        rows = range(len(found) // len(types))
        return {kind: [found[f"{kind}.{number}"] for number in rows] for kind in types}


def old_settings(checkpoint: Path) -> dict[str, object]:
    """What the converter asks of a configuration of transformers 4, and those of transformers 5 no longer say.

    As config.json says it, if it was written then, or as it shows in what is written now: positions are added (5 knows
    no other way), rope_parameters holds what stood beside it, scale_decoder_outputs is what a tied head stood for, and
    where the norms of an encoder-decoder lie is in the names of its weights.
    """
    config, names = read_json(checkpoint / SETTINGS), read_checkpoint(checkpoint).tensors
    rope = config.get("rope_parameters") or {}
    said = {
        "position_embedding_type": "absolute",
        "normalize_before": any(name.endswith("encoder.layer_norm.weight") for name in names),
        "normalize_embedding": any(name.endswith("encoder.layernorm_embedding.weight") for name in names),
        "rope_theta": rope.get("rope_theta"),
        "tie_word_embeddings": config.get("scale_decoder_outputs"),
    }
    own = {name: config[name] for name in said if name in config}
    if said["tie_word_embeddings"] is not None:  # beside it, transformers 5 writes that heads are tied in any case
        own.pop("tie_word_embeddings", None)
    return {name: value for name, value in (said | own).items() if value is not None}


def _name_nothing(path: Path) -> None:
    """A special token that the tokenizer does not have is "", as the converter has it for some models: null is written
    for others, and CTranslate2 does not load it."""
    settings = read_json(path)
    absent = {name: "" for name in _NAMES if name in settings and settings[name] is None}
    if absent:
        write_json(path, settings | absent)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = in_environment(tool_environment("ctranslate2", PACKAGES))
    return subprocess.run(
        [sys.executable, "-P", str(SCRIPT), *arguments],
        stdin=subprocess.DEVNULL,  # transformers asks there whether to run code that came with a checkpoint
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        check=False,
    )


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """What it said last: the error of a traceback without its frames."""
    lines = [line.rstrip() for line in done.stderr.splitlines() if line.strip()]
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    after = lines[frames[-1] + 1 :] if frames else lines
    return "\n".join((after or lines)[-_LAST_LINES:])[-900:] or f"exit status {done.returncode}"
