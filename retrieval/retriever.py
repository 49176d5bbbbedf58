"""An encoder as a retriever: embeddings of packed texts, contrastive training on pairs, search; and as mteb wants to call it.

After arXiv 2507.00994, section 4: an embedding is the mean of the last hidden states over all tokens of "Query: ..." or
"Document: ..." and eos, and similarity the cosine. Trained with InfoNCE over the documents of a batch, which stays one loss
however it is cut into micro-batches or shared by processes.
"""
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from core.distributed import speaks
from core.rng import permute
from model import segment_mean
from retrieval import search
from tasks import packing, worker
from tasks.training import fit


def info_nce(embeddings, known, temperature):
    """InfoNCE of a batch, query to document only: each query's own document against those of the others.

    embeddings [2B, C] fp32 of unit length, B queries and then their B documents; known [B, B] bool: documents of other pairs that
    answer the query, too, and are no negatives. -> the sum of B cross-entropies, in nats
    """
    queries, documents = embeddings.chunk(2)
    cosines = queries @ documents.T                                                   # [B, B]
    return F.cross_entropy((cosines / temperature).masked_fill(known, float("-inf")),
                           torch.arange(len(queries), device=queries.device), reduction="sum")


def known_positives(pairs, known):
    """pairs [B, 2] of query and document, known: for each query its documents -> [B, B] bool for info_nce"""
    return torch.tensor([[i != j and d in known[q] for j, (_, d) in enumerate(pairs)] for i, (q, _) in enumerate(pairs)])


class Retriever(worker.Worker):
    """c: settings of eval_ir.py; processes: those that share each trial (system.Processes)."""

    def __init__(self, c, path, processes, free):
        super().__init__(c, path, free)
        self.processes = processes
        self.eval_tokens = c.eval_tokens or (65_536 if self.device.startswith("cuda") else 8192)

    def embed(self, encoded, indices):
        """Embeddings of some sequences, fp32 of unit length. -> [S, C]"""
        tokens, cu_seqlens = packing.pack(encoded, indices, self.device)
        with self.autocast():
            hidden = self.encoder(tokens, cu_seqlens, self.c.causal)
        return F.normalize(segment_mean(hidden, cu_seqlens), dim=-1)

    def encode(self, encoded, what, rank=0, world=1):
        """Yields (indices [S], embeddings [S, C]) until all sequences were there, or a process' share of them. Longest first, so
        that what does not fit in memory fails at once."""
        order = np.argsort(-packing.lengths(encoded), kind="stable")
        batches = packing.by_budget(order, encoded, self.eval_tokens)[rank::world]
        with tqdm(total=sum(map(len, batches)), desc=what, unit="text", leave=False, disable=not speaks()) as bar:
            for indices in batches:
                with torch.inference_mode():
                    part = self.embed(encoded, indices)
                yield torch.tensor(indices, device=self.device), part
                bar.update(len(indices))

    def embeddings(self, encoded, what):
        """-> [n, C] in the order of the texts"""
        found = torch.empty(len(encoded["bounds"]) - 1, self.encoder.config.n_embd, device=self.device)
        for indices, part in self.encode(encoded, what):
            found[indices] = part
        return found

    def search(self, queries, documents, ids, k, what):
        """The k best documents of each query. queries, documents: tokens and bounds; ids [n] int64 of the documents, whose order
        decides ties. -> scores [Q, k] fp32, ids [Q, k], as search.top_k has them"""
        rank, world = self.processes.rank, self.processes.world_size
        asked, ids = self.embeddings(queries, f"{what} queries"), ids.to(self.device)
        pieces = ((ids[indices], part) for indices, part in self.encode(documents, what, rank, world))
        keys = search.best_keys(asked, pieces, k)
        if world > 1:
            parts = [torch.empty_like(keys) for _ in range(world)]
            dist.all_gather(parts, keys)
            keys = search.merge(torch.cat(parts, dim=1), k)                           # [Q, world * k] -> [Q, k]
        return search.decode(keys.cpu())

    def train(self, source, steps, trial, name):
        """Train the encoder on (encoded, pairs [P, 2] of sequences in it, known: for each query its documents). -> loss curve"""
        c, (encoded, pairs, known), parameters = self.c, source, self.parameters()
        rank, world = self.processes.rank, self.processes.world_size

        def micro_batches(step):
            position, n = np.arange(step * c.batch, (step + 1) * c.batch), len(pairs)       # in the stream of all epochs
            chosen = pairs[permute(position % n, n, trial["seed"], position // n)]                        # [B, 2]
            # the paper's code has every other document as a negative, right or wrong
            others = known_positives(chosen.tolist(), known) & (c.mode != "paper")
            others, sequences = others.to(self.device), chosen.T.ravel()                                  # [2B], queries first
            mine = np.arange(2 * c.batch)[rank::world]
            parts = packing.by_budget(sequences[mine], encoded, c.micro_tokens)
            if world == 1 and len(parts) == 1:
                return [((parts[0], others, None), c.batch)]
            # Each query needs every document, so the batch cannot be cut as it is: embed all of it without a graph, take the
            # loss' gradient at each embedding, and embed it again part by part with that gradient (GradCache, arXiv 2101.06983).
            places = [torch.from_numpy(place) for place in np.split(mine, np.cumsum([len(part) for part in parts])[:-1])]
            found = torch.zeros(2 * c.batch, self.encoder.config.n_embd, device=self.device)
            with torch.no_grad():
                for part, place in zip(parts, places):
                    found[place] = self.embed(encoded, part)
            if world > 1:
                dist.all_reduce(found)         # every other process has zeros in this one's places
            loss = info_nce(found.requires_grad_(), others, c.temperature)
            loss.backward()
            return [((part, found.grad[place], loss.detach() * (i == 0)), c.batch * (i == 0))
                    for i, (part, place) in enumerate(zip(parts, places))]

        def loss_of(batch):
            part, given, loss = batch
            embedded = self.embed(encoded, part)
            if loss is None:
                return info_nce(embedded, given, c.temperature)
            stand_in = (embedded * given).sum()                    # has the loss' gradient, not its value
            return stand_in + (loss - stand_in).detach()

        def sum_gradients():
            for p in parameters:
                dist.all_reduce(p.grad)

        return fit(parameters, micro_batches, loss_of, steps, trial["lr"], c, name, sum_gradients if world > 1 else None)
