"""Modules that somebody watches, replaces or quantises: attention dropout, global hooks, weights of other types."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from doubles import T2T_ViT
from small_models import FAMILIES, MODELS, relative_error, seeded_images, small, smallest
from timm.utils.attention_extract import AttentionExtract
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.nn.utils import parametrizations, parametrize, prune

import t2t_fast
from t2t_fast import ops
from t2t_fast.bench.samples import SAMPLES, make, tensors_of
from t2t_fast.layers.plain import are_plain

every_family = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
EXPLICIT = {"t2t_vit_t_14": 4}  # attention maps of the model of two blocks; two elsewhere


@pytest.fixture
def unfused() -> Iterator[None]:
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(True)


def softmax_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps of the blocks' attentions, from what their projections return."""
    maps, handles = [], []

    def record(attn: Any, inputs: Any, outputs: Any = None) -> None:
        x = inputs[0]
        parts = (attn.qkv(x).chunk(3, dim=-1)) if hasattr(attn, "qkv") else ghost(attn, x)
        q, k = (t.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2).double() for t in parts[:2])
        maps.append((attn.scale * q @ k.mT).softmax(-1))

    def ghost(attn: Any, x: Tensor) -> list[Tensor]:
        return [
            torch.cat((y, y * cheap.weight.flatten()), -1)
            for y, cheap in ((attn.q(x), attn.cheap_operation_q), (attn.k(x), attn.cheap_operation_k))
        ]

    for block in model.blocks:
        if hasattr(block, "attn"):
            handles.append(block.attn.register_forward_pre_hook(record))
    model(images)
    for handle in handles:
        handle.remove()
    return maps


@every_family
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attention_extract_by_hooks(name: str, backend: str) -> None:
    images = seeded_images(2, 32, 32)
    for model in (small(name, backend=backend).eval(), t2t_fast.freeze(small(name, backend=backend).eval())):
        want = model(images)
        maps = AttentionExtract(model, method="hook")(images)
        assert len(maps) == EXPLICIT.get(name, 2)
        for found in maps.values():
            assert found.shape[0] == 2 and found.shape[2] == found.shape[3]
            assert (found.sum(-1) - 1).abs().max() < 1e-5
        assert relative_error(model(images), want) < 5e-6
    expected = softmax_maps(small(name).eval(), images)
    for found, right in zip(list(maps.values())[-2:], expected, strict=True):
        assert relative_error(found, right) < 2e-5


@every_family
def test_attention_extract_by_fx(name: str, unfused: None) -> None:
    images = seeded_images(2, 32, 32)
    model = small(name).eval()
    maps = AttentionExtract(model, method="fx")(images)
    assert len(maps) == EXPLICIT.get(name, 2)
    for found, right in zip(list(maps.values())[-2:], softmax_maps(model, images), strict=True):
        assert relative_error(found, right) < 2e-5


@every_family
def test_what_a_replaced_attn_drop_returns_multiplies_v(name: str) -> None:
    """Doubled weights double what the attention returns: as doubled values do, whose bias-free part is in qkv."""

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    images = seeded_images(2, 32, 32)
    model, want = small(name).eval(), small(name).eval()
    for block, other in zip(model.blocks, want.blocks, strict=True):
        if hasattr(block, "attn"):
            block.attn.attn_drop = Twice()
            with torch.no_grad():
                other.attn.proj.weight.mul_(2)
    assert relative_error(model(images), want(images)) < 5e-6
    assert relative_error(t2t_fast.freeze(model)(images), want(images)) < 5e-6


def test_optimize_refuses_a_replaced_attn_drop() -> None:
    theirs = T2T_ViT(img_size=32, tokens_type="performer", embed_dim=64, depth=2, num_heads=2, mlp_ratio=2.0)
    theirs.blocks[1].attn.attn_drop = nn.Softmax(-1)
    with pytest.raises(TypeError, match=r"blocks\.1\.attn\.attn_drop must be a Dropout, got Softmax"):
        t2t_fast.optimize(theirs)


