"""Options of AdapterHub's methods: those that lightsft's strategies compute, and what the others mean.

Read off AdapterHub 1.3.0 (`configuration/adapter_config.py`, `methods/`). All that is refused is named at once. An
option that is not listed is refused too, since it may change what is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightsft.errors import ArtifactError
from lightsft.export.adapterhub_folder import AdapterHubFolder

# Types of model whose places for adapters and prefixes were compared.
COMPARED = ("bert", "distilbert", "electra", "roberta", "xlm-roberta", "gpt2", "llama", "mistral")
NOT_READ = "train it again with lightsft, or go on using it with AdapterHub's library"
_NON_LINEARITIES = ("relu", "gelu", "silu", "swish", "tanh", "sigmoid", "leaky_relu")  # of the strategy `adapter`


@dataclass(frozen=True)
class _Option:
    """What the library takes where a folder does not say, what is accepted (None: anything), what the rest means."""

    default: Any
    accepted: tuple[Any, ...] | None = None
    otherwise: str = ""


_GATE = _Option(False, (False,), "a learned gate")
_BOTTLENECK = {
    "mh_adapter": _Option(False),
    "output_adapter": _Option(True, (True,), "adapters after attentions alone"),
    "reduction_factor": _Option(16),
    "non_linearity": _Option("relu"),
    "scaling": _Option(1.0),
    "dropout": _Option(0.0),
    "leave_out": _Option(()),
    "is_parallel": _Option(False),
    "ln_before": _Option(False),
    "ln_after": _Option(False),
    "original_ln_after": _Option(True, (True,), "without the sublayer's own residual connection and norm"),
    "original_ln_before": _Option(False),
    "residual_before_ln": _Option(True),
    "adapter_residual_before_ln": _Option(False),
    "use_gating": _GATE,
    "inv_adapter": _Option(None, (None,), "an invertible adapter after the embeddings"),
    "invertible_adapter": _Option(None, (None,), "an invertible adapter after the embeddings"),
    "cross_adapter": _Option(False, (False,), "an adapter after cross attention"),
    "phm_layer": _Option(False, (False,), "Kronecker products, of another layout than compacter's"),
    "stochastic_depth": _Option(0, (0, None), "adapters dropped whole in training"),
}
_SEQUENTIAL = {"residual_before_ln": _Option(True, (True, False), "a residual connection that nothing starts")}
_AFTER_SUM = {"residual_before_ln": _Option(True, (True,), "the stream, or its norm, added a second time")}
_PARALLEL = {"mh_adapter": _Option(False, (False,), "adapters parallel to attentions")}
_LORA = {
    "r": _Option(8),
    "alpha": _Option(8),
    "dropout": _Option(0.0),
    "attn_matrices": _Option(("q", "v")),
    "composition_mode": _Option("add", ("add", "scale"), "another composition"),
    "use_gating": _GATE,
    "use_dora": _Option(False, (False,), "DoRA that scales the bias too, and norms W + B A without alpha / r"),
    "vera_d": _Option(None, (None,), "VeRA"),
    "vera_b": _Option(None, (None,), "VeRA"),
}
_PREFIX = {
    "flat": _Option(False),
    "prefix_length": _Option(30),
    "non_linearity": _Option("tanh"),
    "dropout": _Option(0.0),
    "leave_out": _Option(()),
    "use_gating": _GATE,
}
# Options that say nothing more about what is computed: the tensors do, or an option that is refused comes first.
_SILENT = {
    *("architecture", "init_weights", "init_weights_seed", "inv_adapter_reduction_factor"),
    *("phm_dim", "phm_bias", "phm_rank", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity"),
    *("factorized_phm_W", "factorized_phm_rule", "shared_W_phm", "shared_phm_rule"),
    *("selfattn_lora", "intermediate_lora", "output_lora", "dtype"),
    *("encoder_prefix", "cross_prefix", "bottleneck_size", "shared_gating"),
}


def bottleneck_options(folder: AdapterHubFolder) -> dict[str, Any]:
    """Those of a bottleneck adapter. Raises ArtifactError for what the strategy `adapter` does not compute."""
    options, refused = _read(folder, _BOTTLENECK)
    options["non_linearity"] = _activation(folder, options["non_linearity"])
    if options["is_parallel"]:
        refused += _beyond(options, _PARALLEL)
    else:
        refused += _beyond(options, _AFTER_SUM if options["original_ln_before"] else _SEQUENTIAL)
        if options["ln_after"] and options["adapter_residual_before_ln"]:
            refused.append("adapter_residual_before_ln=True (a norm over its residual connection too)")
    if options["scaling"] != "learned" and not is_number(options["scaling"]):
        refused.append(f"scaling={options['scaling']!r} (factors of another kind)")
    if options["non_linearity"] not in _NON_LINEARITIES:
        refused.append(f"non_linearity={options['non_linearity']!r} (not one of {', '.join(_NON_LINEARITIES)})")
    refuse(folder, [*refused, *_other_model(folder)])
    return options


def lora_options(folder: AdapterHubFolder) -> dict[str, Any]:
    """Those of a LoRA, or of vectors that scale. Raises ArtifactError for what no strategy computes.

    Versions of `adapters` before 1.1.0 scaled by 1 whatever alpha is, and later ones read their folders so.
    """
    options, refused = _read(folder, _LORA)
    refuse(folder, refused)
    if type(options["r"]) is not int or not is_number(options["alpha"]) or min(options["r"], options["alpha"]) <= 0:
        raise folder.wrong(f"says r={options['r']!r}, alpha={options['alpha']!r}", expected="numbers above 0")
    version = re.match(r"adapters\.(\d+)\.(\d+)", folder.version or "")
    if version is not None and (int(version[1]), int(version[2])) < (1, 1):
        options["alpha"] = options["r"]
    return options


def prefix_options(folder: AdapterHubFolder) -> dict[str, Any]:
    """Those of a prefix. Raises ArtifactError for what the strategy `prefix` does not compute."""
    options, refused = _read(folder, _PREFIX)
    options["non_linearity"] = _activation(folder, options["non_linearity"])
    refuse(folder, [*refused, *_other_model(folder)])
    if type(options["prefix_length"]) is not int or options["prefix_length"] < 1:
        raise folder.wrong(f"says prefix_length={options['prefix_length']!r}", expected="a number of tokens")
    return options


def refuse(folder: AdapterHubFolder, refused: Sequence[str]) -> None:
    """Raise ArtifactError if anything is."""
    if refused:
        raise ArtifactError(
            f"{folder.path} uses what no strategy of lightsft computes:\n  " + "\n  ".join(refused),
            expected=f"{folder.architecture} without it",
            todo=NOT_READ,
        )


def is_number(value: object) -> bool:
    """Whether it is one; truth values are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(folder: AdapterHubFolder, known: Mapping[str, _Option]) -> tuple[dict[str, Any], list[str]]:
    """Every option that says what is computed, and what is refused among them."""
    options = {name: folder.options.get(name, option.default) for name, option in known.items()}
    unknown = sorted(set(folder.options) - set(known) - _SILENT - {"leave_out"})
    left_out = options.get("leave_out") or ()
    if not isinstance(left_out, list | tuple):
        raise folder.wrong(f"says leave_out={left_out!r}", expected="a list of blocks")
    refused = _beyond(options, known)
    return options, refused + [f"{name}={folder.options[name]!r} (an option that is not known)" for name in unknown]


def _beyond(options: Mapping[str, Any], known: Mapping[str, _Option]) -> list[str]:
    return [
        f"{name}={options[name]!r} ({option.otherwise})"
        for name, option in known.items()
        if option.accepted is not None and options[name] not in option.accepted
    ]


def _other_model(folder: AdapterHubFolder) -> list[str]:
    if folder.model_type in COMPARED:
        return []
    return [f"model_type={folder.model_type!r} (where the library puts {folder.architecture} there was not compared)"]


def _activation(folder: AdapterHubFolder, name: Any) -> str:
    """The name in transformers; folders from before there were versions call the approximation "gelu"."""
    said = str(name).lower()
    older = {"gelu": "gelu_new", "gelu_orig": "gelu"} if folder.version is None else {}
    return {"leakyrelu": "leaky_relu", **older}.get(said, said)
