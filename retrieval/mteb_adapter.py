"""Scores an encoder with the package mteb, which calls our Retriever through a wrapper."""
import os

import numpy as np
import torch

from core.configurator import RunError, UserError
from core.tokenizer import DOCUMENT, QUERY
from retrieval.tokens import tokenize


class ForMteb:
    """A Retriever with the methods of mteb's EncoderProtocol."""

    def __init__(self, retriever):
        from mteb.models.model_meta import ModelMeta

        self.retriever = retriever
        name = f"nanoencoder/{retriever.facts['model']}"
        revision = retriever.facts["ckpt_sha"]
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "revision": revision})

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        """Embeds mteb's batches of texts. -> float32 array [n, C]

        Texts that are neither a query nor a document get no prefix.
        """
        prompt_name = getattr(prompt_type, "value", prompt_type)  # "query", "document" or None
        prefix = {"query": QUERY, "document": DOCUMENT}.get(prompt_name, "")
        texts = []
        for batch in inputs:
            texts += [prefix + text for text in batch["text"]]
        arrays, _ = tokenize(texts, self.retriever.tokenizer, self.retriever.max_length)
        sequences = {
            "tokens": np.concatenate(arrays),
            "bounds": np.cumsum([0, *map(len, arrays)]),
        }
        embeddings = self.retriever.embeddings(sequences, f"{task_metadata.name} {hf_split}")
        return embeddings.cpu().numpy()

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)


def score_on_mteb(retriever, task_names, folder):
    """Scores an encoder, without training it, on tasks of mteb, and prints their main scores.

    task_names: such as "NFCorpus,SciFact". mteb keeps its results in folder/mteb.
    """
    try:
        import mteb
    except ImportError:
        raise UserError("--mteb needs the package mteb: pip install mteb") from None
    names = [name for name in task_names.replace(" ", "").split(",") if name]
    try:
        tasks = mteb.get_tasks(tasks=names)
    except (KeyError, ValueError) as error:
        raise UserError(f"mteb={task_names}: {error.args[0]}") from None
    cache_dir = os.path.join(folder, "mteb")
    try:
        results = mteb.evaluate(ForMteb(retriever), tasks, cache=mteb.ResultCache(cache_dir))
    except Exception as error:  # network, hub and mteb each raise their own
        first_line = (str(error).splitlines() or [""])[0]
        raise RunError(
            f"mteb could not score {task_names} ({type(error).__name__}: {first_line}); "
            f"finished tasks are kept in {cache_dir}"
        ) from error
    for task, result in zip(tasks, results.task_results):
        score = 100 * result.get_score()
        print(f"{result.task_name}: {task.metadata.main_score} {score:.2f}")
