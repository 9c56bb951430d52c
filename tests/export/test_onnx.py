"""The FP32 graph: its interface, its parity with torch, and that it tells nothing of the machine."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from clinifed.config import Training
from clinifed.evaluation.parity import run_onnx
from clinifed.export.deployed import DeployedModel, TextTower, deploy
from clinifed.export.onnx import MAX_BATCH, OPSET, export_onnx, export_text, write_onnx
from clinifed.models.adapters import GlobalModel, build_trainable
from clinifed.models.backbone import Backbone
from clinifed.models.specialties import SPECIALTIES


@pytest.fixture(scope="module")
def file(graph: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "fp32.onnx"
    write_onnx(graph, path)
    return path


def test_the_interface_is_pixels_in_embedding_and_logits_out(graph: onnx.ModelProto) -> None:
    (pixels,) = graph.graph.input
    batch, *rest = pixels.type.tensor_type.shape.dim
    assert pixels.name == "pixels"
    assert batch.dim_param
    assert [d.dim_value for d in rest] == [3, 160, 160]
    kinds = ("logits_", "zero_shot_")
    assert [o.name for o in graph.graph.output] == [
        "embedding",
        *(kind + name for kind in kinds for name in ("emergency", "radiology")),
    ]
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", OPSET)]


def test_layer_norm_and_gelu_stay_whole(graph: onnx.ModelProto) -> None:
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("Gelu") == operators.count("Softmax") > 0
    assert operators.count("LayerNormalization") == 2 * operators.count("Gelu") + 1
    assert "Erf" not in operators


@pytest.mark.parametrize("batch", [1, 3, MAX_BATCH])
def test_it_computes_what_torch_computes(
    batch: int, file: Path, model: DeployedModel, images: dict[str, SimpleNamespace]
) -> None:
    pixels = np.resize(images["test"].pixels, (batch, *images["test"].pixels.shape[1:]))
    with torch.no_grad():
        embedding, logits, zero_shot = model(torch.from_numpy(pixels))
    found = run_onnx(file, pixels, batch_size=batch)
    np.testing.assert_allclose(found.embedding, embedding.numpy(), rtol=0, atol=1e-5)
    scale = max(value.abs().max().item() for value in logits.values())
    for name, value in logits.items():
        np.testing.assert_allclose(found.logits[name], value.numpy(), rtol=0, atol=1e-5 * max(1, scale))
        np.testing.assert_allclose(found.zero_shot[name], zero_shot[name].numpy(), rtol=0, atol=1e-5 * max(1, scale))


@pytest.mark.parametrize("batch", [1, 3, MAX_BATCH])
def test_the_text_graph_computes_what_torch_computes(batch: int, backbone: Backbone, tmp_path: Path) -> None:
    tower, tokens = TextTower(backbone).eval(), backbone.tokenizer(["a chest x-ray", "clear lungs", "a burn"])
    path = tmp_path / "text.onnx"
    write_onnx(export_text(tower, tokens.shape[1]), path)
    tokens = tokens[torch.arange(batch) % len(tokens)]
    with torch.no_grad():
        expected = tower(tokens).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["text_embedding"], {"tokens": tokens.numpy()})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_head_exported_as_zero_shot_has_both_outputs(
    trained: GlobalModel, backbone: Backbone, tmp_path: Path
) -> None:
    specialties = {name: SPECIALTIES[name] for name in ("emergency", "radiology")}
    model = deploy(trained, backbone, specialties, Training(train="projection"), zero_shot_heads=["radiology"])
    write_onnx(export_onnx(model, backbone.preprocess.size_px), tmp_path / "model.onnx")
    pixels = np.zeros((2, 3, 160, 160), np.float32)
    found = run_onnx(tmp_path / "model.onnx", pixels)
    assert np.array_equal(found.logits["radiology"], found.zero_shot["radiology"])
    assert not np.array_equal(found.logits["emergency"], found.zero_shot["emergency"])


@pytest.mark.parametrize("lost", [(), ("radiology",)])
@pytest.mark.parametrize("train", ["lora", "blocks"])
def test_a_second_tower_is_in_the_graph_only_for_a_head_that_lost_to_zero_shot(
    train: str, lost: tuple[str, ...], backbone: Backbone, tmp_path: Path
) -> None:
    specialties = {name: SPECIALTIES[name] for name in ("emergency", "radiology")}
    training = Training(train=train)
    part = build_trainable(backbone, specialties, training)
    part.load_shared({n: t + 0.05 * torch.randn_like(t) for n, t in part.shared().items()})
    trained = GlobalModel(backbone, part).eval()
    model = deploy(trained, backbone, specialties, training, zero_shot_heads=lost)
    graph = export_onnx(model, backbone.preprocess.size_px)
    assert [o.name for o in graph.graph.output] == ["embedding", "logits_emergency", "logits_radiology"]
    blocks = len(backbone.model.visual.trunk.blocks)
    again = {"lora": blocks, "blocks": 1}[train] if lost else 0
    assert [node.op_type for node in graph.graph.node].count("Gelu") == blocks + again
    write_onnx(graph, tmp_path / "model.onnx")
    pixels = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    found = run_onnx(tmp_path / "model.onnx", pixels.numpy())
    with torch.no_grad():
        embedding, logits, _ = model(pixels)
        np.testing.assert_allclose(embedding.numpy(), trained(pixels)[0].numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.embedding, embedding.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.logits["radiology"], logits["radiology"].numpy(), rtol=0, atol=1e-4)


def test_the_same_model_gives_the_same_bytes(
    file: Path, model: DeployedModel, backbone: Backbone, tmp_path: Path
) -> None:
    again = tmp_path / "again.onnx"
    size = write_onnx(export_onnx(model, backbone.preprocess.size_px), again)
    assert again.read_bytes() == file.read_bytes()
    assert size == again.stat().st_size


def test_the_file_holds_no_path_of_this_machine(file: Path) -> None:
    content = file.read_bytes()
    repository = Path(__file__).resolve().parents[2]
    for trace in (str(repository), str(Path.home()), "site-packages", ".py", 'File "'):
        assert trace.encode() not in content, trace


def test_the_file_is_self_contained(file: Path) -> None:
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    loaded = onnx.load(file, load_external_data=False)
    assert not any(tensor.external_data for tensor in loaded.graph.initializer)
