"""Extractive question answering: the answer is a span of the context (SQuAD, SQuAD v2, ReCoRD).

The head gives every token two scores: one for being the first token of the answer, one for being
the last. A context that is too long is cut into overlapping windows, and the best span of all
windows wins. The end-of-text token stands for "no answer". The paper's code instead labels each
token as inside or outside of the answer: PaperQuestionAnswering.
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
from tasks.family import Family, field_of, mean, shortened
from tasks.packing import rows

OVERLAP = 128           # tokens that neighbouring windows of a context share
LONGEST_ANSWER = 30     # tokens, as in Hugging Face's run_qa


@dataclass
class Prediction:
    """What the model answers to one question."""
    text: str = ""                  # the best span of the context
    entity: str = ""                # the best marked entity of the context, where a task marks them
    no_answer_margin: float = 0.0   # the score of "no answer" minus the score of the best span


class QuestionAnswering(Family):
    """The model points at the first and last token of the answer; the score is SQuAD's F1.

    What `encode` adds to the arrays of packing.py, for n sequences (windows) with N tokens in all:

        answer_chars [n, 2]  characters [start, end) of the first gold answer in its context; -1 if
                             there is none
        token_chars [N, 2]   characters [start, end) of the context that the token stands for; -1 for
                             tokens that are not of the context
    """

    title = "question answering"
    per_sequence = ("answer_chars",)
    has_windows = True

    # ---- data

    def read(self, row, where):
        """{"question", "context", "answers": [(text, start)], "entities": [(start, end)]}.

        start and end count characters of the context.
        """
        if self.task.entities:
            example = self.read_record(row, where)
        else:
            example = self.read_squad(row, where)
        context = example["context"]
        for text, start in example["answers"]:
            is_valid = isinstance(text, str) and text and type(start) is int and start >= 0
            if not is_valid or context[start:start + len(text)] != text:
                raise UserError(f"{where}: the answer {shortened(repr(text))} is not at character "
                                f"{shortened(repr(start))} of the context")
        return example

    def read_squad(self, row, where):
        """An example from a row in SQuAD's format: an answer has a text and its first character."""
        context = field_of(row, "context", str, where)
        question = field_of(row, "question", str, where)
        gold = field_of(row, "answers", (dict, list), where)
        if isinstance(gold, list):         # as in SQuAD's own files: [{"text", "answer_start"}]
            gold = {"text": [field_of(answer, "text", str, where) for answer in gold],
                    "answer_start": [field_of(answer, "answer_start", int, where) for answer in gold]}
        texts, starts = lists_of_equal_length(gold, ("text", "answer_start"), where)
        answers = list(zip(texts, starts))
        if not answers and not self.task.unanswerable:
            raise UserError(f"{where}: the question has no answer")
        return {"question": question, "context": context, "answers": answers, "entities": []}

    def read_record(self, row, where):
        """An example from a row in ReCoRD's format.

        The row gives its answers as texts. Each entity with such a text is a gold answer.
        """
        context = field_of(row, "passage", str, where)
        question = field_of(row, "query", str, where)
        answer_texts = field_of(row, "answers", list, where)
        marked = field_of(row, "entity_spans", dict, where)
        answers, entities = [], []
        texts, starts, ends = lists_of_equal_length(marked, ("text", "start", "end"), where)
        for text, start, end in zip(texts, starts, ends):
            end = entity_end(context, text, start, end, where)
            entities.append((start, end))
            if text in answer_texts:
                answers.append((text, start))
        if not answers:
            raise UserError(f"{where}: none of the answers {shortened(repr(answer_texts))} is an entity "
                            "of the passage")
        return {"question": question, "context": context, "answers": answers, "entities": entities}

    def key_text(self, example):
        # all questions about a paragraph are in training, or all are in validation
        return example["context"]

    def encode(self, examples, tokenizer, max_length):
        """Yields (example index, its windows, whether tokens were lost).

        A window is "Question: ...\\nContext: ", as much of the context as fits, and eos.
        """
        # neighbouring questions often ask about the same context
        encode_context = functools.lru_cache(1000)(tokenizer.encode_with_offsets)
        for index, example in enumerate(examples):
            # A question may take half of a window; a longer one is cut.
            prefix = tokenizer.encode(f"Question: {example['question']}\nContext: ")
            is_cut = len(prefix) > max_length // 2
            prefix = prefix[:max_length // 2]
            ids, offsets = encode_context(example["context"])       # [tokens], [tokens, 2]
            room = max_length - 1 - len(prefix)
            window_starts = self.window_starts(len(ids), room)
            # Without windows (the paper's code) the end of a long context is lost.
            if window_starts[-1] + room < len(ids):
                is_cut = True

            # all windows of an example have the same question and the same answer
            answer_chars = np.array([-1, -1])
            if example["answers"]:
                text, first_character = example["answers"][0]
                answer_chars = np.array([first_character, first_character + len(text)])
            prefix_offsets = np.full((len(prefix), 2), -1, np.int32)
            eos_offsets = [[-1, -1]]
            windows = []
            for start in window_starts:
                end = start + room
                tokens = [*prefix, *ids[start:end], tokenizer.eos_id]
                token_chars = np.concatenate([prefix_offsets, offsets[start:end], eos_offsets])
                windows.append({"tokens": np.array(tokens, np.int32), "answer_chars": answer_chars,
                                "token_chars": token_chars.astype(np.int32)})
            yield index, windows, is_cut

    def window_starts(self, n_tokens, room):
        """The index of the context token that each window begins with.

        n_tokens: tokens of the context. room: how many of them fit into a window.
        """
        if not self.has_windows:
            return [0]
        overlap = min(OVERLAP, room // 2)
        stride = room - overlap
        # A window that began in the last `overlap` tokens would show nothing new.
        return range(0, max(1, n_tokens - overlap), stride)

    # ---- training

    def new_head(self, width):
        return TokenHead(width, 2)

    def targets(self, sequences, indices):
        """Where each window's answer begins and ends, and how many windows there are.

        "ids" [S, 2]: places in the window of the answer's first and last token; both are eos if
        there is no answer, or the window does not hold all of it.
        "outside" [T]: true for tokens that cannot be in an answer: those before the context.
        """
        first_and_last, outside = [], []
        for i in indices:
            offsets = rows(sequences, "token_chars", [i])                          # [tokens, 2]
            answer_start, answer_end = sequences["answer_chars"][i]
            eos = len(offsets) - 1
            answer_tokens = np.flatnonzero(in_answer(sequences, i))
            is_complete = (len(answer_tokens) > 0
                           and offsets[answer_tokens[0], 0] <= answer_start
                           and offsets[answer_tokens[-1], 1] >= answer_end)
            if is_complete:
                first_and_last.append((answer_tokens[0], answer_tokens[-1]))
            else:
                first_and_last.append((eos, eos))
            is_outside = offsets[:, 0] < 0
            is_outside[eos] = False         # eos stands for "no answer"
            outside.append(is_outside)
        targets = {"ids": np.array(first_and_last), "outside": np.concatenate(outside)}
        return targets, len(indices)

    def loss(self, logits, batch):
        """The sum over windows of the mean of two cross-entropies: of the answer's first token, and
        of its last."""
        logits = logits.masked_fill(batch.targets["outside"][:, None], float("-inf"))
        # For cross_entropy, dimension 1 holds the classes: the places in a window. The last
        # dimension holds two separate choices: start and end. [T, 2] -> [S, longest, 2]. Padding
        # with -inf costs only two numbers a token.
        padded = pad_sequence(logits.split(batch.lengths), batch_first=True,
                              padding_value=float("-inf"))
        return F.cross_entropy(padded, batch.targets["ids"], reduction="sum") / 2

    # ---- evaluation

    def predict(self, outputs):
        """One Prediction per question.

        The best span and the best entity of all its windows win. The score of "no answer" is its
        minimum over the windows: one window that sees an answer is enough to answer.
        """
        predictions = [Prediction() for _ in outputs.examples]
        best_span_score = [-np.inf] * len(predictions)
        best_entity_score = [-np.inf] * len(predictions)
        no_answer_score = [np.inf] * len(predictions)
        for i, token_logits in enumerate(outputs.logits):
            # sequence i is a window of question q
            q = int(outputs.sequences["example"][i])
            example = outputs.examples[q]
            offsets = rows(outputs.sequences, "token_chars", [i])                   # [tokens, 2]
            in_context = offsets[:, 0] >= 0                                  # [tokens]
            start_logits, end_logits = token_logits[:, 0], token_logits[:, 1]
            eos_score = float(token_logits[-1].sum())       # start and end at the last token, eos
            no_answer_score[q] = min(no_answer_score[q], eos_score)

            # the best span
            score, first, last = best_span(start_logits, end_logits, in_context)
            if score > best_span_score[q]:
                best_span_score[q] = score
                text = example["context"][offsets[first, 0]:offsets[last, 1]]
                predictions[q].text = text.strip()

            # the best entity, by the scores of its first and last token in this window
            for start, end in example["entities"]:
                in_entity = (offsets[:, 0] < end) & (offsets[:, 1] > start) & in_context
                tokens = np.flatnonzero(in_entity)
                if not len(tokens):
                    continue
                score = float(start_logits[tokens[0]] + end_logits[tokens[-1]])
                if score > best_entity_score[q]:
                    best_entity_score[q] = score
                    predictions[q].entity = example["context"][start:end]
        for q, prediction in enumerate(predictions):
            prediction.no_answer_margin = no_answer_score[q] - best_span_score[q]
        return predictions

    def evaluate(self, validation, test):
        """Scores both splits. Validation chooses the threshold, if questions may have no answer."""
        if not self.task.unanswerable:
            return super().evaluate(validation, test)
        predictions = self.predict(validation)
        threshold = best_threshold(predictions, gold_texts(validation.examples))
        validation_scores = self.score(validation, predictions, threshold)
        test_scores = self.score(test, self.predict(test), threshold)
        return validation_scores, test_scores

    def score(self, split, predictions, threshold=0.0):
        """SQuAD's exact match and F1 ("score"), and each question's own F1.

        What is scored depends on the task:

            ReCoRD     the best marked entity; "free_em" and "free_f1" score the best span
            SQuAD v2   the best span, or "" if the margin of "no answer" is above the threshold;
                       "untuned_f1" is F1 at the threshold 0
            SQuAD      the best span
        """
        gold = gold_texts(split.examples)
        span_texts = [prediction.text for prediction in predictions]
        if self.task.entities:
            entity_texts = [prediction.entity for prediction in predictions]
            scores, per_question = squad_scores(entity_texts, gold)
            free_scores, _ = squad_scores(span_texts, gold)
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
            scores, per_question = squad_scores(span_texts, gold)
        return {"score": scores["f1"]} | scores, per_question

    def baseline(self, splits):
        """The entity that the context mentions most often; no answer in a task without entities."""
        test = splits["test"]
        if not self.task.entities:
            scores, _ = self.score(test, [Prediction() for _ in test.examples])
            return {"name": "no answer", "score": scores["score"]}
        predictions = []
        for example in test.examples:
            mentions = Counter(example["context"][start:end] for start, end in example["entities"])
            entity = mentions.most_common(1)[0][0]
            predictions.append(Prediction(text=entity, entity=entity))
        scores, _ = self.score(test, predictions)
        return {"name": "most frequent entity", "score": scores["score"]}


class PaperQuestionAnswering(QuestionAnswering):
    """The paper's code: each token is inside of the answer (1) or not (0). There are no windows: a
    context is cut at max_length."""

    has_windows = False

    def targets(self, sequences, indices):
        """1 for each token of the first gold answer, 0 for the others."""
        is_inside = np.concatenate([in_answer(sequences, i) for i in indices])          # [T]
        return {"ids": is_inside.astype(np.int64)}, len(is_inside)

    def loss(self, logits, batch):
        return Family.loss(self, logits, batch)                 # two classes for each token

    def predict(self, outputs):
        """For each question the set of tokens that are inside of the answer, by their places."""
        predictions = []
        for token_logits in outputs.logits:
            inside = np.flatnonzero(token_logits.argmax(axis=1))
            predictions.append(set(inside.tolist()))
        return predictions

    def evaluate(self, validation, test):
        return Family.evaluate(self, validation, test)          # no threshold to choose

    def score(self, split, predictions):
        """The paper's score: the F1 of predicted and gold tokens, a mean over the questions."""
        per_question = []
        for i, tokens in enumerate(predictions):
            gold_tokens = np.flatnonzero(in_answer(split.sequences, i)).tolist()
            per_question.append(metrics.token_set_f1(tokens, gold_tokens))
        return {"score": mean(per_question)}, per_question

    def baseline(self, splits):
        """No token is inside of an answer."""
        test = splits["test"]
        scores, _ = self.score(test, [set()] * len(test.examples))
        return {"name": "no answer", "score": scores["score"]}


def lists_of_equal_length(row, names, where):
    """The lists in the fields `names` of a row. Raises UserError if their lengths differ."""
    lists = [field_of(row, name, list, where) for name in names]
    if len(set(map(len, lists))) > 1:
        sizes = ", ".join(f"{len(values)} in '{name}'" for name, values in zip(names, lists))
        raise UserError(f"{where}: the lists of spans are of unequal length: {sizes}")
    return lists


def entity_end(context, text, start, end, where):
    """The place of the character after an entity. Raises UserError if its text is not there.

    ReCoRD's own files give the entity's last character, and the hub's copy the character after it.
    The text tells which.
    """
    if isinstance(text, str) and text and type(start) is int and type(end) is int and 0 <= start <= end:
        for exclusive_end in (end, end + 1):
            if context[start:exclusive_end] == text:
                return exclusive_end
    raise UserError(f"{where}: the entity {shortened(repr(text))} is not at characters "
                    f"{shortened(repr(start))} to {shortened(repr(end))} of the passage")


def in_answer(sequences, i):
    """True for each token of sequence i that has a character of the first gold answer. -> bool
    [tokens]"""
    answer_start, answer_end = sequences["answer_chars"][i]
    offsets = rows(sequences, "token_chars", [i])
    in_context = offsets[:, 0] >= 0
    return (offsets[:, 0] < answer_end) & (offsets[:, 1] > answer_start) & in_context


def best_span(start_logits, end_logits, allowed):
    """The span with the largest start_logits[first] + end_logits[last]. -> score, first, last

    Both tokens must be allowed, and the span has at most LONGEST_ANSWER tokens. The score is -inf
    if there is no such span.
    """
    start_logits = np.where(allowed, start_logits, -np.inf)
    end_logits = np.where(allowed, end_logits, -np.inf)
    n = len(start_logits)
    best = -np.inf, 0, 0
    for distance in range(min(LONGEST_ANSWER, n)):         # from the first token to the last
        scores = start_logits[:n - distance] + end_logits[distance:]
        first = int(scores.argmax())
        if scores[first] > best[0]:
            best = float(scores[first]), first, first + distance
    return best


def gold_texts(examples):
    """For each question the list of its gold answers' texts, [] if it has none."""
    gold = []
    for example in examples:
        gold.append([text for text, _ in example["answers"]])
    return gold


def given_answers(predictions, threshold):
    """The texts given as answers: "" where the margin of "no answer" is above the threshold."""
    return [p.text if p.no_answer_margin <= threshold else "" for p in predictions]


def squad_scores(texts, gold):
    """The means over all questions, and each question's own F1. -> {"em", "f1"}, list

    texts: one answer per question. gold: the gold texts of each question.
    """
    em_and_f1 = [metrics.squad(text, golds) for text, golds in zip(texts, gold)]
    em = [em for em, _ in em_and_f1]
    f1 = [f1 for _, f1 in em_and_f1]
    return {"em": mean(em), "f1": mean(f1)}, f1


def best_threshold(predictions, gold):
    """The threshold for the margin of "no answer" that has the best F1 on these questions."""
    # how much F1 rises if we answer a question with its text instead of "no answer"
    gains = []
    for prediction, golds in zip(predictions, gold):
        _, f1_of_text = metrics.squad(prediction.text, golds)
        _, f1_of_no_answer = metrics.squad("", golds)
        gains.append(f1_of_text - f1_of_no_answer)

    # total_gain[m]: how much F1 rises if we answer only the m questions with the smallest margins
    margins = np.array([prediction.no_answer_margin for prediction in predictions])
    order = np.argsort(margins, kind="stable")
    total_gain = np.concatenate([[0.0], np.cumsum(np.array(gains)[order])])
    # No threshold lies between equal margins.
    sorted_margins = margins[order]
    is_possible = np.concatenate([[True], sorted_margins[1:] > sorted_margins[:-1], [True]])
    n_answered = int(np.where(is_possible, total_gain, -np.inf).argmax())
    if n_answered == 0:
        return float(margins.min() - 1)
    return float(sorted_margins[n_answered - 1])
