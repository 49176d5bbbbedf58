"""A checkpoint -> a folder that transformers and sentence-transformers load, without code of ours and without unpickling.

An encoder leaves as `eurobert`, which is native in transformers 5 (AutoModel, ForMaskedLM, ForSequenceClassification and
ForTokenClassification load it) and is a SentenceTransformer as well: mean over the tokens, length 1, as eval_ir.py embeds.
A decoder leaves as `llama`. A fine-tuned encoder takes its head along.
"""
import json
import os
import shutil

from safetensors.torch import load_file, save_file

from core import checkpoint
from core.configurator import UserError
from core.tokenizer import DOCUMENT, QUERY
from huggingface import tokenizer as hf_tokenizer
from huggingface import weights as hf_weights
from huggingface.model_card import model_card
from objectives import facts_of, objective_at


def export(ckpt, out, average=1, causal="auto"):
    """Write `out`, which must not be there. -> config.json's content, the steps whose checkpoints it is the mean of

    average: how many of the run's checkpoints up to this one. causal: "true" for a decoder, "false" for an encoder, "auto" as it
    was trained last. Raises UserError.
    """
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"{out} is there already: choose another folder")
    path = checkpoint.find(ckpt)
    state, config, tok = checkpoint.read_state(path), checkpoint.config_of(path), checkpoint.tokenizer_of(path)
    causal = was_causal(state) if causal == "auto" else causal == "true"
    paths = last_checkpoints(path, average)
    about = hf_weights.write_config(config, causal) | {
        "bos_token_id": None, "eos_token_id": tok.eos_id, "pad_token_id": tok.eos_id, "mask_token_id": tok.mask_id,
        "classifier_pooling": "mean"}
    weights = hf_weights.write_weights(mean_of(paths), config)
    if "fine_tuned" in state:
        if causal or was_causal(state):
            raise UserError(f"{path} is fine-tuned: it leaves as an encoder, if it was one; transformers has no decoder with "
                            "such a head")
        stored = os.path.join(path, "head.safetensors")
        head = load_file(stored) if os.path.isfile(stored) else {}
        # the LM head is left over from pretraining and fits no more
        weights = {k: v for k, v in weights.items() if k != "lm_head.weight"} | head
        about |= with_labels(state["fine_tuned"]) if head else {"architectures": ["EuroBertModel"]}
    files = {"config.json": about, "tokenizer.json": hf_tokenizer.to_json(tok, append_eos=not causal),
             "tokenizer_config.json": tokenizer_config(tok, config)} | ({} if causal else sentence_transformer(config))
    hf_tokenizer.compare(files["tokenizer.json"], tok, path)
    temporary = os.path.normpath(out) + ".writing"
    shutil.rmtree(temporary, ignore_errors=True)
    for name, content in files.items():
        os.makedirs(os.path.dirname(os.path.join(temporary, name)), exist_ok=True)
        with open(os.path.join(temporary, name), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=2, ensure_ascii=False)
    stored = os.path.join(temporary, "model.safetensors")
    save_file(weights, stored, metadata={"format": "pt"})
    shutil.copymode(os.path.join(temporary, "config.json"), stored)         # safetensors writes for the owner alone
    with open(os.path.join(temporary, "README.md"), "w", encoding="utf-8") as f:
        f.write(model_card(path, paths, state, about, config, sum(v.numel() for v in weights.values())))
    os.replace(temporary, out)
    return about, [checkpoint.step_of(p) for p in paths]


def was_causal(state):
    """Under which mask a checkpoint was trained last. Raises UserError if its state does not tell."""
    if "fine_tuned" in state:
        return bool(state["fine_tuned"].get("causal"))
    if "phases" in state["settings"]:
        phases = state["settings"]["phases"]
        facts = state.get("objectives") or facts_of(phases)
        return facts[objective_at(max(0, state["step"] - 1), phases)]["is_causal"]
    known = state.get("imported", {}).get("causal")
    if known is None:
        raise UserError("this checkpoint does not say whether it is a decoder or an encoder: --causal=true or --causal=false")
    return known


def last_checkpoints(path, k):
    """The paths of k checkpoints of a run, `path` the last of them. Raises UserError if there are fewer."""
    run = os.path.dirname(os.path.abspath(path))
    found = [p for p in checkpoint.all_of(run) if checkpoint.step_of(p) <= checkpoint.step_of(path)]
    if k < 1 or len(found) < k:
        raise UserError(f"average={k}: {run} has {len(found)} checkpoint{'s' * (len(found) > 1)} up to {os.path.basename(path)}; "
                        "--keep_last and --milestones of train.py keep more")
    for p in found[-k:-1]:
        checkpoint.same_model(checkpoint.config_of(checkpoint.find(p)), checkpoint.config_of(path), p)
    return found[-k:]


def mean_of(paths):
    """The mean of checkpoints' weights, added in fp64, as fp32."""
    weights = load_file(os.path.join(paths[-1], "model.safetensors"))
    if len(paths) > 1:
        total = {k: v.double() for k, v in weights.items()}
        for path in paths[:-1]:
            for k, v in load_file(os.path.join(path, "model.safetensors")).items():
                total[k] += v
        weights = {k: (v / len(paths)).float() for k, v in total.items()}
    return weights


def tokenizer_config(tok, config):
    """eos pads, as in pretraining, so the attention mask must say what is text."""
    specials = {i: text for text, i in tok.encoding._special_tokens.items()}
    mask = {"__type": "AddedToken", "content": specials[tok.mask_id], "lstrip": True, "rstrip": False, "normalized": False,
            "single_word": False, "special": True}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size, "eos_token": specials[tok.eos_id],
            "pad_token": specials[tok.eos_id], "mask_token": mask, "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"]}


def with_labels(row):
    """config.json's part about a fine-tuned head. Question answering has two outputs a token."""
    labels = row["labels"] or (("outside", "inside") if row["mode"] == "paper" else ("start", "end"))
    kind = "Sequence" if row["kind"] == "sequence" else "Token"
    return {"architectures": [f"EuroBertFor{kind}Classification"], "num_labels": len(labels),
            "id2label": {str(i): name for i, name in enumerate(labels)}, "label2id": {name: i for i, name in enumerate(labels)},
            **({"problem_type": "single_label_classification"} if kind == "Sequence" else {})}


def sentence_transformer(c):
    """The files that make it one. Their type names are those of sentence-transformers 2 to 5, which 6 reads as well."""
    modules = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    return {"modules.json": [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                             for i, (path, kind) in enumerate(modules)],
            "1_Pooling/config.json": {"word_embedding_dimension": c.n_embd, "pooling_mode_cls_token": False,
                                      "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False,
                                      "pooling_mode_mean_sqrt_len_tokens": False, "include_prompt": True},
            "2_Normalize/config.json": {},
            "sentence_bert_config.json": {"max_seq_length": round(0.99 * c.block_size), "do_lower_case": False},
            "config_sentence_transformers.json": {"prompts": {"query": QUERY, "document": DOCUMENT}, "default_prompt_name": None,
                                                  "similarity_fn_name": "cosine"}}
