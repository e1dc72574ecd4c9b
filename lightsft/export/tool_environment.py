"""A tool's environment: packages in a folder of their own under the user's cache, made on demand and used again.

The tool runs with this interpreter and its packages, and with the folder before them. Nothing else is installed along:
a loose requirement can neither change what is installed nor fetch another torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lightsft.errors import ConfigurationError
from lightsft.files import disk_errors

_PIP = "--quiet --disable-pip-version-check --no-input --no-deps --no-compile --only-binary :all: --retries 1"


@dataclass(frozen=True)
class Package:
    """One version of a package; `sha256` of its wheel, where one wheel serves every machine."""

    name: str
    version: str
    sha256: str | None = None

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


def cache_folder() -> Path:
    """Where environments are kept: `lightsft` under $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightsft"


def tool_environment(name: str, packages: Sequence[Package]) -> Path:
    """The folder NAME-VERSION-PYTHON that holds `packages`, of which the first names the version; made if it is not
    there, whole or not at all.

    Raises ConfigurationError where they cannot be had.
    """
    place = cache_folder() / f"{name}-{packages[0].version}-{sys.implementation.cache_tag}"
    if not place.is_dir():
        _make(place, packages)
    return place


def in_environment(folder: Path) -> dict[str, str]:
    """The environment variables of a process that runs in it, without the hub."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _make(place: Path, packages: Sequence[Package]) -> None:
    try:
        version("pip")
    except PackageNotFoundError:
        raise ConfigurationError(
            f"{place} is not there, and this Python has no pip to make it",
            expected=", ".join(package.requirement for package in packages),
            todo=f"python -m ensurepip, or uv pip install {_by_hand(place, packages)}",
        ) from None
    with disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            for package in packages:
                _install(package, scratch, place, packages)
            with suppress(AttributeError):  # Windows has none
                os.sync()
            if not place.is_dir():  # another process may have made it
                scratch.chmod(0o755)
                os.replace(scratch, place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _install(package: Package, scratch: Path, place: Path, packages: Sequence[Package]) -> None:
    """One at a time: pip takes hashes for all packages of a call, or for none."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(package.requirement + (f" --hash=sha256:{package.sha256}" if package.sha256 else "") + "\n")
        command = [sys.executable, "-m", "pip", "install", *_PIP.split(), "--target", str(scratch), "-r", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise ConfigurationError(
            f"{package.requirement} cannot be installed: {' '.join(reasons)[-600:]}",
            expected="a package index within reach, the first time",
            todo=f"connect once; or bring the wheels along (pip download --no-deps) and run: pip install --no-index "
            f"--find-links WHEELS {_by_hand(place, packages)}",
        )


def _by_hand(place: Path, packages: Sequence[Package]) -> str:
    return f"--no-deps --target {place} {' '.join(package.requirement for package in packages)}"
