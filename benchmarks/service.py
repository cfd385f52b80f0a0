"""How fast is the service beside its peers, and what do several clients get of the codec's own speed?

    python benchmarks/service.py --json benchmarks/results/service.json --markdown benchmarks/results/service.md

The same as `dat bench service` (dat_service/bench/service.py). Peers: bare FastAPI + uvicorn, Ray Serve with its
default proxy, LitServe (extra `bench`), tritonclient as the client; the ceiling is a raw socket echo, and for the
codec the engine without a service. Machine, command and results: benchmarks/results/.
"""

from __future__ import annotations

import sys

from dat_service.bench.service import main

if __name__ == "__main__":
    sys.exit(main())
