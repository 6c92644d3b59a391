"""GraphRunner: when it replays and when it calls the model; on a GPU, what the replays return."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import t2t_fast
from t2t_fast import GraphRunner
from t2t_fast.deploy import graph_runner


def make(device: str = "cpu") -> nn.Module:
    model = t2t_fast.create_model("t2t_vit_7", img_size=32, depth=2, num_classes=5).eval()
    nn.init.normal_(model.head.weight)
    return model.to(device)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replays on the CPU, as a list of their batches: the model's answer, marked by adding 100."""
    replayed: list[int] = []

    def capture(model: nn.Module, example: Tensor, sizes: Sequence[int]) -> dict[int, Callable[[Tensor], Tensor]]:
        def replay(images: Tensor) -> Tensor:
            replayed.append(len(images))
            return model(images) + 100

        return dict.fromkeys(sizes, replay)

    monkeypatch.setattr(graph_runner, "_capture", capture)
    monkeypatch.setattr(graph_runner, "_why_not", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return replayed


def test_on_the_cpu_it_has_nothing_to_do() -> None:
    model, images = make(), torch.randn(3, 3, 32, 32)
    runner = GraphRunner(model, [1, 3])
    (note,) = runner.notes
    assert "nothing to capture" in note and "'cpu'" in note
    assert runner.reason(images) in note
    got = runner(images)
    assert not got.requires_grad
    torch.testing.assert_close(got, model(images).detach())


@torch.no_grad()
def test_it_replays_what_it_captured_and_nothing_else(recorded: list[int]) -> None:
    model = make()
    runner = GraphRunner(model, (2, 4, 2))
    assert runner.notes == ["batches of 4: captured", "batches of 2: captured"]
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(runner(images), model(images) + 100)
    torch.testing.assert_close(runner(images[:2]), model(images[:2]) + 100)
    assert recorded == [4, 2]
    assert runner.reason(images) is None
    for other, reason in (
        (images[:3], "batches of 3 were not captured, only of 4, 2"),
        (images.double(), "dtype is torch.float64, the graphs were captured for torch.float32"),
        (images.to("meta"), "device is meta, the graphs were captured for cpu"),
        (images[..., :31], r"shape is (3, 32, 31), the graphs were captured for (3, 32, 32)"),
    ):
        assert reason in str(runner.reason(other))
    torch.testing.assert_close(runner(images[:3]), model(images[:3]))
    with t2t_fast.use_backend("reference"):
        assert "autocast, the backend or the precision" in str(runner.reason(images))
        torch.testing.assert_close(runner(images), model(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast, the backend or the precision" in str(runner.reason(images))
    torch.set_float32_matmul_precision("high")
    try:
        assert "precision of float32 matmuls is another" in str(runner.reason(images))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert recorded == [4, 2]


@torch.no_grad()
def test_a_runner_that_was_moved_lets_go_of_its_graphs(recorded: list[int]) -> None:
    runner, images = GraphRunner(make(), (size for size in (2,))), torch.randn(2, 3, 32, 32)
    copied = copy.deepcopy(runner)
    runner.double()
    (note,) = runner.notes
    assert "nothing to replay" in note and "make a new one" in note
    assert "make a new one" in str(runner.reason(images.double()))
    runner(images.double())
    assert recorded == []
    copied(images)
    assert recorded == [2]


def test_copies_and_pickles_on_the_cpu() -> None:
    runner, images = GraphRunner(make(), (1, 2)), torch.randn(2, 3, 32, 32)
    for other in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):
        assert torch.equal(other(images), runner(images))
        assert "nothing to capture" in other.notes[0]


def test_a_graph_keeps_the_tables_it_has_read() -> None:
    model = t2t_fast.create_model("t2t_vit_7", img_size=32, depth=1, dynamic_img_size=True).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 48, 32))
        (entry,) = model._tables.values()
        kept = graph_runner._caches(nn.Sequential(model))
        for side in range(48, 48 + 16 * 20, 16):
            model(torch.randn(1, 3, 64, side))
    assert all(known[2] is not entry[2] for known in model._tables.values())
    assert kept[0].popitem()[1][2] is entry[2]


@torch.no_grad()
def test_any_model_with_an_example(recorded: list[int]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    with pytest.raises(TypeError, match=r"example .*Sequential.*\(in_chans, H, W\)"):
        GraphRunner(model)
    runner = GraphRunner(model, example=torch.zeros(3, 2, 2))
    runner(torch.randn(1, 3, 2, 2))
    assert recorded == [1]


def test_a_frozen_model(recorded: list[int]) -> None:
    frozen = t2t_fast.freeze(make(), torch.bfloat16)
    runner = GraphRunner(frozen, [2])
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(runner(images), frozen(images) + 100)  # which casts by itself, as the runner does
    assert "dtype is torch.int64" in str(runner.reason(images.long()))
    assert recorded == [2]


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="batch_sizes must be at least 1, got 0"):
        GraphRunner(make(), [4, 0])
    with pytest.raises(TypeError, match="batch_sizes must be an int, got 'x'"):
        GraphRunner(make(), ["x"])
    with pytest.raises(ValueError, match=r"model is in training mode.*model\.eval\(\)"):
        GraphRunner(make().train())
    with pytest.raises(ValueError, match=r"example must be one image .* got the shape \(1, 3, 32, 32\)"):
        GraphRunner(make(), example=torch.zeros(1, 3, 32, 32))
    with pytest.raises(RuntimeError, match="train the model itself"):
        GraphRunner(make()).train()
    assert not GraphRunner(make()).eval().training


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_replays_return_the_model_s_logits(dtype: torch.dtype) -> None:
    frozen = t2t_fast.freeze(make("cuda"), dtype)
    runner = GraphRunner(frozen, [1, 4])
    results, wanted = [], []
    for batch in (4, 1, 3, 4, 1):
        images = torch.randn(batch, 3, 32, 32, device="cuda", dtype=dtype)
        assert (runner.reason(images) is None) == (batch != 3)
        results.append(runner(images))
        wanted.append(frozen(images))
    for got, want in zip(results, wanted, strict=True):  # after all calls: earlier results are left alone
        assert torch.equal(got, want)


@pytest.mark.gpu
@torch.no_grad()
def test_a_runner_made_under_autocast_and_inference_mode() -> None:
    model = make("cuda")  # of float32 weights, which autocast casts and forgets
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        runner = GraphRunner(model, [4])
    junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]  # takes what was given back
    del junk
    images = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert runner.reason(images) is None
        assert torch.equal(runner(images), model(images))


@pytest.mark.gpu
@torch.no_grad()
def test_replays_on_several_streams_do_not_mix() -> None:
    frozen = t2t_fast.freeze(make("cuda"))
    runner = GraphRunner(frozen, [2])
    batches = [torch.randn(2, 3, 32, 32, device="cuda") for _ in range(16)]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for index, images in enumerate(batches):
        with torch.cuda.stream(streams[index % 4]):
            results.append(runner(images))
    torch.cuda.synchronize()
    for got, images in zip(results, batches, strict=True):
        assert torch.equal(got, frozen(images))
