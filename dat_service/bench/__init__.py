"""`dat bench service`: the service beside its peers, and under the load of several clients.

`service.py` is the command; `echo.py` moves bytes, `throughput.py` discretizes for several clients, `scaling.py`
adds replicas. What they measure runs in processes of its own (`processes.py`): the peers' servers (`peers/`),
the engine without a service (`engine_process.py`), and replicas that only sleep (`sleeping.py`).

`client.py` is `dat bench client`: where the time of a trainer's call goes.
"""
