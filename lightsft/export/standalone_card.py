"""README.md of an exported folder that brings its own code: what it is, how it is loaded, what the check found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightsft.export.model_card import CARD, _strategy
from lightsft.files import write_text


def write_standalone_card(folder: Path, certificate: Mapping[str, Any]) -> None:
    """Write it from the certificate, and from what the adapter folder says of itself."""
    base, loads = str(certificate["base"]), certificate["auto_classes"][0]
    base = Path(base).name if Path(base).is_absolute() else base
    kinds = Counter(part["kind"] for part in certificate["parts"])
    rows = [("base", f"`{base}`"), ("trained", _strategy(Path(certificate["adapter"])))]
    rows.append(("parts beside the weights", ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))))
    if "metric" in certificate:
        scores = (
            f"{certificate['score_before']:.4f} of base + strategy, {certificate['score_after']:.4f} of this folder"
        )
        rows.append((f"{certificate['metric']} on {certificate['examples']} rows", scores))
    rows.append(("largest logit difference", f"{certificate['largest_logit_difference']:.2g}"))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in certificate["versions"].items())))
    lines = [
        *("---", "library_name: transformers", "tags:", "- lightsft", "- custom_code", "---", ""),
        *(f"# {base}, fine-tuned", ""),
        f"`{base}` with a strategy that its weights alone cannot hold: `modeling_lightsft.py` computes the rest. It "
        "needs torch and transformers.",
        *("", "```python", f"from transformers import {loads}, AutoTokenizer", ""),
        f'model = {loads}.from_pretrained("THIS FOLDER", trust_remote_code=True)',
        *('tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER", trust_remote_code=True)', "```", ""),
        *("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)),
        *("", "`certificate.json` has all figures, hashes and versions.", ""),
    ]
    write_text(folder / CARD, "\n".join(lines))
