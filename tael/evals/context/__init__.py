"""The effective-context suite: up to what length a mode answers as well as the exact model does
on short texts, what it loses against the exact model, and what it costs.

    texts        what haystacks are made of
    haystack     filling a given number of tokens, and hiding facts in it
    sample       a haystack and the questions about it
    words, retrieval, reasoning, tasks      the tasks
    prompt       a sample as token ids: first the haystack, then a question
    scoring, statistics                     from answers to figures with intervals
    teacher, divergence                     distributions at forced tokens
    modes, cell, suite                      one mode at one length; all of them
    report, plot                            tables, JSON and a picture
"""
