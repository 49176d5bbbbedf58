"""Hugging Face models, read and written.

    folders      find or download a model's folder, read its JSON files
    tokenizer    tokenizer.json <-> our Tokenizer
    weights      config.json and tensor names <-> ModelConfig and the Encoder's names
    importing    a Hugging Face folder -> an Encoder, or a run folder with a checkpoint
    history      what a checkpoint records about its training
    model_card   the README.md of an exported folder
    exporting    a checkpoint -> a folder that transformers and sentence-transformers load
"""
