"""Token classification: a label for every word, such as entities in IOB2 ("B-PER", "I-PER", "O").

The head gives every token a score for each label. A word's label is trained, and predicted, at its
first token, and the score is entity F1, or accuracy if the labels are no entities
(label_schemes.py). The paper's code trains all tokens of a word, lets them vote, and has a score of
its own: PaperTokenClassification.
"""
import functools
import itertools
from collections import Counter

import numpy as np

from core.configurator import UserError
from model import TokenHead
from tasks import metrics
from tasks.family import Family, field_of, label_id, mean
from tasks.label_schemes import scheme_of
from tasks.packing import rows


class TokenClassification(Family):
    """A word's label is trained, and predicted, at its first token; the score is entity F1, or
    accuracy if the labels are no entities.

    What `encode` adds to the arrays of packing.py, a value for each of N tokens:

        target [N]   the id of its word's label; -100 at eos
        word [N]     the index of its word; -1 at eos
        first [N]    true if the word's label is trained and predicted here
    """

    title = "token classification"
    leaves_out_empty = True       # a sentence without words has nothing to score
    main_score = ""               # which of the scores is "score"; "": entity F1, or accuracy

    def __init__(self, task, mode="standard"):
        super().__init__(task, mode)
        self.scheme = scheme_of(task.labels)
        # {type: the label that begins an entity of it}
        self.begin = {t: label for label, (position, t) in self.scheme.parts.items() if position == "B"}
        if self.scheme.note:
            self.notes = (self.scheme.note,)

    # ---- data

    def read(self, row, where):
        """{"words", "tags": label ids}. IOB1 becomes IOB2, where every entity begins with B-."""
        words = field_of(row, self.task.words, list, where)
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"{where}: the field '{self.task.words}' holds something that is not "
                            "a string")
        labels = self.task.labels
        tags = [label_id(labels, tag, where) for tag in field_of(row, self.task.label, list, where)]
        if len(words) != len(tags):
            raise UserError(f"{where} has {len(words)} words and {len(tags)} tags")

        # IOB1 -> IOB2: an I- that does not continue the entity before it begins one
        if self.scheme.name == "IOB":
            previous_type = None
            for i, tag in enumerate(tags):
                position, entity_type = self.scheme.parts.get(labels[tag], ("O", None))
                if position == "I" and entity_type != previous_type and entity_type in self.begin:
                    tags[i] = labels.index(self.begin[entity_type])
                previous_type = entity_type
        return {"words": words, "tags": tags}

    def key_text(self, example):
        return " ".join(example["words"])

    def encode(self, examples, tokenizer, max_length):
        """Yields (example index, its one sequence, whether it was cut).

        Words are encoded one by one, each with the space before it. That gives the ids of the whole
        sentence, because none of our tokenizers has a token that spans a word and the space after
        it.
        """
        ranks = tokenizer.encoding._mergeable_ranks
        blank_ids = {token_id for token, token_id in ranks.items() if not token.strip()}

        @functools.cache
        def encode_word(text):
            """The ids of a word, and which of them stands for it: the first that is not a bare
            space (" 1996" may be " ", "199", "6"), or -1 if all are."""
            ids = tokenizer.encode(text)
            visible = [place for place, token_id in enumerate(ids) if token_id not in blank_ids]
            return ids, visible[0] if visible else -1

        for index, example in enumerate(examples):
            # the tokens of all words, end to end
            ids, word_of, is_first = [], [], []
            for w, word in enumerate(example["words"]):
                word_ids, first = encode_word(word if w == 0 else f" {word}")
                ids += word_ids
                word_of += [w] * len(word_ids)
                is_first += [place == first for place in range(len(word_ids))]

            # cut to max_length, eos included
            n = min(len(ids), max_length - 1)
            tags = np.array(example["tags"], np.int32)
            sequence = {
                "tokens": np.array([*ids[:n], tokenizer.eos_id], np.int32),
                "word": np.array([*word_of[:n], -1], np.int32),
                "first": np.array([*is_first[:n], False]),
                "target": np.append(tags[word_of[:n]], -100).astype(np.int32),
            }
            yield index, [sequence], n < len(ids)

    # ---- training

    def new_head(self, width):
        return TokenHead(width, len(self.task.labels))

    def targets(self, sequences, indices):
        """A word's label at its first token, and no target at its other tokens."""
        labels = rows(sequences, "target", indices)                          # [T]
        is_first = rows(sequences, "first", indices)                         # [T]
        labels = np.where(is_first, labels, -100)
        return {"ids": labels}, int((labels >= 0).sum())

    # ---- evaluation

    def predict(self, outputs):
        """One list of labels per example, a label for every word.

        A word's label is predicted at its first token. The model never saw the words that
        max_length cut off: they count as "O". Where no label is "O" they get None, which is wrong.
        """
        predictions = []
        for i, (example, token_logits) in enumerate(zip(outputs.examples, outputs.logits)):
            token_labels = token_logits.argmax(axis=1)                       # [tokens]
            word_of = rows(outputs.sequences, "word", [i])                   # [tokens]
            word_labels = [self.scheme.outside or None] * len(example["words"])
            for token in np.flatnonzero(rows(outputs.sequences, "first", [i])):
                word_labels[word_of[token]] = self.task.labels[token_labels[token]]
            predictions.append(word_labels)
        return predictions

    def score(self, split, predictions):
        """The scores, and of each sentence the paper's own.

        entities       their precision, recall and F1; where labels are IOB also F1 under a strict
                       reading of IOB2
        no entities    the accuracy of words, and the mean F1 of the labels
        """
        gold, per_sentence = [], []
        for example, labels in zip(split.examples, predictions):
            gold_labels = [self.task.labels[tag] for tag in example["tags"]]
            gold.append(gold_labels)
            per_sentence.append(metrics.sentence_macro_f1(gold_labels, labels))

        if self.scheme.name:
            gold = [self.scheme.as_iob2(labels) for labels in gold]
            predicted = [self.scheme.as_iob2(labels) for labels in predictions]
            scores = metrics.entity_f1(gold, predicted)
            if self.scheme.name == "IOB":
                scores["strict_f1"] = metrics.entity_f1(gold, predicted, strict=True)["f1"]
            main_score = self.main_score or "f1"
        else:
            gold_words = list(itertools.chain(*gold))
            predicted_words = list(itertools.chain(*predictions))
            scores = {"accuracy": metrics.accuracy(gold_words, predicted_words),
                      "macro_f1": metrics.sentence_macro_f1(gold_words, predicted_words)}
            main_score = self.main_score or "accuracy"
        scores["sentence_macro_f1"] = mean(per_sentence)
        return {"score": scores[main_score]} | scores, per_sentence

    def baseline(self, splits):
        """No entity anywhere; the most frequent label of the training data if none means that."""
        label = self.scheme.outside
        name = f"all {label}"
        if not label:
            name = "majority"
            counts = Counter(tag for example in splits["train"].examples for tag in example["tags"])
            label = self.task.labels[counts.most_common(1)[0][0]]
        test = splits["test"]
        scores, _ = self.score(test, [[label] * len(example["words"]) for example in test.examples])
        return {"name": name, "score": scores["score"]}


class PaperTokenClassification(TokenClassification):
    """The paper's code: each token of a word is trained on its label, and votes for the word's.

    The label with the most votes wins; of several, the one with the lowest id (in the paper's code,
    the one that a Python set happens to yield first).
    """

    main_score = "sentence_macro_f1"

    def targets(self, sequences, indices):
        """A word's label at each of its tokens."""
        labels = rows(sequences, "target", indices)                          # [T]
        return {"ids": labels}, int((labels >= 0).sum())

    def predict(self, outputs):
        """One list of labels per example, a label for every word. Words that were cut off: as there."""
        predictions = []
        for i, (example, token_logits) in enumerate(zip(outputs.examples, outputs.logits)):
            token_labels = token_logits.argmax(axis=1)                       # [tokens]
            word_of = rows(outputs.sequences, "word", [i])                   # [tokens]
            word_labels = [self.scheme.outside or None] * len(example["words"])
            for word in set(word_of[word_of >= 0].tolist()):
                votes = np.bincount(token_labels[word_of == word])           # [labels]
                word_labels[word] = self.task.labels[votes.argmax()]
            predictions.append(word_labels)
        return predictions
