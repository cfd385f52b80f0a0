"""`python -m benchmarks.codec`: engines and peers on the same codec; random weights need torch and numpy alone.

__main__.py           the command
cell.py               one size and one batch: builds, judges and times all contestants
contestants.py        our engines, taming-transformers' modules, diffusers (diffusers_model.py)
roofline.py           FLOP of a network, and a prediction of what each trick is worth
report.py, plot.py    the results as tables and as a picture
"""
