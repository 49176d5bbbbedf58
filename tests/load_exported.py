"""Load exported folders as their users would, and write down what comes out.

This runs in a fresh process that has only transformers and sentence-transformers, the hub off, and none of this
repository's code:

    python load_exported.py JOBS OUT

JOBS: {name: {"folder", "texts", "classes", and perhaps "fill" and "sentences"}} as JSON. Writes OUT, the results as JSON,
and OUT.safetensors, the tensors.
"""
import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path = [p for p in sys.path if p and os.path.abspath(p) != HERE]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def output_of(model, name, **inputs):
    """The logits of a model, or the hidden states of one that has no head."""
    with torch.no_grad():
        out = model(**inputs)
    return out.last_hidden_state if name == "AutoModel" else out.logits


def load_class(class_name, job, tokenizer, prefix, tensors):
    """Load the folder with one AutoModel class. Its outputs become tensors. -> what loading it said"""
    model, info = getattr(transformers, class_name).from_pretrained(job["folder"], output_loading_info=True)
    tensors[prefix] = output_of(model, class_name, **tokenizer(job["texts"], padding=True, return_tensors="pt"))
    if class_name != "AutoModelForSequenceClassification":
        # each text alone, nothing padded
        for i, ids in enumerate(tokenizer(job["texts"]).input_ids):
            tensors[f"{prefix}.{i}"] = output_of(model, class_name, input_ids=torch.tensor([ids]))[0].clone()
    return {"class": type(model).__name__, "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
            "labels": list(model.config.id2label.values()), "theta": model.config.rope_parameters["rope_theta"]}


def fill(job, tokenizer):
    """For each gap the four likeliest tokens: (id, text, probability)."""
    pipeline = transformers.pipeline("fill-mask", model=job["folder"], top_k=4)
    gaps = []
    for answers in pipeline(job["fill"].replace("[MASK]", tokenizer.mask_token)):
        gaps.append([(a["token"], a["token_str"], a["score"]) for a in answers])
    return gaps


def load(name, job, tensors):
    """Do one job. Adds its tensors to `tensors`. -> its results"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
    results = {"ids": tokenizer(job["texts"]).input_ids,
               "specials": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id]}
    for class_name in job["classes"]:
        results[class_name] = load_class(class_name, job, tokenizer, f"{name}.{class_name}", tensors)
    if "fill" in job:
        results["fill"] = fill(job, tokenizer)
    if job.get("sentences"):
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer(job["folder"])
        results["max_seq_length"] = model.max_seq_length
        for kind, encode in (("query", model.encode_query), ("document", model.encode_document), ("plain", model.encode)):
            tensors[f"{name}.sentences.{kind}"] = torch.tensor(encode(job["sentences"]))
    return results


if __name__ == "__main__":
    jobs, out = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    tensors = {}
    results = {name: load(name, job, tensors) for name, job in json.loads(jobs).items()}
    save_file(tensors, out + ".safetensors")
    json.dump(results, open(out, "w"))
