"""Whether an explanation is of surface form: whether it names strings, letters, signs or places in the text as the trigger.

The head of what is said decides, and not where it occurs: "the token '(' in function signatures" is about a token, "descriptions of
tokens" is about descriptions. The rule of which this is a reading stands in published/explanations/README.md, with texts that were
labelled by it.
"""

import re

STRING = "§"  # stands for what is quoted: a string that is named, whatever it says
QUOTED = re.compile(r"(?<!\w)'.+?'(?!\w)|\".+?\"|`.+?`|“.+?”|‘.+?’(?!\w)", re.DOTALL)  # the apostrophe of "don't" opens nothing
SENTENCE_ENDS = re.compile(r"[.!?]\s+(?=[A-Z])")

LEADS = re.compile(
    r"(?:(?:(?:this|the|it)\s+)?(?:(?:feature|latent|neuron|unit|it)\s+)?"  # "This feature fires mainly on"
    r"(?:fires?|activat\w+|responds?|detects?|looks? for|captures?|recogni[sz]es?|identif\w+|represents?|is active|is triggered)\s+"
    r"(?:(?:strongly|mainly|mostly|primarily|specifically|only|most)\s+)?(?:(?:on|for|to|in|when|at|by)\s+)?"
    r"|(?:(?:an?|the|any|all|every|each|different|various)\s+)*"  # "all occurrences of"
    r"(?:occurrence|instance|presence|use|usage|mention|form|variant|variation|spelling|inflection|repetition|sequence|run|row"
    r"|pair|combination|kind|type)s?\s+of\s+"
    r"|(?:(?:immediately|directly|right|just)\s+)?(?:after|before|following|preceding|between|inside|around)\s+)",
    re.IGNORECASE,
)
"""What may stand before the name of a trigger."""

CUTS = re.compile(
    r"in|within|inside|of|at|on|from|for|with|without|that|which|who|whose|when|where|while|as|to|by|after|before|between|around|near"
    r"|about|regardless|whatever|its|their|is|are|like|such|including|especially|particularly|often|usually|typically|mostly|mainly|immediately"
    r"|directly|right|just|across|under|:|e\.g|i\.e"
)
"""Words at which the head of what is said ends."""

SIGNS = re.compile(
    r"(?:letter|vowel|consonant|prefix|suffix|affix|substring|digit|numeral|number|symbol|sign|character|punctuation|mark|comma|period"
    r"|dot|colon|semicolon|bracket|parenthes[ie]s|brace|quote|backtick|apostrophe|underscore|hyphen|dash|slash|backslash|asterisk"
    r"|ellips[ie]s|white-?space|space|tab|newline|break|indentation|capital|capitali[sz]ation|acronym|url|path|fence)(?:s|es)?"
)
"""Nouns that are of surface form by themselves."""

WORDS = re.compile(
    r"(?:token|word|subword|name|identifier|term|string|text|phrase|line|variable|abbreviation|keyword|piece|fragment)s?"
)
"""Nouns that what is said of them makes one thing or the other."""

NAMING = re.compile(r"word|token|subword|keyword|string|substring|letter|prefix|suffix|character|symbol|digit|number")

FORM = re.compile(
    r"\b(?:(?:begin|start|end)\w* (?:with|in)|contain|consist|spell|capital|upper|lower|letter|character|digit|prefix|suffix"
    r"|hyphen|underscore)",
)
MEANING = re.compile(
    r"\b(?:relat|refer|about|mean|denot|express|descri|associat|concern|indicat|signal|convey|discuss|pertain|involv|synonym)",
)
NEIGHBOUR = re.compile(r"\b(?:after|before|follow(?:s|ing)?|preced(?:es?|ing)|(?:followed|preceded) by) (.*)")
PLACE = re.compile(
    r"\b(?:first|last|initial|final|beginning|start|end|position)s?\b.*"
    r"\b(?:token|word|character|line|sentence|paragraph|document|text|context|sequence|file)s?\b"
)


def says_surface(text: str) -> bool:
    """Whether the first sentence names triggers of surface form, and, where it names several (parted by semicolons), no others."""
    whole = text.strip()
    if QUOTED.sub(STRING, whole) == STRING:  # the answer itself stands in quotes
        whole = whole[1:-1]
    first = SENTENCE_ENDS.split(QUOTED.sub(STRING, whole))[0]
    return all(_names_form(part) for part in re.split(r";(?:\s*(?:or|and)\b)?", re.sub(r"\([^)]*\)", "", first)))


def _names_form(said: str) -> bool:
    """Whether one trigger is of surface form. Quotes are replaced by `STRING`."""
    named = said.strip(" .").lower()
    while (lead := LEADS.match(named)) is not None:
        named = named[lead.end() :]
    head, rest = _head(named)
    if not head:
        return False
    if PLACE.match(re.sub(r"^(?:the|an?|very)\s+", "", named)):
        return True
    if head[-1] == STRING or (len(head) == 3 and head[0] == "the" and NAMING.fullmatch(head[1])):  # the word return
        return True
    if SIGNS.fullmatch(head[-1]):
        return not (head[-1].startswith("number") and rest.startswith("of"))  # how many there are of something
    return WORDS.fullmatch(head[-1]) is not None and _defined_by_form(" ".join(head[:-1]), rest)


def _head(named: str) -> tuple[list[str], str]:
    """The words up to the first that says where, when or what for, and the rest."""
    head: list[str] = []
    rest = ""
    for word in re.finditer(rf"{STRING}|:|e\.g|i\.e|[\w-]+", named):
        noun = bool(head) and (head[-1] == STRING or any(kind.fullmatch(head[-1]) for kind in (SIGNS, WORDS)))
        if CUTS.fullmatch(word[0]) or (noun and word[0].endswith(("ing", "ed"))):  # "commas separating items"
            rest = named[word.start() :]
            break
        head.append(word[0])
    while head and head[-1] in ("and", "or"):  # "the token 'array' and its plural"
        head.pop()
    return head, rest


def _defined_by_form(before: str, after: str) -> bool:
    """Whether words are told by their letters or their neighbours, by what stands before and after the noun: the first says it."""
    meant = MEANING.search(after)
    after = after[: meant.start()] if meant else after
    if FORM.search(before) or FORM.search(after):
        return True
    neighbour = NEIGHBOUR.search(after)
    return neighbour is not None and _names_form(neighbour[1])
