"""Fine-tuning tasks and the grid of trials.

    registry                  the tasks and the families: names, sizes, where the data comes from
    family                    what a family of tasks provides; the families, one file each:
    sequence_classification   a label for a text
    token_classification      a label for each word
    label_schemes             what the labels of words say: IOB2, BIOES and others, or no entities
    question_answering        an answer in a context
    loading                   data sets from local folders and the hub, and the cut of validation
    packing                   examples -> token arrays, cached, packed without padding
    demo                      tasks made by rule from the demo corpus
    metrics                   accuracy, F1, exact match, NDCG and the rest
    queue                     a grid of trials as a queue of files, shared by many processes
    training                  the training loop of one trial
    worker                    one process of a grid: its encoder, its settings, its trials
"""
