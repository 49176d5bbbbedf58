"""Retrieval: training an encoder to embed, and searching with it.

    collections    documents, queries and judgements, in BEIR's layout or from the hub
    pools          training pairs; which documents are searched: judged, hard or full; BM25
    tokens         token files of a collection
    targets        what a trial trains on and what it searches, tokenized; the scores of a ranking
    retriever      embeddings, the contrastive loss, training and encoding in batches
    search         exact search in a corpus of any size
    mteb_adapter   scores an encoder with the package mteb
"""
