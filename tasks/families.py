"""What each task family trains on, how its outputs become answers, and how those are scored.

A family is four functions, collected in FAMILIES at the end; `family(task, mode)` picks one.

    targets(encoded, indices, mode)                -> {name: array}, the number of targets in these sequences
    loss(logits, targets, lengths)                 -> the sum of their cross-entropies
    predictions(task, examples, encoded, outputs, mode) -> one prediction an example, from the head's outputs of every sequence
    scores(task, examples, encoded, predictions, mode, threshold) -> {"score": the headline, ...} of 0 to 1, every example's own [n]

mode "standard": entity F1 (a word is its first token), answers as a start and an end, SQuAD's F1. mode "paper": what
the code of arXiv 2507.00994 does: every token of a word has its tag and the majority decides, an answer is every token that
is tagged 1, and the two scores of its own (metrics.py). Encoded arrays are encode.py's. threshold is only for questions that
may have no answer: span_scores tells.
"""
from collections import Counter

import numpy as np
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import SequenceHead, TokenHead
from tasks import metrics
from tasks.packing import rows

LONGEST_ANSWER = 30     # tokens, as in Hugging Face's run_qa


def new_head(task, width):
    """The untrained head of a task; question answering has two outputs a token: start and end, or outside and inside."""
    return SequenceHead(width, len(task.labels)) if task.kind == "sequence" else TokenHead(width, len(task.labels) or 2)


def cross_entropy(logits, targets, lengths):
    return F.cross_entropy(logits, targets["ids"], reduction="sum", ignore_index=-100)


# ---- sequence classification

def sequence_targets(encoded, indices, mode):
    return {"ids": encoded["target"][indices]}, len(indices)          # [S]


def sequence_predictions(task, examples, encoded, outputs, mode):
    return [int(o.argmax()) for o in outputs]


def sequence_scores(task, examples, encoded, found, mode, threshold=None):
    gold = [e["label"] for e in examples]
    return {"score": metrics.accuracy(gold, found)}, [float(g == p) for g, p in zip(gold, found)]


# ---- token classification

def token_targets(encoded, indices, mode):
    tags = rows(encoded, "target", indices)                           # [T]
    tags = tags if mode == "paper" else np.where(rows(encoded, "first", indices), tags, -100)
    return {"ids": tags}, int((tags >= 0).sum())


def token_predictions(task, examples, encoded, outputs, mode):
    """Words beyond max_length are O, and count."""
    found = []
    for i, (e, o) in enumerate(zip(examples, outputs)):
        tags, votes, word, first = [0] * len(e["words"]), o.argmax(1), rows(encoded, "word", [i]), rows(encoded, "first", [i])
        if mode == "paper":        # the majority of a word's tokens; of equals the lowest id (theirs: whichever a set yields first)
            for w in set(word[word >= 0].tolist()):
                tags[w] = int(np.bincount(votes[word == w]).argmax())
        else:
            for w, tag in zip(word[first], votes[first]):
                tags[w] = int(tag)
        found.append([task.labels[t] for t in tags])
    return found


def token_scores(task, examples, encoded, found, mode, threshold=None):
    gold = [[task.labels[t] for t in e["tags"]] for e in examples]
    items = [metrics.sentence_macro_f1(g, p) for g, p in zip(gold, found)]
    scores = metrics.entity_f1(gold, found) | {"strict_f1": metrics.entity_f1(gold, found, strict=True)["f1"],
                                               "sentence_macro_f1": sum(items) / len(items)}
    return {"score": scores["sentence_macro_f1" if mode == "paper" else "f1"]} | scores, items


# ---- question answering: the answer's first and last token

def in_answer(encoded, i):
    """Which tokens of sequence i have a character of the first gold answer. -> bool [L]"""
    (start, end), span = encoded["target"][i], rows(encoded, "span", [i])
    return (span[:, 0] < end) & (span[:, 1] > start) & (span[:, 0] >= 0)


def span_targets(encoded, indices, mode):
    """First and last token [S, 2]: both the end-of-text token where the window does not hold the whole answer, or there is none."""
    pointers, outside = [], []
    for i in indices:
        span, (start, end), found = rows(encoded, "span", [i]), encoded["target"][i], np.flatnonzero(in_answer(encoded, i))
        whole = len(found) and span[found[0], 0] <= start and span[found[-1], 1] >= end
        pointers.append((found[0], found[-1]) if whole else (len(span) - 1, len(span) - 1))
        outside.append(np.append(span[:-1, 0] < 0, False))            # the question can hold no answer
    return {"ids": np.array(pointers), "outside": np.concatenate(outside)}, len(indices)


def span_loss(logits, targets, lengths):
    logits = logits.masked_fill(targets["outside"][:, None], float("-inf"))
    # [T, 2] -> [S, longest, 2]: the only padding anywhere, of two numbers a token
    padded = pad_sequence(logits.split(lengths), batch_first=True, padding_value=float("-inf"))
    return F.cross_entropy(padded, targets["ids"], reduction="sum") / 2      # over [S, longest], for start and end


def best_span(start, end, allowed):
    """The span i <= j < i + LONGEST_ANSWER of allowed tokens that maximises start[i] + end[j]. -> score, i, j"""
    start, end, best = np.where(allowed, start, -np.inf), np.where(allowed, end, -np.inf), (-np.inf, 0, 0)
    for d in range(min(LONGEST_ANSWER, len(start))):
        sums = start[:len(start) - d] + end[d:]
        i = int(sums.argmax())
        if sums[i] > best[0]:
            best = float(sums[i]), i, i + d
    return best


