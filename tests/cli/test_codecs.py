"""`dat codecs`: list, show, pull and import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from dat_service.cli.codecs import _reporter
from dat_service.cli.main import app
from dat_service.cli.output import live_progress
from dat_workers.codecs import download
from dat_workers.codecs.registry import REGISTRY
from dat_workers.codecs.spec import CodecSpec
from dat_workers.codecs.store import CodecStore


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CodecStore:
    monkeypatch.setenv("DAT_HOME", str(tmp_path / "home"))
    return CodecStore()


def run(*arguments: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["codecs", *arguments])
    assert result.exit_code == status, result.output
    return result


def test_help_does_not_load_torch() -> None:
    code = "import sys, dat_service.cli.main as c; assert 'torch' not in sys.modules; c.app(['codecs', '--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(command in result.stdout for command in ("list", "show", "pull", "import"))


def test_import_show_and_list(
    tmp_path: Path,
    home: CodecStore,
    weights: dict[str, Tensor],
    lightning_checkpoint: Callable[..., Path],
) -> None:
    path = lightning_checkpoint(tmp_path / "last.ckpt", weights)
    said = run("import", str(path), "--as", "mine").stdout
    mark = home.load("mine").fingerprint
    assert "dropped: 2 weights of the training loss (loss.*), callbacks, " in said
    assert f"fingerprint {mark}" in said
    assert f"path {home.path('mine')}" in said

    facts = json.loads(run("show", "mine", "--json").stdout)
    assert facts["fingerprint"] == mark
    assert facts["status"] == "installed"
    assert facts["origin"]["source"] == "last.ckpt"
    assert len(facts["origin"]["sha256"]) == 64
    assert (facts["factor"], facts["codebook_size"], facts["latent_dim"]) == (2, 64, 4)
    assert facts["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert f"fingerprint      {mark}" in run("show", "mine").stdout

    home.path("torn").write_bytes(b"torn")
    lines = {line.split()[0]: line for line in run("list").stdout.splitlines()}
    assert lines["mine"].split()[1:4] == ["2", "64", "4"]
    assert "installed" in lines["mine"]
    assert "67.7 M" in lines["vqgan-openimages-f8-16384"]
    assert "not installed" in lines["vqgan-openimages-f8-16384"]
    assert "broken: " in lines["torn"]


def test_show_of_what_is_not_installed() -> None:
    facts = json.loads(run("show", "vqgan-imagenet-f16-1024", "--json").stdout)
    assert (facts["status"], facts["fingerprint"]) == ("not installed", None)
    assert facts["source_url"].startswith("https://")
    assert facts["licence"].startswith("MIT")
    result = run("show", "vqgan-imagenet-f16-1025", status=1)
    assert result.stderr.startswith("dat codecs show: unknown codec 'vqgan-imagenet-f16-1025'; did you mean ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_import_replaces_only_by_force(
    tmp_path: Path,
    home: CodecStore,
    weights: dict[str, Tensor],
    lightning_checkpoint: Callable[..., Path],
) -> None:
    path = lightning_checkpoint(tmp_path / "last.ckpt", weights)
    run("import", str(path), "--as", "mine")
    run("import", str(path), "--as", "mine")
    first = home.load("mine").fingerprint
    weights["quant_conv.bias"] += 1
    lightning_checkpoint(path, weights)
    assert "--force" in run("import", str(path), "--as", "mine", status=1).stderr
    assert home.load("mine").fingerprint == first
    run("import", str(path), "--as", "mine", "--force")
    assert home.load("mine").fingerprint != first


def test_import_under_a_registered_name_wants_its_geometry(
    tmp_path: Path, weights: dict[str, Tensor], lightning_checkpoint: Callable[..., Path]
) -> None:
    path = lightning_checkpoint(tmp_path / "last.ckpt", weights)
    said = run("import", str(path), "--as", "vqgan-openimages-f8-256", status=1).stderr
    assert "missing keys: " in said
    assert "encoder.conv_in.weight (expected [128, 3, 3, 3], found [32, " in said
    assert "not allowed" in run("import", str(path), "--as", "../x", status=1).stderr
    assert "no such file" in run("import", str(tmp_path / "none"), "--as", "x", status=1).stderr


def test_pull(
    tmp_path: Path,
    home: CodecStore,
    source: Any,
    spec: CodecSpec,
    weights: dict[str, Tensor],
    lightning_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(REGISTRY, "toy", replace(spec, source_url="http://127.0.0.1:9/x"))
    source.body = lightning_checkpoint(tmp_path / "last.ckpt", weights).read_bytes()
    result = run("pull", "toy", "--url", source.url)
    assert f"fingerprint {home.load('toy').fingerprint}" in result.stdout
    assert "toy: 0.0 of " in result.stderr
    assert "s left" in result.stderr
    source.status = 404
    assert "HTTP status 404" in run("pull", "toy", "--url", source.url, status=1).stderr


def test_interrupted_pull_ends_with_130_and_keeps_the_part(
    home: CodecStore, source: Any, spec: CodecSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, "toy", replace(spec, source_url=source.url))
    source.body = bytes(500_000)
    receive = download._PartialDownload.receive

    def interrupted(partial: Any, *arguments: Any) -> None:
        def stop(received: int, total: int | None) -> None:
            if received > 100_000:
                raise KeyboardInterrupt

        partial.progress = stop
        receive(partial, *arguments)

    monkeypatch.setattr(download._PartialDownload, "receive", interrupted)
    result = run("pull", "toy", status=130)
    assert result.stderr.endswith("dat codecs pull: interrupted; the same command resumes the download\n")
    assert (home.home / "downloads" / "toy.download.part").stat().st_size > 100_000


def test_plain_progress_tells_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with live_progress(plain_every_s=5) as show:
        report = _reporter("toy", show)
        for now_s, done in ((0.0, 0), (1.0, 10_000_000), (10.0, 100_000_000), (20.0, 300_000_000)):
            monkeypatch.setattr("time.monotonic", lambda now_s=now_s: now_s)
            report(done, 300_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "toy: 0.0 of 300.0 MB, 0.0 MB/s, ? left",
        "toy: 100.0 of 300.0 MB, 10.0 MB/s, 20.0 s left",
        "toy: 300.0 of 300.0 MB, 15.0 MB/s, 0.0 s left",
    ]
