"""Benchmarks that run on an installed package: one shared runner, and a module for each question.

`runner.py` lets contestants alternate and says how they compare; `machine.py` says what the machine can do;
`codec.py` is `dat bench codec` (its contestants in `contestants.py`, its prediction in `roofline.py`).
Nothing here needs more than torch and numpy to run on random weights.
"""
