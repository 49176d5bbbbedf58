"""An encoder as a retriever: embeddings of packed texts, contrastive training on pairs, search.

As in arXiv 2507.00994, section 4: the embedding of a text is the mean of the last hidden states
over all tokens of "Query: ..." or "Document: ..." and eos, and similarity is the cosine. The
training loss is InfoNCE over the documents of a batch. It is the same however the batch is cut into
micro-batches or shared by processes.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from core.distributed import shows_progress
from core.rng import permute
from model import segment_mean
from retrieval import search
from tasks import packing, worker
from tasks.training import fit


def info_nce(embeddings, excluded, temperature):
    """InfoNCE of a batch. -> the sum of B cross-entropies, in nats

    Each query must tell its own document from those of the other pairs. (Documents need not tell
    queries apart.)
    embeddings [2B, C] fp32 of unit length: B queries and then their B documents.
    excluded [B, B] bool: true where a document is not a negative of a query.
    """
    queries, documents = embeddings.chunk(2)  # [B, C] each
    cosines = queries @ documents.T  # [B, B]
    logits = (cosines / temperature).masked_fill(excluded, float("-inf"))
    own_document = torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(logits, own_document, reduction="sum")


def other_positives(pairs, positives):
    """True where the document of another pair also answers the query. -> [B, B] bool

    pairs: B lists [query, document]. positives: for each query the set of documents that answer it.
    """
    rows = []
    for i, (query, _) in enumerate(pairs):
        answers = positives[query]
        rows.append([i != j and document in answers for j, (_, document) in enumerate(pairs)])
    return torch.tensor(rows)


@dataclass
class MicroBatch:
    """Sequences that are embedded in one forward and backward pass.

    It is either a complete batch, and its InfoNCE is computed from its embeddings, or a piece of a
    batch. For a piece the loss of the batch, and its gradient at the piece's embeddings, have been
    computed before: see gradcache_pieces.
    """

    indices: list  # of sequences in TrainingSet.sequences
    excluded: torch.Tensor = None  # of a complete batch: see info_nce
    gradient: torch.Tensor = None  # of a piece: [S, C], the loss' gradient at its embeddings
    loss: torch.Tensor = None  # of a piece: the batch's loss in the first one, 0 in all others


class Retriever(worker.Worker):
    """A worker whose encoder is trained to embed, embeds, and searches.

    settings: eval_ir.py's. processes: the core.distributed.Processes that share each trial. free:
    see worker.Worker.
    """

    def __init__(self, settings, path, processes, free):
        super().__init__(settings, path, free)
        self.processes = processes
        self.eval_tokens = settings.eval_tokens
        if not self.eval_tokens:
            self.eval_tokens = 65_536 if self.device.startswith("cuda") else 8192

    # ---- embeddings

    def embed(self, sequences, indices):
        """Embeds some sequences in one forward pass. -> [S, C] fp32 of unit length"""
        tokens, cu_seqlens = packing.pack(sequences, indices, self.device)
        with self.autocast():
            hidden = self.encoder(tokens, cu_seqlens, self.c.causal)  # [T, C]
        return F.normalize(segment_mean(hidden, cu_seqlens), dim=-1)

    def encode(self, sequences, title, rank=0, world_size=1):
        """Yields (indices [S], embeddings [S, C]) of all sequences, or of one process' share.

        The longest come first, so that what does not fit in memory fails at once. title: shown by
        the progress bar.
        """
        order = np.argsort(-packing.lengths(sequences), kind="stable")
        batches = packing.by_budget(order, sequences, self.eval_tokens)[rank::world_size]
        total = sum(map(len, batches))
        is_quiet = not shows_progress()
        with tqdm(total=total, desc=title, unit="text", leave=False, disable=is_quiet) as bar:
            for indices in batches:
                with torch.inference_mode():
                    embeddings = self.embed(sequences, indices)
                yield torch.tensor(indices, device=self.device), embeddings
                bar.update(len(indices))

    def embeddings(self, sequences, title):
        """Embeds all sequences. -> [n, C] in their order"""
        n = len(sequences["bounds"]) - 1
        all_embeddings = torch.empty(n, self.encoder.config.n_embd, device=self.device)
        for indices, embeddings in self.encode(sequences, title):
            all_embeddings[indices] = embeddings
        return all_embeddings

    # ---- search

    def search(self, queries, documents, ids, k, title):
        """Finds the k best documents of each query, encoding the documents as it goes.

        queries, documents: dicts of tokens and bounds. ids [n] int64: one for each document; of
        equal scores the larger id ranks first.
        -> scores [Q, k] fp32 and ids [Q, k], as search.top_k returns them
        """
        rank = self.processes.rank
        world_size = self.processes.world_size
        query_embeddings = self.embeddings(queries, f"{title} queries")
        ids = ids.to(self.device)
        pieces = (
            (ids[indices], embeddings)
            for indices, embeddings in self.encode(documents, title, rank, world_size)
        )
        keys = search.best_keys(query_embeddings, pieces, k)
        if world_size > 1:
            # Each process has searched its share of the documents: merge what they found.
            keys_of_processes = [torch.empty_like(keys) for _ in range(world_size)]
            dist.all_gather(keys_of_processes, keys)
            keys = torch.cat(keys_of_processes, dim=1)  # [Q, world_size * k]
            keys = search.merge(keys, k)  # [Q, k]
        return search.decode(keys.cpu())

    # ---- training

    def train(self, training_set, steps, trial, name):
        """Trains the encoder on a targets.TrainingSet. -> the loss curve of fit()

        Raises Diverged.
        """
        is_shared = self.processes.world_size > 1
        return fit(
            self.parameters(),
            lambda step: self.micro_batches(training_set, step, trial["seed"]),
            lambda micro_batch: self.loss_of(training_set, micro_batch),
            steps,
            trial["lr"],
            self.c,
            name,
            self.sum_gradients if is_shared else None,
        )

    def sum_gradients(self):
        """Adds up the gradients of all processes, in each of them."""
        for p in self.parameters():
            dist.all_reduce(p.grad)

    def micro_batches(self, training_set, step, seed):
        """This process' share of a step. -> [(MicroBatch, number of pairs)], as fit() needs them"""
        B = self.c.batch
        rank = self.processes.rank
        world_size = self.processes.world_size

        # The epochs follow each other without a gap, each in an order of its own. A step takes the
        # next B places of this stream; permute() says which pair stands where.
        n = len(training_set.pairs)
        place = np.arange(step * B, (step + 1) * B)
        pairs = training_set.pairs[permute(place % n, n, seed, epoch=place // n)]  # [B, 2]
        indices = pairs.T.ravel()  # [2B], of the B queries, then of the B documents

        # The paper's code takes all other documents as negatives, also those that answer the query.
        if self.c.mode == "paper":
            excluded = torch.zeros(B, B, dtype=torch.bool)
        else:
            excluded = other_positives(pairs.tolist(), training_set.positives)
        excluded = excluded.to(self.device)

        # This process' share of the batch, in pieces that fit in memory.
        places = np.arange(2 * B)[rank::world_size]  # in the batch
        pieces = packing.by_budget(indices[places], training_set.sequences, self.c.micro_tokens)
        if world_size == 1 and len(pieces) == 1:
            return [(MicroBatch(pieces[0], excluded=excluded), B)]
        return self.gradcache_pieces(training_set, pieces, places, excluded)

    def gradcache_pieces(self, training_set, pieces, places, excluded):
        """The micro-batches of a batch that is embedded in pieces (GradCache, arXiv 2101.06983).

        InfoNCE compares each query with every document of the batch, so it cannot be computed from
        one piece. Instead, embed the whole batch once without a graph, and take the gradient of the
        loss at each embedding. loss_of() then embeds it a second time, piece by piece, and
        backpropagates these gradients into the encoder.

        pieces: lists of sequence indices. places: where these sequences, end to end, stand in the
        batch.
        """
        B = self.c.batch
        ends = np.cumsum([len(piece) for piece in pieces])
        places_of_pieces = [torch.from_numpy(p) for p in np.split(places, ends[:-1])]
        embeddings = torch.zeros(2 * B, self.encoder.config.n_embd, device=self.device)
        with torch.no_grad():
            for piece, piece_places in zip(pieces, places_of_pieces):
                embeddings[piece_places] = self.embed(training_set.sequences, piece)
        if self.processes.world_size > 1:
            dist.all_reduce(embeddings)  # a sum: a process has zeros in the places of all others
        loss = info_nce(embeddings.requires_grad_(), excluded, self.c.temperature)
        loss.backward()

        # The first piece carries the loss and the number of pairs of the whole batch.
        micro_batches = []
        for i, (piece, piece_places) in enumerate(zip(pieces, places_of_pieces)):
            is_first = i == 0
            piece_loss = loss.detach() if is_first else torch.zeros_like(loss)
            batch = MicroBatch(piece, gradient=embeddings.grad[piece_places], loss=piece_loss)
            micro_batches.append((batch, B if is_first else 0))
        return micro_batches

    def loss_of(self, training_set, batch):
        """The loss of a MicroBatch, a sum over queries, from which fit() backpropagates."""
        embeddings = self.embed(training_set.sequences, batch.indices)
        if batch.excluded is not None:
            return info_nce(embeddings, batch.excluded, self.c.temperature)
        # The gradient of this sum is that of the loss, but its value is another. So exchange the
        # value and leave the gradient.
        stand_in = (embeddings * batch.gradient).sum()
        return stand_in + (batch.loss - stand_in).detach()
