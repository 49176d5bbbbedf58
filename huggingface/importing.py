"""A Hugging Face model -> an Encoder's config and weights, with its tokenizer, in memory or as a checkpoint of ours."""
import os
from dataclasses import asdict, dataclass

import torch

from core import checkpoint, tokenizer
from core.configurator import UserError
from huggingface import tokenizer as hf_tokenizer
from huggingface import weights as hf_weights
from model import Encoder, ModelConfig

FILES = (*hf_tokenizer.SMALL, "*.safetensors", "model.safetensors.index.json")


@dataclass
class Imported:
    config: ModelConfig
    weights: dict                        # Encoder(config)'s state dict, fp32, the tied head included
    tokenizer: tokenizer.Tokenizer       # or None
    facts: dict                          # what a checkpoint's state.json says of where it came from


def is_foreign(source):
    """Is it a model of Hugging Face's, hf:ORG/NAME or a folder, and no run or checkpoint of ours?"""
    if source.startswith("hf:"):
        return True
    path = os.path.join(source, "config.json")
    return os.path.isfile(path) and "model_type" in hf_tokenizer.read_json(source, "config.json")


def read(source, weights_only=False, ignore=()):
    """-> Imported. source: a folder, or hf:ORG/NAME[@REVISION]; weights_only: without the tokenizer. Raises UserError."""
    folder = hf_tokenizer.locate(source, FILES)
    config, kind = hf_weights.read_config(folder, ignore)
    found, how = (None, "none") if weights_only else hf_tokenizer.load(folder)
    weights = hf_weights.read_weights(folder, config)
    if found and found.vocab_size > config.vocab_size:
        # an untrained row among trained ones: their mean is a token of average meaning, and no outlier to the softmax
        for name in {"embedding.weight", "lm_head.weight"} & weights.keys():
            weights[name] = torch.cat([weights[name], weights[name].mean(0, keepdim=True)])       # [V + 1, C]
        config.vocab_size = found.vocab_size
    if config.tied:
        weights["lm_head.weight"] = weights["embedding.weight"]
    revision = os.path.basename(folder) if os.path.basename(os.path.dirname(folder)) == "snapshots" else None     # the hub's cache
    source = source if os.path.isdir(source.removeprefix("hf:")) else f"hf:{source.removeprefix('hf:')}"
    facts = {"source": source, "revision": revision, "model_type": kind, "mask": how,
             "causal": None if kind == "sl_model" else kind != "eurobert"}        # theirs are of either kind
    return Imported(config, weights, found, facts)


def write(source, out, weights_only=False, ignore=()):
    """Import a model as the run folder `out`, with a checkpoint of step 0 and its tokenizer. -> Imported, the checkpoint's path"""
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"{out} is there already: choose another folder")
    found = read(source, weights_only, ignore)
    with torch.device("meta"):
        model = Encoder(found.config)
    model.load_state_dict(found.weights, assign=True)
    os.makedirs(out, exist_ok=True)
    if found.tokenizer:
        tokenizer.save(found.tokenizer, out)
    settings = {"tokenizer_hash": found.tokenizer.hash.hex() if found.tokenizer else ""}
    return found, checkpoint.save(out, 0, model, {"settings": settings, "imported": found.facts})


def describe(found):
    """A line or two for people."""
    c, tok = found.config, found.tokenizer
    shape = ", ".join(f"{k} {v}" for k, v in asdict(c).items() if v not in (None, False))
    text = "without its tokenizer: it reads ids only" if not tok else (
        f"tokenizer: {tok.vocab_size:,} rows, eos {tok.eos_id} {tok.decode([tok.eos_id])}, mask {tok.mask_id} "
        f"({found.facts['mask']}); no bos is put before a text")
    return f"{found.facts['model_type']} from {found.facts['source']}: {shape}\n{text}"
