"""A checkpoint -> a folder that transformers and sentence-transformers load without our code.

An encoder is exported as `eurobert`, which is native in transformers 5: AutoModel, ForMaskedLM,
ForSequenceClassification and ForTokenClassification load it. It is a SentenceTransformer as well:
the mean over the tokens, scaled to length 1, as eval_ir.py embeds. A decoder is exported as
`llama`, or as `qwen3` if it has Qwen3's norms. A fine-tuned encoder is exported with its head.
"""

import json
import os
import re
import shutil

from core import checkpoint
from core.configurator import UserError
from core.files import remove_leftovers
from core.lock import NAME, hold_new
from core.schema import misfit
from core.tokenizer import DOCUMENT, QUERY
from huggingface import tokenizer as hf_tokenizer
from huggingface import weights as hf_weights
from huggingface.folders import check_is_free
from huggingface.history import check_history, has_lm_head, was_causal
from huggingface.model_card import model_card

# {kind of task: the tensors of its head}. They have the same names in Hugging Face's EuroBert.
HEADS = {
    "sequence": {"dense.weight", "dense.bias", "classifier.weight", "classifier.bias"},
    "token": {"classifier.weight", "classifier.bias"},
    "span": {"classifier.weight", "classifier.bias"},
}
HEAD_SHAPE = {"kind": str, "labels": ([str], None)}   # what is read of the row of a model with a head


def export(ckpt, out, average=1, causal="auto"):
    """Write the folder `out`. -> the content of its config.json, and the steps of its checkpoints

    ckpt: a checkpoint, or a run for its newest one. average: how many of the run's checkpoints to
    average; `ckpt` is the last of them. causal: "true" for a decoder, "false" for an encoder,
    "auto" for what the model was last trained as. Raises UserError if that is not possible, or if
    another process writes `out`.
    """
    check_is_free(out)
    with hold_new(out, "hf.py"):
        check_is_free(out)      # another export may have ended in the meantime
        remove_leftovers(os.path.dirname(os.path.realpath(out)), pattern=temporary_name(out))
        return export_into(out, ckpt, average, causal)


def export_into(out, ckpt, average, causal):
    """export() into a folder that this process holds."""
    path = checkpoint.find(ckpt)
    state = checkpoint.read_state(path)
    check_history(state, os.path.join(path, "state.json"))
    config = checkpoint.config_of(path)
    tokenizer = checkpoint.tokenizer_of(path)
    is_causal = was_causal(state) if causal == "auto" else causal == "true"
    if "fine_tuned" in state and (is_causal or was_causal(state)):
        raise UserError(
            f"{path} is fine-tuned: only an encoder can be exported with its head; transformers "
            "has no decoder with such a head"
        )

    # The weights, and config.json.
    paths = last_checkpoints(path, average)
    weights = hf_weights.write_weights(mean_of(paths), config)
    hub_config = hf_weights.write_config(config, is_causal) | {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
        "mask_token_id": tokenizer.mask_id,
        "classifier_pooling": "mean",
    }
    if not has_lm_head(state):
        hub_config["tie_word_embeddings"] = False
        hub_config["architectures"] = ["LlamaModel" if is_causal else "EuroBertModel"]
        if hub_config["model_type"] == "qwen3":
            hub_config["architectures"] = ["Qwen3Model"]
    if "fine_tuned" in state:
        # The LM head is left over from pretraining. It no longer fits the encoder.
        weights.pop("lm_head.weight", None)
        weights |= read_head(path, state["fine_tuned"])
        hub_config |= describe_head(path, state["fine_tuned"])

    # The tokenizer. It must give our ids when transformers reads it.
    tokenizer_json = hf_tokenizer.to_json(tokenizer, append_eos=not is_causal)
    hf_tokenizer.check_same_ids(tokenizer_json, tokenizer, path)

    files = {
        "config.json": hub_config,
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": tokenizer_config(tokenizer, config),
    }
    if not is_causal:
        files |= sentence_transformer(config)
    n_parameters = sum(value.numel() for value in weights.values())
    card = model_card(path, paths, state, hub_config, config, n_parameters)
    write_folder(out, files, weights, card)
    return hub_config, [checkpoint.step_of(p) for p in paths]


def temporary_name(out):
    """A regular expression for the folder beside `out` that write_folder() fills: OUT.XXXXXXXX.writing."""
    return re.escape(os.path.basename(os.path.realpath(out))) + r"\.[0-9a-f]{8}\.writing"


