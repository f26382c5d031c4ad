"""Who leaves memory for others, as rows."""

import pytest

from agent.serving.models.budget import Resident, choose, soonest_s

NOW = 100.0


def resident(key, size, used, loaded=0.0, free=True):
    return Resident(key, size, used, loaded, free)


ROWS = [
    ("nothing is over", [resident(1, 10, 1.0)], 0, []),
    ("the least recently used goes", [resident(1, 10, 5.0), resident(2, 10, 1.0)], 1, [2]),
    ("as many as are needed, oldest first", [resident(1, 10, 1.0), resident(2, 10, 2.0), resident(3, 10, 3.0)], 15, [1, 2]),
    ("a small old one stays when a larger one has to go anyway", [resident(1, 3, 1.0), resident(2, 20, 2.0)], 15, [2]),
    ("what may not go stays", [resident(1, 10, 1.0, free=False), resident(2, 10, 2.0)], 5, [2]),
    ("what has just come stays", [resident(1, 10, 1.0, loaded=95.0), resident(2, 10, 2.0)], 5, [2]),
    ("what gives nothing stays", [resident(1, 0, 1.0), resident(2, 10, 2.0)], 5, [2]),
    ("not enough may go", [resident(1, 10, 1.0), resident(2, 10, 2.0, free=False)], 15, None),
    ("all have just come", [resident(1, 10, 1.0, loaded=99.0)], 5, None),
    ("nobody is there", [], 5, None),
]


@pytest.mark.parametrize(("name", "residents", "excess", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_the_choice(name, residents, excess, expected):
    found = choose(residents, excess, NOW, 10.0)
    assert (None if found is None else sorted(r.key for r in found)) == expected


def test_how_long_until_time_helps():
    residents = [
        resident(1, 10, 1.0, loaded=95.0),
        resident(2, 10, 1.0, loaded=97.0),
        resident(3, 10, 1.0, loaded=91.0, free=False),
    ]
    assert soonest_s(residents, NOW, 10.0) == 5.0
    assert soonest_s(residents, 200.0, 10.0) == 0.0
