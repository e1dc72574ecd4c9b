"""Trainings that run in one process or in several, started by `torchrun -m tests.training.in_processes FOLDER`.

FOLDER/cases.json      [{"name", "strategy", "model", "task", ...}, ...]
FOLDER/NAME-RANK.pt    what process RANK has in the end
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments

import lightsft
from lightsft import Backbone, registry
from lightsft.training.progress import Record
from lightsft.training.trainer import Trainer
from tests.checkpoints import LABELS, chat_rows, labelled_rows


def trained(case, folder):
    """(tensors, losses, scores, ...) of one case in this process."""
    rows = chat_rows(case["rows"]) if case["task"] == "chat" else labelled_rows(case["rows"])
    options = {} if case["task"] == "chat" else {"labels": LABELS}
    task = lightsft.task(case["task"], **options)
    torch.manual_seed(0)
    backbone = Backbone.load(
        case["model"], task=task.name, labels=options.get("labels"), dtype="float32", device="cpu", seed=0
    )
    for module in backbone.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    values = {"learning_rate": 2e-3, "seed": 0, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    values |= {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_steps": 1, "num_train_epochs": 2}
    values |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "optim": "sgd", **case["arguments"]}
    stopping = [transformers.EarlyStoppingCallback(case["patience"])] if "patience" in case else []
    trainer = Trainer(
        registry.strategy(case["strategy"]).inject(backbone, seed=0),
        task,
        train=rows,
        validation=rows[:21],
        args=TrainingArguments(str(folder / case["name"]), **values),
        callbacks=stopping,
        tokens_per_batch=case.get("tokens_per_batch"),
    )
    record = Record("loss", lambda step: 0)
    trainer.add_callback(record)
    read = trainer.tokens_of_updates()
    tokens = [next(read) for _ in range(20)]
    trainer.train()
    metrics, outcomes = trainer.score(rows[:23])
    single, _ = trainer.score(rows[:1])
    history = trainer.state.log_history
    return {
        "tensors": {name: tensor.clone() for name, tensor in trainer.injection.tensors().items()},
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "validation": [(entry["eval_loss"], entry["epoch"]) for entry in history if "eval_loss" in entry],
        "steps": trainer.state.global_step,
        "best": trainer.state.best_metric,
        "outcomes": torch.tensor(outcomes),
        "test_loss": metrics["loss"],
        "alone": single["loss"],
        "tokens": tokens,
        "seconds": record.seconds,
    }


def launched(cases, folder, processes=2):
    """What each process has of each case: {name: [of process 0, of process 1, ...]}."""
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "tests.training.in_processes", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    ranks = range(processes)
    return {case["name"]: [torch.load(folder / f"{case['name']}-{rank}.pt") for rank in ranks] for case in cases}


def main(folder):
    rank = os.environ["RANK"]
    for case in json.loads((folder / "cases.json").read_text()):
        torch.save(trained(case, folder), folder / f"{case['name']}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