def test_replaced_attn_drop_of_a_token_transformer() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    images = seeded_images(2, 32, 32)
    model, want = small("t2t_vit_t_14").eval(), small("t2t_vit_t_14").eval()
    model.tokens_to_token.attention1.attn.attn_drop = Twice()
    with torch.no_grad():
        want.tokens_to_token.attention1.attn.proj.weight.mul_(2)
    assert relative_error(model(images), want(images)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_are_float32_in_every_dtype(dtype: torch.dtype) -> None:
    images = seeded_images(2, 32, 32)
    seen: list[Tensor] = []
    for model, x in ((small("t2t_vit_7").eval().to(dtype), images.to(dtype)), (small("t2t_vit_7").eval(), images)):
        model.blocks[0].attn.attn_drop.register_forward_hook(lambda m, args, y: seen.append(y))
        with torch.autocast("cpu", dtype=dtype, enabled=x.dtype == torch.float32):
            model(x)
    assert [t.dtype for t in seen] == [torch.float32] * 2
    assert all((t.sum(-1) - 1).abs().max() < 1e-5 for t in seen)


def test_dropouts_follow_their_own_mode() -> None:
    """Monte Carlo dropout: an evaluated model whose dropouts train; and the other way round."""
    images = seeded_images(2, 32, 32)
    for name in ("t2t_vit_7", "t2t_vit_14_se", "t2t_vit_14_se_mlp", "t2t_vit_16_ghost"):
        model = small(name, drop_rate=0.3, attn_drop_rate=0.3).eval()
        want = model(images)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        assert relative_error(model(images), want) > 1e-2, name
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        assert relative_error(model(images), want) < 5e-6, name


@every_family
def test_global_hooks_see_what_the_parts_are(name: str) -> None:
    """Every module is called, and as often as with the literal backend; without hooks none of this changes."""
    images = seeded_images(2, 32, 32)

    def count(model: nn.Module) -> dict[str, int]:
        names, calls = {module: n for n, module in model.named_modules()}, dict.fromkeys(names_of(model), 0)

        def hook(module: nn.Module, *unused: Any) -> None:
            if module in names:
                calls[names[module]] += 1

        handle = register_module_forward_hook(hook)
        try:
            model(images)
        finally:
            handle.remove()
        return calls

    def names_of(model: nn.Module) -> list[str]:
        return [n for n, module in model.named_modules() if not isinstance(module, nn.ModuleList)]

    model = small(name).eval()
    calls = count(model)
    assert [n for n, number in calls.items() if not number] == []
    assert sum(isinstance(model.get_submodule(n), nn.Linear) for n in calls) == sum(
        number for n, number in calls.items() if isinstance(model.get_submodule(n), nn.Linear)
    )
    assert calls == count(small(name, backend="reference").eval())
    frozen = t2t_fast.freeze(model)
    assert [n for n, number in count(frozen).items() if not number] == []


def test_global_backward_hooks_see_every_linear() -> None:
    model, seen = small("t2t_vit_7"), set()
    handle = register_module_full_backward_hook(lambda m, *grads: seen.add(m) if type(m) is nn.Linear else None)
    try:
        model(seeded_images(2, 32, 32)).sum().backward()
    finally:
        handle.remove()
    assert seen == {m for m in model.modules() if type(m) is nn.Linear}


class Quantised(Tensor):
    """int8 values with a scale per row, behind a tensor full of NaN: whoever reads that gets what is not the weight."""

    values: Tensor
    row_scale: Tensor

    @staticmethod
    def of(weight: Tensor) -> nn.Parameter:
        made = torch.full_like(weight, torch.nan).as_subclass(Quantised)
        made.row_scale = weight.detach().abs().amax(1, keepdim=True) / 127
        made.values = (weight.detach() / made.row_scale).round().to(torch.int8)
        return nn.Parameter(made, requires_grad=False)

    def dequantise(self) -> Tensor:
        return self.values * self.row_scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *rest = args
            return F.linear(x, weight.dequantise(), *rest, **(kwargs or {}))
        result = super().__torch_function__(func, types, args, kwargs or {})
        if type(result) is cls and isinstance(args[0], cls) and result is not args[0]:
            result.values, result.row_scale = args[0].values, args[0].row_scale
        return result

    def __deepcopy__(self, memo: Any) -> Any:
        return Quantised.of(self.dequantise())


def quantise(model: nn.Module) -> int:
    places = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "PackedLinear"]
    for place in places:
        place.weight = Quantised.of(place.weight)
    return len(places)


