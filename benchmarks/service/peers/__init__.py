"""Servers that only send back the bytes that they receive: the ceiling, and how others would serve the same bytes.

    python -m benchmarks.service.peers.fastapi_echo PORT

Each is written as its own documentation shows it, with the fastest event loop and parser that it takes, in a module
of its own, since most want their classes at the top level of one. Each prints "ready" once it answers, and ends
with SIGINT.
"""
