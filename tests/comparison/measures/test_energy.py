"""Joules from counters as Linux shows them, made up here: packages alone, around the wrap, unreadable."""

import sys
import time
import types

import pytest
import torch

from lightsft.comparison.measures.energy import energy, energy_counters, energy_source

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def zone(root, name, kind, microjoules, wraps=1_000_000_000):
    """One zone of powercap."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps}\n")
    return folder / "energy_uj"


def test_the_sum_is_that_of_the_packages(tmp_path):
    one = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    other = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    part = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    whole = zone(tmp_path, "intel-rapl:2", "psys", 0)
    with energy(CPU, tmp_path) as found:
        for file, value in ((one, 7_500_000), (other, 1_000_000), (part, 9_000_000), (whole, 9_000_000)):
            file.write_text(str(value))
    assert found.source == "rapl"
    assert found.joules == pytest.approx(3.5)
    assert energy_source(CPU, tmp_path) == "rapl"


def test_a_counter_that_starts_again_goes_on(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 900, wraps=1000)
    with energy(CPU, tmp_path) as found:
        file.write_text("150")
    assert found.joules == pytest.approx(250e-6)


def test_a_counter_that_starts_again_twice_is_looked_at_in_between(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0, wraps=1000)
    with energy(CPU, tmp_path, often=0.01) as found:
        for value in (700, 400, 100):  # 0.7, 1.4 and 2.1 turns
            file.write_text(str(value))
            time.sleep(0.2)
    assert found.joules == pytest.approx(2100e-6)


def test_what_cannot_be_read_is_none(tmp_path):
    with energy(CPU, tmp_path / "nothing") as found:
        pass
    assert (found.source, found.joules) == (None, None)
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()  # as for anybody but root: an error when it is opened
    assert energy_counters(CPU, tmp_path) == (None, [])


def test_what_cannot_be_read_any_more_is_none(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    with energy(CPU, tmp_path) as found:
        file.unlink()
    assert (found.source, found.joules) == ("rapl", None)


def test_an_error_in_the_block_is_the_block_s_own(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    with pytest.raises(ZeroDivisionError), energy(CPU, tmp_path):
        1 / 0  # noqa: B018


class NVMLError(Exception):
    """As pynvml's."""


def nvml(monkeypatch, read):
    """A pynvml whose one GPU's counter is `read`."""
    module = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda identity: {b"GPU-abc": "handle"}[identity]
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: read()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))


def test_a_gpu_is_asked_through_nvml(monkeypatch, tmp_path):
    counts = iter([1000, 1000, 4500])
    nvml(monkeypatch, lambda: next(counts))
    with energy(CUDA, tmp_path) as found:
        pass
    assert found.source == "nvml"
    assert found.joules == pytest.approx(3.5)


def test_a_gpu_that_does_not_count_has_none(monkeypatch, tmp_path):
    def unable():
        raise NVMLError

    nvml(monkeypatch, unable)
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    assert energy_source(CUDA, tmp_path) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_source(CUDA, tmp_path) is None
