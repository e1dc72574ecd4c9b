"""Personal data is found where it is, and numbers that are none are left alone."""

import pytest

from lightsft.doctor.personal_patterns import is_card, is_iban, masked, personal

HIDDEN = {
    "email": {
        "write to jane.doe+news@mail.example.co.uk, please": "write to j***@m***.uk, please",
        "<jane@example.com>": "<j***@e***.com>",
    },
    "phone": {
        "call +49 30 901820 now": "call +49 ** ****20 now",
        "call +49 (0)30 901-820.": "call +49 (*)** ***-*20.",
        "+14155550123": "+14*******23",
        "(415) 555-0123": "(41*) ***-**23",
        "tel. 415-555-0123": "tel. 41*-***-**23",
        "1-415-555-0123": "1-4**-***-**23",
        "020 7946 0958": "02* **** **58",
        "030/1234567": "03*/*****67",
        "01 23 45 67 89": "01 ** ** ** 89",
        "0049 170 1234567": "00** *** *****67",
    },
    "iban": {
        "DE89 3704 0044 0532 0130 00": "DE89 **** **** **** **** 00",
        "GB82WEST12345698765432": "GB82****************32",
        "NO93 8601 1117 947": "NO93 **** **** *47",
    },
    "card": {
        "4111 1111 1111 1111": "**** **** **** 1111",
        "5500-0000-0000-0004": "****-****-****-0004",
        "3782 822463 10005": "**** ****** *0005",
        "card 6011000990139424.": "card ************9424.",
    },
    "ip_address": {"from 93.184.216.34": "from 93.***.***.**"},
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in HIDDEN.items() for text in texts])
def test_it_is_found_and_masked(kind, text):
    assert [one.kind for one in personal(text)] == [kind]
    assert masked(text) == HIDDEN[kind][text]


HARMLESS = (
    "In 1984, 1,299 of 20000 people paid 49.90 EUR (about 1.234.567,89 in total).",
    "2024-01-31, 31.01.2024, 01/31/2024, 01-02-2003 and 2024-01-31T12:00:00Z",
    "from 09:30 to 10:45, 1990-2000, pages 100-200",
    "3.14159265358979 and -0.123456789 and 6.02214076e23",
    "ISBN 978-3-16-148410-0, ISBN 0-306-40615-2",
    "order 1234567890123456, 4111111111111112, 1700000000000000 ms",
    "1700000000 and 12345678 and 0123456789",
    "version 10.2.3 and 1.2.3.4, see 2.1.1.1",
    "127.0.0.1 and 192.168.178.20 and 10.0.0.138 and 999.184.216.34",
    "+5, +100000000 followers, 3+12345678=12345681, C++ 20",
    "0 10 20 30 40 50, 1 2 3 4 5 6 7 8 9 10 11 12",
    "100 200 3000, 212 555 1234",
    "@user said hi @home, price@ 5, a@b, not an @ddress",
    "RE: AB12 CDEF GHIJ KLMN, DE88 3704 0044 0532 0130 00",
    "2:0 4-4-2 7-6 (7-4) 6-4",
    "37.7749, -122.4194",
    "0xdeadbeef 550e8400-e29b-41d4-a716-446655440000",
)


@pytest.mark.parametrize("text", HARMLESS)
def test_numbers_that_are_nobodys_are_left_alone(text):
    assert personal(text) == []
    assert masked(text) == text


def test_a_number_counts_once():
    text = "IBAN DE89 3704 0044 0532 0130 00, card 4111 1111 1111 1111, phone +49 30 901820"
    assert [one.kind for one in personal(text)] == ["iban", "card", "phone"]


def test_checksums_notice_a_changed_digit():
    assert is_iban("FR1420041010050500013M02606")
    assert not is_iban("FR1420041010050500013M02607")
    assert is_card("5555555555554444")
    assert not is_card("5555555555554445")


def test_long_texts_take_linear_time():
    import time

    began = time.perf_counter()
    for text in ("a" * 200_000, "1 " * 100_000, "a." * 100_000, "+1" * 100_000, "0123-" * 40_000, "1234 " * 40_000):
        personal(text + "@")
    assert time.perf_counter() - began < 5
