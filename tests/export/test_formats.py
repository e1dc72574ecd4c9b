"""One way to every format: the table, the options, the flags of the command line."""

import inspect
from types import SimpleNamespace

import pytest

import lightsft.export
from lightsft.cli.export import command as export_command
from lightsft.errors import ConfigurationError
from lightsft.export import FORMATS, export
from lightsft.export.formats import options_of

FIGURES = {"largest_difference": 0.5, "largest_value": 2.0, "limit": 1.0, "positions": 3, "inputs": 1}
CERTIFICATE = {"sha256": {"model.any": "0"}, "bytes": 10**6, "fp32": FIGURES, "compared": FIGURES}
HOME = {
    "onnx": "lightsft.export.onnx_graph.export_folder",
    "gguf": "lightsft.export.gguf_file.export_gguf",
    "ctranslate2": "lightsft.export.ctranslate2_folder.export_ctranslate2",
}
GIVEN = {
    "onnx": ({"quantize": "int8", "force": True}, {"quantize": "int8", "force": True, "dequantize": False}),
    "gguf": ({"type": "bf16", "lora": True}, {"kind": "bf16", "lora": True}),
    "ctranslate2": ({"type": "int8"}, {"kind": "int8"}),
}


@pytest.mark.parametrize("to", HOME)
def test_a_format_gets_what_was_asked_for(monkeypatch, tmp_path, to):
    called = SimpleNamespace()

    def write(source, out, **options):
        called.source, called.out, called.options = source, out, options
        return CERTIFICATE

    monkeypatch.setattr(HOME[to], write)
    options, expected = GIVEN[to]
    exported = export(str(tmp_path / "adapter"), str(tmp_path / "out"), to=to, base=tmp_path / "base", **options)
    called.options.pop("rows", None)
    assert (called.source, called.out) == (tmp_path / "adapter", tmp_path / "out")
    assert called.options == {"base": str(tmp_path / "base"), **expected}
    assert (exported.folder, exported.certificate) == (tmp_path / "out", CERTIFICATE)
    assert exported.said["exported"].startswith(str(tmp_path / "out"))
    assert "largest difference" in exported.said["certificate"]


def test_an_unknown_format_and_options_of_another_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no format 'coreml'\nExpected: one of onnx, gguf, ctranslate2"):
        export(tmp_path, tmp_path / "out", to="coreml")
    with pytest.raises(
        ConfigurationError, match=r"--quantize, --rank with --to gguf\nExpected: .*--type, --lora or none"
    ):
        export(tmp_path, tmp_path / "out", to="gguf", quantize="int8", lora=True, rank=3)


def test_every_option_of_a_format_is_a_flag_of_the_command():
    flags = set()
    for name, parameter in inspect.signature(export_command, eval_str=True).parameters.items():
        (option,) = parameter.annotation.__metadata__
        given = option.default if isinstance(option.default, str) else name  # its first word, as typer takes it
        flags.add(given.removeprefix("--"))
    assert {name for to in FORMATS for name in options_of(to)} == flags - {"adapter", "to", "out", "base"}


def test_names_that_are_not_there_are_told_with_those_that_are():
    with pytest.raises(AttributeError, match=r"no 'exports'; its public names are FORMATS, Exported, export"):
        _ = lightsft.export.exports
