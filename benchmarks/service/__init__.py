"""`python -m benchmarks.service`: the service beside its peers, and under the load of several clients.

__main__.py        the command
echo.py            128 images there and back, through dat serve and through the servers of peers/
throughput.py      images/s for several clients, beside the engine without a service (engine_process.py)
scaling.py         1 to 8 replicas of the sleeping stand-in
tables.py          the results as tables, each figure beside its target
"""
