"""Several adapters in one merge, from the command line to the certificate."""

import json

import pytest
import torch

from lightsft.errors import ConfigurationError, LightsftError
from lightsft.export.merge import merge, merge_folder
from lightsft.export.verify import verify
from lightsft_adapters import Full, LoRA
from tests.export.test_from_disk import adapter_of, base_in, stored


@pytest.fixture
def made(tmp_path):
    """(base, two adapters on it): the second leaves the feed-forward alone."""
    base = base_in(tmp_path)
    one = adapter_of(base, LoRA(4), tmp_path / "one")
    return base, one, adapter_of(base, LoRA(2, targets="attention"), tmp_path / "other", scale=0.1)


def test_a_weighted_sum_adds_what_each_changes(made, tmp_path):
    base, one, other = made
    merge([one, other], out=tmp_path / "both", weights=[0.7, 0.3])
    for folder, adapter in (("only one", one), ("only other", other)):
        merge_folder(adapter, tmp_path / folder, check="none")
    before, both = stored(base), stored(tmp_path / "both")
    alone = [stored(tmp_path / "only one"), stored(tmp_path / "only other")]
    for name, tensor in both.items():
        expected = before[name] + sum(w * (a[name] - before[name]) for w, a in zip((0.7, 0.3), alone, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    certificate = json.loads((tmp_path / "both" / "certificate.json").read_text())
    assert certificate["passed"]
    assert certificate["check"] == "tiles"
    assert [one["weight"] for one in certificate["adapters"]] == [0.7, 0.3]


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_each_method_is_checked_from_disk_and_verified_later(method, made, tmp_path, command):
    _, one, other = made
    arguments = (one, other, "--weights", "0.7,0.3", "--method", method, "--density", "0.4", "--most-rounding", "9")
    ended = command("merge", *arguments, "--out", tmp_path / "both")
    assert ended.code == 0, ended
    assert "against the formula in fp64" in ended.out
    assert verify(tmp_path / "both")["passed"]
    command("merge", *arguments, "--out", tmp_path / "again")
    one, other = (stored(tmp_path / name) for name in ("both", "again"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_cannot_be_put_together_is_refused(made, tmp_path, command):
    base, one, _ = made
    full = adapter_of(base, Full(), tmp_path / "full")
    with pytest.raises(ConfigurationError, match="lightsft convert"):
        merge([one, full], out=tmp_path / "both")
    with pytest.raises(ConfigurationError, match="check='load'"):
        merge([one, one], out=tmp_path / "both", check="load")
    with pytest.raises(LightsftError, match="weights"):
        merge([one, one], out=tmp_path / "both", weights=[1.0])
    for arguments in (
        ["--weights", "a,b"],
        ["--method", "tys"],
        ["--in-memory"],
        ["--density", "2", "--method", "ties"],
    ):
        assert command("merge", one, one, "--out", tmp_path / "both", *arguments).code == 2
    assert not (tmp_path / "both").exists()
