"""Kept states of frozen blocks: python benchmarks/frozen_cache.py

The demo's rows and epochs (MiniLM-L6, 1,000 training and 250 validation texts, 2 epochs), a linear probe and a LoRA on
the last two blocks, with cache_frozen off and on in turn; medians over --repeats (5) of the wall and processor seconds
of `train()`, its validations included. MiniLM has dropout of 0.1, which `on` switches off in the frozen part.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

from lightsft.demo import demo_config
from lightsft.injection import Strategy
from lightsft.training.prepared import prepare
from lightsft.training.run import build_trainer, load_backbone
from lightsft_adapters import Full, LoRA

CASES: dict[str, tuple[Strategy, float]] = {
    "linear probe": (Full(targets="head"), 1e-2),
    "lora on the last 2 of 6 blocks": (LoRA(layers=(-1, -2)), LoRA.learning_rate),
}
MODES = ("off", "on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=2)
    options = parser.parse_args()
    config = demo_config(Path("unused")).model_copy(update={"epochs": options.epochs})
    prepared = prepare(config)
    print("| strategy | cache_frozen | seconds | processor seconds | validation accuracy |\n|---|---|---|---|---|")
    for name, (strategy, rate) in CASES.items():
        found: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in MODES}
        for _ in range(options.repeats):
            for mode in MODES:
                with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                    settings = config.model_copy(update={"cache_frozen": mode})
                    injection = strategy.inject(load_backbone(settings, prepared, strategy, 0))
                    trainer = build_trainer(
                        settings,
                        prepared,
                        injection,
                        learning_rate=rate,
                        seed=0,
                        directory=Path(folder),
                        resumable=False,
                    )
                    wall, processor = time.perf_counter(), time.process_time()
                    trainer.train()
                    wall, processor = time.perf_counter() - wall, time.process_time() - processor
                    score = max(point["score"] or 0.0 for point in trainer.record.curve)
                found[mode].append((wall, processor, score))
        for mode in MODES:
            seconds, processor_seconds, score = (statistics.median(column) for column in zip(*found[mode], strict=True))
            print(f"| {name} | {mode} | {seconds:.1f} | {processor_seconds:.1f} | {score:.3f} |", flush=True)


if __name__ == "__main__":
    main()
