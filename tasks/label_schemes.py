"""What the labels of words say: which words are an entity, or no entities at all.

    IOB      B-PER begins an entity, I-PER continues it, O is outside. IOB2 and IOB1; with I- alone, IO
    BIOES    also E-PER for the last word and S-PER for a single one; BILOU and BMES mean the same
    plain    PER for every word of an entity, O outside: neighbours with one label are one entity
    ""       labels that are no entities, such as parts of speech

A prefix may be written in other ways: B_PER, b-per, PER-B, or B alone where there is only one type.
"""
import re
from dataclasses import dataclass

from core.configurator import UserError

# The letters of a scheme, and what they mean: Begin, Inside, End, Single.
SCHEMES = {
    "IOB": {"B": "B", "I": "I"},
    "BIOES": {"B": "B", "I": "I", "E": "E", "S": "S"},
    "BILOU": {"B": "B", "I": "I", "L": "E", "U": "S"},
    "BMES": {"B": "B", "M": "I", "E": "E", "S": "S"},
    "BMEW": {"B": "B", "M": "I", "E": "E", "W": "S"},
}
PREFIX = re.compile(r"(?P<letter>[BIESLUMW])(?P<mark>[-_:/|.])(?P<type>.+)", re.IGNORECASE)
SUFFIX = re.compile(r"(?P<type>.+)(?P<mark>[-_:/|.])(?P<letter>[BIESLUMW])", re.IGNORECASE)
ALONE = re.compile(r"(?P<letter>[BIESLUMW])(?P<mark>)(?P<type>)", re.IGNORECASE)
OUTSIDE = ("o", "out", "outside", "other", "none", "null", "_", "-")


@dataclass(frozen=True)
class LabelScheme:
    """How to read the labels of a task."""

    name: str       # a key of SCHEMES, "plain", or "" for labels that are no entities
    outside: str    # the label of words outside of entities; "" if there is none
    parts: dict     # {label: ("B", "I", "E" or "S", the entity's type)}
    note: str = ""  # what a reader of the scores should know

    def as_iob2(self, labels):
        """The entities of a sentence's labels, written as IOB2. A label of None is outside."""
        tags = []
        open_type = None                   # of the entity that the word before belongs to
        for label in labels:
            position, entity_type = self.parts.get(label, ("O", None))
            if entity_type is None:
                tags.append("O")
            elif self.name == "IOB":
                tags.append(f"{position}-{entity_type}")
            elif position in "BS" or entity_type != open_type:
                tags.append(f"B-{entity_type}")
            else:
                tags.append(f"I-{entity_type}")
            open_type = None if position in "ES" else entity_type
        return tags


def scheme_of(labels):
    """The LabelScheme of a task's labels. Raises UserError for labels that mix two schemes."""
    for pattern in (PREFIX, SUFFIX, ALONE):
        matches = {label: pattern.fullmatch(label) for label in labels}
        others = [label for label in labels if not matches[label]]
        matches = {label: match for label, match in matches.items() if match}
        letters = {match["letter"].upper() for match in matches.values()}
        if not letters & {"B", "I"}:
            continue
        # "B" and "I" may be two of many one-letter parts of speech.
        if pattern is ALONE and ("B" not in letters or len(others) > 1):
            continue
        names = [name for name, meaning in SCHEMES.items() if letters <= meaning.keys()]
        marks = {match["mark"] for match in matches.values()}
        outside = [label for label in others if label.lower() in OUTSIDE]
        strange = [label for label in others if label not in outside]
        if strange or len(outside) > 1 or not names or len(marks) > 1:
            odd = strange or outside or list(matches)
            raise UserError(f"the labels mix two schemes ({', '.join(odd[:5])} beside "
                            f"{', '.join(list(matches)[:3])}): name all but one of them as in IOB2, "
                            "B-TYPE and I-TYPE, beside O")
        meaning = SCHEMES[names[0]]
        parts = {}
        for label, match in matches.items():
            parts[label] = meaning[match["letter"].upper()], match["type"]
        note = ""
        if names[0] != "IOB":
            note = f"labels read as {names[0]}"
        elif letters == {"I"}:
            note = "labels read as IO: neighbouring words of one type are one entity"
        return LabelScheme(names[0], outside[0] if outside else "", parts, note)

    # No letters say where an entity begins.
    outside = [label for label in labels if label in ("O", "o")]
    are_words = all(any(letter.isalpha() for letter in label) for label in labels)
    if len(outside) == 1 and are_words:
        parts = {label: ("I", label) for label in labels if label not in outside}
        return LabelScheme("plain", outside[0], parts, "labels read as entity types without B- and I-: "
                           "neighbouring words of one label are one entity")
    return LabelScheme("", "", {}, "labels that are no entities: the score is accuracy")
