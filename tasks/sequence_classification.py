"""Sequence classification: one label for a text, as in SST-2, MNLI and QQP.

The head reads the mean of the last hidden states. The loss is the cross-entropy of the label, and
the score is accuracy. So it is in the paper, and there is no paper variant. (Whether its head has
our dense layer is not known: model.SequenceHead.)
"""
import os
import re
from collections import Counter

import numpy as np

from core.configurator import UserError
from model import SequenceHead
from tasks import metrics
from tasks.family import Family, field_of, label_id


class SequenceClassification(Family):
    title = "sequence classification"
    has_output_per_token = False
    per_sequence = ("target",)

    def __init__(self, task, mode="standard"):
        super().__init__(task, mode)
        self.parts = template_parts(task.template, "tasks/registry.py")

    def read(self, row, where):
        """{"text", "label": id}. The task's template makes the text from the row's fields."""
        text = ""
        for is_field, part in self.parts:
            text += field_of(row, part, str, where) if is_field else part
        label = field_of(row, self.task.label, object, where)
        return {"text": text, "label": label_id(self.task.labels, label, where)}

    def key_text(self, example):
        return example["text"]

    def encode(self, examples, tokenizer, max_length):
        """Yields (example index, its one sequence, whether it was cut). "target" is the label."""
        texts = [example["text"] for example in examples]
        ids_of_texts = tokenizer.encode_batch(texts, threads=os.cpu_count() or 1)
        for index, (example, ids) in enumerate(zip(examples, ids_of_texts)):
            tokens = np.array([*ids[:max_length - 1], tokenizer.eos_id], np.int32)
            sequence = {"tokens": tokens, "target": np.array(example["label"])}
            yield index, [sequence], len(ids) > max_length - 1

    def new_head(self, width):
        return SequenceHead(width, len(self.task.labels))

    def targets(self, sequences, indices):
        return {"ids": sequences["target"][indices]}, len(indices)          # [S]

    def predict(self, outputs):
        """The id of the likeliest label of each example."""
        return [int(label_logits.argmax()) for label_logits in outputs.logits]

    def score(self, split, predictions):
        labels = [example["label"] for example in split.examples]
        is_right = [float(label == prediction) for label, prediction in zip(labels, predictions)]
        return {"score": metrics.accuracy(labels, predictions)}, is_right

    def baseline(self, splits):
        """The label that is most frequent in the training data, for every example."""
        counts = Counter(example["label"] for example in splits["train"].examples)
        majority = counts.most_common(1)[0][0]
        scores, _ = self.score(splits["test"], [majority] * len(splits["test"].examples))
        return {"name": "majority", "score": scores["score"]}


def template_parts(template, where):
    """The parts of a template like "Title: {title}": [(whether it is a field, its name or the text)].

    A field may have any name without braces. {{ and }} stand for braces. Raises UserError for a
    brace that stands alone.
    """
    parts = []
    for part in re.split(r"(\{\{|\}\}|\{[^{}]+\})", template):
        if part in ("{{", "}}"):
            parts.append((False, part[0]))
        elif part.startswith("{") and part.endswith("}") and len(part) > 2:
            parts.append((True, part[1:-1]))
        elif "{" in part or "}" in part:
            raise UserError(f"{where}: a brace stands alone in the template {template[:80]!r}: expected "
                            "fields like {title}, and {{ or }} for a brace in the text")
        elif part:
            parts.append((False, part))
    return parts
