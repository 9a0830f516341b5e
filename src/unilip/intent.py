"""What a turn of a conversation wants: "generate" a picture, "edit" one, or "ask" for words; and the model's text.

Plain rules, so that it can be foreseen. In doubt it is a question: words where a picture was wanted cost a sentence
more, a picture where words were wanted is a wrong answer. "answer:", "draw:" and "edit:" decide.
"""

from __future__ import annotations

import re
from typing import Literal

Intent = Literal["generate", "edit", "ask"]

WINDOW = 300  # characters of a message, at its beginning, that can say what it wants


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE)


_PREFIX = _pattern(r"\W{0,9}(answer|ask|draw|generate|edit|change)\s*:\s*(?=\S)")
_POLITE = _pattern(
    r"\W{0,9}(?:please|now|then|ok(?:ay)?|and|also|hi|hello|hey|(?:can|could|would|will) you|i(?:'d| would) like you to"
    r"|i want you to|kindly|just|no|yes)\b(?!:)"
)
_PICTURE = (
    r"(?:picture|image|photo|photograph|drawing|painting|illustration|sketch|icon|logo|emoji|portrait|poster|scene)s?"
)
_NUMBER = r"(?:one|two|three|four|five|six|seven|eight|nine|ten|some|several|\d{1,2})"
_A = rf"(?:an?|the|another|{_NUMBER})"
# what is said in words, though verbs of making and changing go with it
_WORDS = _pattern(
    r"\b(?:captions?|descriptions?|answers?|lists?|tables?|codes?|latex|markdown|json|html|csv|xml|python|sql|stor(?:y|ies)"
    r"|poems?|haikus?|songs?|jokes?|letters?|options?|summar(?:y|ies)|introductions?|sentences?|words?|paragraphs?|titles?"
    r"|names?|conclusions?|analog(?:y|ies)|comparisons?|explanations?|reports?|essays?|translations?|questions?|reasons?"
    r"|reasoning|adjectives?|guess|sense|equations?|formulas?|outlines?|recipes?|plans?|ideas?|examples?|expressions?"
    r"|emails?|tweets?|posts?|headlines?|slogans?|quiz(?:zes)?|dialog(?:ue)?s?|speech|reviews?|comments?|hashtags?|menus?"
    r"|schedules?|timelines?|checklists?|budgets?|hypothes[ie]s|diagnos[ie]s|predictions?|estimates?|opinions?|feedback"
    r"|advice|tips?|instructions?|arguments?|solutions?|proofs?|hints?|definitions?|synonyms?|ratings?|scores?|totals?"
    r"|sums?|averages?|prices?|prompts?|transcripts?|scripts?|functions?|classes|quer(?:y|ies)|regex|datasets?|itinerary"
    r"|details?|facts?|overview|analysis|interpretation|meaning|time|date|year|subject|topic|class(?:ification)?|lesson"
    r"|keywords?|inventory"
    r"|statements?|responses?|texts?|tasks?|coordinates|bounding|box(?:es)?|tags?|ambiguity|thoughts|blank"
    r"|numbers?(?! of\s+\w+\W*$)|how|where|what|why|which|whether|order)\b"
)
_NOT_DRAWN = _pattern(
    r"\b(?:conclusions?|analog(?:y|ies)|comparisons?|distinctions?|inferences?|parallels?|lessons?|attention|answers?"
    r"|insights?|verbal|words|reasoning|up|how|why|what)\b"
)
_VISIBLE = _pattern(
    r"(?:remove|delete|erase|recolou?r|crop|rotate|flip|mirror|brighten|darken|blur|sharpen|enlarge|shrink|double|duplicate)\s"
    r"+(?:it|him|her|them|this|that|these|those|the|all|everything|everyone|an?|one|two|three|his|her|people|text)\b(?!\s+blank)"
)
_DRAW = _pattern(
    r"(?:draw|paint|sketch|illustrate|render|depict|imagine|visuali[sz]e)\b(?!\s*:)(?!\s+(?:you|my|out|this:|this was))"
    rf"(?:\s+(?:me|us)\b)?(?:\s+(?:an?\s+)?(?:new\s+)?{_PICTURE}\s+of\b)?"
)
_NEW = _pattern(  # ... a picture of
    r"(?:(?:generate|create|make|produce|design|show|give|get|paint|draw|render)\b(?:\s+(?:me|us))?"
    r"|i\s+(?:want|need|would like)|i'd like|let (?:me|us) (?:see|have)|(?:can|could|may) (?:i|we) (?:have|get|see))?"
    rf"(?:\s*to\s+(?:see|have|get))?\s*(?:{_A}\s+)?(?:new\s+|small\s+|simple\s+)?{_PICTURE}"
    r"\s*(?:of|with|showing|that shows|:)"
)
_MAKE = _pattern(rf"(?:generate|create|produce|design|make)\b(?:\s+(?:me|us)\b)?(?=\s+(?:{_A}|something)\s)|generate\b")
_SHOW = _pattern(
    r"(?:show(?:\s+(?:me|us))?|let(?:\s+me|\s+us|'s)\s+see|i\s+want\s+to\s+see|(?:can|could|may)\s+(?:i|we)\s+see)"
    rf"(?=\s+(?:an?|another|{_NUMBER})\s)"
)
_USED = _pattern(  # ... a logo for
    rf"(?:(?:generate|create|make|produce|design)(?:\s+(?:me|us))?|i\s+(?:want|need|would like)|i'd like)\s+(?:{_A}"
    rf"\s+)?(?:new\s+)?(?={_PICTURE}\s+for\b)"
)
_NOUN = _pattern(rf"(?={_A}\s+\w+\s+\w)")
_SENTENCE = _pattern(  # a bare noun phrase has none of these
    r"[.!?:;]\s*\S|\b(?:is|are|was|were|does|do|did|has|have|had|can|will|would|should|please|before|given|shown|you|your"
    r"|i|me|or|things?)\b|\?"
)
# of what is at hand: "an inventory of the room" is no picture to be made
_ABOUT = _pattern(
    r"\b(?:of|for|from|about|on|in|to)\s+(?:this|these|it|the\s+(?:image|picture|photo|painting|chart|graph|diagram|map"
    r"|scene|room|following|above|person|given|provided))\b"
)
_IT = r"(?:it|him|her|his|them|its|this|that|these|those|the|all|everything)"
_SOME = rf"(?:{_IT[3:-1]}|an?|more|another|{_NUMBER})"
_EDIT = _pattern(
    rf"(?:edit|change|replace|make|move|swap|transform|set|fill|paint|draw|sketch|let)\s+{_IT}\b"
    rf"|(?:remove|delete|erase|add|put|insert|place|recolou?r|colou?r|use)\s+{_SOME}\b"
    r"|change\s+\w+\s+(?:to|into)\b|(?:put|place)\s+\w+\s+(?:on|in|into|over|behind|next to)\s+(?:it|him|her|them"
    r"|the)\b|give\s+(?:(?:it|him|her|them)\s+\w|the\s+\w+\s+(?:an?|\d|two|more)\b)"
    r"|turn\s+(?:\w+\s+){1,4}into\s+(?:an?|night|day|winter|summer)\b|turn\s+(?:it|the(?:\s+(?!into\b)\w+){1,2})\s+(?!into\b)\w+\W*$"
    r"|convert\s+(?:\w+\s+){1,3}(?:in)?to\s+(?:an?|black|gr[ae]y\w*|sepia|colou?r)\b"
    r"|get rid of|take away|undo\b|zoom\s+(?:in|out)|(?:add|remove|delete|erase)\s+\w+\W*$"
)
_CHANGES = _pattern(
    r"(?:paint|draw|sketch)\s+(?:the\s+\w+\s+\w+$|.*\s(?:on|onto|above|below|under|behind|beside|next to)\s+the\b)"
)
_FRAGMENT = _pattern(  # of a wish about the picture at hand
    r"(?:(?:a\s+(?:bit|little)\s+)?(?:bigger|smaller|larger|brighter|darker|lighter)\b|with(?:out)?\s+(?:an?|the)\b"
    r"|in\s+\w+(?:\s+please)?\W*$|as\s+an?\b|the\s+same\b|(?:more|less|fewer)\s+\w+\W*$|try again\b|another one\b"
    r"|(?:it|(?:the|that)\s+(?:other\s+)?\w+|,?\s*the other one)\s+should\s+(?:be|have|wear|look|get)\b)"
)
_WANTED = _pattern(
    r"(?:i\s+(?:want|need|would like)|i'd like)\s+(?:it|them|him|her|the\s+\w+)\s+(?:to\s+be\s+|in\s+)?\w"
)
_ASKED = _pattern(r"(?:can|could|would|will) you\b|(?:can|could|may) (?:i|we) (?:have|get|see)\b")
_CLAUSE = _pattern(r"[,.;!]\s*(?:but|now|and|so|then|please|\s)*(?=\w)")


