"""What a run is made of: the same keys in a YAML file, on the command line and in Python, all checked at once."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lightsft.errors import ConfigurationError


def _number(value: Any) -> Any:
    """YAML reads 2e-4 as a string."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Positive = Annotated[float, BeforeValidator(_number), Field(gt=0)]
Share = Annotated[float, BeforeValidator(_number), Field(gt=0, lt=0.5)]
Count = Annotated[int, Field(ge=1)]


class StrategySpec(BaseModel):
    """A strategy to train: its name, its options, and what to call it in results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    label: str = ""
    learning_rate: Positive | None = None
    search: dict[str, Any] = Field(default_factory=dict)  # what a search chooses from, in place of the strategy's own

    @classmethod
    def parse(cls, text: Any) -> StrategySpec:
        """From `lora`, `lora(rank=16)`, a mapping {name, options..., label, ...}, or a strategy object."""
        if isinstance(text, StrategySpec):
            return text
        if isinstance(text, Mapping):
            return cls._from_mapping(text)
        if not isinstance(text, str):
            return cls._from_object(text)
        name, options = _called(text, "the strategy", "lora(rank=16, alpha=32)")
        label = re.sub(r"\s+", "", text)
        if "search" in options:
            shown = ",".join(part for part in _parts(text) if not part.startswith("search="))
            label = f"{name}({shown})" if shown else name
        return cls._from_mapping({"name": name, "label": label, **options})

    @property
    def folder(self) -> str:
        """The label as a part of a file name."""
        return re.sub(r"[^A-Za-z0-9_.=-]+", "_", self.label).strip("_")

    def __str__(self) -> str:
        """The text that `parse` reads as this."""
        own = {"label": self.label, "learning_rate": self.learning_rate, "search": self.search or None}
        for options in (self.options, {**self.options, **{k: v for k, v in own.items() if v is not None}}):
            inside = ", ".join(f"{key}={json.dumps(value)}" for key, value in options.items())
            text = f"{self.name}({inside})" if inside else self.name
            if StrategySpec.parse(text) == self:
                break
        return text

    @classmethod
    def _from_object(cls, strategy: Any) -> StrategySpec:
        """Of a strategy in Python: its registered name, and the options that differ from the defaults."""
        if not dataclasses.is_dataclass(strategy) or isinstance(strategy, type):
            raise ConfigurationError(
                f"{strategy!r} is not a strategy", expected="a name, a mapping, or an object such as LoRA(rank=16)"
            )
        from lightsft.registry import name_of

        name, default = name_of(strategy), type(strategy)()  # type: ignore[arg-type]
        chosen = {key: value for key, value in vars(strategy).items() if value != getattr(default, key)}
        inside = ",".join(f"{key}={_shown(value)}" for key, value in chosen.items())
        options = {key: _plain(value) for key, value in chosen.items()}
        return cls(name=name, options=options, label=f"{name}({inside})" if inside else name)

    @classmethod
    def _from_mapping(cls, mapping: Mapping[str, Any]) -> StrategySpec:
        if "name" not in mapping:
            raise ConfigurationError(f"the strategy {dict(mapping)} has no name", expected="name: lora")
        own = {key: mapping[key] for key in ("name", "label", "learning_rate", "search") if key in mapping}
        options = {**mapping.get("options", {})}
        options |= {key: value for key, value in mapping.items() if key not in (*own, "options")}
        return cls(**{"label": mapping["name"], **own}, options=options)


def _is_strategy(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and hasattr(value, "inject")


def _shown(value: Any) -> str:
    """An option's value in a label: of strategies among it, their labels."""
    if isinstance(value, list | tuple) and any(map(_is_strategy, value)):
        return f"[{','.join(StrategySpec.parse(item).label for item in value)}]"
    return str(value)


