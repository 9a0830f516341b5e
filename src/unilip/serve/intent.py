"""What a turn of a conversation wants: a new picture, a changed one, or words.

In:  the text of the turn, and whether the conversation has a picture. Out: "generate", "edit" or "ask", and the text
that the model should get. Plain rules, so that it can be foreseen; a program should say what it wants instead.
"""

from __future__ import annotations

import re
from typing import Literal

Intent = Literal["generate", "edit", "ask"]

_POLITE = re.compile(
    r"^\W*(?:(?:please|now|then|ok(?:ay)?|and|also|hi|hello|hey|can you|could you|would you|will you|i want you to"
    r"|i(?:'d| would) like you to|kindly|just)\b[\s,!:.]*)*",
    re.IGNORECASE,
)
_PICTURE = r"(?:picture|image|photo|photograph|drawing|painting|illustration|sketch|icon|logo|emoji)s?"
_DRAW = re.compile(
    rf"(?:draw|paint|sketch|illustrate|imagine|render)\b(?:\s+me\b)?(?:\s+(?:an?\s+)?(?:new\s+)?{_PICTURE}\s+of\b)?"
    rf"|(?:generate|create|make|produce|show|give)\b(?:\s+me\b)?\s+(?:an?\s+|the\s+|some\s+)?(?:new\s+)?{_PICTURE}"
    rf"\s*(?:of|with|showing|that shows|:)"
    rf"|(?:an?\s+)?(?:new\s+)?{_PICTURE}\s+(?:of|with|showing)\b"
    r"|generate\b|create\b",
    re.IGNORECASE,
)
_EDIT = re.compile(
    r"(?:edit|change|replace|remove|delete|erase|add|put|insert|turn|make|recolou?r|colou?r|move|swap|convert|transform"
    r"|crop|rotate|flip|mirror|enlarge|shrink|take away|get rid of|set|give|fill|paint|draw|place|double|duplicate)\b",
    re.IGNORECASE,
)
_NEW = re.compile(rf"\b(?:new|another|fresh|different)\s+{_PICTURE}\b|\b{_PICTURE}\s+of\b", re.IGNORECASE)
_CHANGES = re.compile(
    r"(?:paint|draw)\s+(?:the\b|.*\b(?:on|onto|above|below|behind|beside|next to)\s+the\b)", re.IGNORECASE
)
_INTO = re.compile(r"\b(?:it|its|this|that|them|these|the (?:picture|image|photo|background))\b", re.IGNORECASE)


def intent(text: str, has_picture: bool) -> tuple[Intent, str]:
    """Return what a turn wants, and its text without "please", "draw me" and the like where it wants a new picture.

    With a picture at hand "make it blue", "add a star" or "paint the car red" change it; "draw a car" starts anew.
    """
    rest = _POLITE.sub("", text.strip())
    drawn = _DRAW.match(rest)
    if has_picture and _EDIT.match(rest):
        fresh = drawn is not None and (_NEW.search(rest) or not _INTO.search(rest)) and not _CHANGES.match(rest)
        if not fresh:
            return "edit", rest
    if drawn is not None:
        prompt = rest[drawn.end() :].strip(" \t\n,:;-")
        if prompt:
            return "generate", prompt
    return "ask", text.strip()
