"""Fine-tuning tasks and the grid of trials.

    registry   the tasks: names, sizes, where their data comes from
    demo       tasks made by rule from the demo corpus
    packing    examples -> token arrays, cached, packed without padding
    families   what each family of tasks trains on, predicts and is scored by
    metrics    accuracy, F1, exact match, NDCG and the rest
    queue      a grid of trials as a queue of files, shared by any number of processes
    training   the training loop of one trial
    worker     one process of a grid: its encoder, its settings, its trials
"""
