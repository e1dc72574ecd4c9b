"""What docs/data.md shows runs."""

import re
from pathlib import Path

from lightsft.data.file_kinds import READERS
from lightsft.data.folders import MEMBERS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_documented_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL):
        exec(block, names)
    assert len(names["found"]) == 4


def test_every_kind_of_file_is_documented():
    endings = {*READERS, *(ending for endings in MEMBERS.values() for ending in endings)}
    table = DOCUMENT.partition("## Reading")[0]
    assert [ending for ending in endings if ending.removeprefix(".") not in re.split(r"\W+", table)] == []
