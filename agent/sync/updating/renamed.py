"""Words that records on disk had in version 0.1.0, and what they are called now. May go when no device comes from that version
any more.
"""

from __future__ import annotations

_WORDS = (
    (b'"peers":', b'"team":'),
    (b'"waiting_for":"others"', b'"waiting_for":"team"'),
    (b'"gate":"together"', b'"gate":"team"'),
)

TEAM_FILE = ".together.json"
"""What the file with the states of a team was called."""


def with_new_words(data: bytes) -> bytes:
    """The JSON of a state or of a journal, with the words of now. A text in it is never changed: its quotation marks are
    escaped.
    """
    for old, new in _WORDS:
        data = data.replace(old, new)
    return data
