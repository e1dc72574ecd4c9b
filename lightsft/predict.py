"""Predictions from an adapter folder or a merged checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightsft import adapter_files, artifact
from lightsft.backbone import Backbone
from lightsft.dry_run import evaluating
from lightsft.errors import BackboneError, ConfigurationError
from lightsft.tasks.chat import Chat

DEFAULT_LENGTH = 512


class Predictor:
    """Loads once, answers many times.

    `directory` is an adapter folder (its base is loaded from where it was, or from `base`) or a checkpoint.
    """

    def __init__(
        self, directory: str | Path, *, base: str | None = None, dtype: str = "float32", device: str = "auto"
    ) -> None:
        directory = Path(directory)
        if adapter_files.is_adapter(directory):
            backbone = artifact.load_base(directory, base, dtype=dtype, device=device)
            artifact.load(directory, backbone)
            settings = (adapter_files.read_settings(directory) or {}).get("task") or {}
        else:
            backbone = Backbone.load(directory, task=_task_of(directory), dtype=dtype, device=device)
            settings = {}
        self._use(backbone, settings)

    @classmethod
    def of(cls, backbone: Backbone, settings: Mapping[str, Any] | None = None) -> Predictor:
        """Predict with a backbone in memory, with whatever it carries; `settings` as `Task.describe()` gives them."""
        predictor = cls.__new__(cls)
        predictor._use(backbone, settings or {})
        return predictor

    def _use(self, backbone: Backbone, settings: Mapping[str, Any]) -> None:
        self.backbone, self.settings = backbone, settings
        self.task = backbone.task or "classification"

    def classify(self, texts: Sequence[str], batch_size: int = 32) -> list[dict[str, Any]]:
        """{"text", "label", "probabilities": {label: p}} for each text; probabilities sum to 1."""
        if self.settings.get("text_pair"):
            raise ConfigurationError(
                f"it was trained on pairs ({self.settings['text']}, {self.settings['text_pair']})",
                expected="a model for single texts",
                todo="load it with lightsft.load and call its model on tokenized pairs",
            )
        rows = []
        for first in range(0, len(texts), batch_size):
            part = list(texts[first : first + batch_size])
            for text, probabilities in zip(part, self._probabilities(part), strict=True):
                best = max(probabilities, key=probabilities.__getitem__)
                rows.append({"text": text, "label": best, "probabilities": probabilities})
        return rows

    def _probabilities(self, texts: list[str]) -> list[dict[str, float]]:
        model, tokenizer = self.backbone.model, self.backbone.tokenizer
        inputs = tokenizer(texts, truncation=True, max_length=self._length(), padding=True, return_tensors="pt")
        with torch.no_grad(), evaluating(model):
            shares = model(**inputs.to(model.device)).logits.float().softmax(-1).cpu()
        labels = model.config.id2label
        return [{str(labels[i]): float(p) for i, p in enumerate(row)} for row in shares]

    def answer(self, prompts: Sequence[str], max_new_tokens: int = 64) -> list[dict[str, Any]]:
        """{"prompt", "answer"} for each prompt, by greedy decoding."""
        chat = Chat(chat_template=self.settings.get("chat_template"))
        return [{"prompt": prompt, "answer": self._answer(chat, prompt, max_new_tokens)} for prompt in prompts]

    def _answer(self, chat: Chat, prompt: str, max_new_tokens: int) -> str:
        model, tokenizer = self.backbone.model, self.backbone.tokenizer
        text = chat.conversation([{"role": "user", "content": prompt}], tokenizer, prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
        with torch.no_grad(), evaluating(model):
            generated = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        answer: str = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer.strip()

    def _length(self) -> int:
        return min(self.settings.get("max_length") or DEFAULT_LENGTH, int(self.backbone.tokenizer.model_max_length))


def _task_of(directory: Path) -> str:
    """The task a checkpoint was made for, by its architecture's name in config.json."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{directory} is neither an adapter folder nor a checkpoint: {str(error).splitlines()[0]}",
            expected="a folder written by lightsft train, merge or compare",
            todo="check the path",
        ) from error
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return "classification"
    if "CausalLM" in architecture or "LMHead" in architecture:
        return "chat"
    raise BackboneError(
        f"{directory} holds a {architecture or 'model without a task head'}",
        expected="a sequence classifier or a causal language model",
        todo="fine-tune it first: lightsft train",
    )
