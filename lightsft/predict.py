"""Predictions from an adapter folder or a merged checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightsft import adapter_files, artifact
from lightsft.backbone import Backbone
from lightsft.checkpoint_task import settings_of, task_of
from lightsft.data.reading import Row
from lightsft.dry_run import evaluating, text_config
from lightsft.errors import ConfigurationError
from lightsft.tasks import Task, options_of, task_class
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
            settings = settings_of(directory)
            name = settings.get("name") or task_of(directory)
            backbone = Backbone.load(directory, task=name, dtype=dtype, device=device)
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

    @cached_property
    def chosen(self) -> Task:
        """The task with its settings; where nothing but a checkpoint says any, with the model's labels."""
        kind = task_class(self.task)
        known = {name: value for name, value in self.settings.items() if name in options_of(kind)}
        if set(known) - {"labels"}:
            return kind(**known)
        config = self.backbone.model.config
        if self.task == "chat" and getattr(self.backbone.tokenizer, "chat_template", None) is None:
            kind = task_class("language-modeling")  # no template: a text is continued
        options = {"max_length": self._length()} if "max_length" in options_of(kind) else {}
        labels = [str(config.id2label[index]) for index in sorted(config.id2label or {})]
        return kind.of_labels(labels, **options)

    def predict(
        self, rows: Sequence[Row | str], *, batch_size: int = 32, max_new_tokens: int | None = None
    ) -> list[dict[str, Any]]:
        """What it read and says of each row, in the task's words (docs/tasks.md); `max_new_tokens` if it writes.

        A text alone is a row where the task reads one column; of an image or a recording it is the path.
        Raises ConfigurationError where it reads several, DataError naming the first row that lacks one of them.
        """
        task = self.chosen
        whole = [task.row_of(row) if isinstance(row, str) else row for row in rows]
        task.check_to_predict(whole)
        said = task.predict(self.backbone.model, whole, self.backbone.tokenizer, batch_size, max_new_tokens)
        read = [{task.asked: row} if isinstance(row, str) else _plain(row, task.read_columns()) for row in rows]
        return [{**given, **answer} for given, answer in zip(read, said, strict=True)]

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
        positions = getattr(text_config(self.backbone.model), "max_position_embeddings", None) or DEFAULT_LENGTH
        limit = getattr(self.backbone.tokenizer, "model_max_length", DEFAULT_LENGTH)
        return int(min(self.settings.get("max_length") or DEFAULT_LENGTH, positions, limit))


def _plain(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    """What can be shown of a row: no images or sounds in memory."""
    return {name: row[name] for name in columns if isinstance(row.get(name), str | int | float | list | tuple)}
