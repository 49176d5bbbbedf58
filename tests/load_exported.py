"""A fresh process that has only transformers and sentence-transformers, the hub off, and no code of this repository: loads exported
folders as their users would, and writes down what comes out. Words: {"name": {"folder", "texts", ...}} as JSON, OUT."""
import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
sys.path = [p for p in sys.path if p and os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

transformers.logging.set_verbosity_error()
results, tensors = {}, {}
for name, job in json.loads(sys.argv[1]).items():
    folder, found = job["folder"], results.setdefault(name, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(job["texts"], padding=True, return_tensors="pt")
    found["ids"] = tokenizer(job["texts"]).input_ids
    found["specials"] = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id]
    for kind in job["classes"]:
        model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
        found[kind] = {"class": type(model).__name__, "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
                       "labels": list(model.config.id2label.values()), "theta": model.config.rope_parameters["rope_theta"]}
        with torch.no_grad():
            out = model(**encoded)
            tensors[f"{name}.{kind}"] = out.last_hidden_state if kind == "AutoModel" else out.logits
            if kind != "AutoModelForSequenceClassification":        # each text alone, nothing padded
                for i, ids in enumerate(found["ids"]):
                    out = model(input_ids=torch.tensor([ids]))
                    tensors[f"{name}.{kind}.{i}"] = (out.last_hidden_state if kind == "AutoModel" else out.logits)[0].clone()
    if "fill" in job:
        answers = transformers.pipeline("fill-mask", model=folder, top_k=4)(job["fill"].replace("[MASK]", tokenizer.mask_token))
        found["fill"] = [[(a["token"], a["token_str"], a["score"]) for a in gap] for gap in answers]
    if job.get("sentences"):
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer(folder)
        found["max_seq_length"] = model.max_seq_length
        for kind, encode in (("query", model.encode_query), ("document", model.encode_document), ("plain", model.encode)):
            tensors[f"{name}.sentences.{kind}"] = torch.tensor(encode(job["sentences"]))
save_file(tensors, sys.argv[2] + ".safetensors")
json.dump(results, open(sys.argv[2], "w"))
