"""What a turn of a conversation wants: "generate" a picture, "edit" one, or "ask" for words; and the model's text.

Plain rules, so that it can be foreseen. In doubt it is a question: words where a picture was wanted cost a sentence
more, a picture where words were wanted is a wrong answer. "answer:", "draw:" and "edit:" decide.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

from unilip.files import read_table

Intent = Literal["generate", "edit", "ask"]
WINDOW = 300  # characters of a message, at its beginning, that can say what it wants
TABLE: dict[str, Any] = read_table("unilip", "intent.json")


def _pattern(parts: Sequence[str]) -> re.Pattern[str]:
    """Compile a pattern of the table, in which {NAME} is one of its fragments."""
    text = "".join(parts)
    for name, fragment in reversed(TABLE["fragments"].items()):
        text = text.replace(f"{{{name}}}", fragment)
    return re.compile(text, re.IGNORECASE)


RULE = {name: _pattern(parts) for name, parts in TABLE["patterns"].items()}
EDITS = [RULE[name] for name in ("visible", "edit", "changes", "fragment", "wanted")]


def intent(text: str, has_picture: bool) -> tuple[Intent, str]:
    """Return what a turn wants, and its text without "please", "draw me" and the like where it wants a new picture.

    With a picture at hand "make it blue", "add a star" or "paint the car red" change it; "draw a car" starts anew.
    """
    text = text.strip()
    if found := RULE["prefix"].match(text):
        word, rest = found[1].lower(), text[found.end() :]
        if word in ("edit", "change"):
            return ("edit" if has_picture else "ask"), rest
        return ("ask" if word in ("answer", "ask") else "generate"), rest
    rest, asked = text, False
    while found := RULE["polite"].match(rest):
        asked = asked or bool(RULE["asked"].search(found[0]))
        rest = rest[found.end() :]
    rest = rest.lstrip(" \t\n,!:.")
    start = rest[:WINDOW]
    asked = asked or bool(RULE["asked"].match(start))
    marks = text.count("?") + text.count("？")
    question = marks > 0 and not (asked and marks == 1 and text[-1] in "?？")
    if question or not start or RULE["told"].search(start):
        return "ask", text
    new = RULE["new"].match(start)
    if new and rest[new.end() :].strip(" \t\n,:;-?"):
        return "generate", rest[new.end() :].strip(" \t\n,:;-")
    drawn = RULE["draw"].match(start)
    if drawn is not None and RULE["not_drawn"].search(start[:80]):
        return "ask", text
    seen = RULE["place"].sub(" ", start)  # without what can be seen, though words have its name
    words = RULE["words"].search(seen) or RULE["head"].match(seen)
    if drawn is None and not (has_picture and RULE["visible"].match(start)) and words:
        return "ask", text
    if has_picture:
        fresh = drawn is not None and not RULE["changes"].match(start)
        clauses = [start, *(start[found.end() :] for found in RULE["clause"].finditer(start))]
        if not fresh and any(rule.match(clause) for rule in EDITS for clause in clauses[:4]):
            return "edit", rest
    about = RULE["about"].search(start)
    if drawn is None and not about:
        drawn = RULE["used"].match(start) or RULE["make"].match(start) or RULE["show"].match(start)
    named = not (has_picture or about or start.lower().startswith("the ") or RULE["sentence"].search(start))
    if drawn is None and named:
        drawn = RULE["noun"].match(start)
    prompt = rest[drawn.end() :].strip(" \t\n,:;-") if drawn else ""
    return ("generate", prompt) if prompt else ("ask", text)