def _plain(value: Any) -> Any:
    """An option's value; of strategies among it, their names and options."""
    if _is_strategy(value):
        spec = StrategySpec.parse(value)
        return {"name": spec.name, **spec.options}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _called(text: str, what: str, example: str = "seq2seq(num_beams=4)") -> tuple[str, dict[str, Any]]:
    """(name, options) of `name(option=value, ...)`."""
    match = re.fullmatch(r"\s*([\w./-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise ConfigurationError(f"cannot read {what} {text!r}", expected=f"a name, or a name with options: {example}")
    return match[1], dict(_option(part, text) for part in split_list(match[2] or ""))


def _parts(text: str) -> list[str]:
    """The options between the brackets of `name(a=1, b=2)`, without white space."""
    _, _, inside = text.strip().removesuffix(")").partition("(")
    return [re.sub(r"\s+", "", part) for part in split_list(inside)]


def _option(text: str, whole: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigurationError(f"cannot read {text!r} in {whole!r}", expected="options as key=value")
    return key.strip(), _yaml_value(value, whole)


def _yaml_value(text: str, whole: str) -> Any:
    """What YAML reads, and numbers such as 2e-4 besides."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"cannot read {whole!r}: {reason}", expected="a value in YAML") from error
    return _number(value) if re.match(r"^[\d.+-]", text.strip()) else value


def split_list(text: str) -> list[str]:
    """Split on commas that are not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _whole(value: Any) -> Any:
    """1e6 is a million."""
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _switch(value: Any) -> Any:
    """YAML reads on and off as True and False."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _counts(value: Any) -> Any:
    return tuple(split_list(value)) if isinstance(value, str) else value


def _strategies(value: Any) -> Any:
    items = split_list(value) if isinstance(value, str) else value
    return [StrategySpec.parse(item) for item in items] if isinstance(items, Sequence) else items


def _labels(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(split_list(value))
    if isinstance(value, list | tuple) and not any(isinstance(item, bool) for item in value):  # YAML reads yes as True
        return tuple(str(item) for item in value)
    return value


def _pairs(value: Any) -> Any:
    """A mapping as `key=value,key=value`."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={part}" for key, part in value.items())
    if isinstance(value, str) and not all("=" in part for part in split_list(value)):
        raise ValueError("options are written as key=value, separated by commas")
    return value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


Source = Annotated[str, BeforeValidator(_text)]


class TaskSpec(BaseModel):
    """A task: its name and its options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def parse(cls, text: Any) -> TaskSpec:
        """From `chat`, `seq2seq(num_beams=4)`, a mapping {name, options...}, or a task object."""
        if isinstance(text, TaskSpec):
            return text
        if isinstance(text, str):
            name, options = _called(text, "the task")
            return cls(name=name, options=options)
        if isinstance(text, Mapping) and "name" in text:
            options = {**text.get("options", {}), **{k: v for k, v in text.items() if k not in ("name", "options")}}
            return cls(name=text["name"], options=options)
        if hasattr(text, "describe"):
            return cls.parse(text.describe())
        raise ConfigurationError(f"cannot read the task {text!r}", expected="a name, or a mapping with a name")

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={json.dumps(value)}" for key, value in self.options.items())
        return f"{self.name}({inside})" if inside else self.name


class TrainConfig(BaseModel):
    """What every run needs: model, task, data, and how to train. Field descriptions are the command line's help."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    model: Source
    """Base model: a folder, a GGUF file or a hub id."""
    out: Path
    """Folder for everything this run writes; it must not exist yet, or hold the same run."""
    task: Annotated[TaskSpec, BeforeValidator(TaskSpec.parse)] = TaskSpec(name="classification")
    """What to train for, with options if you like: classification, chat, "seq2seq(num_beams=4)", ..."""

    data: Source
    """Rows: a file (csv, jsonl, parquet, CoNLL, SQuAD, ...), a folder, a saved data set, or a hub id."""
    validation_data: Source | None = None
    """Validation rows; without it they are split off by hash of the text."""
    test_data: Source | None = None
    """Test rows; without it they are split off by hash of the text."""
    text: str | None = None
    """Column with the text; by default found by its name, then by its content."""
    text_pair: str | None = None
    """Column with a second text, for pairs."""
    label: str | None = None
    """Column with the label; by default found by its name, then by its content."""
    labels: Annotated[tuple[str, ...] | None, BeforeValidator(_labels)] = None
    """All labels in order, comma-separated; by default those that occur, sorted."""
    encoding: str = "utf-8"
    """Encoding of text files."""
    drop_bad_rows: bool = False
    """Leave out rows that cannot be used, and say how many; without it the first one is an error."""
    check_data: bool = True
    """Look for duplicates, leakage between splits, damaged texts and the like first, and say what is found."""
    split: Literal["hash", "stratified"] = "hash"
    """How rows are split: hash (adding rows never moves others), or stratified (each class has its share)."""
    group: str | None = None
    """Column whose value keeps rows together: all rows of a group are in one split."""
    shots: Count | None = None
    """Few-shot: train on so many examples per class; each seed draws its own."""
    validation_share: Share = 0.1
    """Share of the rows that is split off for validation."""
    test_share: Share = 0.1
    """Share of the rows that is split off for the test."""
    max_train_examples: Count | None = None
    """Train on at most so many rows, chosen by hash."""
    max_validation_examples: Count | None = None
    """Validate on at most so many rows."""
    max_test_examples: Count | None = None
    """Test on at most so many rows."""
    max_length: Count | None = None
    """Longest input in tokens; by default the task's own (128 for classification, 512 for chat)."""
    chat_template: Source | None = None
    """File with a Jinja chat template, where the tokenizer has none."""

    metric: str | None = None
    """Score that picks checkpoints and the winner; by default the task's own (accuracy for classification)."""
    epochs: Positive = 3.0
    """Passes over the training rows."""
    max_steps: Count | None = None
    """Budget in updates, in place of epochs."""
    max_tokens: Annotated[Count | None, BeforeValidator(_whole)] = None
    """Budget in tokens that are read in training, padding not counted, in place of epochs."""
    max_minutes: Positive | None = None
    """Budget in minutes of training, validation not counted, in place of epochs; no two runs are then the same."""
    evaluations: Count | None = None
    """Validations during a run, evenly spaced; by default one per epoch, 5 under another budget."""
    batch_size: Count = 16
    """Rows per step on each device."""
    tokens_per_batch: Count | None = None
    """Instead of batch_size: as many rows of similar length per step as fit into so many padded tokens."""
    packing: bool = False
    """Lay the rows of a batch side by side instead of padding them, where the model computes the same."""
    evaluation_batch_size: Count = 64
    """Rows per step in evaluation."""
    gradient_accumulation: Count = 1
    """Steps whose gradients are summed into one update."""
    learning_rate: Positive | None = None
    """Learning rate of every strategy; by default each strategy's own."""
    scheduler: str = "linear"
    """Learning-rate schedule, by transformers' name."""
    warmup: Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, BeforeValidator(_number), Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_gradient_norm: Annotated[float, BeforeValidator(_number), Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    optimizer: str = "adamw_torch"
    """Optimizer, by transformers' name: adamw_torch, adamw_8bit, adafactor, galore_adamw, ..."""
    optimizer_options: Annotated[str | None, BeforeValidator(_pairs)] = None
    """Options of the optimizer that transformers reads: rank=64,scale=0.25"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    cache_frozen: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """Compute frozen first blocks once per example: auto where that is exact, on without their dropout too, off."""
    early_stopping: Count | None = None
    """Stop after so many epochs without a better validation score."""
    quantization: Literal["int8", "nf4", "fp4"] | None = None
    """Store the blocks' linear layers in 8 or 4 bits: int8, nf4 or fp4."""
    double_quantization: bool = False
    """Quantize the scales of nf4 or fp4 too."""
    dtype: str = "auto"
    """Type to compute in: auto, float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, xpu or mps."""
    track: Annotated[tuple[str, ...], BeforeValidator(_labels)] = ()
    """Experiment trackers, comma-separated: tensorboard, mlflow, wandb (offline unless WANDB_MODE is set), trackio."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [name for name in ("max_steps", "max_tokens", "max_minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two budgets; give one")
        return self


class SingleConfig(TrainConfig):
    """What `lightsft train` takes: one strategy, one seed."""

    strategy: Annotated[StrategySpec, BeforeValidator(StrategySpec.parse)] = StrategySpec(name="lora", label="lora")
    """Strategy, with options if you like: lora, or "lora(rank=16, alpha=32)"."""
    seed: int = 0
    """Decides new weights, the order of the rows and dropout."""


class RunConfig(TrainConfig):
    """What `lightsft compare` takes: strategies times seeds."""

    strategies: Annotated[tuple[StrategySpec, ...], BeforeValidator(_strategies), Field(min_length=1)]
    """Strategies, comma-separated: full,lora,"lora(rank=16)"."""
    seeds: Count = 5
    """Trials per strategy, with seeds 0, 1, ...: new weights, the order of the rows, dropout."""
    tune: Annotated[int, Field(ge=0)] = 8
    """Search trials per strategy for its learning rate and main option, on validation rows; 0 takes its defaults."""
    jobs: Count = 1
    """Trials that run at the same time, each on its share of the cores, or on an accelerator of its own."""
    on: str = "local"
    """Where trials run: local, ray (this machine), or ray://HOST:PORT."""
    processes: Count = 1
    """Processes of each trial, through accelerate; each takes batch_size rows per step."""
    score_target: Annotated[float | None, BeforeValidator(_number)] = None
    """Validation score whose time to be reached is reported."""
    score_by: str | None = None
    """Column whose values get scores of their own."""
    margin: Positive | None = None
    """How far behind the best a strategy may be to be as good, in the metric's units; by default a point, 0.01."""
    resolve: Positive | None = None
    """Difference that would matter: the seeds that it takes to see it are stated; by default half a point, 0.005."""
    few_shot_curve: Annotated[tuple[Count, ...], BeforeValidator(_counts)] = ()
    """Train on so many examples per class as well, comma-separated: 1,4,16."""
    robustness: bool = True
    """Score test texts with typing errors, in lower and in upper case."""
    forgetting: bool = True
    """Loss of language models on neutral text before and after training."""
    neutral_text: Source | None = None
    """Text file for `forgetting`; by default English reference prose from Python's own documentation."""


Config = TypeVar("Config", bound=TrainConfig)


def build(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Validate `values`; every problem is reported at once, with the names of keys that are close."""
    try:
        config = kind(**values)
    except ValidationError as error:
        problems = [_problem(item, kind) for item in error.errors()]
        unknown = any(item["type"] == "extra_forbidden" for item in error.errors())
        raise ConfigurationError(
            "the configuration has errors:\n  " + "\n  ".join(problems),
            expected=f"the keys {', '.join(kind.model_fields)}" if unknown else "",
            todo="correct them in the file, or with --set key=value",
        ) from error
    folders = [spec.folder.lower() for spec in getattr(config, "strategies", ())]
    for number, spec in enumerate(getattr(config, "strategies", ())):
        if spec.folder.lower() in folders[:number]:
            raise ConfigurationError(
                f"the strategy {spec.label!r} is listed twice",
                expected="each strategy once",
                todo="give one of them another label: lora(rank=16, label=wide)",
            )
    return config


def _problem(item: Any, kind: type[BaseModel]) -> str:
    import difflib

    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        return f"{name}: no such key" + (f"; did you mean {near[0]}?" if near else "")
    if item["type"] == "missing":
        return f"{name}: missing"
    if not name:  # about several keys together
        return str(item["msg"]).removeprefix("Value error, ")
    return f"{name}: {item['msg']}, got {item['input']!r}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    if not path.is_file():
        raise ConfigurationError(f"no configuration file {path}", expected="a YAML file", todo="check the path")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{path} is not valid YAML: {error}", expected="key: value lines", todo="rows are named with --data"
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds a {type(content).__name__}", expected="key: value lines")
    return content


def with_settings(values: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`values` with `a.b=c` settings applied; the values are read as YAML."""
    result = dict(values)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ConfigurationError(f"cannot read --set {setting!r}", expected="--set key=value")
        *parents, last = path.split(".")
        place = result
        for parent in parents:
            inner = place.get(parent) or {}
            if not isinstance(inner, Mapping):
                raise ConfigurationError(
                    f"cannot set {path}: {parent} is {inner!r}",
                    expected=f"a mapping under {parent}",
                    todo=f"write it as a mapping in the file, or set {parent} whole",
                )
            place[parent] = dict(inner)
            place = place[parent]
        place[last] = _yaml_value(text, setting)
    return result