def intent(text: str, has_picture: bool) -> tuple[Intent, str]:
    """Return what a turn wants, and its text without "please", "draw me" and the like where it wants a new picture.

    With a picture at hand "make it blue", "add a star" or "paint the car red" change it; "draw a car" starts anew.
    """
    text = text.strip()
    if found := _PREFIX.match(text):
        word, rest = found[1].lower(), text[found.end() :]
        if word in ("edit", "change"):
            return ("edit" if has_picture else "ask"), rest
        return ("ask" if word in ("answer", "ask") else "generate"), rest
    rest, asked = text, False
    while found := _POLITE.match(rest):
        asked = asked or bool(_ASKED.search(found[0]))
        rest = rest[found.end() :]
    rest = rest.lstrip(" \t\n,!:.")
    start = rest[:WINDOW]
    asked = asked or bool(_ASKED.match(start))
    question = "?" in text and not (asked and text.count("?") == 1 and text.endswith("?"))
    if question or not start:
        return "ask", text
    new = _NEW.match(start)
    if new and rest[new.end() :].strip(" \t\n,:;-?"):
        return "generate", rest[new.end() :].strip(" \t\n,:;-")
    drawn = _DRAW.match(start)
    if drawn is not None and _NOT_DRAWN.search(start[:80]):
        return "ask", text
    if drawn is None and not (has_picture and _VISIBLE.match(start)) and _WORDS.search(start):
        return "ask", text
    if has_picture:
        fresh = drawn is not None and not _CHANGES.match(start)
        clauses = [start, *(start[found.end() :] for found in _CLAUSE.finditer(start))]
        if not fresh and any(
            one.match(clause) for one in (_VISIBLE, _EDIT, _CHANGES, _FRAGMENT, _WANTED) for clause in clauses[:4]
        ):
            return "edit", rest
    if drawn is None and not _ABOUT.search(start):
        drawn = _USED.match(start) or _MAKE.match(start) or _SHOW.match(start)
    if (
        drawn is None
        and not has_picture
        and not start.lower().startswith("the ")
        and _NOUN.match(start)
        and not _SENTENCE.search(start)
    ):
        drawn = _NOUN.match(start)
    if drawn is not None:
        prompt = rest[drawn.end() :].strip(" \t\n,:;-")
        if prompt:
            return "generate", prompt
    return "ask", text
