"""Measurements of this project, run from the root of the repository; each file says its question at the top.

python -m benchmarks.service            the service beside FastAPI, Ray Serve, LitServe and a raw socket
python -m benchmarks.codec              engines beside taming-transformers and diffusers, and the chip's peak
python -m benchmarks.overlap            what the loader hides of the codec's time
python -m benchmarks.precompute         what `dat precompute` costs beside its codec
python -m benchmarks.score_codec        how good a codec is
python -m benchmarks.tokens_changed     how many tokens the adversarial step changes
python -m benchmarks.thin_links         what JPEG and INT8 gradients save and cost

They share stand_ins/ (codecs that only sleep), processes.py, machine.py, tables.py, latency.py and pictures.py.
Each file of results/ holds the command and the machine.
"""
