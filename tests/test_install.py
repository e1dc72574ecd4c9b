"""Set-up: a CUDA build of torch is not pulled by accident."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture
def install(monkeypatch):
    path = Path(__file__).parent.parent / "tools" / "install.py"
    spec = importlib.util.spec_from_file_location("install", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.delenv("LIGHTSFT_ALLOW_CUDA", raising=False)
    return module


def plan(*requirements):
    return json.dumps({"install": [{"metadata": {"version": "2.13.0", "requires_dist": list(requirements)}}]})


def test_a_cuda_build_on_a_machine_without_a_driver_is_refused_with_the_way_out(install, monkeypatch):
    monkeypatch.setattr(install, "pip", lambda *arguments, **options: plan("filelock", "nvidia-cublas==13.0"))
    with pytest.raises(SystemExit, match=r"(?s)CUDA.*CPU wheels.*LIGHTSFT_ALLOW_CUDA=1") as stop:
        install.refuse_accidental_cuda()
    assert "2.13.0" in str(stop.value)


def test_a_cpu_build_is_accepted(install, monkeypatch):
    monkeypatch.setattr(install, "pip", lambda *arguments, **options: plan("filelock", "sympy"))
    install.refuse_accidental_cuda()


def test_a_cuda_build_is_accepted_where_there_is_a_driver_or_a_wish(install, monkeypatch):
    def unasked(*arguments, **options):
        raise AssertionError("pip was asked")

    monkeypatch.setattr(install, "pip", unasked)
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    install.refuse_accidental_cuda()
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    monkeypatch.setenv("LIGHTSFT_ALLOW_CUDA", "1")
    install.refuse_accidental_cuda()
