"""Strategies of somebody else's package, each a way in which a trial can go: installed into a folder for a test."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from lightsft.errors import TargetError
from lightsft_adapters import LoRA

DISTRIBUTION = "strangers-1.0.dist-info"
ENTRY_POINTS = """[lightsft.strategies]
killed = tests.comparison.strangers:Killed
broken = tests.comparison.strangers:Broken
refusing = tests.comparison.strangers:Refusing
waiting = tests.comparison.strangers:Waiting
"""


def install(folder):
    """Make the strategies of this file known to processes that have `folder` on their path."""
    information = folder / DISTRIBUTION
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    return os.pathsep.join([str(folder), str(Path(__file__).parents[2])])


@dataclass(frozen=True)
class Killed:
    """The process is killed, as by a machine that has run out of memory."""

    def inject(self, backbone, *, seed=0):
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Broken:
    """A mistake in the strategy."""

    def inject(self, backbone, *, seed=0):
        raise RuntimeError("a bug in a strategy")


@dataclass(frozen=True)
class Refusing:
    """A model that the strategy does not fit."""

    def inject(self, backbone, *, seed=0):
        raise TargetError("no sails", expected="a ship", todo="set sails")


@dataclass(frozen=True)
class Waiting:
    """Placed a second time, it says that it is there and waits for a file `go`: a trial that can be interrupted."""

    where: str

    def inject(self, backbone, *, seed=0):
        folder = Path(self.where)
        if (folder / "tried").exists():
            (folder / "here").touch()
            while not (folder / "go").exists():
                time.sleep(0.05)
        (folder / "tried").touch()
        return LoRA(rank=2).inject(backbone, seed=seed)
