"""Texts that spell special tokens: known to the tokenizer they act as such, unknown they fall to pieces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lightsft.doctor.collect import Collector, Seen, Tally
from lightsft.doctor.findings import NOTHING, Finding, plural
from lightsft.doctor.samples import excerpt

# The forms in use: <|im_end|>, <｜User｜>, [INST], <<SYS>>, </s>, [MASK], <start_of_turn>, <pad>
LOOKS_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|\[/?INST\]|\[(?:CLS|SEP|MASK|PAD|UNK|BOS|EOS)\]|<</?SYS>>|</?s>"
    r"|<(?:pad|unk|mask|bos|eos|sep|cls|start_of_turn|end_of_turn|begin_of_text|end_of_text|endoftext)>"
)


class SpecialTokens(Collector):
    """A row counts once, as known if any of what it spells is."""

    def __init__(self, tokenizer: Any = None) -> None:
        self._known, self._unknown = Tally(), Tally()
        own = special_tokens(tokenizer) if tokenizer is not None else []
        self._own = re.compile("|".join(map(re.escape, own))) if own else None
        self._opening = all(token[0] in "<[" for token in own)

    def see(self, row: Seen) -> None:
        """Texts without "<" and "[" are not searched, unless the tokenizer has special tokens of another form."""
        marked = b"<" in row.marks or b"[" in row.marks
        if self._own is not None and (marked or not self._opening) and (match := self._own.search(row.text)):
            self._known.add(row.split, row.number, excerpt(row.text, match.start()))
        elif marked and (match := LOOKS_SPECIAL.search(row.text)):
            self._unknown.add(row.split, row.number, excerpt(row.text, match.start()))

    def findings(self) -> Iterator[Finding]:
        """Known ones, unknown ones."""
        if self._known.count:
            title = f"{plural(self._known.count, 'row')} with a special token of the tokenizer spelled in the text"
            fix = "remove or escape it, unless it is meant: from within a text it ends turns and opens roles"
            action = "takes it for the special token, not for its letters"
            yield self._known.finding("special_token", "warning", title, action=action, fix=fix)
        if self._unknown.count:
            if self._own is None:
                title, action = "what looks like a special token (no tokenizer was given to tell)", NOTHING
            else:
                title, action = "what looks like another tokenizer's special token", "splits it into ordinary tokens"
            title = f"{plural(self._unknown.count, 'row')} with {title}"
            fix = "remove it, or use the template of the tokenizer that is trained"
            yield self._unknown.finding("foreign_special_token", "note", title, action=action, fix=fix)


def special_tokens(tokenizer: Any) -> list[str]:
    """All that a tokenizer cuts out of a text before anything else, longest first; single characters are left out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {*map(str, tokenizer.all_special_tokens), *(token.content for token in added if token.special)}
    return sorted((name for name in names if len(name) > 1), key=lambda name: (-len(name), name))
