"""Convert what was trained into another form: a LoRA of a chosen rank, a folder of lightsft, a folder of PEFT.

    lora       B A ~ W' - W for every linear layer and embedding, from an adapter folder of anything that merges, or
               from a checkpoint that was tuned whole, beside the one that it was tuned from; or fitted to what any
               strategy computes on rows of its task
    lightsft   the same tensors with lightsft.json
    peft       the same tensors with adapter_config.json, where PEFT has the method

conversion.json in the new folder says where it came from and what it lost.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightsft import artifact
from lightsft.adapter_files import PEFT_SETTINGS, is_adapter, read_settings
from lightsft.errors import ArtifactError, ConfigurationError, MergeError
from lightsft.export import adapterhub
from lightsft.export.adapterhub_folder import is_adapterhub
from lightsft.export.as_lora import AsLoRA
from lightsft.export.calibration import Calibration
from lightsft.export.low_rank_fit import rounding_noise
from lightsft.export.tuned_checkpoint import open_tuned, require_folder
from lightsft.export.vllm_check import vllm_problems
from lightsft.files import new_folder, require_free, write_json
from lightsft.injection import Injection
from lightsft.primitives import Primitive, Unfreezing
from lightsft.primitives.untied import Untied
from lightsft.quiet import quiet
from lightsft.targets import select_parameters

FORMS = ("lora", "lightsft", "peft")
REPORT = "conversion.json"


def convert(
    source: str | Path,
    *,
    to: str,
    out: str | Path,
    base: str | Path | None = None,
    rank: int = 16,
    energy: float | None = None,
    drop_rest: bool = False,
    calibration: str | Path | None = None,
) -> dict[str, Any]:
    """Write `source` as `to` ("lora", "lightsft", "peft") in the new folder `out`; returns what conversion.json says.

    `source` is an adapter folder of lightsft or PEFT, whose base is found as `lightsft.load` finds it unless `base`
    names it; or, for "lora", a checkpoint folder that was tuned whole from the checkpoint folder `base`.

    For "lora": factors have at most `rank`, or with `energy` the smallest rank that keeps this share of the squared
    change of a weight. What a LoRA cannot express (norms, biases, new tokens) is refused, or with `drop_rest` left out
    and listed with its share. Task heads and modules_to_save are kept whole. With `calibration`, a file of rows of the
    task, the LoRA is fitted to what the strategy computes on them, whatever it is.

    Raises ConfigurationError, ArtifactError or BackboneError for what cannot be read, MergeError for what cannot be
    expressed, OutputError if `out` holds something. Only a whole folder is left there.
    """
    source, out, named = Path(source), Path(out), None if base is None else str(base)
    _require_known(to, rank, energy)
    _require_distilling(source, to, energy, drop_rest, calibration)
    require_free(out)
    if is_adapter(source) or is_adapterhub(source):
        with quiet():
            injection = _opened(source, named, "checkpoint" if calibration is None else "float32")
            if to != "lora":
                return _write_as_it_is(source, injection, to, out)
            if calibration is not None:
                return _write_distilled(source, injection, rank, Path(calibration), out)
            backbone, converted = injection.backbone, _of_adapter(source, injection, rank, energy, drop_rest)
            made = _placed_instead(injection, converted)
    elif to == "lora" and (source / "config.json").is_file():
        tuned = open_tuned(source, require_folder(named, source))
        backbone = tuned.backbone
        converted = AsLoRA(backbone, rank=rank, energy=energy, drop_rest=drop_rest, whole=backbone.head)
        tuned.add_to(converted)
        converted.require_expressed(f"the tuning in {source}")
        made = tuned.placed(converted)
    else:
        raise _not_convertible(source, to)
    report = {"to": to, "source": str(source), "base": backbone.source, **converted.as_json()}
    return _write(source, made, out, report, to)


def _opened(source: Path, base: str | None, dtype: str) -> Injection:
    """What an adapter folder holds, on its base."""
    if is_adapterhub(source):
        return adapterhub.load(source, base, dtype)
    return artifact.load(source, artifact.load_base(source, base, dtype=dtype, device="cpu"))


def _require_known(to: str, rank: int, energy: float | None) -> None:
    if to not in FORMS:
        raise ConfigurationError(f"to={to!r}", expected=f"one of {', '.join(FORMS)}")
    if rank < 1:
        raise ConfigurationError(f"rank={rank}", expected="a rank of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigurationError(f"energy={energy}", expected="a share above 0, up to 1 (0.99 keeps 99 %)")


def _require_distilling(
    source: Path, to: str, energy: float | None, drop_rest: bool, calibration: str | Path | None
) -> None:
    """What goes together with rows to distil on."""
    if calibration is None:
        return
    if to != "lora" or energy is not None or drop_rest:
        raise ConfigurationError(
            f"rows to distil on ({calibration}), and {'energy or drop_rest' if to == 'lora' else f'to={to!r}'}",
            expected="--to lora --calibration FILE, with --rank alone",
            todo="leave one of them out",
        )
    if not (is_adapter(source) or is_adapterhub(source)):
        raise ArtifactError(
            f"{source} is no adapter folder",
            expected="one to distil",
            todo="leave --calibration out, or check the path",
        )


def _not_convertible(source: Path, to: str) -> ArtifactError:
    if (source / "config.json").is_file():
        return ArtifactError(
            f"{source} holds a checkpoint, not an adapter",
            expected=f"an adapter folder to convert to {to}",
            todo="--to lora --base FOLDER makes an adapter of it",
        )
    return ArtifactError(
        f"{source} holds neither an adapter nor a checkpoint",
        expected="an adapter folder of lightsft, PEFT or AdapterHub, or a checkpoint folder with safetensors",
        todo="check the path",
    )


# ---- a LoRA of an adapter


def _of_adapter(source: Path, injection: Injection, rank: int, energy: float | None, drop_rest: bool) -> AsLoRA:
    """The factors of all that it changes."""
    if not injection.mergeable:
        raise MergeError(
            f"{source} holds {type(injection.strategy).__name__}, which computes something that no weight can express",
            expected="a strategy that changes weights (full, lora, ia3, vera, ...)",
            todo="ship the adapter folder as it is, or fit a LoRA to what it computes on rows of its task: "
            "--calibration FILE",
        )
    converted = AsLoRA(
        injection.backbone,
        rank=rank,
        energy=energy,
        drop_rest=drop_rest,
        whole=_whole(injection),
        untied=frozenset(primitive.name for primitive in injection.primitives if isinstance(primitive, Untied)),
    )
    for primitive in injection.primitives:
        _add_changes(primitive, converted)
    converted.require_expressed(str(source))
    return converted


def _add_changes(primitive: Primitive, converted: AsLoRA) -> None:
    changes = 0
    for name, before, after in primitive.changes():
        converted.add(name, before, after, noise=rounding_noise(after))
        changes += 1
    if not changes:
        for name in primitive.trainable():
            converted.leave(name, None, "it is no change of the base's own weights")


def _whole(injection: Injection) -> frozenset[str]:
    """The parameters that are trained in place because they are a task head or were named to be saved."""
    named = getattr(injection.strategy, "modules_to_save", None) or ()
    chosen = set(injection.backbone.head) | set(select_parameters(injection.backbone, named))
    trained = {name for p in injection.primitives if isinstance(p, Unfreezing) for name in p.names}
    return frozenset(chosen & trained)


def _placed_instead(injection: Injection, converted: AsLoRA) -> Injection:
    """The LoRA on the backbone, in the place of what was there; what both keep whole stays."""
    backbone = injection.backbone
    same = converted.whole | set(backbone.moving_buffers)
    held = {name: tensor.clone() for name, tensor in injection.tensors().items() if name in same}
    injection.eject()
    made = converted.strategy(sorted(converted.whole - backbone.head)).inject(backbone, seed=injection.seed)
    tensors = made.tensors()
    made.load_tensors(tensors | {name: held[name] for name in tensors.keys() & held.keys()} | dict(converted.tensors()))
    return made


# ---- writing


def _write_as_it_is(source: Path, injection: Injection, to: str, out: Path) -> dict[str, Any]:
    report = {
        "to": to,
        "source": str(source),
        "base": injection.backbone.source,
        "strategy": type(injection.strategy).__name__,
        "tensors": len(injection.tensors()),
    }
    return _write(source, injection, out, report, to)


def _write_distilled(source: Path, injection: Injection, rank: int, rows: Path, out: Path) -> dict[str, Any]:
    """A LoRA fitted to what the strategy computes."""
    trial = Calibration(source, injection, rows)
    converted = trial.as_lora(rank, _whole(injection))
    made = _placed_instead(injection, converted)
    compared = trial.compared(made)
    report = {"to": "lora", "source": str(source), "base": made.backbone.source, **converted.as_json()}
    return _write(source, made, out, report | {"distilled": compared}, "lora")


def _write(source: Path, injection: Injection, out: Path, report: dict[str, Any], to: str) -> dict[str, Any]:
    """The folder, with what vLLM makes of it."""
    task = (read_settings(source) or {}).get("task")
    with new_folder(out) as folder, torch.no_grad():
        with _reasons() as reasons:
            artifact.save(injection, folder, task=task)
        if to != "lightsft":
            _require_peft(source, injection, folder, reasons)
            report |= {"vllm": vllm_problems(folder)}
        write_json(folder / REPORT, report)
    return report


def _require_peft(source: Path, injection: Injection, folder: Path, reasons: list[str]) -> None:
    if (folder / PEFT_SETTINGS).is_file():
        return
    kind = type(injection.strategy).__name__
    why = "; ".join(reason.rpartition("(lightsft can): ")[2] for reason in reasons) or f"it has no method like {kind}"
    linear = "--to lora makes a LoRA of what is linear in it" if injection.mergeable else "load it with lightsft"
    raise ArtifactError(f"PEFT cannot open {source}: {why}", expected="a method that PEFT has, on layers", todo=linear)


class _Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())


@contextmanager
def _reasons() -> Iterator[list[str]]:
    """What strategies warn of within it: why PEFT cannot open a folder."""
    logger, handler = logging.getLogger("lightsft_adapters"), _Kept()
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
