"""One trial as a user writes it with transformers.Trainer and PEFT: the other side of benchmarks/comparison.py.

    python benchmarks/separate_trial.py lora --seed 0 --model FOLDER --data FOLDER --out FOLDER [--learning-rate 1e-3]

DATA holds train.csv, validation.csv and test.csv with the columns text and label. Everything that is not named here is
the library's default. Learning rates: transformers.TrainingArguments' 5e-5 for full tuning; 3e-4 for LoRA and 1e-2 for
prefix tuning, as in PEFT's examples of sequence classification; 1e-4 for bottleneck adapters, as in AdapterHub's
documentation; torch.optim.AdamW's 1e-3 for the linear probe. AdapterHub does not install beside transformers 5, so its
adapters are written out here.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

LEARNING_RATES = {"full": 5e-5, "lora": 3e-4, "adapter": 1e-4, "prefix": 1e-2, "linear-probe": 1e-3}


class Adapter(nn.Module):
    """x + U relu(D x), behind the output layer of each attention and each feed-forward (1902.00751)."""

    def __init__(self, size: int, reduction_factor: int = 16) -> None:
        super().__init__()
        self.down = nn.Linear(size, size // reduction_factor)
        self.up = nn.Linear(size // reduction_factor, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., size)."""
        return x + self.up(torch.relu(self.down(x)))


def prepared(model: nn.Module, strategy: str) -> nn.Module:
    """The model with what is trained by the strategy."""
    if strategy == "lora":
        return get_peft_model(model, LoraConfig(task_type="SEQ_CLS"))
    if strategy == "prefix":
        return get_peft_model(model, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20))
    if strategy in ("adapter", "linear-probe"):
        for parameter in model.base_model.parameters():
            parameter.requires_grad = False
    if strategy == "adapter":
        for layer in model.base_model.encoder.layer:
            for output in (layer.attention.output, layer.output):
                output.dense = nn.Sequential(output.dense, Adapter(output.dense.out_features))
    return model


def accuracy(prediction):
    """Share of right labels."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategy", choices=LEARNING_RATES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--evaluation-batch-size", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--learning-rate", type=float)
    options = parser.parse_args()

    set_seed(options.seed)
    splits = ("train", "validation", "test")
    data = load_dataset("csv", data_files={name: str(options.data / f"{name}.csv") for name in splits})
    data = data.class_encode_column("label")
    labels = data["train"].features["label"].names
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=options.max_length), batched=True)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(labels))
    arguments = TrainingArguments(
        str(options.out),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.evaluation_batch_size,
        learning_rate=options.learning_rate or LEARNING_RATES[options.strategy],
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to="none",
        seed=options.seed,
    )
    trainer = Trainer(
        model=prepared(model, options.strategy),
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    trainer.save_model(str(options.out / "final"))
    found = {name: trainer.predict(data[name]).metrics["test_accuracy"] for name in ("validation", "test")}
    (options.out / "scores.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
