"""What engines say when they refuse something, in words for whoever asked: no prefixes, no lines of source, no paths of this
machine.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePath

MAX_CHARACTERS = 400

PREFIX = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : |Load model from .*? failed: ?|Exception during initialization: |Fatal error: "
)
NODE = re.compile(r"Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: ")
SOURCE = re.compile(r"[\w./+-]*\.(?:cc|cpp|cxx|h|hpp|cu|cuh|inc):\d+:? ?")
FUNCTION = re.compile(r"[\w:<>&*,~ \[\]]*?[\w>]::[\w~<>= ]+(?=\()")  # as far as the parenthesis of its parameters
CONDITION = re.compile(r".{1,200}? was false\. ?")
BARE_FUNCTION = re.compile(r"[A-Z]\w+[a-z][A-Z]\w* (?=[A-Z])")
PLACE = re.compile(r"(?<![\w:/.])/[^\s'\",;()]*[^\s'\",;().:]")


def plain(text: str) -> str:
    """The text of an engine in one line, at most MAX_CHARACTERS of it."""
    text = PREFIX.sub("", " ".join(text.split()))
    text = NODE.sub(lambda found: f"{found[1]}{found[2] and f' {found[2]!r}'}: ", text)
    pieces, at = [], 0
    for found in SOURCE.finditer(text):
        if found.start() >= at:
            pieces.append(text[at : found.start()])
            at = _end_of_place(text, found.end())
    text = " ".join("".join([*pieces, text[at:]]).split())
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"


def _end_of_place(text: str, at: int) -> int:
    """Where the message begins after a line of source: behind the function and the condition that failed there, as far as they
    are told.
    """
    function = FUNCTION.match(text, at)
    if function:
        at = _end_of_function(text, function.end())
        condition = CONDITION.match(text, at)
        return condition.end() if condition else at
    bare = BARE_FUNCTION.match(text, at)
    return bare.end() if bare else at


def _end_of_function(text: str, at: int) -> int:
    """Behind the parameters, and what a compiler says of a function after them: const, a lambda in it, what its templates stand
    for.
    """
    while at < len(text):
        if text[at] in "([":
            at = _closed(text, at)
        elif text.startswith("::", at):
            following = re.compile(r"::[\w<>~]*").match(text, at)
            at = following.end() if following else at + 2
            if text.startswith("()>", at):  # ::<lambda()>
                at += 3
        elif re.compile(r" const\b").match(text, at):
            at += 6
        elif text.startswith(" [with ", at):
            at += 1
        else:
            break
    return at + 1 if text[at : at + 1] == " " else at


def _closed(text: str, at: int) -> int:
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] in "([") - (text[place] in ")]")
        if depth == 0:
            return place + 1
    return len(text)


def without_paths(text: str) -> str:
    """The text with nothing but the names of files where it has paths of this machine.

    Only of what no client has a word in: which folders there are is nobody's business, and names of tensors look like paths.
    """
    return PLACE.sub(_name, text)


def _name(found: re.Match[str]) -> str:
    path = PurePath(found[0])
    return path.name if len(path.parts) > 2 and _is_folder(path.parts[1]) else found[0]


def _is_folder(top: str) -> bool:
    return Path(f"/{top}").is_dir()