def write_folder(out, files, weights, card):
    """Write a model's folder under a temporary name and rename it: it is complete or absent.

    out: an empty folder that this process holds; files: {name: content of a JSON file}; weights:
    {name: tensor}; card: the text of README.md.
    """
    out = os.path.realpath(out)
    temporary = f"{out}.{os.urandom(4).hex()}.writing"  # a name that nobody else uses
    os.makedirs(temporary)
    try:
        for name, content in files.items():
            path = os.path.join(temporary, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # Of a label that is not Unicode this makes JSON's own escape, as in "\udcff".
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as f:
                json.dump(content, f, indent=2, ensure_ascii=False)
        with open(os.path.join(temporary, "README.md"), "w", encoding="utf-8") as f:
            f.write(card)
        path = os.path.join(temporary, "model.safetensors")
        checkpoint.save_tensors(weights, path, metadata={"format": "pt"})
        # Only an empty folder can be replaced: the lock goes just before.
        os.remove(os.path.join(out, NAME))
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# ---- weights


def last_checkpoints(path, count):
    """Return the paths of `count` checkpoints of a run, in order. `path` is the last of them.

    Raises UserError if there are fewer, or if they are not of the same model.
    """
    run = os.path.dirname(os.path.abspath(path))
    step = checkpoint.step_of(path)
    # `path` itself may have another name: a link, or a folder that was renamed.
    paths = [p for p in checkpoint.all_of(run) if checkpoint.step_of(p) < step] + [path]
    if count < 1 or len(paths) < count:
        noun = "checkpoints" if len(paths) > 1 else "checkpoint"
        raise UserError(
            f"average={count}: {run} has {len(paths)} {noun} up to {os.path.basename(path)}; "
            "--keep_last and --milestones of train.py keep more"
        )
    for earlier in paths[-count:-1]:
        config = checkpoint.config_of(checkpoint.find(earlier))
        checkpoint.same_model(config, checkpoint.config_of(path), earlier)
    return paths[-count:]


def mean_of(paths):
    """Return the mean of the weights of checkpoints: summed in fp64, returned in fp32."""
    weights = read_finite(os.path.join(paths[-1], "model.safetensors"))
    if len(paths) == 1:
        return weights
    total = {name: value.double() for name, value in weights.items()}
    for path in paths[:-1]:
        for name, value in read_finite(os.path.join(path, "model.safetensors")).items():
            total[name] += value
    return {name: (value / len(paths)).float() for name, value in total.items()}


def read_finite(path):
    """Return the tensors of a file. Raises UserError, naming one, if it holds NaN or infinity."""
    tensors = checkpoint.read_tensors(path)
    for name, value in tensors.items():
        checkpoint.check_finite(name, value, path)
    return tensors


# ---- the head of a fine-tuned encoder


def read_head(path, row):
    """Return the tensors of a fine-tuned head, {} if there is none (retrieval has none).

    row: what the checkpoint records about its fine-tuning. Raises UserError, by name, for tensors
    that are not those of Hugging Face's head.
    """
    stored = os.path.join(path, "head.safetensors")
    if not os.path.isfile(stored):
        return {}
    problem = misfit(row, HEAD_SHAPE)
    if problem:
        raise UserError(f"{path}/state.json, of 'fine_tuned': {problem}")
    if row["kind"] not in HEADS:
        raise UserError(
            f"{path} has a head for tasks of the kind {row['kind']}, which the export does not "
            "know: add its tensors to HEADS in huggingface/exporting.py"
        )
    head = read_finite(stored)
    unknown = head.keys() - HEADS[row["kind"]]
    if unknown:
        raise UserError(
            f"{stored} has tensors that the export does not know: "
            f"{hf_weights.list_names(unknown)}; add them to HEADS in huggingface/exporting.py"
        )
    missing = HEADS[row["kind"]] - head.keys()
    if missing:
        raise UserError(
            f"{stored} lacks tensors that the export needs: {hf_weights.list_names(missing)}; "
            "change HEADS in huggingface/exporting.py"
        )
    return head


def describe_head(path, row):
    """Return what config.json says about a fine-tuned encoder's head.

    For question answering that is a token classification head with two labels.
    """
    if not os.path.isfile(os.path.join(path, "head.safetensors")):
        return {"architectures": ["EuroBertModel"]}
    labels = row["labels"]
    if not labels:
        labels = ("outside", "inside") if row["mode"] == "paper" else ("start", "end")
    kind = "Sequence" if row["kind"] == "sequence" else "Token"
    hub_config = {
        "architectures": [f"EuroBertFor{kind}Classification"],
        "num_labels": len(labels),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if kind == "Sequence":
        hub_config["problem_type"] = "single_label_classification"
    return hub_config


# ---- the other files


def tokenizer_config(tokenizer, config):
    """Return the content of tokenizer_config.json.

    The padding token is eos, so only the attention mask says which tokens are padding.
    """
    text_of_id = {i: text for text, i in tokenizer.encoding._special_tokens.items()}
    mask = {
        "__type": "AddedToken",
        "content": text_of_id[tokenizer.mask_id],
        "lstrip": True,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "eos_token": text_of_id[tokenizer.eos_id],
        "pad_token": text_of_id[tokenizer.eos_id],
        "mask_token": mask,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def sentence_transformer(config):
    """Return {name: content} of the files that make the folder a SentenceTransformer.

    The names of its modules are those of sentence-transformers 2 to 5, which 6 reads as well.
    """
    modules = []
    folders = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    for i, (kind, folder) in enumerate(folders.items()):
        modules.append({
            "idx": i,
            "name": str(i),
            "path": folder,
            "type": f"sentence_transformers.models.{kind}",
        })
    pooling = {
        "word_embedding_dimension": config.n_embd,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "include_prompt": True,
    }
    # eval_ir.py cuts texts at the same length.
    longest = round(0.99 * config.block_size)
    return {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": longest, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": QUERY, "document": DOCUMENT},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
