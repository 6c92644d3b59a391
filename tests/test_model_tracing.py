"""Every way to turn a model into a graph: fx, jit.trace, export, compile."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator

import pytest
import timm
import torch
from small_models import FAMILIES, MODELS, flat_gradients, quickest, relative_error, seeded_images, small, smallest
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torchvision.models.feature_extraction import create_feature_extractor

import t2t_fast

every_model = pytest.mark.parametrize("name", MODELS)
every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# torch's own check traces once more; the tests compare with the model themselves.
trace = functools.partial(torch.jit.trace, check_trace=False)


@every_model
def test_symbolic_trace(name: str) -> None:
    model = small(name).eval()
    graph = torch.fx.symbolic_trace(model)
    for batch in (2, 5):
        images = seeded_images(batch, 32, 32)
        torch.testing.assert_close(graph(images), model(images))
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, H, W\), got \(2, 1, 32, 32\)"):
        graph(seeded_images(2, 32, 32, channels=1))
    with pytest.raises(ValueError, match=r"the model was built for \(2, 2\)"):
        graph(seeded_images(2, 32, 48))


@every_family
def test_feature_extractors(name: str) -> None:
    model, images = small(name).eval(), seeded_images(2, 32, 32)
    want = model.forward_intermediates(images, output_fmt="NLC", indices=[0], return_prefix_tokens=True)
    extractor = create_feature_extractor(model, {"blocks.0": "first", "norm": "last"})
    got = extractor(images)
    torch.testing.assert_close(got["first"], torch.cat((want[1][0][1], want[1][0][0]), dim=1))
    torch.testing.assert_close(got["last"], want[0])
    from_timm = small(name, features_only=True, out_indices=(0, 1), feature_cls="fx").eval()
    assert [feature.shape[-1] for feature in from_timm(images)] == from_timm.feature_info.channels()


@every_model
def test_jit_trace(name: str) -> None:
    model = small(name).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecated, and checks on sizes are traced as constants
        traced = {batch: trace(model, seeded_images(batch, 32, 32)) for batch in (2, 6)}
        for graph in traced.values():
            for batch in (1, 3, 9):
                images = seeded_images(batch, 32, 32)
                torch.testing.assert_close(graph(images), model(images), rtol=1e-4, atol=1e-5)


@every_family
def test_jit_trace_with_gradients_on(name: str) -> None:
    model, images = small(name).eval(), seeded_images(2, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(trace(model, images)(images), model(images), rtol=1e-4, atol=1e-5)


@every_family
def test_function_transforms(name: str) -> None:
    """torch.func and forward-mode differentiation, which see through plain operations only."""
    model, images = small(name).eval(), seeded_images(2, 32, 32)
    want = model(images)
    torch.testing.assert_close(torch.func.vmap(model)(images[:, None])[:, 0], want, rtol=1e-4, atol=1e-5)

    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images)
    model(images).square().sum().backward()
    for name_, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(per_sample[name_].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)

    direction = torch.randn_like(images)
    moved = torch.func.jvp(model, (images,), (direction,))[1]
    numeric = (model.double()(images.double() + 1e-5 * direction) - model(images.double() - 1e-5 * direction)) / 2e-5
    assert relative_error(moved, numeric) < 1e-3


@every_family
@pytest.mark.parametrize("traced_with_gradients", [False, True])
def test_a_traced_saved_and_loaded_model_trains(name: str, traced_with_gradients: bool) -> None:
    """From the second call on TorchScript runs an optimised program."""
    model, images = smallest(name, token_drop_rate=0.0).train(), seeded_images(2, 32, 32)
    want, file = gradients(model, model, images), io.BytesIO()
    with warnings.catch_warnings(), torch.set_grad_enabled(traced_with_gradients):
        warnings.simplefilter("ignore")
        torch.jit.save(trace(model, images), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for _ in range(3):
        assert relative_error(gradients(loaded, loaded, images), want) < 1e-5


@every_family
def test_a_trace_serves_other_sizes(name: str) -> None:
    model = smallest(name, img_size=64, dynamic_img_size=True).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = trace(model, seeded_images(2, 64, 64))
    for size in ((64, 64), (96, 48), (47, 81)):
        images = seeded_images(3, *size)
        assert relative_error(traced(images), model(images)) < 1e-5


def test_jit_trace_of_another_size() -> None:
    model, images = small("t2t_vit_7", dynamic_img_size=True).eval(), seeded_images(2, 47, 33)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.trace(model, images)(images), model(images), rtol=1e-4, atol=1e-5)


@every_family
def test_export(name: str) -> None:
    model = quickest(name).eval()
    static = torch.export.export(model, (seeded_images(2, 32, 32),)).module()
    dynamic = torch.export.export(
        model, (seeded_images(2, 32, 32),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    ).module()
    images = seeded_images(7, 32, 32)
    torch.testing.assert_close(static(images[:2]), model(images[:2]), rtol=1e-4, atol=1e-5)
    for batch in (1, 7):
        torch.testing.assert_close(dynamic(images[:batch]), model(images[:batch]), rtol=1e-4, atol=1e-5)


@every_family
def test_export_with_open_height_and_width(name: str) -> None:
    """From an example of the size that the model was built for, which is no special case afterwards."""
    model = quickest(name, img_size=64, dynamic_img_size=True).eval()
    strict = name == "t2t_vit_7"  # the other way to export, too
    sizes = {0: torch.export.Dim("batch", max=64), 2: torch.export.Dim("height", min=32, max=512)}
    sizes[3] = torch.export.Dim("width", min=32, max=512)
    program = torch.export.export(model, (seeded_images(2, 64, 64),), dynamic_shapes=(sizes,), strict=strict).module()
    for size in ((64, 64), (96, 48), (47, 81)):
        images = seeded_images(3, *size)
        assert relative_error(program(images), model(images)) < 1e-5


def gradients(function: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
    model.zero_grad()
    function(images).square().mean().backward()
    return flat_gradients(model)


@every_family
@pytest.mark.usefixtures("_fresh_compiler")
def test_compile(name: str) -> None:
    model = quickest(name).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = seeded_images(9, 32, 32)
    torch._dynamo.mark_dynamic(images, 0)
    assert relative_error(compiled(images), model(images)) < 1e-5
    assert relative_error(gradients(compiled, model, images), gradients(model, model, images)) < 1e-5
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 5, 12):
            other = seeded_images(batch, 32, 32)
            torch._dynamo.mark_dynamic(other, 0)
            assert relative_error(gradients(compiled, model, other), gradients(model, model, other)) < 1e-5


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.usefixtures("_fresh_compiler")
def test_one_program_for_all_batches(name: str, train: bool) -> None:
    """Without marked sizes: one program under dynamic=True, by default a second one for all batches but the first."""
    for dynamic, programs in ((True, [1, 1, 1, 1]), (None, [1, 2, 2, 2])):
        torch.compiler.reset()
        model, counter, compiled_so_far = quickest(name).train(train), CompileCounter(), list[int]()
        compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
        for batch in (4, 8, 3, 16):
            with torch.set_grad_enabled(train):
                compiled(seeded_images(batch, 32, 32))
            compiled_so_far.append(counter.frame_count)
        assert compiled_so_far == programs


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_in_training() -> None:
    model = small("t2t_vit_7", depth=1, drop_rate=0.1, drop_path_rate=0.1, dynamic_img_size=True).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for height, width in ((32, 32), (48, 33)):
        assert torch.isfinite(gradients(compiled, model, seeded_images(3, height, width))).all()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_to_machine_code() -> None:
    """By Inductor, as users do, where one program serves all batches."""
    model = small("t2t_vit_14_se_mlp", depth=1).eval()
    compiled = torch.compile(model, fullgraph=True)
    images = seeded_images(5, 32, 32)
    torch._dynamo.mark_dynamic(images, 0)
    with torch.no_grad():
        assert relative_error(compiled(images), model(images)) < 1e-5
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in (2, 9):
                other = seeded_images(batch, 32, 32)
                torch._dynamo.mark_dynamic(other, 0)
                assert relative_error(compiled(other), model(other)) < 1e-5


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_with_checkpointing() -> None:
    model, images = small("t2t_vit_7", token_drop_rate=0.0).train(), seeded_images(3, 32, 32)
    want = gradients(model, model, images)
    model.set_grad_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(gradients(compiled, model, images), want) < 1e-5


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_keeps_the_backend() -> None:
    model, images = small("t2t_vit_7", depth=1, backend="reference").eval(), seeded_images(2, 32, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))
    ran = t2t_fast.explain(model, images).backends()
    assert set().union(*ran.values()) == {"reference"}


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = timm.create_model("t2t_vit_14", dynamic_img_size=True)
        assert model(torch.empty(2, 3, 240, 320)).shape == (2, 1000)
