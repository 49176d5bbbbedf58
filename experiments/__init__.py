"""The paper's study as a plan of training runs and scored checkpoints.

A study goes through these files from top to bottom:

    recipes      the names of its models and what they mean
    scales       the same study with smaller models
    selection    which models --only and --seeds ask for
    plan         which runs make them, and which steps they share
    cost         tokens, FLOPs and GPU hours of a run
    overview     the printed plan
    layout       where each checkpoint lies in a study's folder, and study.json
    commands     the command lines that train and score
    script       these commands printed, for torchrun or Slurm
    jobs         these commands run here, a few at a time
"""
