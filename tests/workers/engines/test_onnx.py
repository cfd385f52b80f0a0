"""`dat export` and the ONNX Runtime engine: the same numbers in other hands."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecError
from dat_workers.codecs.store import CodecStore, load_model
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create
from dat_workers.engines.onnx import engine, export
from dat_workers.engines.onnx.export import Manifest, check_graphs, write_export
from dat_workers.errors import EngineError
from dat_workers.verify.agreement import compare
from tests.conftest import DAT

onnxruntime: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def model() -> VQGAN:
    return load_model("tiny-f8")


@pytest.fixture(scope="module")
def mark() -> str:
    return CodecStore().load("tiny-f8").fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `dat export` writes."""
    target = tmp_path_factory.mktemp("export") / "tiny"
    done = subprocess.run([*DAT, "export", "--codec", "tiny-f8", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "encoder.onnx" in done.stdout
    return target


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The exported graphs; exporting gives these from now on, without its seconds."""
    held = {f"{part}.onnx": (folder / f"{part}.onnx").read_bytes() for part in export.PARTS}
    for module in (export, engine):
        monkeypatch.setattr(module, "export_graphs", lambda model: held)
    return held


def run(folder: Path, part: str, value: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(folder / f"{part}.onnx"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: value})[0])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 40), (1, 72, 8)])
def test_files_are_q_in_any_size(folder: Path, model: VQGAN, shape: tuple[int, int, int]) -> None:
    images = torch.rand(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(0))
    latents = run(folder, "encoder", images.numpy())
    assert np.abs(latents - model.latents(images * 2 - 1).numpy()).max() < 1e-3
    indices = run(folder, "codebook", latents)
    assert indices.dtype == np.int64
    assert (indices == model.quantize.nearest(torch.from_numpy(latents)).numpy()).mean() > 0.95  # but near-ties
    pictures = run(folder, "decoder", indices)
    expected = (model.decode(torch.from_numpy(indices)) + 1) / 2
    assert pictures.shape == images.shape
    assert np.abs(pictures - expected.numpy()).max() < 1e-4


def test_ties_go_to_the_lowest_index_and_distances_are_never_whole(model: VQGAN) -> None:
    graph = export.CodebookGraph(model)
    graph.vectors = model.quantize.embedding.weight.detach().repeat(2, 1)
    z = model.quantize.embedding.weight[[5, 16383, 0]].t()[None, :, None]
    assert graph(z).flatten().tolist() == [5, 16383, 0]
    assert len(graph.vectors) / 8 > export.ENTRIES_AT_ONCE


def test_manifest_names_what_was_written(folder: Path, mark: str) -> None:
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert (manifest.codec, manifest.fingerprint, manifest.opset) == ("tiny-f8", mark, export.OPSET)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*manifest.files, "codec.json"])
    assert manifest.whole(folder)


def test_check_sees_one_wrong_weight_in_each_graph(graphs: dict[str, bytes]) -> None:
    check_graphs(load_model("tiny-f8"), graphs)
    for part, says in (("encoder", "encoder"), ("quantize", "codebook"), ("decoder", "decoder")):
        wrong = load_model("tiny-f8")
        parameter = list(getattr(wrong, part).parameters())[-1]
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        with pytest.raises(CodecError, match=says):
            check_graphs(wrong, graphs)


def test_another_codecs_folder_is_refused_unless_forced(
    graphs: dict[str, bytes], model: VQGAN, mark: str, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    write_export(model, "tiny-f8", mark, target)
    write_export(model, "tiny-f8", mark, target)  # the same again is no mistake
    with pytest.raises(CodecError, match=rf"'tiny-f8' with fingerprint {mark}.*--force"):
        write_export(model, "other", "f" * 64, target)
    (target / "notes.txt").write_text("mine")
    write_export(model, "other", "f" * 64, target, force=True)
    manifest = Manifest.read(target)
    assert manifest is not None
    assert (manifest.codec, manifest.whole(target)) == ("other", True)
    assert (target / "notes.txt").read_text() == "mine"
    (target / "codec.json").write_text("{")
    with pytest.raises(CodecError, match="no manifest"):
        write_export(model, "tiny-f8", mark, target)
    (target / "codec.json").unlink()
    with pytest.raises(CodecError, match="not empty"):
        write_export(model, "tiny-f8", mark, target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # and nothing half done beside it


def test_a_failing_export_leaves_nothing(
    model: VQGAN, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: dict[str, bytes]
) -> None:
    target = tmp_path / "deep" / "out"

    def full(path: Path, content: bytes) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_atomically", full)
        with pytest.raises(CodecError, match="no space left"):
            write_export(model, "tiny-f8", mark, target)
    graphs["decoder.onnx"] = graphs["encoder.onnx"]
    with pytest.raises(Exception, match=r"(?i)input|name|rank"):
        write_export(model, "tiny-f8", mark, target)
    assert not target.exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_engine_agrees_with_the_published_modules(
    home: Path, graphs: dict[str, bytes], model: VQGAN, photographs: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dat_workers.engines"):
        engine = create(EngineConfig("onnx", device="cpu"), model)
    assert "CPUExecutionProvider" in caplog.text
    images = torch.from_numpy(photographs[:2]).float() / 255
    agreement = compare(engine, create(EngineConfig("reference", device="cpu"), model), images)
    assert agreement.token_agreement > 0.998  # it adds in another order: near-ties
    assert agreement.psnr_db > 80
    assert agreement.non_finite == 0


def test_describe_names_the_provider(home: Path, graphs: dict[str, bytes]) -> None:
    discretizer = Discretizer.from_store("tiny-f8", EngineConfig("onnx", device="cpu"))
    assert discretizer.describe() == {
        "engine": "onnx", "device": "cpu", "dtype": "fp32", "tricks": "none", "provider": "CPUExecutionProvider"
    }  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 13), dtype=np.uint8)
    both = discretizer.discretize(images, outputs=("reconstruction", "indices"))
    for i in range(2):
        one = discretizer.discretize(images[i : i + 1], outputs=("reconstruction", "indices"))
        assert all(np.array_equal(one[name][0], both[name][i]) for name in both)


def test_export_is_kept_and_made_anew_where_it_is_damaged(
    home: Path, graphs: dict[str, bytes], model: VQGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(engine, "export_graphs", lambda model: made.append(1) or graphs)
    folder = engine.exported(model)
    assert engine.exported(model) == folder
    assert len(made) == 1
    (folder / "decoder.onnx").write_bytes(b"half")
    assert engine.exported(model) == folder
    (folder / "codec.json").write_text("{}")
    assert engine.exported(model) == folder
    assert len(made) == 3
    assert [p.name for p in (home / "onnx").iterdir()] == [folder.name]


def test_the_second_of_two_processes_takes_what_the_first_exported(
    home: Path, graphs: dict[str, bytes], model: VQGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(model: VQGAN) -> dict[str, bytes]:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "export_graphs", lambda model: graphs)
            engine.exported(model)  # the other process
        return graphs

    monkeypatch.setattr(engine, "export_graphs", overtaken)
    folder = engine.exported(model)
    assert engine.usable(folder, json.loads((folder / "codec.json").read_text())["fingerprint"])
    assert [p.name for p in (home / "onnx").iterdir()] == [folder.name]


def test_latents_that_are_not_finite_are_marked(home: Path, graphs: dict[str, bytes], model: VQGAN) -> None:
    engine = create(EngineConfig("onnx", device="cpu"), model)
    images = torch.rand(2, 3, 8, 8)
    images[1] = torch.inf
    tokens = engine.encode(images)
    assert tokens[1].item() == -1
    assert tokens[0].item() >= 0


def test_pictures_too_large_for_its_attention_are_refused(
    home: Path, graphs: dict[str, bytes], model: VQGAN
) -> None:
    engine = create(EngineConfig("onnx", device="cpu"), model)
    with pytest.raises(EngineError, match="up to 1048576"):
        engine.encode(torch.zeros(1, 3, 1024, 1032))
    with pytest.raises(EngineError, match="--engine torch"):
        engine.decode(torch.zeros(1, 128, 129, dtype=torch.int64))


@pytest.mark.parametrize(
    ("device", "dtype", "says"), [("cuda", "auto", "onnx-gpu"), ("warp", "auto", "warp"), ("cpu", "fp16", "fp32")]
)
def test_what_the_engine_cannot_do_is_said(
    device: str, dtype: str, says: str, model: VQGAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match=says):
        create(EngineConfig("onnx", device=device, dtype=dtype), model)


def test_providers_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["CPUExecutionProvider", "AzureExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    assert [name[:4] for name in engine.pick_providers("auto")] == ["Tens", "CUDA", "CPUE"]
    assert engine.pick_providers("cpu") == ["CPUExecutionProvider"]


def test_a_missing_package_is_named_with_its_command(model: VQGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"pip install 'dat-service\[onnx\]'"):
        create(EngineConfig("onnx", device="cpu"), model)
