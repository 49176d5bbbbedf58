"""A Hugging Face model -> our config, weights and tokenizer, in memory or as a run folder."""

import contextlib
import os
from dataclasses import asdict, dataclass

import torch

from core import checkpoint
from core import tokenizer as tokenizers
from core.files import remove_leftovers
from core.lock import NAME, hold_new
from huggingface import tokenizer as hf_tokenizer
from huggingface import weights as hf_weights
from huggingface.folders import JSON_FILES, check_is_free, locate, read_model_json
from model import Encoder, ModelConfig

FILES = (*JSON_FILES, "*.safetensors", "model.safetensors.index.json")
BIN_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# What an import that was interrupted may have left in its folder.
OWN_FILES = (NAME, "tokenizer.tiktoken", "tokenizer_info.json")


@dataclass
class Imported:
    config: ModelConfig
    weights: dict  # Encoder(config)'s state dict, in fp32; it has a tied head, too
    tokenizer: tokenizers.Tokenizer | None  # None if only the weights were asked for
    facts: dict  # where the model comes from, as a checkpoint's state.json records it


def is_foreign(source):
    """True for hf:ORG/NAME and for the folder of a Hugging Face model, False for runs of ours."""
    if source.startswith("hf:"):
        return True
    path = os.path.join(source, "config.json")
    return os.path.isfile(path) and "model_type" in read_model_json(source, "config.json")


def read(source, weights_only=False, ignore=(), allow_bin=False):
    """Read a Hugging Face model. -> Imported

    source: a folder, or hf:ORG/NAME[@REVISION]. weights_only: leave the tokenizer out.
    ignore: keys of config.json that are known to be harmless. allow_bin: read pytorch_model.bin if
    there are no safetensors files. Raises UserError if there is no such model, or it has something
    that is not known here.
    """
    folder = locate(source, FILES + BIN_FILES if allow_bin else FILES)
    config, kind = hf_weights.read_config(folder, ignore)
    tokenizer = None
    mask_origin = "none"
    if not weights_only:
        tokenizer, mask_origin = hf_tokenizer.load(folder)
    weights = hf_weights.read_weights(folder, config, allow_bin)
    has_lm_head = config.tied or "lm_head.weight" in weights

    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        # The tokenizer has a new mask token, which needs a row of its own. A random row would be an
        # outlier among the trained ones. Their mean is not.
        for name in {"embedding.weight", "lm_head.weight"} & weights.keys():
            mean = weights[name].mean(0, keepdim=True)  # [1, C]
            weights[name] = torch.cat([weights[name], mean])  # [V + 1, C]
        config.vocab_size = tokenizer.vocab_size
    # A body without an LM head gets the embedding as its head, so that it loads like any model. The
    # facts say so, and what needs a trained head refuses it.
    config.tied = config.tied or not has_lm_head
    if config.tied:
        weights["lm_head.weight"] = weights["embedding.weight"]
    facts = describe_source(source, folder) | {
        "model_type": kind,
        "mask": mask_origin,
        "causal": is_causal(kind),
    }
    if not has_lm_head:
        facts["has_lm_head"] = False
    return Imported(config, weights, tokenizer, facts)


def describe_source(source, folder):
    """Return where a model comes from: a path or hf:ORG/NAME, and the hub's commit if known."""
    name = source.removeprefix("hf:")
    revision = None
    # The hub's cache keeps a model in .../snapshots/COMMIT.
    if os.path.basename(os.path.dirname(folder)) == "snapshots":
        revision = os.path.basename(folder)
    return {"source": source if os.path.isdir(name) else f"hf:{name}", "revision": revision}


def is_causal(kind):
    """True if models of this kind are decoders, None if the kind does not say.

    The paper's checkpoints (sl_model) are of both kinds.
    """
    if kind == "sl_model":
        return None
    return kind != "eurobert"


def write(source, out, weights_only=False, ignore=(), allow_bin=False):
    """Import a model as the run folder `out`, with a checkpoint of step 0 and the tokenizer.

    The other arguments are those of read(), and so are the errors. What an import into `out` that
    was interrupted left there is replaced. -> Imported, and the checkpoint's path
    """
    check_is_free(out, OWN_FILES)
    with hold_new(out, "hf.py"):
        check_is_free(out, OWN_FILES)  # another import may have ended in the meantime
        imported = read(source, weights_only, ignore, allow_bin)
        with torch.device("meta"):  # no time spent on random weights
            model = Encoder(imported.config)
        model.load_state_dict(imported.weights, assign=True)
        tokenizer_hash = imported.tokenizer.hash.hex() if imported.tokenizer else ""
        state = {"settings": {"tokenizer_hash": tokenizer_hash}, "imported": imported.facts}
        # What an interrupted import left; checkpoint.save() removes that of checkpoints.
        remove_leftovers(out, OWN_FILES)
        for name in ("tokenizer.tiktoken", "tokenizer_info.json"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(out, name))
        if imported.tokenizer:
            tokenizers.save(imported.tokenizer, out)
        path = checkpoint.save(out, 0, model, state)
    return imported, path


def describe(imported):
    """Return the lines to print: about the model, and about its tokenizer."""
    facts = imported.facts
    tokenizer = imported.tokenizer
    shape = []
    for key, value in asdict(imported.config).items():
        if value not in (None, False):
            shape.append(f"{key} {value}")
    model_line = f"{facts['model_type']} from {facts['source']}: {', '.join(shape)}"
    if not facts.get("has_lm_head", True):
        model_line += (
            "\nit was saved without its LM head: finetune.py and eval_ir.py take it, train.py and "
            "sample.py do not"
        )
    if tokenizer is None:
        return f"{model_line}\nwithout its tokenizer: it reads ids only"
    return (
        f"{model_line}\ntokenizer: {tokenizer.vocab_size:,} rows, "
        f"eos {tokenizer.eos_id} {tokenizer.decode([tokenizer.eos_id])}, "
        f"mask {tokenizer.mask_id} ({facts['mask']}); no bos is put before a text"
    )
