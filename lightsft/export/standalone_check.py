"""An exported folder, loaded with its own code where lightsft cannot be imported, against base + strategy here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightsft.backbone import Backbone
from lightsft.dry_run import evaluating, text_config
from lightsft.errors import ConfigurationError, MergeError
from lightsft.export.certificate import Batch, certify
from lightsft.export.held_out import HeldOut
from lightsft.export.inputs import MOST_LOGITS
from lightsft.export.onnx_check import random_batches, row_batches
from lightsft.export.onnx_source import input_names
from lightsft.export.onnx_tracing import predicted
from lightsft.files import write_json

DECODER_TOKENS = 5
GENERATION = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, "output_logits": True}
GENERATION |= {"return_dict_in_generate": True}
PROMPT = "prompt"
TEXTS = ("A first text, with 2 numbers: 3.14!", "déjà vu\nand a second line", " leading space")


@dataclass(frozen=True)
class Answers:
    """Outputs by "<number of the batch>.<name>"; for a prompt the generated tokens and their logits."""

    found: dict[str, Tensor]
    tokens: list[list[int]] | None = None

    def logits(self, number: int) -> Tensor:
        """What counts of one batch, in one tensor with features last: logits, or start and end, or vectors."""
        named = [self.found[name] for name in sorted(self.found) if name.startswith(f"{number}.")]
        return named[0] if len(named) == 1 else torch.stack(named, -1)


@dataclass(frozen=True)
class Questions:
    """What is asked: batches, of which the last `from_rows` hold rows, and a prompt to generate from."""

    batches: list[Batch]
    outputs: tuple[str, ...]
    from_rows: int = 0
    prompt: Batch = field(default_factory=dict)
    texts: tuple[str, ...] = ()


def questions(backbone: Backbone, rows: HeldOut | None, taken: int) -> Questions:
    """Random inputs with and without padding, the held-out rows, a left-padded prompt where the model generates.

    `taken`: how many positions a strategy puts beside the input's.
    """
    model, example = backbone.model, dict(backbone.example or {})
    given, prompt, held = [{name: value for name, value in example.items() if isinstance(value, Tensor)}], {}, []
    if model.main_input_name == "input_ids":
        names = input_names(backbone)
        given = _most(backbone, random_batches(backbone, names, None, taken))
        held = _most(backbone, row_batches(backbone, names, rows))
        if model.can_generate():
            prompt = _prompt(given)
        if "decoder_input_ids" in example:
            given, held = ([_with_decoder(backbone, batch) for batch in part] for part in (given, held))
    with torch.no_grad(), evaluating(model):
        found = predicted(model(**given[0]))
    names_found = ("logits",) if "logits" in found else tuple(n for n in found if found[n].ndim == 3) or tuple(found)
    if not names_found:
        raise ConfigurationError(
            f"{type(model).__name__} answers with nothing that can be compared", expected="logits or vectors"
        )
    texts = TEXTS if backbone.tokenizer is not None else ()
    return Questions([*given, *held], names_found, len(held), prompt, texts)


def _most(backbone: Backbone, given: Sequence[Batch]) -> list[Batch]:
    """As many of the batches as their logits fit in half of MOST_LOGITS; a few in any case."""
    width = 1 if backbone.head else int(text_config(backbone.model).vocab_size)
    numbers = list(accumulate(batch["input_ids"].numel() * width for batch in given))
    return [batch for batch, total in zip(given, numbers, strict=True) if total <= MOST_LOGITS // 2] or list(given[:4])


def _prompt(given: Sequence[Batch]) -> Batch:
    """The tokens of a padded batch with the padding moved to the left."""
    batch = given[3]
    if "attention_mask" not in batch:
        return batch
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    return {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask")}


def _with_decoder(backbone: Backbone, batch: Batch) -> Batch:
    random = torch.Generator().manual_seed(len(batch["input_ids"]))
    shape = (len(batch["input_ids"]), DECODER_TOKENS)
    vocabulary = int(text_config(backbone.model).vocab_size)
    return {**batch, "decoder_input_ids": torch.randint(vocabulary, shape, generator=random)}


@torch.no_grad()
def answers_here(backbone: Backbone, asked: Questions) -> Answers:
    """Of the model as it is now."""
    model, found = backbone.model, dict[str, Tensor]()
    with evaluating(model):
        for number, batch in enumerate(asked.batches):
            result = model(**batch)
            found |= {f"{number}.{name}": result[name].float() for name in asked.outputs}
        if asked.prompt:
            generated = model.generate(**asked.prompt, **GENERATION)
            found |= {"prompt.tokens": generated.sequences, "prompt.logits": torch.stack(generated.logits, 1).float()}
    return Answers(found, [backbone.tokenizer(text)["input_ids"] for text in asked.texts] or None)


def answers_elsewhere(folder: Path, auto_class: str, asked: Questions) -> Answers:
    """Of the folder, in a process where lightsft cannot be imported. Raises MergeError where it does not run."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / name for name in ("request.json", "in.safetensors", "out.safetensors", "tokens.json")]
        request = {"folder": str(folder), "auto_class": auto_class, "outputs": asked.outputs, "texts": asked.texts}
        write_json(paths[0], {**request, "generation": GENERATION})
        named = {**{str(number): batch for number, batch in enumerate(asked.batches)}, PROMPT: asked.prompt}
        save_file({f"{n}.{name}": t.contiguous() for n, batch in named.items() for name, t in batch.items()}, paths[1])
        script = Path(__file__).with_name("standalone_answers.py")
        command = [sys.executable, str(script), *map(str, paths)]
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise MergeError(
                f"the exported folder does not run without lightsft: {done.stderr.strip()[-800:]}",
                expected=f"{auto_class}.from_pretrained(folder, trust_remote_code=True) to load and run",
                todo="nothing was written; use the adapter folder, and report it with the model's name",
            )
        return Answers(load_file(paths[2]), json.loads(paths[3].read_text(encoding="utf-8")))


