"""How an embedding model makes one vector of a text, in the files that sentence-transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightsft.adapter_files import read_settings
from lightsft.files import read_json, write_json

PACKAGE = "sentence_transformers.models"  # names that its versions 2 to 6 take
MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


def write_pooling(folder: Path, adapter: Path) -> None:
    """`SentenceTransformer(folder)` then gives the unit vectors that were trained. Nothing for another task.

    Pooling files that came with the base are replaced: the training decided.
    """
    task: dict[str, Any] = (read_settings(adapter) or {}).get("task") or {}
    if task.get("name") != "embedding":
        return
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{PACKAGE}.{kind}"}
        for number, (path, kind) in enumerate(parts)
    ]
    config = read_json(folder / "config.json")
    width = next(config[name] for name in ("hidden_size", "d_model", "dim", "n_embd") if name in config)
    chosen = {mode: name == task["pooling"] for name, mode in MODES.items()}
    for path, _ in parts:
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **chosen})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": task["max_length"], "do_lower_case": False})
