"""What our own processes want from their environment; whatever the user has set stays."""

from __future__ import annotations

import logging
import os

DEFAULTS = {
    "GOMP_SPINCOUNT": "1000",  # threads that spin longer stall each other on a busy machine
    "TOKENIZERS_PARALLELISM": "false",  # workers fork
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def prepare_process() -> None:
    """Set the defaults, before torch is imported, and silence a report about an optional kernel package."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
