"""export: programs that run without this package, with the same logits, for any batch."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from small_models import FAMILIES, quickest, relative_error, seeded_images, small, smallest
from timm.utils.onnx import onnx_export, onnx_forward
from torch import Tensor

import t2t_fast
from t2t_fast.cli import main
from t2t_fast.deploy import export as module

onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))

every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@every_family
def test_onnx(name: str, tmp_path: Path) -> None:
    model, path = quickest(name).eval(), tmp_path / "model.onnx"
    done = t2t_fast.export(model, path)
    assert done["format"] == "onnx"
    assert done["checked_by"] == "onnxruntime"
    assert done["bytes"] == path.stat().st_size
    for batch in (1, 2, 9):
        images = seeded_images(batch, 32, 32)
        assert relative_error(run_onnx(path, images), model.double()(images.double())) < 5e-6
    graph = onnx.load(path)
    assert [(i.domain, i.version) for i in graph.opset_import if i.domain not in ("", "ai.onnx")] == []
    assert graph.opset_import[0].version == 18
    used = {node.op_type for node in graph.graph.node}
    assert not used & {"Col2Im", "Loop", "Scan", "If"}
    assert not [op for op in used if "Sequence" in op]  # which TensorRT lacks
    assert not [op for op in used if "Scatter" in op]  # what writing in place becomes, many times slower
    sizes = [value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.graph.input, *graph.graph.output)]
    assert sizes == ["batch", "batch"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_onnx_of_ones_own(tmp_path: Path) -> None:
    """The exporter's optimizer takes 1e-8 for zero; the Performer's epsilon survives it."""
    model, images = small("t2t_vit_7").eval(), seeded_images(2, 32, 32)
    path = tmp_path / "model.onnx"
    program = torch.onnx.export(
        model, (images,), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
    )
    assert program is not None
    program.save(path)
    assert relative_error(run_onnx(path, images), model(images)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Programs in the dtype that the model was frozen to, whatever autocast surrounds the call."""
    model, images = smallest("t2t_vit_7").eval(), seeded_images(3, 32, 32)
    want = model(images)
    frozen, tolerance = t2t_fast.freeze(model, dtype), {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        t2t_fast.export(frozen, tmp_path / "model.pt2")
    got = torch.export.load(tmp_path / "model.pt2").module()(images.to(dtype))
    assert got.dtype == dtype
    assert relative_error(got, want) < tolerance
    if dtype == torch.float16:
        t2t_fast.export(frozen, tmp_path / "model.onnx")
        assert relative_error(run_onnx(tmp_path / "model.onnx", images.half()), want) < tolerance
    else:
        with pytest.raises(t2t_fast.ExportError, match=f"ONNX .*float32 or float16.* {dtype}"):
            t2t_fast.export(frozen, tmp_path / "model.onnx")


def test_an_optimizer_that_changes_the_logits_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, found = module._compare, list[float]()

    def first_wrong(*args: object) -> float:
        found.append(compare(*args) if found else float("nan"))
        return found[-1]

    monkeypatch.setattr(module, "_compare", first_wrong)
    done = t2t_fast.export(small("t2t_vit_c_14"), tmp_path / "model.onnx")
    assert len(found) == 2
    assert done["error"] == found[1] < 1e-5


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_14_se_mlp"])
def test_torch_archive(name: str, tmp_path: Path) -> None:
    model, path = smallest(name, dynamic_img_size=True).eval(), tmp_path / "model.pt2"
    assert t2t_fast.export(t2t_fast.freeze(model), path, max_batch=16)["error"] < 1e-5
    program = torch.export.load(path).module()
    for batch in (1, 16):
        images = seeded_images(batch, 32, 32)
        assert relative_error(program(images), model(images)) < 5e-6


@pytest.mark.slow
@every_family
def test_aoti(name: str, tmp_path: Path) -> None:
    model, path = quickest(name).eval(), tmp_path / "model.pt2"
    assert t2t_fast.export(model, path, "aoti")["checked_by"] == "AOTInductor"
    package = torch._inductor.aoti_load_package(str(path))
    for batch in (1, 5):
        images = seeded_images(batch, 32, 32)
        assert relative_error(package(images), model(images)) < 5e-6


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"the old one")
    monkeypatch.setattr(module, "_compare", lambda *args: 0.5)
    with pytest.raises(t2t_fast.ExportError, match=r"logits differ by 5\.0e-01 of their norm"):
        t2t_fast.export(small("t2t_vit_c_14"), path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.pt2", b"the old one")]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("t2t_vit_c_14")
    with pytest.raises(ValueError, match=r"\.onnx, \.xml or \.pt2.*format="):
        t2t_fast.export(model, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"must end in \.pt2 for format='aoti'"):
        t2t_fast.export(model, tmp_path / "model.onnx", "aoti")
    with pytest.raises(ValueError, match="format='trt' is unknown; accepted: onnx, openvino, torch, aoti"):
        t2t_fast.export(model, tmp_path / "model.onnx", "trt")
    with pytest.raises(ValueError, match=r"max_batch .*4 .*2147483647, got 1"):
        t2t_fast.export(model, tmp_path / "model.onnx", max_batch=1)
    monkeypatch.setattr(module, "_has", lambda name: name != "onnxscript")
    with pytest.raises(t2t_fast.ExportError, match=r"ONNX .*pip install onnxscript"):
        t2t_fast.export(model, tmp_path / "model.onnx")


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, target = tmp_path / "weights.pth", tmp_path / "model.onnx"
    model = small("t2t_vit_7").eval()
    t2t_fast.save_checkpoint(model.state_dict(), checkpoint)
    arguments = ["export", str(target), "--checkpoint", str(checkpoint), "--img-size", "32"]
    assert main([*arguments, "--model", "t2t_vit_7"]) == 2  # two blocks are none of t2t_vit_7's
    capsys.readouterr()
    full = t2t_fast.create_model("t2t_vit_7", img_size=32, num_classes=5)
    t2t_fast.save_checkpoint(full.state_dict(), checkpoint)
    assert main(arguments) == 0
    assert "logits agree to" in capsys.readouterr().out
    images = seeded_images(2, 32, 32)
    assert relative_error(run_onnx(target, images), full.eval()(images)) < 1e-4
    half = [*arguments[:1], str(tmp_path / "half.pt2"), *arguments[2:], "--dtype", "bfloat16"]
    assert main(half) == 0
    assert torch.export.load(tmp_path / "half.pt2").module()(images.bfloat16()).dtype == torch.bfloat16
    assert main(arguments) == 2
    assert "exists; pass --force to overwrite it" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none" / "model.onnx")]) == 2
    assert "no such folder" in capsys.readouterr().err


@every_family
def test_onnx_by_the_default_exporter_of_timm(name: str, tmp_path: Path) -> None:
    """Which is the one for TorchScript, with any height and width if the model takes them."""
    path = str(tmp_path / "model.onnx")
    model = quickest(name, img_size=64, dynamic_img_size=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that exporter is deprecated
        onnx_export(model, path, example_input=seeded_images(2, 64, 64), check_forward=True, dynamic_size=True)
    for batch, *size in ((1, 64, 64), (3, 96, 48), (2, 47, 81)):
        images = seeded_images(batch, *size)
        assert relative_error(torch.from_numpy(onnx_forward(path, images)), model(images)) < 1e-5


@pytest.mark.slow
def test_onnx_with_open_height_and_width(tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    model = smallest("t2t_vit_t_14", img_size=64, dynamic_img_size=True).eval()
    onnx_export(model, path, example_input=seeded_images(2, 64, 64), dynamic_size=True, use_dynamo=True)
    for size in ((64, 64), (96, 48)):
        images = seeded_images(2, *size)
        assert relative_error(torch.from_numpy(onnx_forward(path, images)), model(images)) < 1e-5
