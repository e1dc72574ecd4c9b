"""E-mail addresses, IBANs, credit cards, IP addresses and phone numbers in a text, and the text with them masked.

A pattern is followed by what makes a number more than digits: IBANs by their checksum (ISO 13616, mod 97), cards by
their issuer's first digits and Luhn's checksum (ISO/IEC 7812), addresses by being public, phone numbers by the
grouping that people write them in. A row of bare digits is none of them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

EMAIL = re.compile(r"(?<![\w.%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w@])")
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]{4}){2,7}(?:[ ]?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
CARD = re.compile(
    r"(?<![\d.,/+-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{4,5})(?![\d/]|[.,-]\d)"
)
IP = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
PHONE = re.compile(
    r"""(?<![\w+.,/:-]) (?<!\d[ ]) (?:
        \+ [1-9]\d{0,2} (?:[ ./-]? \(?\d{1,5}\)?){1,6}            # +49 (0)30 123-456, +14155550123
      | 00 [1-9]\d{0,2} (?:[ /-] \(?\d{2,8}\)?){2,5}              # 0049 30 123456
      | (?:1[ .-])? \([2-9]\d{2}\) [ ]? [2-9]\d{2} [ .-] \d{4}    # (415) 555-0123
      | (?:1[ .-])? [2-9]\d{2} ([.-]) [2-9]\d{2} \1 \d{4}         # 415-555-0123
      | 0[1-9] (?:([ .-])\d{2}) (?:\2\d{2}){3}                    # 01 23 45 67 89
      | \(?0[1-9]\d{1,3}\)? [ /-]{1,3} \d{3,4} (?:[ -]?\d{2,4}){1,2} # 030/123456, 020 7946 0958
    ) (?![\w]|[.,:/-]\d)""",
    re.VERBOSE,
)
ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3[068]\d{12}|(?:6011|65\d\d|35\d\d)\d{12}"
)


class Personal(NamedTuple):
    """One place: its kind, where it is, and what may be shown of it."""

    kind: str
    start: int
    end: int
    masked: str


def personal(text: str, *, digits: int | None = None) -> list[Personal]:
    """Every place in the text, by position; what is part of one is not searched for another.

    digits: how many the text holds, where that is known: what needs more is not searched for.
    """
    found: list[Personal] = []
    for kind, fewest, pattern, valid, mask in _KINDS:
        if (digits is not None and digits < fewest) or (kind == "email" and "@" not in text):
            continue
        for match in pattern.finditer(text):
            start, end = match.span()
            if valid(match.group()) and all(end <= one.start or start >= one.end for one in found):
                found.append(Personal(kind, start, end, mask(match.group())))
    return sorted(found, key=lambda one: one.start)


def masked(text: str) -> str:
    """The text with every place masked."""
    return "".join(_pieces(text))


def _pieces(text: str) -> Iterator[str]:
    end = 0
    for one in personal(text):
        yield text[end : one.start] + one.masked
        end = one.end
    yield text[end:]


def is_iban(text: str) -> bool:
    """The country code and check digits moved to the end, letters as 10 to 35: the remainder by 97 is 1."""
    compact = text.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def is_card(text: str) -> bool:
    """An issuer's digits in front, and Luhn's sum, every second digit from the right doubled, divides by 10."""
    digits = re.sub(r"\D", "", text)
    if not ISSUERS.fullmatch(digits):
        return False
    doubled = (int(d) if i % 2 == 0 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(reversed(digits)))
    return sum(doubled) % 10 == 0


def is_public_address(text: str) -> bool:
    """A public IPv4 address; one of single digits alone (1.2.3.4) is taken for a version or a section."""
    try:
        return ipaddress.IPv4Address(text).is_global and any(len(part) > 1 for part in text.split("."))
    except ValueError:
        return False


def is_phone(text: str) -> bool:
    """8 to 15 digits (E.164); North American numbers have 11 with their 1, and no area code begins with 0 or 1."""
    digits = re.sub(r"\D", "", text)
    if text.startswith("+1"):
        return len(digits) == 11 and digits[1] in "23456789"
    if text.startswith("+") and digits.endswith("0" * 6):  # +100000000: a gain
        return False
    return (9 if text.startswith("+") else 8) <= len(digits) <= 15 and not _is_date(text)


def _is_date(text: str) -> bool:
    return re.fullmatch(r"\d{1,2}([./-])\d{1,2}\1\d{2,4}", text) is not None


def _mask_email(text: str) -> str:
    name, _, domain = text.partition("@")
    return f"{name[0]}***@{domain[0]}***.{domain.rpartition('.')[2]}"


def _mask_digits(front: int, back: int) -> Callable[[str], str]:
    """Letters and digits as stars, but for the first and last few."""

    def mask(text: str) -> str:
        places = [i for i, c in enumerate(text) if c.isalnum()]
        hidden = set(places[front : len(places) - back])
        return "".join("*" if i in hidden else c for i, c in enumerate(text))

    return mask


class _Kind(NamedTuple):
    name: str
    digits: int  # at least
    pattern: re.Pattern[str]
    valid: Callable[[str], bool]
    mask: Callable[[str], str]


_KINDS = (
    _Kind("email", 0, EMAIL, bool, _mask_email),
    _Kind("iban", 4, IBAN, is_iban, _mask_digits(4, 2)),
    _Kind("card", 13, CARD, is_card, _mask_digits(0, 4)),
    _Kind("ip_address", 5, IP, is_public_address, _mask_digits(2, 0)),
    _Kind("phone", 8, PHONE, is_phone, _mask_digits(2, 2)),
)
