"""The session of docs/statistics.md."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "statistics.md"


def test_the_documented_session_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    verdict, near = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"lora beats prefix by \d+\.\d points \[\d+\.\d, \d+\.\d\]", verdict)
    assert near == "no other strategy is shown to be within 1 point of lora"
