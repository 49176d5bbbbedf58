"""Token classification: a label for every word, such as entities in IOB2 ("B-PER", "I-PER", "O").

The head gives every token a score for each label. Here a word is trained and read at its first
token, and the score is entity F1. The paper's code trains all tokens of a word, lets them vote, and
has a score of its own: PaperTokenClassification.
"""
import functools

import numpy as np

from core.configurator import UserError
from model import TokenHead
from tasks import metrics
from tasks.family import Family, label_id, mean, value
from tasks.packing import rows


class TokenClassification(Family):
    """A word is trained and read at its first token; the score is entity F1.

    The arrays of its sequences have one value a token: "target", the id of its word's label (-100
    at eos); "word", the index of its word (-1 at eos); "first", whether it stands for its word.
    """

    title = "token classification"
    leaves_out_empty = True       # a sentence without words has nothing to score
    headline = "f1"               # the score that counts

    # ---- data

    def read(self, row, where):
        """{"words", "tags": ids}. Tags become IOB2: an entity begins with B-, also after another
        one."""
        words = value(row, self.task.words, list, where)
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"{where}: the field '{self.task.words}' holds something that is not "
                            "a string")
        labels = self.task.labels
        tags = [label_id(labels, tag, where) for tag in value(row, self.task.label, list, where)]
        if len(words) != len(tags):
            raise UserError(f"{where} has {len(words)} words and {len(tags)} tags")
        # in IOB1 an I- may begin an entity
        type_before = None
        for i, tag in enumerate(tags):
            prefix, _, entity_type = labels[tag].partition("-")
            if prefix == "I" and entity_type != type_before:
                tags[i] = labels.index(f"B-{entity_type}")
            type_before = entity_type
        return {"words": words, "tags": tags}

    def key_text(self, example):
        return " ".join(example["words"])

    def encode(self, examples, tokenizer, max_length):
        """Yields (example index, its one sequence, whether it was cut).

        Words are encoded one by one, each with the space before it. The ids are those of the whole
        sentence, because no tokenizer's pattern here spans a word and the space after it.
        """
        ranks = tokenizer.encoding._mergeable_ranks
        blank_ids = {token_id for token, token_id in ranks.items() if not token.strip()}

        @functools.cache
        def encode_word(text):
            """A word's ids, and the place of the token that stands for it: the first that is not a
            bare space (" 1996" may be " ", "199", "6"), or -1 if all are."""
            ids = tokenizer.encode(text)
            visible = [place for place, token_id in enumerate(ids) if token_id not in blank_ids]
            return ids, visible[0] if visible else -1

        # an example -> one sequence: its words' tokens end to end, cut to max_length, and eos
        for index, example in enumerate(examples):
            ids, word_of, is_first = [], [], []
            for w, word in enumerate(example["words"]):
                word_ids, first = encode_word(word if w == 0 else f" {word}")
                ids += word_ids
                word_of += [w] * len(word_ids)
                is_first += [place == first for place in range(len(word_ids))]
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

        A word's label is read at its first token. Words that max_length cut off were never seen by
        the model: they count as "O".
        """
        predictions = []
        for i, (example, token_logits) in enumerate(zip(outputs.examples, outputs.logits)):
            token_labels = token_logits.argmax(axis=1)                       # [tokens]
            word_of = rows(outputs.sequences, "word", [i])                   # [tokens]
            word_labels = [0] * len(example["words"])
            for token in np.flatnonzero(rows(outputs.sequences, "first", [i])):
                word_labels[word_of[token]] = token_labels[token]
            predictions.append([self.task.labels[label] for label in word_labels])
        return predictions

    def score(self, split, predictions):
        """Precision, recall and F1 of the entities, F1 with IOB2 read strictly, and the paper's
        score."""
        gold, per_sentence = [], []
        for example, labels in zip(split.examples, predictions):
            gold_labels = [self.task.labels[tag] for tag in example["tags"]]
            gold.append(gold_labels)
            per_sentence.append(metrics.sentence_macro_f1(gold_labels, labels))
        scores = metrics.entity_f1(gold, predictions)
        scores["strict_f1"] = metrics.entity_f1(gold, predictions, strict=True)["f1"]
        scores["sentence_macro_f1"] = mean(per_sentence)
        return {"score": scores[self.headline]} | scores, per_sentence

    def baseline(self, splits):
        """No entity anywhere."""
        test = splits["test"]
        scores, _ = self.score(test, [["O"] * len(example["words"]) for example in test.examples])
        return {"name": "all O", "score": scores["score"]}


class PaperTokenClassification(TokenClassification):
    """The paper's code: each token of a word is trained on its label, and the majority decides.

    Of labels with equal votes the lowest id wins (in the paper's code, whichever a set yields
    first).
    """

    headline = "sentence_macro_f1"

    def targets(self, sequences, indices):
        """A word's label at each of its tokens."""
        labels = rows(sequences, "target", indices)                          # [T]
        return {"ids": labels}, int((labels >= 0).sum())

    def predict(self, outputs):
        """One list of labels per example, a label for every word; words that were cut off are
        "O"."""
        predictions = []
        for i, (example, token_logits) in enumerate(zip(outputs.examples, outputs.logits)):
            token_labels = token_logits.argmax(axis=1)                       # [tokens]
            word_of = rows(outputs.sequences, "word", [i])                   # [tokens]
            word_labels = [0] * len(example["words"])
            for word in set(word_of[word_of >= 0].tolist()):
                votes = np.bincount(token_labels[word_of == word])           # [labels]
                word_labels[word] = votes.argmax()
            predictions.append([self.task.labels[label] for label in word_labels])
        return predictions
