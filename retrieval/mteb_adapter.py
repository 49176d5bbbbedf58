"""An encoder as the package mteb calls it."""
import os

import numpy as np
import torch

from core.configurator import RunError, UserError
from core.tokenizer import DOCUMENT, QUERY
from retrieval.tokens import tokenized


class ForMteb:
    """mteb's EncoderProtocol around a Retriever."""

    def __init__(self, retriever):
        from mteb.models.model_meta import ModelMeta
        self.retriever = retriever
        name = f"nanoencoder/{retriever.facts['model']}"
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "revision": retriever.facts["ckpt_sha"]})

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        """inputs: mteb's batches of texts -> float32 array [n, C]. Texts that are neither query nor document have no prefix."""
        prefix = {"query": QUERY, "document": DOCUMENT}.get(getattr(prompt_type, "value", prompt_type), "")
        arrays, _ = tokenized([prefix + text for batch in inputs for text in batch["text"]], self.retriever.tokenizer,
                                      self.retriever.max_length)
        encoded = {"tokens": np.concatenate(arrays), "bounds": np.cumsum([0, *map(len, arrays)])}
        return self.retriever.embeddings(encoded, f"{task_metadata.name} {hf_split}").cpu().numpy()

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)


def on_mteb(mine, folder):
    """Score the encoder, untrained as it is given, on tasks of the package mteb, which keeps its results in folder/mteb."""
    try:
        import mteb
    except ImportError:
        raise UserError("--mteb needs the package mteb: pip install mteb") from None
    try:
        found = mteb.get_tasks(tasks=[name for name in mine.c.mteb.replace(" ", "").split(",") if name])
    except (KeyError, ValueError) as error:
        raise UserError(f"mteb={mine.c.mteb}: {error.args[0]}") from None
    try:
        results = mteb.evaluate(ForMteb(mine), found, cache=mteb.ResultCache(os.path.join(folder, "mteb")))
    except Exception as error:                # network, hub and mteb each raise their own
        first = (str(error).splitlines() or [""])[0]
        raise RunError(f"mteb could not score {mine.c.mteb} ({type(error).__name__}: {first}); finished tasks are kept in "
                       f"{folder}/mteb") from error
    for task, result in zip(found, results.task_results):
        print(f"{result.task_name}: {task.metadata.main_score} {100 * result.get_score():.2f}")
