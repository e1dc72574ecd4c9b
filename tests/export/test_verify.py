"""The check of a merged checkpoint, repeated later."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightsft.errors import ArtifactError, ConfigurationError, MergeError
from lightsft.export.merge import merge_folder
from lightsft.export.verify import verify
from lightsft_adapters import Full, LoRA
from tests.export.test_from_disk import adapter_of, base_in


@pytest.fixture
def merged(tmp_path):
    """(merged folder, adapter, base), checked from disk."""
    base = base_in(tmp_path, torch.bfloat16)
    adapter = adapter_of(base, LoRA(4), tmp_path / "adapter")
    merge_folder(adapter, tmp_path / "merged", check="tiles", most_rounding=9.0)
    return tmp_path / "merged", adapter, base


def change(file, name, by=1.0):
    tensors = load_file(file)
    save_file({key: tensor + by if key == name else tensor for key, tensor in tensors.items()}, file, {"format": "pt"})


def test_it_finds_what_the_merge_found(merged):
    folder, *_ = merged
    found = verify(folder, check="tiles")
    assert found["passed"]
    assert set(found["checkpoint_sha256"]) == {"model.safetensors"}
    assert set(found["base_sha256"]) == {"model.safetensors"}
    assert verify(folder, check="none")["passed"] is None


def test_a_changed_result_is_found(merged):
    folder, *_ = merged
    change(folder / "model.safetensors", "model.norm.weight")
    with pytest.raises(MergeError, match=r"model\.norm\.weight"):
        verify(folder, check="tiles")


@pytest.mark.slow
def test_by_loading_files_are_the_same_and_logits_too(tmp_path):
    """In both ways to merge."""
    base = base_in(tmp_path)
    for name, strategy in (("lora", LoRA(4)), ("full", Full())):
        folder = tmp_path / f"merged {name}"
        merge_folder(adapter_of(base, strategy, tmp_path / name), folder)
        assert verify(folder)["check"] == "load"
        change(folder / "model.safetensors", "model.norm.weight")
        with pytest.raises(MergeError, match=r"the result's model\.safetensors changed"):
            verify(folder)


def test_another_adapter_or_base_is_refused(merged, tmp_path):
    folder, adapter, _ = merged
    other = shutil.copytree(adapter, tmp_path / "other")
    change(other / "adapter_model.safetensors", next(iter(load_file(other / "adapter_model.safetensors"))))
    with pytest.raises(MergeError, match="the adapter changed"):
        verify(folder, adapter=other)
    shutil.move(adapter, tmp_path / "moved")
    with pytest.raises(ArtifactError, match="--adapter"):
        verify(folder)
    assert verify(folder, adapter=tmp_path / "moved", check="tiles")["passed"]


def test_what_was_never_certified_is_refused(merged, tmp_path):
    folder, _, base = merged
    with pytest.raises(ArtifactError, match=r"certificate\.json"):
        verify(base)
    certificate = json.loads((folder / "certificate.json").read_text())
    del certificate["adapter"]
    (folder / "certificate.json").write_text(json.dumps(certificate))
    with pytest.raises(ArtifactError, match=r"certificate\.json"):
        verify(folder)
    with pytest.raises(ConfigurationError, match="check='all'"):
        verify(folder, check="all")


def test_from_the_command_line(command, merged):
    folder, *_ = merged
    ended = command("verify", folder, "--check", "tiles")
    assert ended.code == 0, ended
    assert "sha256" in ended.out
    change(folder / "model.safetensors", "model.norm.weight")
    ended = command("verify", folder, "--check", "tiles")
    assert ended.code == 2
    ended.says("model.norm.weight")
