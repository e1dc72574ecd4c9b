"""Experiment trackers, through transformers' integrations: where they write, how runs are named and grouped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from lightsft.errors import ConfigurationError

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb", "trackio": "trackio"}


def reported_to(track: Sequence[str]) -> str | list[str]:
    """The value of transformers' `report_to`."""
    return list(track) or "none"


def require_trackers(track: Sequence[str]) -> None:
    """Raise ConfigurationError for a tracker that is not known or not installed."""
    for name in track:
        if name not in PACKAGES:
            raise ConfigurationError(
                f"no tracker named {name!r}", expected=f"one of {', '.join(PACKAGES)}", todo="--track tensorboard"
            )
        if find_spec(PACKAGES[name]) is None:
            raise ConfigurationError(
                f"--track {name}, and the package {PACKAGES[name]} is not installed",
                expected=f"{name} installed beside lightsft",
                todo=f"pip install {PACKAGES[name]}",
            )


def tracker_environment(folder: Path, group: str, name: str) -> Mapping[str, str]:
    """What the trackers read from the environment: files in `folder`, runs called `name` in the group `group`.

    What the user has set stays. W&B is offline unless WANDB_MODE says otherwise.
    """
    wanted = {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard" / name),
        "MLFLOW_TRACKING_URI": (folder / "mlruns").resolve().as_uri(),
        "MLFLOW_EXPERIMENT_NAME": group,
        "MLFLOW_TAGS": f'{{"comparison": "{group}"}}',
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(folder),
        "WANDB_PROJECT": "lightsft",
        "WANDB_RUN_GROUP": group,
        "TRACKIO_DIR": str((folder / "trackio").resolve()),
    }
    return {key: value for key, value in wanted.items() if key not in os.environ}
