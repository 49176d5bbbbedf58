"""Retrieval: training an encoder to embed, and searching with it.

    collections    corpora, queries and judgements, in BEIR's layout or from the hub
    pools          which documents are searched: judged, hard or full
    tokens         token files of a collection
    targets        what a trial is scored by
    retriever      embeddings and the contrastive loss
    search         exact search in a corpus of any size
    mteb_adapter   an encoder as the package mteb calls it
"""
