"""Text -> shards of tokens.

documents   local files of text, document by document
hub         data sets of the Hugging Face hub, streamed
shards      the format of a shard: header, tokens, checksum
parallel    files of a hub data set prepared by many processes and machines
assemble    prepared files put together into one corpus
"""
