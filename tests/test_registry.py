import tomllib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import lightsft
from lightsft import registry
from lightsft.config import StrategySpec
from lightsft.errors import ConfigurationError
from lightsft_adapters import Adapter, Full, LoRA, Prefix
from lightsft_adapters.peft import Peft

OURS = {"adapter": Adapter, "full": Full, "lora": LoRA, "prefix": Prefix}


@dataclass(frozen=True)
class Greeting:
    """A family of strategies; a third party's could look like this."""

    member_name = ""

    @classmethod
    def members(cls):
        return ("hello", "goodbye")

    @classmethod
    def member(cls, name):
        if name == "curse":
            raise ConfigurationError("greeting does not curse", todo="use 'greeting/hello'")
        return {"hello": Hello, "goodbye": Goodbye}[name]

    def inject(self, backbone, *, seed=0):
        raise NotImplementedError


@dataclass(frozen=True)
class Hello(Greeting):
    member_name = "hello"
    loudness: int = 1


@dataclass(frozen=True)
class Goodbye(Greeting):
    member_name = "goodbye"


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
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    declared = pyproject["project"]["entry-points"][registry.GROUP]
    found = registry.strategies()
    assert (OURS | {"peft": Peft}).items() <= found.items()
    assert found.keys() == declared.keys()


@pytest.mark.parametrize("strategy", [Adapter(), Full(), LoRA(), Prefix()], ids=lambda s: type(s).__name__)
def test_a_strategy_is_made_by_the_name_it_goes_by(strategy):
    assert lightsft.strategy(registry.name_of(strategy)) == strategy


def test_options_go_to_the_strategy():
    assert lightsft.strategy("lora", rank=3, alpha=1.5) == LoRA(rank=3, alpha=1.5)


@pytest.mark.parametrize(("asked", "near"), [("lorra", "lora"), ("adaptor", "adapter")])
def test_an_unknown_name_lists_what_is_installed_and_the_nearest(asked, near):
    with pytest.raises(ConfigurationError) as caught:
        lightsft.strategy(asked)
    assert all(f"{name}," in caught.value.expected for name in OURS)
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


def test_a_class_that_its_package_exports_from_elsewhere_goes_by_its_name(installed):
    installed(("broken", "no_such_package:Class"), ("mine", "lightsft_adapters:LoRA"))
    assert registry.name_of(LoRA()) == "mine"


@pytest.mark.parametrize("value", ["json:dumps", "json:JSONDecoder", "tests.test_registry:OURS"])
def test_what_is_no_strategy_is_named_with_its_package(installed, value):
    installed(("broken", value), ("lora", "lightsft_adapters.lora:LoRA"))
    with pytest.raises(ConfigurationError, match=f"'broken' of {value} is no strategy") as caught:
        registry.strategy_class("broken")
    assert "inject" in caught.value.expected
    assert registry.usable() == {"lora": LoRA}
    assert registry.names() == ["broken", "lora"]


def test_a_third_partys_strategy_is_found_by_its_name(installed):
    installed(("mine", "lightsft_adapters.adapter:Adapter"))
    assert isinstance(lightsft.strategy("mine", reduction_factor=2), Adapter)


# ---- families: one entry point, several strategies


@pytest.fixture
def family(installed):
    installed(("greeting", "tests.test_registry:Greeting"), ("lora", "lightsft_adapters.lora:LoRA"))


def test_a_member_of_a_family_is_a_strategy_with_options_of_its_own(family):
    assert lightsft.strategy("greeting/hello", loudness=3) == Hello(loudness=3)
    assert registry.strategy_class("greeting/goodbye") is Goodbye


@pytest.mark.parametrize("strategy", [Hello(loudness=2), Goodbye()])
def test_a_member_goes_by_its_familys_name_and_its_own(family, strategy):
    assert registry.name_of(strategy) == f"greeting/{strategy.member_name}"
    spec = StrategySpec.parse(strategy)
    assert lightsft.strategy(spec.name, **spec.options) == strategy


def test_an_unknown_member_lists_the_members_and_the_nearest(family):
    with pytest.raises(ConfigurationError, match="greeting has no member 'helo'") as caught:
        lightsft.strategy("greeting/helo")
    assert "greeting/NAME with NAME one of hello, goodbye" in caught.value.expected
    assert "'hello'" in caught.value.todo


def test_a_family_may_say_itself_why_something_is_no_member(family):
    with pytest.raises(ConfigurationError, match="greeting does not curse"):
        lightsft.strategy("greeting/curse")


def test_an_unknown_option_of_a_member_lists_its_own(family):
    with pytest.raises(ConfigurationError, match="greeting/hello has no option loudnes") as caught:
        lightsft.strategy("greeting/hello", loudnes=2)
    assert "'loudness'" in caught.value.todo


def test_a_family_without_a_member_asks_for_one(family):
    with pytest.raises(ConfigurationError, match="'greeting' is a family of strategies") as caught:
        lightsft.strategy("greeting")
    assert "hello, goodbye" in caught.value.expected


def test_a_strategy_that_is_no_family_has_no_members(family):
    with pytest.raises(ConfigurationError, match="lora has no members"):
        lightsft.strategy("lora/large")


def test_a_familys_subclass_that_it_does_not_name_is_not_taken_for_a_member_of_another(installed):
    installed(("lora", "lightsft_adapters.lora:LoRA"))

    class Mine(LoRA):
        pass

    with pytest.raises(ConfigurationError, match="Mine is not registered"):
        registry.name_of(Mine())


def test_a_members_yaml_and_command_line_forms_are_one(family):
    forms = ["greeting/hello(loudness=2)", {"name": "greeting/hello", "loudness": 2}]
    made = [lightsft.strategy(spec.name, **spec.options) for spec in map(StrategySpec.parse, forms)]
    assert made == [Hello(loudness=2), Hello(loudness=2)]