def dequantised(model: nn.Module, plain: Callable[[Any], Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and type(weight) is not nn.Parameter:
            module.weight = nn.Parameter(plain(weight).detach(), requires_grad=False)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_quantised_weights_are_not_read(name: str) -> None:
    images = seeded_images(2, 32, 32)
    model = smallest(name).eval()
    assert quantise(model) >= 5
    want = dequantised(model, Quantised.dequantise)(images)
    for quantised in (model, t2t_fast.freeze(model)):
        assert relative_error(quantised(images), want) < 5e-6
    frozen = t2t_fast.freeze(smallest(name).eval())
    assert quantise(frozen) >= 5
    assert relative_error(frozen(images), dequantised(frozen, Quantised.dequantise)(images)) < 5e-6


@pytest.mark.parametrize("name", FAMILIES.values())
def test_torchao(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    images = seeded_images(2, 32, 32)
    model = smallest(name).eval()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    want = dequantised(model, lambda weight: weight.dequantize())(images)
    for quantised in (model, t2t_fast.freeze(model)):
        assert relative_error(quantised(images), want) < 5e-6
    frozen = t2t_fast.freeze(smallest(name).eval())
    quantization.quantize_(frozen, quantization.Int8WeightOnlyConfig())
    want = dequantised(frozen, lambda weight: weight.dequantize())(images)
    assert relative_error(frozen(images), want) < 5e-6


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("how", ["parametrize", "weight_norm", "spectral_norm", "prune"])
@every_family
@torch.no_grad()
def test_parametrised_and_pruned_weights(name: str, how: str) -> None:
    images = seeded_images(2, 32, 32).double()
    model = smallest(name).double()
    for module in [m for m in model.modules() if type(m) is nn.Linear]:
        if how == "parametrize":
            parametrize.register_parametrization(module, "weight", Doubled())
        elif how == "weight_norm":
            parametrizations.weight_norm(module)
            module.parametrizations.weight.original0.mul_(2)
        elif how == "spectral_norm":
            torch.nn.utils.spectral_norm(module)
        else:
            prune.l1_unstructured(module, "weight", 0.3)
        assert not are_plain(module)
    model.eval()
    got = model(images)
    want = smallest(name).double().eval()
    for n, module in want.named_modules():
        if type(module) is nn.Linear:
            module.weight.copy_(model.get_submodule(n).weight)
    assert relative_error(got, want(images)) < 1e-11
    assert relative_error(t2t_fast.freeze(model)(images), got) < 1e-11


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(4, 4, dtype=torch.int8),
        torch.ones(4, 4).to_sparse_csr(),
        torch.ones(4, 4).to(torch.float8_e4m3fn),
        Quantised.of(torch.ones(4, 4)),
    ],
    ids=["int8", "sparse", "float8", "subclass"],
)
def test_weights_that_no_op_knows(weight: Tensor) -> None:
    linear = nn.Linear(4, 4)
    assert are_plain(linear)
    linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    assert not are_plain(linear)


def test_a_swapped_class_is_not_plain() -> None:
    """As fully_shard swaps it."""
    model = small("t2t_vit_7").eval()
    images = seeded_images(2, 32, 32)
    want, seen = model(images), []

    class Sharded:
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            seen.append((len(args), kwargs))
            return super().forward(*args, **kwargs)

    for part in (model.blocks[0].attn, model.blocks[0].mlp, model.blocks[0].mlp.fc1, model.blocks[0].attn.qkv):
        part.__class__ = type(f"Sharded{type(part).__name__}", (Sharded, type(part)), {})
    assert relative_error(model(images), want) < 5e-6
    assert seen == [(1, {})] * 4


@every_family
def test_gradients_per_sample(name: str) -> None:
    model = small(name).eval()
    images, labels = seeded_images(3, 32, 32), torch.tensor([0, 3, 1])
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, weights, (image[None],)), label[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, images, labels)
    for i in range(3):
        model.zero_grad()
        F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]).backward()
        for n, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert relative_error(per_sample[n][i], parameter.grad) < 5e-5, n


def test_gradients_per_sample_by_hooks() -> None:
    """As Opacus does: what a Linear's forward hook keeps must be what its backward hook's gradient belongs to."""
    kept: dict[nn.Module, Tensor] = {}
    sums: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, unused: Any) -> None:
        kept[module] = inputs[0]

    def add_up(module: nn.Module, unused: Any, gradients: Any) -> None:
        sums[module] = torch.einsum("bo,bi->oi", gradients[0], kept[module])

    for name in ("t2t_vit_14_se", "t2t_vit_14_se_mlp"):
        model = small(name)
        for n, module in model.named_modules():
            if type(module) is nn.Linear and "se_layer" in n:
                module.register_forward_hook(keep)
                module.register_full_backward_hook(add_up)
        model(seeded_images(2, 32, 32)).square().sum().backward()
    assert len(sums) == 8
    for module, gradient in sums.items():
        assert relative_error(gradient, module.weight.grad) < 1e-5


def test_freeze_names_weights_that_are_not_finite() -> None:
    for value in (torch.nan, torch.inf):
        model = small("t2t_vit_7")
        with torch.no_grad():
            model.blocks[1].attn.qkv.weight[3, 4] = value
        with pytest.raises(ValueError, match=r"weights that are not finite: blocks\.1\.attn\.qkv\.weight"):
            t2t_fast.freeze(model)


@every_family
def test_images_of_another_dtype(name: str) -> None:
    model, images = small(name).eval(), seeded_images(2, 32, 32)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        with pytest.raises(TypeError, match=f"images .*{word}, .*float32"):
            model(images.to(dtype))
    assert t2t_fast.freeze(model)(images.double()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images.bfloat16()).isfinite().all()
        with pytest.raises(TypeError, match="images has dtype float64, the model's weights float32"):
            model(images.double())


@pytest.mark.parametrize("op", [op for op in SAMPLES if op != "soft_split"])  # which has one tensor
def test_ops_refuse_mixed_dtypes(op: str) -> None:
    sample = make(op)
    for name in tensors_of(sample):
        changed = ("x", "y") if op == "add_layer_norm" and name in ("x", "y") else (name,)  # those two may differ
        for dtype, word in ((torch.float64, "float64"), (torch.float16, "float16")):
            mixed = sample | {key: sample[key].to(dtype) for key in changed}
            with pytest.raises(TypeError, match=rf"(?s)(?=.*{word})(?=.*float32).*cast one of them"):
                getattr(ops, op)(**mixed)
