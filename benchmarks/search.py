"""Exact top-k over a million documents: retrieval/search.py, numpy sorting all scores, and FAISS'
flat index.

    python bench.py search              # needs 3 GB of disk; FAISS where it is installed

The corpus is a file of random unit vectors, as if an encoder had written them. retrieval/search.py
reads the file piece by piece. The others need the whole corpus in memory, and their time begins
when it is loaded. Each runs in a process of its own, whose memory is counted from the moment when
libraries and queries are loaded. numpy sorts for a few queries only: its time per query does not
depend on their number.
"""
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.rows import describe, record
from benchmarks.settings import as_flags, settings_for
from core.configurator import Path, PositiveInt, RunError, UserError
from core.device import pick_device
from core.files import ROOT, write_json
from core.schema import read_json
from retrieval import search as exact_search

K = 100              # results a query
PIECE = 10_000       # documents that are written or read at once
SORTED = 20          # queries that numpy sorts for; also the queries whose results are compared
NAMES = {
    "ours": "search.py, from a file piece by piece",
    "numpy": f"numpy, all scores sorted ({SORTED} queries)",
    "faiss": "FAISS IndexFlatIP",
}


@dataclass
class Config:
    # the corpus
    documents: PositiveInt = 1_000_000  # random unit vectors
    queries: PositiveInt = 1000         # random unit vectors, too
    width: PositiveInt = 768            # of an embedding: 210m's
    # how
    device: str = "auto"                # of ours: cuda where there is one, else cpu
    to: Path = ""                       # append the rows, with device and versions, to this .jsonl file


def search(c):
    device = pick_device(c.device)
    if min(c.documents, c.queries, c.width) < K:
        raise UserError(f"documents={c.documents}, queries={c.queries}, width={c.width}: "
                        f"expected at least {K} each")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(c, folder)
    print(f"\n{describe(device)}; the {K} best of {c.documents:,} documents x {c.width}, "
          f"{c.queries:,} queries\n\n"
          "| search | ms a query | the corpus | peak extra MiB | same first ten |\n"
          "|---|---|---|---|---|")
    for key, result in results.items():
        same = share_of_same_ten(result["ids"], results["ours"]["ids"])
        load = f"+ {result['load']:.1f} s to load" if result["load"] else "reading included"
        ms = 1000 * result["seconds"] / result["queries"]
        peak = result["peak"] / 2 ** 20
        print(f"| {NAMES[key]} | {ms:.1f} | {load} | {peak:,.0f} | {same:.0%} |")
        row = {"bench": "search", "name": key, "documents": c.documents, "width": c.width, "k": K}
        measured = {name: result[name] for name in ("seconds", "queries", "peak", "load")}
        record(c.to, row | measured | {"same_ten": same}, device)


def share_of_same_ten(ids, reference):
    """Return the share of queries whose first ten documents are the same, in the same order."""
    n_same = sum(a[:10] == b[:10] for a, b in zip(ids, reference))
    return n_same / len(ids)


def measure(c, folder):
    """Run every search. -> {name: the results that its process wrote, see run_searcher}"""
    write_embeddings(c, folder)
    names = ["ours", "numpy"]
    if importlib.util.find_spec("faiss"):
        names.append("faiss")
    flags = as_flags(settings_for(SearcherConfig, c))
    results = {}
    for name in names:
        command = [sys.executable, os.path.join(ROOT, "bench.py"), "searcher", name, folder, *flags]
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise RunError(f"{name} ended with exit code {done.returncode}")
        results[name] = read_json(os.path.join(folder, f"{name}.json"))
    return results


# --------------------------------------------------------------------------------------------------
# the embeddings

def unit_vectors(generator, n, width):
    return torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)


def write_embeddings(c, folder):
    """Write folder/documents.f32 and folder/queries.npy."""
    generator = torch.Generator().manual_seed(0)
    queries = unit_vectors(generator, c.queries, c.width)
    np.save(os.path.join(folder, "queries.npy"), queries.numpy())
    with open(os.path.join(folder, "documents.f32"), "wb") as f:
        for start in range(0, c.documents, PIECE):
            n = min(PIECE, c.documents - start)
            f.write(unit_vectors(generator, n, c.width).numpy().tobytes())


def read_pieces(c, folder, device):
    """Yield (ids [n], embeddings [n, width]) of PIECE documents at a time, on the device."""
    with open(os.path.join(folder, "documents.f32"), "rb") as f:
        for start in range(0, c.documents, PIECE):
            embeddings = np.fromfile(f, np.float32, PIECE * c.width).reshape(-1, c.width)
            ids = torch.arange(start, start + len(embeddings), device=device)
            yield ids, torch.from_numpy(embeddings).to(device)


# --------------------------------------------------------------------------------------------------
# the process of one search

@dataclass
class SearcherConfig(Config):
    args: tuple = ()             # a key of NAMES, and the folder of the embeddings


def run_searcher(c):
    """bench.py searcher NAME FOLDER: search, and write FOLDER/NAME.json.

    {"seconds": of the search, "queries": their number, "peak": bytes of extra memory,
     "load": seconds before the search, "ids": results of the first SORTED queries}
    """
    name, folder = c.args
    device = pick_device(c.device)
    queries = np.load(os.path.join(folder, "queries.npy"))
    memory_before = forget_peak()
    # the others load the corpus
    load = 0.0
    if name != "ours":
        began = time.time()
        path = os.path.join(folder, "documents.f32")
        documents = np.fromfile(path, np.float32).reshape(-1, c.width)
        if name == "faiss":
            import faiss

            index = faiss.IndexFlatIP(c.width)
            index.add(documents)
        else:
            queries = queries[:SORTED]
        load = time.time() - began

    # the search
    began = time.time()
    if name == "ours":
        pieces = read_pieces(c, folder, device)
        _, ids = exact_search.top_k(torch.from_numpy(queries).to(device), pieces, K)
    elif name == "faiss":
        _, ids = index.search(queries, K)
    else:
        ids = np.argsort(-(queries @ documents.T), axis=1)[:, :K]
    ids = ids.tolist()
    seconds = time.time() - began
    write_json(os.path.join(folder, f"{name}.json"), {
        "seconds": seconds,
        "queries": len(queries),
        "peak": memory_of_process("VmHWM") - memory_before,
        "load": load,
        "ids": ids[:SORTED],
    })


def memory_of_process(field):
    """Return the bytes of this process: field "VmRSS" for now, "VmHWM" for the peak (Linux)."""
    with open("/proc/self/status", encoding="utf-8") as f:
        for line in f:
            if line.startswith(field):
                return 1024 * int(line.split()[1])
    raise RunError(f"/proc/self/status has no line {field}")


def forget_peak():
    """Reset the peak VmHWM to VmRSS. -> bytes of this process now"""
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
        f.write("5")
    return memory_of_process("VmRSS")
