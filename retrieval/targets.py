"""A collection and a pool of it, tokenized: what a trial is scored by."""
from dataclasses import dataclass

import torch

from retrieval import collections as ir_data


@dataclass
class Target:
    """A collection and a pool of it, tokenized."""
    collection: ir_data.Collection
    queries: dict        # tokens and bounds of all validation and test queries
    query_ids: list
    documents: dict      # tokens and bounds of the pool
    ids: list            # the pool's document ids in their own order, which search breaks ties by
    rank: torch.Tensor   # [n] int64: place in ids of each encoded document
    facts: dict          # what its rows say about it
