from importlib.metadata import EntryPoint

import pytest

import lightsft
from lightsft import registry
from lightsft.errors import ConfigurationError
from lightsft_adapters import Adapter, Full, LoRA, Prefix


@pytest.fixture
def installed(monkeypatch):
    """Call it with (name, "module:Class") pairs: these are the entry points that packages offer."""

    def install(*pairs):
        found = [EntryPoint(name, value, registry.GROUP) for name, value in pairs]
        monkeypatch.setattr(registry, "entry_points", lambda group: found if group == registry.GROUP else [])
        registry._entries.cache_clear()

    yield install
    monkeypatch.undo()
    registry._entries.cache_clear()


def test_the_built_in_strategies_come_through_the_entry_points():
    assert registry.strategies() == {"adapter": Adapter, "full": Full, "lora": LoRA, "prefix": Prefix}


@pytest.mark.parametrize("strategy", [Adapter(), Full(), LoRA(), Prefix()], ids=lambda s: type(s).__name__)
def test_a_strategy_is_made_by_the_name_it_goes_by(strategy):
    assert lightsft.strategy(registry.name_of(strategy)) == strategy


def test_options_go_to_the_strategy():
    assert lightsft.strategy("lora", rank=3, alpha=1.5) == LoRA(rank=3, alpha=1.5)


@pytest.mark.parametrize(("asked", "near"), [("lorra", "lora"), ("adaptor", "adapter")])
def test_an_unknown_name_lists_what_is_installed_and_the_nearest(asked, near):
    with pytest.raises(ConfigurationError) as caught:
        lightsft.strategy(asked)
    assert "adapter, full, lora, prefix" in caught.value.expected
    assert near in caught.value.todo


def test_an_unknown_option_lists_the_known_ones_and_the_nearest():
    with pytest.raises(ConfigurationError, match="lora has no option ranc") as caught:
        lightsft.strategy("lora", ranc=4)
    assert "alpha" in caught.value.expected
    assert "'rank'" in caught.value.todo


def test_two_packages_that_claim_one_name_are_both_named(installed):
    installed(("lora", "lightsft_adapters.lora:LoRA"), ("lora", "other_package.lora:TheirLoRA"))
    with pytest.raises(ConfigurationError) as caught:
        registry.strategies()
    assert "lightsft_adapters.lora:LoRA and other_package.lora:TheirLoRA" in caught.value.found


def test_one_package_seen_twice_on_the_path_is_one(installed):
    installed(*[("lora", "lightsft_adapters.lora:LoRA")] * 2)
    assert registry.strategies() == {"lora": LoRA}


@pytest.mark.parametrize("value", ["no_such_package.lora:LoRA", "lightsft_adapters.lora:NoSuchClass"])
def test_a_strategy_that_cannot_be_imported_is_named_with_its_origin(installed, value):
    installed(("lora", "lightsft_adapters.lora:LoRA"), ("broken", value))
    with pytest.raises(ConfigurationError, match=value):
        registry.strategies()
    assert registry.strategy_class("lora") is LoRA


def test_a_class_that_no_package_registers_is_refused_with_the_line_to_add(installed):
    installed(("full", "lightsft_adapters.full:Full"))
    with pytest.raises(ConfigurationError, match=r"lightsft_adapters\.lora:LoRA is not registered") as caught:
        registry.name_of(LoRA())
    assert registry.GROUP in caught.value.todo


def test_a_third_partys_strategy_is_found_by_its_name(installed):
    installed(("mine", "lightsft_adapters.adapter:Adapter"))
    assert isinstance(lightsft.strategy("mine", reduction_factor=2), Adapter)
