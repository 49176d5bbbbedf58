"""Text -> shards of tokens.

    documents   local files of text, document by document
    hub         parquet files of the Hugging Face hub or of a folder, as streams of documents
    shards      the format of a shard: header, tokens, checksum
    parallel    parquet files prepared one by one, by many processes and machines
    assemble    prepared files put together into one corpus
"""
