"""Folders of Hugging Face models: find or download them, read their JSON files, overwrite none."""

import os
import re

from core.configurator import UserError
from core.files import is_new
from core.schema import read_json

JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def locate(source, patterns=JSON_FILES):
    """The local folder of a model: `source` itself, or the folder to which the hub's is downloaded.

    source: a folder, ORG/NAME or ORG/NAME@REVISION, each also with hf: before it.
    patterns: which of its files to download, into huggingface_hub's cache.
    Raises UserError if there is no such model, or the hub cannot be reached.
    """
    source = source.removeprefix("hf:")
    if os.path.isdir(source):
        return source
    if os.path.exists(source):
        hint = ""
        if source.endswith(".gguf"):
            hint = (
                "; load a .gguf with transformers (from_pretrained(folder, gguf_file=...)) and "
                "save it with save_pretrained"
            )
        raise UserError(f"{source} is a file: expected a folder with config.json{hint}")
    name, _, revision = source.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"there is no folder {source}, and it is not an id of the Hugging Face hub "
            "(ORGANISATION/NAME)"
        )

    # A local folder does not need huggingface_hub, so it is imported only here.
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=list(patterns))
    except Exception as error:  # the hub, its cache and the network each have their own errors
        raise UserError(
            f"there is no folder {name}, and the hub did not give a model of that name "
            f"({type(error).__name__}): is it right, is the network on, is a login "
            "needed (hf auth login)?"
        ) from None


ANY_OBJECT = {}


def read_model_json(folder, name, shape=ANY_OBJECT):
    """The content of the JSON file `name` of a model's folder. Raises UserError.

    shape: what is needed of it, as in core/schema.py; an object with any keys if it is not given.
    """
    try:
        return read_json(os.path.join(folder, name), shape)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {name}: is it a complete Hugging Face model?") from None
    except OSError as error:
        raise UserError(f"{folder}/{name} cannot be read ({error.strerror})") from None
    except UserError as error:
        raise UserError(f"{error}: fetch the folder again") from None


def check_is_free(out, own_files=()):
    """Raises UserError if `out` exists already, unless it is a folder with nothing but `own_files`."""
    if not os.path.lexists(out):
        return
    if not os.path.isdir(out) or not is_new(out, *own_files):
        raise UserError(f"{out} already exists: choose another folder")
