"""Models of Hugging Face, read and written.

    tokenizer    their tokenizer.json and ours
    weights      their config.json and tensor names and ours
    importing    their folder -> an Encoder
    exporting    a checkpoint -> a folder that transformers and sentence-transformers load
    model_card   the README.md of such a folder
"""