def certified(
    asked: Questions, *, plain: Answers, tuned: Answers, elsewhere: Answers, half_precision: bool
) -> dict[str, Any]:
    """What was compared and found; `passed` by the limits of merged checkpoints."""
    groups = [[one.logits(number) for number in range(len(asked.batches))] for one in (plain, tuned, elsewhere)]
    batches = [_counting(batch, logits) for batch, logits in zip(asked.batches, groups[1], strict=True)]
    found = _compared(batches, groups, half_precision)
    sizes = {tuple(next(iter(batch.values())).shape) for batch in asked.batches}
    found["sizes"] = sorted(map(list, sizes))
    found["batches_with_padding"] = sum("attention_mask" in b and not b["attention_mask"].all() for b in asked.batches)
    found["rows_compared"] = sum(
        len(next(iter(b.values()))) for b in asked.batches[len(asked.batches) - asked.from_rows :]
    )
    if asked.prompt:
        found["generation"] = _generations(plain, tuned, elsewhere, half_precision)
        found["passed"] = found["passed"] and found["generation"]["passed"]
    if tuned.tokens is not None:
        found["same_tokens"] = tuned.tokens == elsewhere.tokens
        found["passed"] = found["passed"] and found["same_tokens"]
    return found


def _compared(batches: list[Batch], groups: Sequence[list[Tensor]], half_precision: bool) -> dict[str, Any]:
    """`certify` of logits of the base, of base + strategy and of the folder."""
    plain, tuned, found_there = groups
    found = certify(
        batches, base=plain, tuned=tuned, merged=found_there, reloaded=found_there, half_precision=half_precision
    )
    text = "base + strategy in memory with the exported folder, loaded by transformers and its own code in a process "
    return found | {"compared": text + "where lightsft cannot be imported"}


def _counting(batch: Batch, logits: Tensor) -> Batch:
    """What `certify` reads of a batch: how many rows, and where logits are per token, which tokens count."""
    first = next(iter(batch.values()))
    counted: Batch = {"input_ids": batch.get("input_ids", first)}
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == logits.shape[:-1]:
        counted["attention_mask"] = mask
    return counted


def _generations(plain: Answers, tuned: Answers, elsewhere: Answers, half_precision: bool) -> dict[str, Any]:
    """Logits of generated tokens, with a cache and from a left-padded prompt, up to the first token that differs."""
    logits = [one.found["prompt.logits"] for one in (plain, tuned, elsewhere)]
    steps = min(part.shape[1] for part in logits)
    logits = [part[:, :steps] for part in logits]
    chosen = [part.argmax(-1) for part in logits]
    after = (chosen[1] != chosen[2]).cumsum(1)
    alike = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1) == 0
    batch = {"input_ids": chosen[1], "attention_mask": alike.long()}
    found = _compared([batch], [[part] for part in logits], half_precision)
    same = [one.found["prompt.tokens"] for one in (tuned, elsewhere)]
    kept = ("passed", "limit", "limit_applies_to", "positions", "largest_logit_difference", "mean_logit_difference")
    return {name: found[name] for name in kept} | {"same_tokens": bool(torch.equal(*same))}


def require_passed(found: Mapping[str, Any]) -> None:
    """Raise MergeError with what differs."""
    if found["passed"]:
        return
    if found.get("same_tokens") is False:
        raise MergeError(
            "the tokenizer in the exported folder splits texts in another way",
            expected="the tokenizer of the adapter",
            todo="nothing was written; report it with the model's name",
        )
    worst = found["generation"] if not found.get("generation", {}).get("passed", True) else found
    what = "generates from other logits than" if worst is not found else "differs from"
    raise MergeError(
        f"the exported model {what} base + strategy by {worst['largest_logit_difference']:.3g}",
        expected=f"a {worst['limit_applies_to']} of at most {worst['limit']:.3g}",
        todo="nothing was written; use the adapter folder (lightsft.load), and report it with the model's name",
    )
