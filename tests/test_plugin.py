"""The example of a third party's strategy, as a user gets it: installed by pip into a folder of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from tests.run_fixtures import bert, flags, rows_csv, single  # noqa: F401
from tests.tiny_models import off

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"
MODULE = "lightsft_ssf"


def installed(source, target):
    """Install without an index, with the build tools that are there."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


def python(*arguments, path):
    """Python in a process that finds the packages of the folders in `path` too."""
    folders = [*map(str, path), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The folder that it is installed in."""
    source = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("source") / "plugin")
    return installed(source, tmp_path_factory.mktemp("site"))


@pytest.fixture
def plugin(package, monkeypatch):
    """The module, in this process."""
    monkeypatch.syspath_prepend(package)
    module = __import__(MODULE)
    yield module
    del sys.modules[MODULE]


def test_it_is_fewer_than_60_lines_of_python():
    assert sum(len(file.read_text().splitlines()) for file in PLUGIN.rglob("*.py")) < 60


@pytest.mark.slow
def test_it_shows_among_the_strategies(package):
    done = python("-m", "lightsft", "strategies", path=[package])
    assert done.returncode == 0, done.stderr
    shown = {line.split()[0]: line for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert "2210.08823" in shown["ssf"]
    assert {"full", "lora"} <= shown.keys()


@pytest.mark.slow
def test_it_keeps_the_contract_of_a_strategy(package):
    script = (
        "from lightsft.testing import TINY_MODELS, check_strategy\n"
        "from lightsft_ssf import SSF\n"
        "from tests.tiny_models import tiny\n"
        "for model in (*TINY_MODELS, lambda: tiny('gpt2')): check_strategy(SSF(), model)"
    )
    done = python("-W", "error::UserWarning", "-c", script, path=[package, Path(__file__).parents[1]])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layer", [torch.nn.Linear(6, 4), torch.nn.Linear(6, 4, bias=False), Conv1D(4, 6)], ids=str)
def test_it_computes_and_merges_its_formula(plugin, layer):
    side, x = plugin.ScaleAndShift(layer), torch.randn(3, 6)
    for parameter in side.parameters():
        torch.nn.init.normal_(parameter)
    weight = layer.weight.double().T if isinstance(layer, Conv1D) else layer.weight.double()
    bias = 0 if layer.bias is None else layer.bias.double()
    shift = 0 if layer.bias is None else side.beta.double()
    expected = side.gamma.double() * (x.double() @ weight.T + bias) + shift
    assert off(side(layer, x, layer(x)), expected) < 1e-6
    with torch.no_grad():
        for name, value in side.merged(layer).items():
            layer.get_parameter(name).copy_(value)
    assert off(layer(x), expected) < 1e-6


@pytest.mark.slow
def test_it_trains_and_merges_from_the_command_line(package, bert, rows_csv, tmp_path):  # noqa: F811
    out, merged = tmp_path / "out", tmp_path / "merged"
    values = single(bert, rows_csv, out) | {"strategy": "ssf"}
    for arguments in (["train", *flags(**values)], ["merge", out, "--out", merged]):
        done = python("-m", "lightsft", *arguments, path=[package])
        assert done.returncode == 0, done.stderr
    difference = re.search(r"largest logit difference (\S+) on", done.stdout)
    assert float(difference[1]) < 1e-5
    assert (merged / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_second_package_of_that_name_is_an_error_that_names_both(package, tmp_path):
    other = shutil.copytree(PLUGIN, tmp_path / "source")
    for file in (other / "pyproject.toml", other / f"{MODULE}.py"):
        file.write_text(file.read_text().replace(MODULE, "other_ssf").replace("lightsft-ssf", "other-scale-and-shift"))
    (other / f"{MODULE}.py").rename(other / "other_ssf.py")
    done = python("-m", "lightsft", "strategies", path=[package, installed(other, tmp_path / "site")])
    assert done.returncode == 2
    for fragment in ("'ssf'", "lightsft-ssf", "other-scale-and-shift"):
        assert fragment in done.stderr
    assert "Traceback" not in done.stderr
