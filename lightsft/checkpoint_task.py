"""The task that a checkpoint was made for, as far as its configuration tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto as auto

from lightsft.backbone import PROBLEM_TYPES
from lightsft.errors import BackboneError
from lightsft.export.provenance import CERTIFICATE
from lightsft.files import read_json

# Class names by type of model, as transformers lists them; the first task whose list has a checkpoint's class is its.
CLASSES = {
    "classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "multiple-choice": auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "chat": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image-classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio-classification": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "embedding": auto.MODEL_MAPPING_NAMES,
}


def task_of(directory: Path) -> str:
    """The name of the task; a head of numbers or of several labels says so in `problem_type`."""
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
    found = next((task for task, names in CLASSES.items() if architecture in _listed(names, config.model_type)), None)
    if found is None:
        raise BackboneError(
            f"{directory} holds a {architecture or 'model of no class'}, whose task transformers does not list",
            expected=f"a model for {', '.join(CLASSES)}",
            todo="fine-tune it first: lightsft train",
        )
    meanings = {meaning: task for task, meaning in PROBLEM_TYPES.items()}
    return meanings.get(config.problem_type, found) if found == "classification" else found


def settings_of(directory: Path) -> dict[str, Any]:
    """The task's settings that a merge wrote into its certificate: columns, thresholds, templates; {} without one."""
    file = directory / CERTIFICATE
    return dict(read_json(file).get("task") or {}) if file.is_file() else {}


def _listed(names: Any, model_type: str) -> tuple[str, ...]:
    found = names.get(model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)
