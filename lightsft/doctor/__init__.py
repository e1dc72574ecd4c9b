"""Data that is checked before it costs an hour: one pass over the rows of every split, in bounded memory.

    report = examine({"train": stream_rows("train.jsonl"), "test": stream_rows("test.jsonl")}, task, tokenizer)
    show(report, console)

`examine` hands each row to collectors (one idea per file), which answer with findings: what is wrong, in which rows,
what training will do about it, how to mend it. A collector holds counts, a few row numbers, and at most some bytes per
row; no collector holds the texts.
"""

from __future__ import annotations

from lightsft.doctor.examine import examine
from lightsft.doctor.findings import Finding
from lightsft.doctor.report import Report
from lightsft.doctor.showing import show

__all__ = ["Finding", "Report", "examine", "show"]
