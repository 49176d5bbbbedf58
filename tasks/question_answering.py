"""Extractive question answering: the answer is a part of the context (SQuAD, SQuAD v2, ReCoRD).

The head gives every token two scores, for being the answer's first and its last token. A context
that is too long becomes several windows, which overlap, and the best span of all windows wins. The
end-of-text token stands for "no answer". The paper's code tags each token as inside or outside of
the answer instead: PaperQuestionAnswering.
"""
import functools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from core.configurator import UserError
from model import TokenHead
from tasks import metrics
from tasks.family import Family, mean, value
from tasks.packing import rows

STRIDE = 128            # tokens that neighbouring windows of a context share
LONGEST_ANSWER = 30     # tokens, as in Hugging Face's run_qa


@dataclass
class Answer:
    """What the model says about one question."""
    text: str = ""          # the best span of the context
    entity: str = ""        # the best marked entity of the context, for tasks that have them
    margin: float = 0.0     # how much better "no answer" scores than the text


class QuestionAnswering(Family):
    """An answer is a start and an end; the score is SQuAD's F1.

    The arrays of its sequences: "target", the characters [start, end) of the first answer, -1
    without one, one value a sequence; "span", the characters of the context that each token has
    bytes of, -1 outside of the context.
    """

    title = "question answering"
    per_sequence = ("target",)
    has_windows = True

    # ---- data

    def read(self, row, where):
        """{"question", "context", "answers": [(text, start)], "entities": [(start, end)]}."""
        if self.task.entities:
            example = self.read_record(row, where)
        else:
            example = self.read_squad(row, where)
        context = example["context"]
        for text, start in example["answers"]:
            is_answer = isinstance(text, str) and text and type(start) is int and start >= 0
            if not is_answer or context[start:start + len(text)] != text:
                raise UserError(f"{where}: the answer {text!r} is not at character {start} of the "
                                "context")
        return example

    def read_squad(self, row, where):
        """A row in SQuAD's format: answers are texts with their first characters."""
        context = value(row, "context", str, where)
        question = value(row, "question", str, where)
        fields = value(row, "answers", dict, where)
        texts = value(fields, "text", list, where)
        starts = value(fields, "answer_start", list, where)
        if not list(zip(texts, starts)) and not self.task.unanswerable:
            raise UserError(f"{where}: the question has no answer")
        answers = list(zip(texts, starts))
        return {"question": question, "context": context, "answers": answers, "entities": []}

    def read_record(self, row, where):
        """A row in ReCoRD's format: every mention of an answer among the entities counts."""
        context = value(row, "passage", str, where)
        question = value(row, "query", str, where)
        answer_texts = set(value(row, "answers", list, where))
        marked = value(row, "entity_spans", dict, where)
        texts = value(marked, "text", list, where)
        starts = value(marked, "start", list, where)
        ends = value(marked, "end", list, where)
        answers = [(text, start) for text, start in zip(texts, starts) if text in answer_texts]
        if not answers:
            raise UserError(f"{where}: none of the answers {sorted(answer_texts)} is an entity of "
                            "the passage")
        return {"question": question, "context": context, "answers": answers,
                "entities": list(zip(starts, ends))}

    def key_text(self, example):
        return example["context"]         # so all questions of a paragraph are on one side of a cut

    def encode(self, examples, tokenizer, max_length):
        """Yields (example index, its windows, whether tokens were lost).

        A window is "Question: ...\\nContext: ", a part of the context, and eos.
        """
        # neighbouring questions often ask about the same context
        encode_context = functools.lru_cache(1000)(tokenizer.encode_with_offsets)
        for index, example in enumerate(examples):
            prefix = tokenizer.encode(f"Question: {example['question']}\nContext: ")
            is_cut = len(prefix) > max_length // 2
            prefix = prefix[:max_length // 2]
            ids, spans = encode_context(example["context"])
            room = max_length - 1 - len(prefix)
            starts = self.window_starts(len(ids), room)
            if starts[-1] + room < len(ids):
                is_cut = True

            # each window has the same question and answer
            answer = np.array([-1, -1])
            if example["answers"]:
                text, start = example["answers"][0]
                answer = np.array([start, start + len(text)])
            outside = np.full((len(prefix), 2), -1, np.int32)
            windows = []
            for start in starts:
                span = np.concatenate([outside, spans[start:start + room], [[-1, -1]]])
                tokens = np.array([*prefix, *ids[start:start + room], tokenizer.eos_id], np.int32)
                windows.append({"tokens": tokens, "target": answer,
                                "span": span.astype(np.int32)})
            yield index, windows, is_cut

    def window_starts(self, n_tokens, room):
        """The first token of each window of a context. room: tokens of the context in a window."""
        if not self.has_windows:
            return [0]
        stride = min(STRIDE, room // 2)
        return range(0, max(1, n_tokens - stride), room - stride)

    # ---- training

    def new_head(self, width):
        return TokenHead(width, 2)

    def targets(self, sequences, indices):
        """The first and last token of each answer, and the tokens that cannot be in one.

        "ids" [S, 2]: both are eos if the window lacks a part of the answer, or there is none.
        "outside" [T]: true for the question, whose tokens the loss leaves out.
        """
        pointers, outside = [], []
        for i in indices:
            span = rows(sequences, "span", [i])
            start, end = sequences["target"][i]
            tokens = np.flatnonzero(in_answer(sequences, i))
            eos = len(span) - 1
            if len(tokens) and span[tokens[0], 0] <= start and span[tokens[-1], 1] >= end:
                pointers.append((tokens[0], tokens[-1]))
            else:
                pointers.append((eos, eos))
            outside.append(np.append(span[:-1, 0] < 0, False))            # eos is allowed
        return {"ids": np.array(pointers), "outside": np.concatenate(outside)}, len(indices)

    def loss(self, logits, batch):
        """The sum over sequences of the mean cross-entropy of an answer's first and last token."""
        logits = logits.masked_fill(batch.targets["outside"][:, None], float("-inf"))
        # [T, 2] -> [S, longest, 2]: two numbers a token, so padding is cheap here
        padded = pad_sequence(logits.split(batch.lengths), batch_first=True,
                              padding_value=float("-inf"))
        return F.cross_entropy(padded, batch.targets["ids"], reduction="sum") / 2

    # ---- evaluation

    def predict(self, outputs):
        """An Answer to each question. For "no answer", the window least sure of it decides."""
        answers = [Answer() for _ in outputs.examples]
        best_span_score = [-np.inf] * len(answers)
        best_entity_score = [-np.inf] * len(answers)
        no_answer_score = [np.inf] * len(answers)
        for i, token_logits in enumerate(outputs.logits):
            k = int(outputs.sequences["example"][i])
            example = outputs.examples[k]
            span = rows(outputs.sequences, "span", [i])                      # [tokens, 2]
            in_context = span[:, 0] >= 0                                     # [tokens]
            start_logits, end_logits = token_logits[:, 0], token_logits[:, 1]
            no_answer_score[k] = min(no_answer_score[k], float(token_logits[-1].sum()))

            # the best span of all windows
            score, first, last = best_span(start_logits, end_logits, in_context)
            if score > best_span_score[k]:
                best_span_score[k] = score
                answers[k].text = example["context"][span[first, 0]:span[last, 1]].strip()

            # and the best entity, by its first and last token
            for start, end in example["entities"]:
                tokens = np.flatnonzero((span[:, 0] < end) & (span[:, 1] > start) & in_context)
                if not len(tokens):
                    continue
                score = float(start_logits[tokens[0]] + end_logits[tokens[-1]])
                if score > best_entity_score[k]:
                    best_entity_score[k] = score
                    answers[k].entity = example["context"][start:end]
        for k, answer in enumerate(answers):
            answer.margin = no_answer_score[k] - best_span_score[k]
        return answers

    def evaluate(self, validation, test):
        """Scores both splits. For questions without an answer, validation chooses the threshold."""
        if not self.task.unanswerable:
            return super().evaluate(validation, test)
        answers = self.predict(validation)
        threshold = best_threshold(answers, gold_texts(validation.examples))
        validation_scores = self.score(validation, answers, threshold)
        return validation_scores, self.score(test, self.predict(test), threshold)

    def score(self, split, predictions, threshold=0.0):
        """SQuAD's exact match and F1, as SQuAD v2's own evaluation has them where there may be no
        answer.

        Then the answer is "" if its margin is above the threshold; untuned_f1 is F1 at the
        threshold 0. With marked entities the answer is the best entity; free_em and free_f1 are of
        free spans.
        """
        gold = gold_texts(split.examples)
        if self.task.entities:
            free_scores, _ = squad_scores([answer.text for answer in predictions], gold)
            scores, per_question = squad_scores([answer.entity for answer in predictions], gold)
            scores |= {f"free_{name}": score for name, score in free_scores.items()}
        elif self.task.unanswerable:
            scores, per_question = squad_scores(given_answers(predictions, threshold), gold)
            with_answer = [f1 for f1, texts in zip(per_question, gold) if texts]
            without_answer = [f1 for f1, texts in zip(per_question, gold) if not texts]
            untuned_scores, _ = squad_scores(given_answers(predictions, 0.0), gold)
            scores["has_answer_f1"] = mean(with_answer) if with_answer else None
            scores["no_answer_f1"] = mean(without_answer) if without_answer else None
            scores["null_threshold"] = threshold
            scores["untuned_f1"] = untuned_scores["f1"]
        else:
            scores, per_question = squad_scores([answer.text for answer in predictions], gold)
        return {"score": scores["f1"]} | scores, per_question

    def baseline(self, splits):
        """The entity that the context mentions most often, or no answer."""
        test = splits["test"]
        if not self.task.entities:
            scores, _ = self.score(test, [Answer() for _ in test.examples])
            return {"name": "no answer", "score": scores["score"]}
        answers = []
        for example in test.examples:
            mentions = Counter(example["context"][start:end] for start, end in example["entities"])
            entity = mentions.most_common(1)[0][0]
            answers.append(Answer(text=entity, entity=entity))
        scores, _ = self.score(test, answers)
        return {"name": "most frequent entity", "score": scores["score"]}


class PaperQuestionAnswering(QuestionAnswering):
    """The paper's code: each token is inside the answer or not. A context is cut at max_length."""

    has_windows = False

    def targets(self, sequences, indices):
        """1 for each token of the first answer, 0 for the others."""
        is_inside = np.concatenate([in_answer(sequences, i) for i in indices])          # [T]
        return {"ids": is_inside.astype(np.int64)}, len(is_inside)

    def loss(self, logits, batch):
        return Family.loss(self, logits, batch)

    def predict(self, outputs):
        """The set of an answer's tokens, for each question."""
        predictions = []
        for token_logits in outputs.logits:
            inside = np.flatnonzero(token_logits.argmax(axis=1))
            predictions.append(set(inside.tolist()))
        return predictions

    def evaluate(self, validation, test):
        return Family.evaluate(self, validation, test)          # no threshold to choose

    def score(self, split, predictions):
        """The paper's score: F1 of the two sets of tokens, for each question."""
        per_question = []
        for i, tokens in enumerate(predictions):
            gold_tokens = np.flatnonzero(in_answer(split.sequences, i)).tolist()
            per_question.append(metrics.token_set_f1(tokens, gold_tokens))
        return {"score": mean(per_question)}, per_question

    def baseline(self, splits):
        """No token is in an answer."""
        test = splits["test"]
        scores, _ = self.score(test, [set()] * len(test.examples))
        return {"name": "no answer", "score": scores["score"]}


def in_answer(sequences, i):
    """Whether each token of sequence i has a character of the first gold answer -> bool
    [tokens]."""
    start, end = sequences["target"][i]
    span = rows(sequences, "span", [i])
    return (span[:, 0] < end) & (span[:, 1] > start) & (span[:, 0] >= 0)


def best_span(start, end, allowed):
    """(score, i, j) of the span i <= j < i + LONGEST_ANSWER of allowed tokens that maximises
    start[i] + end[j]."""
    start = np.where(allowed, start, -np.inf)
    end = np.where(allowed, end, -np.inf)
    best = -np.inf, 0, 0
    for length in range(min(LONGEST_ANSWER, len(start))):
        sums = start[:len(start) - length] + end[length:]
        i = int(sums.argmax())
        if sums[i] > best[0]:
            best = float(sums[i]), i, i + length
    return best


def gold_texts(examples):
    """The texts of each question's right answers."""
    gold = []
    for example in examples:
        gold.append([text for text, _ in example["answers"]])
    return gold


def given_answers(answers, threshold):
    """The texts that are given as answers: "" where "no answer" is better by more than the
    threshold."""
    return [answer.text if answer.margin <= threshold else "" for answer in answers]


def squad_scores(texts, gold):
    """{"em", "f1"} of all answers, and each question's own F1. gold: the right texts of each
    question."""
    pairs = [metrics.squad(text, right) for text, right in zip(texts, gold)]
    exact = [em for em, _ in pairs]
    f1 = [f1 for _, f1 in pairs]
    return {"em": mean(exact), "f1": mean(f1)}, f1


def best_threshold(answers, gold):
    """The margin above which giving no answer has the best F1 on these questions."""
    margins = np.array([answer.margin for answer in answers])
    order = np.argsort(margins, kind="stable")
    gains = []
    for answer, right in zip(answers, gold):
        gains.append(metrics.squad(answer.text, right)[1] - metrics.squad("", right)[1])
    # total F1, less that of answering nothing, when the first 0, 1, ... questions are answered: [n
    # + 1]
    total = np.concatenate([[0.0], np.cumsum(np.array(gains)[order])])
    answered = int(total.argmax())
    if answered == 0:
        return float(margins.min() - 1)
    return float(margins[order[answered - 1]])
