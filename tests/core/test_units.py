import pytest
from hypothesis import given
from hypothesis import strategies as st

from effitrain.core.errors import InputError
from effitrain.core.units import LEAST_BYTES, counted, format_bytes, format_duration, parse_bytes


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (9840, "2 h 44 min"), (273600, "3 d 4 h")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20G", 20 * 2**30),
        ("20GiB", 20 * 2**30),
        ("20GB", 20 * 10**9),
        ("1.5g", 3 * 2**29),
        (" 512 M ", 512 * 2**20),
        ("3000KB", 3_000_000),
        ("2T", 2 * 2**40),
        ("200000B", 200_000),
        ("100000", 100_000),
        (7 * 2**20, 7 * 2**20),
    ],
)
def test_sizes_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "20 X", "-1G", "1e9", "20G20", "nan", "20,5G", -5, "-5", None, True, [1]])
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(InputError, match="not a memory size") as caught:
        parse_bytes(text)  # type: ignore[arg-type]
    assert "20G" in caught.value.next_step


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("20", "20G"), (24, "24G"), ("1.5 ", "1.5G"), ("24576", "24576M"), (99_999, "99999M"), ("9K", "9G"),
        ("20B", "20G"), ("0", "20G"), ("0G", "20G"), (0, "20G"), ("0.0000001K", "0.0000001G"),
    ],
)  # fmt: skip
def test_what_is_too_small_asks_for_another_unit(text: str | int, meant: str) -> None:
    with pytest.raises(InputError, match=r"is \d+ bytes") as caught:
        parse_bytes(text)
    assert caught.value.next_step == f"Did you mean {meant}?"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (441 * 2**20, "441 MiB"),
        (35_311_779_840, "32.9 GiB"),
        (5000 * 2**30, "5000 GiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 samples"), (1, "1 sample"), (1330, "1,330 samples")])
def test_one_thing_and_several(number: int, text: str) -> None:
    assert counted(number, "sample") == text


@given(st.integers(2 * LEAST_BYTES, 2**50))
def test_what_is_formatted_reads_back_within_its_digits(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.06)
