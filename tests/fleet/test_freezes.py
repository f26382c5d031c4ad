"""Freezes of a fleet: how they are written, and when they last."""

import datetime as dt
from zoneinfo import ZoneInfo

import pytest

from fleet_server.freezes import frozen_until, moment, parse, said
from fleet_server.sections import RolloutSettings

BERLIN = ZoneInfo("Europe/Berlin")


def at(text, zone=BERLIN):
    return dt.datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


@pytest.mark.parametrize(
    ("freeze", "now", "until"),
    [
        ("mon-fri 08:00-18:00 Europe/Berlin", "2026-12-01T07:59", None),
        ("mon-fri 08:00-18:00 Europe/Berlin", "2026-12-01T08:00", "2026-12-01T18:00"),
        ("mon-fri 08:00-18:00 Europe/Berlin", "2026-12-01T18:00", None),
        ("mon-fri 08:00-18:00 Europe/Berlin", "2026-12-05T12:00", None),  # a Saturday
        ("fri 22:00-06:00 Europe/Berlin", "2026-12-05T05:59", "2026-12-05T06:00"),  # it began on Friday
        ("fri 22:00-06:00 Europe/Berlin", "2026-12-04T05:59", None),
        ("sat 00:00-24:00 Europe/Berlin", "2026-12-05T12:00", "2026-12-06T00:00"),
        ("01:00-04:00 Europe/Berlin", "2026-03-29T01:30", "2026-03-29T04:00"),  # the clock goes from 2 to 3 meanwhile
        ("2026-12-23T18:00+01:00/2027-01-02T08:00+01:00", "2026-12-31T00:00", "2027-01-02T08:00"),
        ("2026-12-23T18:00+01:00/2027-01-02T08:00+01:00", "2027-01-02T08:00", None),
    ],
)
def test_when_a_freeze_lasts(freeze, now, until):
    assert frozen_until([parse(freeze)], at(now)) == (None if until is None else at(until))


def test_without_a_zone_it_is_utc():
    assert frozen_until([parse("12:00-13:00")], at("2026-12-01T12:30", dt.timezone.utc)) == at(
        "2026-12-01T13:00", dt.timezone.utc
    )


def test_freezes_that_follow_each_other_are_one():
    found = [
        parse("fri 08:00-24:00 Europe/Berlin"),
        parse("sat,sun 00:00-24:00 Europe/Berlin"),
        parse("mon 00:00-06:00 Europe/Berlin"),
    ]
    assert frozen_until(found, at("2026-12-04T09:00")) == at("2026-12-07T06:00")


def test_a_fleet_that_is_always_frozen_is_so_for_long():
    assert frozen_until([parse("00:00-24:00")], 0.0) > 365 * 86400.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at night", "no time zone"), ("", "is neither DAYS"), ("mon 8-18", "is neither DAYS"), ("mon 08:00-18:00 Europe/Atlantis", "no time zone"),
        ("2026-12-23T18:00/2027-01-02T08:00", "does not say its time zone"), ("2027-01-02T08:00Z/2026-12-23T18:00Z", "ends before it begins"),
        ("2026-12-23Txx/2027-01-02T08:00Z", "is no moment"),
    ],
)  # fmt: skip
def test_what_is_no_freeze(text, expected):
    with pytest.raises(ValueError, match=expected):
        parse(text)
    with pytest.raises(ValueError, match=expected):
        RolloutSettings(freeze=(text,))


def test_moments():
    assert moment("2026-12-24T02:00+01:00") == moment("2026-12-24T01:00Z") == at("2026-12-24T02:00")
    assert said(at("2026-12-24T02:00")) == "2026-12-24 01:00 UTC"
