"""Prometheus and Grafana: every metric, label and path in their files is one of the service."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import promql_parser as promql
import pytest

from dat_service.http.errors import REASONS
from dat_service.observability.metrics import GAUGES, Metrics
from tests.deploy.files import DEPLOY, document, problems

FROM_PROMETHEUS = {"job", "instance"}


def exposed() -> dict[str, set[str]]:
    """Labels by the name of each series that the service shows."""
    metrics = Metrics("tiny-f8", "r1")
    described = {"engine": "cpu", "device": "cpu", "dtype": "fp32"}
    discretizer = SimpleNamespace(fingerprint="ab", engine=SimpleNamespace(describe=lambda: described))
    metrics.watch(SimpleNamespace(**{attribute: 1 for attribute, _ in GAUGES.values()}))
    metrics.describe(discretizer)
    metrics.refused("full")
    metrics.request(200, 1, 1, 1.0)
    metrics.answered("adversarial", 1, 0.1, 0.1)
    metrics.batch(1, 1, 1.0)
    return {s.name: set(s.labels) for family in metrics.families() for s in family.samples}


def alerts() -> list[Any]:
    return [rule for group in document("prometheus/alerts.yml")["groups"] for rule in group["rules"]]


def panels() -> list[Any]:
    found: list[Any] = document("grafana/dashboard.json")["panels"]
    return found


def expressions() -> list[str]:
    """Of alerts and panels, Grafana's variables filled in."""
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    filled = [e.replace("$__rate_interval", "1m").replace("$codec", ".*") for e in shown]
    return [rule["expr"] for rule in alerts()] + filled


def parts(node: Any) -> Iterator[Any]:
    """A parsed expression and all within it."""
    yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs", "param"):
        inner = getattr(node, name, None)
        if inner is not None and not isinstance(inner, str | float):
            yield from parts(inner)
    for inner in getattr(node, "args", None) or ():
        yield from parts(inner)


def selectors(expression: str) -> list[Any]:
    return [node for node in parts(promql.parse(expression)) if isinstance(node, promql.VectorSelector)]


def test_expressions_are_promql_over_metrics_that_exist() -> None:
    series = exposed()
    for expression in expressions():
        found = selectors(expression)
        named = set(re.findall(r"\bdat_\w+", expression))
        assert {s.name for s in found} - {"up"} == named, f"the walk has missed one: {expression}"
        for selector in found:
            if selector.name == "up":
                continue
            assert selector.name in series, expression
            for matcher in selector.matchers.matchers:
                assert matcher.name in series[selector.name] | FROM_PROMETHEUS, expression


def test_labels_that_are_kept_exist() -> None:
    series = exposed()
    for expression in expressions():
        labels = set.union(*(series.get(s.name, set()) for s in selectors(expression)), FROM_PROMETHEUS)
        for kept in re.findall(r"\b(?:by|on) \(([\w, ]+)\)", expression):
            assert set(kept.split(", ")) <= labels, expression


def test_values_that_are_asked_for_exist() -> None:
    known = {"reason": {*REASONS.values(), "unhealthy"}, "status": {"500"}, "job": {"dat"}}
    for rule in alerts():
        for selector in selectors(rule["expr"]):
            for matcher in selector.matchers.matchers:
                assert set(matcher.value.split("|")) <= known[matcher.name], rule["expr"]


def test_counters_are_never_read_by_themselves() -> None:
    for expression in expressions():
        for counter in re.findall(r"\bdat_\w+_(?:total|bucket|sum|count)\b", expression):
            assert re.search(rf"(rate|increase)\({counter}", expression), expression


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {s.name for panel in panels() for t in panel["targets"] for s in selectors(
        t["expr"].replace("$__rate_interval", "1m").replace("$codec", ".*")
    )}  # fmt: skip
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in exposed()}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in shown} == families


def test_alerts() -> None:
    assert problems(document("prometheus/alerts.yml"), "prometheus", "rules") == []
    wrong = {"groups": [{"name": "a", "rules": [{"alert": "DatX", "expr": "up", "four": "1m"}]}]}
    assert problems(wrong, "prometheus", "rules")
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    wanted = {"DatDown", "DatUnhealthy", "DatNoProgress", "DatRefusing", "DatQueueSlow", "DatRetries"}
    assert wanted <= set(names)
    for rule in alerts():
        labels = set.union(*(exposed().get(s.name, set()) for s in selectors(rule["expr"])))
        for text in rule["annotations"].values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels, rule["alert"]
            assert text.count("{{") == text.count("}}")


def test_scrape_configuration() -> None:
    config = document("prometheus/prometheus.yml")
    assert problems(config, "prometheus", "config") == []
    assert problems({"scrape_configs": [{"job_name": "a", "metrics_path": "metrics"}]}, "prometheus", "config")
    for file in config["rule_files"]:
        assert (DEPLOY / "prometheus" / file).is_file()
    (job,) = config["scrape_configs"]
    compose = document("compose.yaml")
    secret = job["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    assert secret in compose["services"]["prometheus"]["secrets"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    for name in ("dat-cpu", "dat-cuda"):
        service = compose["services"][name]
        assert host in service["networks"]["default"]["aliases"]
        assert service["ports"][0].endswith(f":{port}")
    assert job["job_name"] == "dat"  # the alerts say up{job="dat"}


def test_metrics_path_is_a_route() -> None:
    from dat_service.http.admin import router

    (job,) = document("prometheus/prometheus.yml")["scrape_configs"]
    assert job["metrics_path"] in {getattr(route, "path", None) for route in router.routes}


def test_dashboard() -> None:
    board = document("grafana/dashboard.json")
    assert problems(board, "prometheus", "dashboard") == []
    assert problems(board | {"panels": [{"id": 1}]}, "prometheus", "dashboard")
    source = document("grafana/datasource.yaml")["datasources"][0]
    used = {panel["datasource"]["uid"] for panel in board["panels"]}
    assert used | {v["datasource"]["uid"] for v in board["templating"]["list"]} == {source["uid"]}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    series = exposed()
    for panel in board["panels"]:
        for target in panel["targets"]:
            labels = set.union(*(series[s.name] for s in selectors(
                target["expr"].replace("$__rate_interval", "1m").replace("$codec", ".*")
            )))  # fmt: skip
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels
    (variable,) = board["templating"]["list"]
    metric, label = re.findall(r"label_values\((\w+), (\w+)\)", variable["definition"])[0]
    assert label in series[metric]


def test_provisioning_leads_to_the_dashboard() -> None:
    compose = document("compose.yaml")
    mounts = [volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"]]
    folder = document("grafana/provider.yaml")["providers"][0]["options"]["path"]
    assert ["./grafana/dashboard.json", f"{folder}/dat.json"] in mounts
    url = document("grafana/datasource.yaml")["datasources"][0]["url"]
    assert url == "http://prometheus:9090"
    assert "prometheus" in compose["services"]
    assert ["./prometheus", "/etc/prometheus"] in [
        v.split(":")[:2] for v in compose["services"]["prometheus"]["volumes"]
    ]


@pytest.mark.parametrize("broken", ["rate(dat_images_total[5m]", "sum by codec (x)", "histogram_quantile(x)"])
def test_the_parser_refuses_what_prometheus_would(broken: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        promql.parse(broken)
