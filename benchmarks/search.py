"""The search part of bench.py: exact top-k over a corpus of random unit vectors, by search.py, by sorting all scores in numpy, and
by FAISS' flat index where it is installed.

The embeddings lie in a file, as an encoder could have left them. search.py reads it piece by piece; the others want the whole
corpus in memory, and their time begins when it is there. Each runs in a process of its own; its memory is counted from the
moment when libraries and queries are loaded. numpy sorts for a few queries only: its time per query does not depend on how many.
"""
import importlib.util
import json
import os
import subprocess
import sys
import time

import numpy as np
import torch

from core.configurator import RunError
from core.device import pick_device
from core.files import ROOT
from retrieval import search

K, PIECE, SORTED = 100, 10_000, 20      # results a query, documents read at once, queries that numpy sorts for


def unit(generator, n, width):
    return torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)


def write(c, folder):
    """folder/documents.f32 and queries.npy"""
    generator = torch.Generator().manual_seed(0)
    np.save(os.path.join(folder, "queries.npy"), unit(generator, c.queries, c.width).numpy())
    with open(os.path.join(folder, "documents.f32"), "wb") as f:
        for start in range(0, c.documents, PIECE):
            f.write(unit(generator, min(PIECE, c.documents - start), c.width).numpy().tobytes())


def pieces(c, folder, device):
    with open(os.path.join(folder, "documents.f32"), "rb") as f:
        for start in range(0, c.documents, PIECE):
            part = torch.from_numpy(np.fromfile(f, np.float32, PIECE * c.width).reshape(-1, c.width))
            yield torch.arange(start, start + len(part), device=device), part.to(device)


def memory(field):
    """Bytes of this process: VmRSS now, VmHWM at most so far (Linux)."""
    with open("/proc/self/status", encoding="utf-8") as f:
        return 1024 * next(int(line.split()[1]) for line in f if line.startswith(field))


def forget_peak():
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
        f.write("5")        # VmHWM begins anew at VmRSS
    return memory("VmRSS")


def contestant(c, name, folder):
    """Search, and leave folder/NAME.json: {"seconds", "queries", "peak": bytes, "load": seconds before it, "ids" of some}"""
    queries = np.load(os.path.join(folder, "queries.npy"))
    before, load, device = forget_peak(), 0.0, pick_device(c.device)
    if name == "ours":
        began = time.time()
        _, ids = search.top_k(torch.from_numpy(queries).to(device), pieces(c, folder, device), K)
        ids = ids.tolist()
    else:
        began = time.time()
        documents = np.fromfile(os.path.join(folder, "documents.f32"), np.float32).reshape(-1, c.width)
        if name == "faiss":
            import faiss
            index = faiss.IndexFlatIP(c.width)
            index.add(documents)
        else:
            queries = queries[:SORTED]
        load, began = time.time() - began, time.time()
        ids = index.search(queries, K)[1] if name == "faiss" else np.argsort(-(queries @ documents.T), axis=1)[:, :K]
        ids = ids.tolist()
    found = {"seconds": time.time() - began, "queries": len(queries), "peak": memory("VmHWM") - before, "load": load,
             "ids": ids[:SORTED]}
    with open(os.path.join(folder, f"{name}.json"), "w", encoding="utf-8") as f:
        json.dump(found, f)


def measure(c, folder):
    """-> {name: what contestant() left}"""
    write(c, folder)
    found = {}
    for name in ("ours", "numpy", *["faiss"] * (importlib.util.find_spec("faiss") is not None)):
        command = [sys.executable, "bench.py", "searcher", name, folder, *(w for w in sys.argv[1:] if w.startswith("--"))]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            raise RunError(f"{name} ended with exit code {done.returncode}")
        with open(os.path.join(folder, f"{name}.json"), encoding="utf-8") as f:
            found[name] = json.load(f)
    return found