def span_predictions(task, examples, encoded, outputs, mode):
    """Answers as text, the best span of all windows. With marked entities: pairs of that and the text of the best entity. Where a
    question may have no answer: pairs of that and how much better "none", the end-of-text token, is in each window at least."""
    texts, entities = [""] * len(examples), [""] * len(examples)
    best, best_entity, none = (np.full(len(examples), x) for x in (-np.inf, -np.inf, np.inf))
    for i, o in enumerate(outputs):
        k, span = int(encoded["example"][i]), rows(encoded, "span", [i])
        context, inside = examples[k]["context"], span[:, 0] >= 0
        none[k] = min(none[k], o[-1].sum())
        score, a, b = best_span(o[:, 0], o[:, 1], inside)
        if score > best[k]:
            best[k], texts[k] = score, context[span[a, 0]:span[b, 1]].strip()
        for start, end in examples[k]["entities"]:
            tokens = np.flatnonzero((span[:, 0] < end) & (span[:, 1] > start) & inside)
            if len(tokens) and o[tokens[0], 0] + o[tokens[-1], 1] > best_entity[k]:
                best_entity[k], entities[k] = o[tokens[0], 0] + o[tokens[-1], 1], context[start:end]
    if task.unanswerable:
        return list(zip(texts, (none - best).tolist()))
    return list(zip(texts, entities)) if task.entities else texts


def of_answers(answers, golds):
    pairs = [metrics.squad(answer, gold) for answer, gold in zip(answers, golds)]
    em, f1 = ([pair[k] for pair in pairs] for k in (0, 1))
    return {"em": sum(em) / len(em), "f1": sum(f1) / len(f1)}, f1


def null_threshold(found, golds):
    """The margin of "none" above which giving no answer has the best F1. found: pairs of text and margin; golds: lists of texts"""
    margins = np.array([margin for _, margin in found])
    order = np.argsort(margins, kind="stable")
    gains = np.array([metrics.squad(text, gold)[1] - metrics.squad("", gold)[1] for (text, _), gold in zip(found, golds)])
    total = np.concatenate([[0.0], np.cumsum(gains[order])])      # [n + 1] when the first 0, 1, ... are answered
    answered = int(total.argmax())
    return float(margins[order[answered - 1]] if answered else margins.min() - 1)


def span_scores(task, examples, encoded, found, mode, threshold=None):
    """SQuAD's exact match and F1. With marked entities (ReCoRD) the answer is the best entity; free_* are those of free spans.
    Where a question may have no answer, the answer is "" if the margin of "none" is above threshold, as in SQuAD v2's own
    evaluation; without one the best is chosen, which is for validation sets. untuned_f1 is at 0."""
    golds = [[text for text, _ in e["answers"]] for e in examples]
    extra = {}
    if task.unanswerable:
        threshold = null_threshold(found, golds) if threshold is None else threshold
        at_0, found = ([text if margin <= most else "" for text, margin in found] for most in (0, threshold))
        extra = {"null_threshold": threshold, "untuned_f1": of_answers(at_0, golds)[0]["f1"]}
    if task.entities:
        free, _ = of_answers([text for text, _ in found], golds)
        scores, items = of_answers([entity for _, entity in found], golds)
        return {"score": scores["f1"]} | scores | {f"free_{k}": v for k, v in free.items()}, items
    scores, items = of_answers(found, golds)
    for name, wanted in (("has_answer_f1", True), ("no_answer_f1", False)) if task.unanswerable else ():
        part = [item for item, gold in zip(items, golds) if bool(gold) == wanted]
        scores[name] = sum(part) / len(part) if part else None
    return {"score": scores["f1"]} | scores | extra, items


# ---- question answering as the paper has it: every token is inside the answer or not; one window

def tag_targets(encoded, indices, mode):
    inside = np.concatenate([in_answer(encoded, i) for i in indices])
    return {"ids": inside.astype(np.int64)}, len(inside)              # [T]


def tag_predictions(task, examples, encoded, outputs, mode):
    return [set(np.flatnonzero(o.argmax(1)).tolist()) for o in outputs]


def tag_scores(task, examples, encoded, found, mode, threshold=None):
    items = [metrics.token_set_f1(p, np.flatnonzero(in_answer(encoded, i)).tolist()) for i, p in enumerate(found)]
    return {"score": sum(items) / len(items)}, items


FAMILIES = {"sequence": (sequence_targets, cross_entropy, sequence_predictions, sequence_scores),
            "token": (token_targets, cross_entropy, token_predictions, token_scores),
            "span": (span_targets, span_loss, span_predictions, span_scores),
            "tags": (tag_targets, cross_entropy, tag_predictions, tag_scores)}


def family(task, mode):
    """-> targets, loss, predictions, scores"""
    return FAMILIES["tags" if task.kind == "span" and mode == "paper" else task.kind]


def baseline(task, train, test, encoded_test, mode):
    """What the test set gives to somebody who reads the labels and no text. -> {"name", "score"}"""
    if task.kind == "sequence":
        name, found = "majority", [Counter(e["label"] for e in train).most_common(1)[0][0]] * len(test)
    elif task.kind == "token":
        name, found = "all O", [["O"] * len(e["words"]) for e in test]
    elif mode == "paper":
        name, found = "no answer", [set()] * len(test)
    elif task.entities:
        name = "most frequent entity"
        found = [(common, common) for e in test
                 for common, _ in Counter(e["context"][a:b] for a, b in e["entities"]).most_common(1)]
    else:
        name, found = "no answer", [("", 0.0) if task.unanswerable else ""] * len(test)
    return {"name": name, "score": family(task, mode)[3](task, test, encoded_test, found, mode)[0]["score"]}
