"""Experiment trackers, through transformers' integrations: where they write, how runs are named and grouped.

Everything stays in files below the run's folder, and nothing is sent anywhere, unless the environment says otherwise:

    OUT/tensorboard/NAME       tensorboard --logdir OUT/tensorboard
    OUT/mlruns                 mlflow ui --backend-store-uri OUT/mlruns; an experiment is a comparison
    OUT/wandb/offline-run-*    wandb sync OUT/wandb/offline-run-*; a group is a comparison
    OUT/trackio                TRACKIO_DIR=OUT/trackio trackio show; a project is a comparison
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def use_trackers(track: Sequence[str], folder: Path, group: str, name: str) -> None:
    """Have the trackers of this process write below `folder` from now on."""
    if track:
        folder.mkdir(parents=True, exist_ok=True)  # W&B writes elsewhere if it is not there
        os.environ.update(tracker_environment(folder.resolve(), group, name))


def tracker_environment(folder: Path, group: str, name: str) -> Mapping[str, str]:
    """What the trackers read from the environment: files in `folder`, runs called `name` in the group `group`.

    What the user has set stays. W&B is offline unless WANDB_MODE says otherwise.
    """
    wanted = {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard" / name),
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "MLFLOW_EXPERIMENT_NAME": group,
        "MLFLOW_TAGS": json.dumps({"comparison": group}),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DIR": str(folder),
        "WANDB_PROJECT": "lightsft",
        "WANDB_RUN_GROUP": group,
        "TRACKIO_DIR": str(folder / "trackio"),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    return {key: value for key, value in wanted.items() if key not in os.environ}


def end_trackers(track: Sequence[str], args: Any, found: Mapping[str, Any]) -> None:
    """Add what a run has come to, its numbers, to its record in every tracker; the runs are over then.

    found: a trial's results. Metrics are named final/test/accuracy, costs final/seconds. args: of the trainer.
    """
    values = dict(_numbers("final", found))
    for name in track:
        _ENDINGS[name](args, values)


def _numbers(path: str, found: Any) -> list[tuple[str, float]]:
    if isinstance(found, Mapping):
        return [pair for key, value in found.items() for pair in _numbers(f"{path}/{key}", value)]
    return [(path, float(found))] if isinstance(found, int | float) and not isinstance(found, bool) else []


def _end_tensorboard(args: Any, values: Mapping[str, float]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(os.environ["TENSORBOARD_LOGGING_DIR"]) as writer:
        for name, value in values.items():
            writer.add_scalar(name, value)


def _end_mlflow(args: Any, values: Mapping[str, float]) -> None:
    import mlflow

    mlflow.flush_async_logging()
    run = mlflow.last_active_run()
    assert run is not None
    for name, value in values.items():
        mlflow.MlflowClient().log_metric(run.info.run_id, re.sub(r"[^\w\-. :/]", "_", name), value)


def _end_wandb(args: Any, values: Mapping[str, float]) -> None:
    import wandb

    assert wandb.run is not None
    wandb.run.summary.update(dict(values))
    wandb.finish()


def _end_trackio(args: Any, values: Mapping[str, float]) -> None:
    import trackio

    trackio.init(project=args.project, name=args.run_name, resume="must", embed=False)
    trackio.log(dict(values))
    trackio.finish()


_ENDINGS = {"tensorboard": _end_tensorboard, "mlflow": _end_mlflow, "wandb": _end_wandb, "trackio": _end_trackio}
