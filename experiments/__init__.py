"""The paper's study as a plan of training runs and trials.

    recipes    the names of its models and what they mean
    plan       runs that share a beginning, each trained once
    scales     the same study with smaller models
    cost       tokens, FLOPs and GPU hours of a plan
    commands   the command lines
    jobs       running them, a few at a time
"""
