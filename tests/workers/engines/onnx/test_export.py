"""`dat export`: the files compute Q, and are complete or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecError
from dat_workers.codecs.store import load_model
from dat_workers.engines.onnx import export
from dat_workers.engines.onnx.export import Manifest, check_graphs, write_export

onnxruntime: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


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


def test_manifest_names_what_was_written(folder: Path, fingerprint: str) -> None:
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert (manifest.codec, manifest.fingerprint, manifest.opset) == ("tiny-f8", fingerprint, export.OPSET)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*manifest.files, "codec.json"])
    assert manifest.is_complete(folder)


def test_check_sees_one_wrong_weight_in_each_graph(graphs: dict[str, bytes]) -> None:
    check_graphs(load_model("tiny-f8"), graphs)
    for part, says in (("encoder", "encoder"), ("quantize", "codebook"), ("decoder", "decoder")):
        wrong = load_model("tiny-f8")
        parameter = list(getattr(wrong, part).parameters())[-1]
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        with pytest.raises(CodecError, match=says):
            check_graphs(wrong, graphs)


def test_another_codecs_folder_is_refused_unless_forced(
    graphs: dict[str, bytes], model: VQGAN, fingerprint: str, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    write_export(model, "tiny-f8", fingerprint, target)
    write_export(model, "tiny-f8", fingerprint, target)  # the same again is no mistake
    with pytest.raises(CodecError, match=rf"'tiny-f8' with fingerprint {fingerprint}.*--force"):
        write_export(model, "other", "f" * 64, target)
    (target / "notes.txt").write_text("mine")
    write_export(model, "other", "f" * 64, target, force=True)
    manifest = Manifest.read(target)
    assert manifest is not None
    assert (manifest.codec, manifest.is_complete(target)) == ("other", True)
    assert (target / "notes.txt").read_text() == "mine"
    (target / "codec.json").write_text("{")
    with pytest.raises(CodecError, match="is not a manifest"):
        write_export(model, "tiny-f8", fingerprint, target)
    (target / "codec.json").unlink()
    with pytest.raises(CodecError, match="not empty"):
        write_export(model, "tiny-f8", fingerprint, target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # and nothing half done beside it


def test_a_failing_export_leaves_nothing(
    model: VQGAN, fingerprint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: dict[str, bytes]
) -> None:
    target = tmp_path / "deep" / "out"

    def full(path: Path, content: bytes) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_atomically", full)
        with pytest.raises(CodecError, match="no space left"):
            write_export(model, "tiny-f8", fingerprint, target)
    graphs["decoder.onnx"] = graphs["encoder.onnx"]
    with pytest.raises(Exception, match=r"(?i)input|name|rank"):
        write_export(model, "tiny-f8", fingerprint, target)
    assert not target.exists()
    assert not list(tmp_path.rglob("*.tmp"))
