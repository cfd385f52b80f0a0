"""How fast is Q on this machine, beside the published modules and diffusers, and is it still the same Q?

    python benchmarks/codec.py --codec tiny-f8 --images SHARD... --out benchmarks/results/codec-tiny-f8-cpu.json
    PYTHONPATH=workers python benchmarks/codec.py --geometry vq-f8 --device cuda --steps --out FILE.json

The same as `dat bench codec` (workers/dat_workers/bench/codec.py); the second line needs torch, triton and numpy
alone. Peers: taming-transformers' modules as published, diffusers' VQModel eager and compiled, all with the same
weights; those that are not installed are listed so. Machine, command and results: benchmarks/results/.
"""

from __future__ import annotations

import sys

from dat_workers.bench.codec import main

if __name__ == "__main__":
    sys.exit(main())
