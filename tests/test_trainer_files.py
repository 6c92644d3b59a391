"""Files as trainers write them: containers, prefixes, shards, objects beside the weights; and odd ones, refused."""

from __future__ import annotations

import collections
import datetime
import enum
import json
import pathlib
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from weights import assert_same, small

from t2t_fast.models.checkpoints import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from t2t_fast.models.layouts import from_official

WEIGHTS = dict(small(seed=0).state_dict())
OTHERS = dict(small(seed=1).state_dict())


def prefixed(prefix: str, weights: dict[str, Tensor] = WEIGHTS) -> dict[str, Any]:
    return {prefix + name: value for name, value in weights.items()}


def loaded(tmp_path: Path, content: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The official weights of ``content`` saved by torch.save, after they went through a model."""
    torch.save(content, tmp_path / "w.pth")
    model = small(seed=2)
    load_checkpoint(tmp_path / "w.pth", model, **kwargs)
    return model.state_dict()


# Containers and prefixes

CRITERION = {"criterion.weight": torch.ones(3)}
CONTENTS: dict[str, Any] = {
    "PyTorch's tutorials": {"epoch": 3, "model_state_dict": WEIGHTS, "optimizer_state_dict": {}, "loss": 0.5},
    "DeepSpeed": {"module": WEIGHTS, "optimizer": None, "ds_config": {"a": 1}, "param_shapes": [torch.Size([3])]},
    "Lightning": {"state_dict": {**prefixed("model."), **CRITERION}, "hyper_parameters": {"lr": 1e-3}},
    "Lightning, another attribute": {"state_dict": {**prefixed("classifier.net."), **CRITERION}},
    "Lightning, compiled": {"state_dict": {**prefixed("student._orig_mod."), **CRITERION}},
    "DataParallel": {"net": prefixed("module.")},
    "torch's AveragedModel": {"n_averaged": torch.tensor(3), **prefixed("module.")},
    "torchvision's ExponentialMovingAverage": {"model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.")}},
    "FSDP": {"model": prefixed("_fsdp_wrapped_module.")},
    "checkpoint wrappers": {n.replace("ks.0.", "ks.0._checkpoint_wrapped_module."): v for n, v in WEIGHTS.items()},
    "compiled blocks in DDP": prefixed("module._orig_mod."),
    "mmpretrain in DDP": {"state_dict": {f"module.{n}": v for n, v in from_official(WEIGHTS, "mmpretrain").items()}},
    "transformers": prefixed("timm_model."),
    "a level deeper": {"checkpoint": {"model": WEIGHTS, "epoch": 1}},
}  # fmt: skip


@pytest.mark.parametrize("trainer", CONTENTS)
def test_containers_and_prefixes(tmp_path: Path, trainer: str) -> None:
    assert_same(loaded(tmp_path, CONTENTS[trainer]), WEIGHTS)


@pytest.mark.parametrize(
    ("content", "averaged", "trained"),
    [
        ({"state_dict": OTHERS, "state_dict_ema": WEIGHTS}, WEIGHTS, OTHERS),
        ({"model": OTHERS, "model_ema": prefixed("module.")}, WEIGHTS, OTHERS),
        ({"model_state_dict": OTHERS, "ema": WEIGHTS}, WEIGHTS, OTHERS),
        ({"state_dict": {**prefixed("model.", OTHERS), **prefixed("ema_model.module.")}}, WEIGHTS, OTHERS),
        ({"state_dict": {**OTHERS, **prefixed("ema.")}}, WEIGHTS, OTHERS),
        ({"state_dict": OTHERS, "ema_state_dict": WEIGHTS}, WEIGHTS, OTHERS),
        ({"model": OTHERS, "EMA": WEIGHTS}, WEIGHTS, OTHERS),
        # mmengine and Lightning swap both before they save.
        ({"state_dict": WEIGHTS, "ema_state_dict": prefixed("module.", OTHERS), "message_hub": {}}, WEIGHTS, OTHERS),
        (
            {"state_dict": WEIGHTS, "current_model_state": OTHERS, "pytorch-lightning_version": "2.6"},
            WEIGHTS,
            OTHERS,
        ),
        ({"n_averaged": torch.tensor(1), **prefixed("module.")}, WEIGHTS, WEIGHTS),
    ],
)
def test_averaged_and_trained_weights(tmp_path: Path, content: Any, averaged: Any, trained: Any) -> None:
    assert_same(loaded(tmp_path, content), averaged)
    assert_same(loaded(tmp_path, content, use_ema=False), trained)


def test_two_models_are_not_chosen_between(tmp_path: Path) -> None:
    torch.save({"student": WEIGHTS, "teacher": OTHERS}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth: holds several models: student, teacher; save"):
        read_checkpoint(tmp_path / "w.pth")


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    torch.save(CONTENTS["Lightning"], tmp_path / "w.pth")
    checkpoint = read_checkpoint(tmp_path / "w.pth")
    assert checkpoint.notes == ("ignored what is not the model's: criterion.weight",)
    torch.save({**WEIGHTS, "extra.weight": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"1 unexpected: extra\.weight"):
        load_checkpoint(tmp_path / "w.pth", small())


# Objects beside the weights


class Color(enum.Enum):
    RED = 1


class OwnDict(dict[str, Any]):
    pass


class OwnList(list[int]):
    pass


def history_buffer() -> Any:
    """An object shaped as mmengine's HistoryBuffer: arrays, and its own methods by name, which pickle as getattr."""

    class HistoryBuffer:
        def mean(self) -> float:
            return 0.0

        def __init__(self) -> None:
            self._log_history, self._count_history = np.array([0.5, 0.25]), np.array([1, 1])
            self._statistics_methods = {"mean": HistoryBuffer.mean}

    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.__module__ = HistoryBuffer.mean.__module__ = "mmengine.logging.history_buffer"
    module = sys.modules["mmengine.logging.history_buffer"]
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    return HistoryBuffer()


@pytest.fixture
def mmengine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    yield


@pytest.mark.parametrize("zipped", [True, False])
def test_the_file_of_an_mmengine_runner(
    tmp_path: Path, zipped: bool, mmengine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {
        "meta": {"epoch": 1, "cfg": "model = 1", "seed": 3, "dataset_meta": {"classes": ["cat"]}},
        "state_dict": from_official(WEIGHTS, "mmpretrain"),
        "message_hub": {"log_scalars": {"train/loss": history_buffer()}, "runtime_info": {"iter": 5}},
        "optimizer": torch.optim.AdamW(small().parameters()).state_dict(),
        "param_schedulers": [{"last_step": 1}],
    }
    torch.save(content, tmp_path / "epoch_1.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()  # where the file is read, mmengine is not installed
    checkpoint = read_checkpoint(tmp_path / "epoch_1.pth")
    assert checkpoint.layout == "mmpretrain"
    assert_same(checkpoint.state_dict, WEIGHTS)


BESIDE: dict[str, Any] = {
    "path": pathlib.Path("runs/1"),
    "defaultdict": collections.defaultdict(list, {"loss": [0.5]}),
    "deque": collections.deque([0.5, 0.25], maxlen=5),
    "counter": collections.Counter("abc"),
    "random states": [torch.get_rng_state(), np.random.get_state(), random.getstate(), np.random.default_rng(0)],
    "array": np.arange(5),
    "objects": np.array([None, "a"], dtype=object),
    "time": [datetime.datetime(2026, 1, 1), datetime.timedelta(1)],
    "enum": {Color.RED: Color.RED},
    "subclass of dict": OwnDict(a=OwnDict(b=1)),
    "subclass of list": OwnList([1, 2]),
    "class and function": [Color, history_buffer, dict],
    "builtins": [{1}, frozenset([1]), 1j, slice(1, 2), range(3), b"a", bytearray(b"b"), ...],
    "torch's": [torch.float16, torch.device("cpu"), torch.Size([1]), torch.__version__],
    "namespace": types.SimpleNamespace(a=1),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_weights(tmp_path: Path, zipped: bool) -> None:
    torch.save({"state_dict": WEIGHTS, **BESIDE}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(tmp_path / "w.pth").state_dict, WEIGHTS)


def test_weights_in_a_subclass_of_dict(tmp_path: Path) -> None:
    for container in (collections.defaultdict(list), OwnDict()):
        container.update(WEIGHTS)
        assert_same(loaded(tmp_path, {"model": container}), WEIGHTS)


def test_the_names_registered_with_torch_stay(tmp_path: Path) -> None:
    """Reading leaves alone what the user has told torch to trust."""
    with torch.serialization.safe_globals([Color]):
        torch.save({"state_dict": WEIGHTS, "color": Color.RED, **BESIDE}, tmp_path / "w.pth")
        before = torch.serialization.get_safe_globals()
        read_checkpoint(tmp_path / "w.pth")
        after = torch.serialization.get_safe_globals()
        assert Color in after and set(after) == set(before)


def test_a_whole_pickled_model_is_named(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"pickled .*T2TViT.* state_dict\(\)"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("function", [eval, exec, __import__, compile, open, sys.exit, pathlib.os.system])  # type: ignore[attr-defined]
def test_code_is_refused(tmp_path: Path, function: Any) -> None:
    torch.save({"state_dict": WEIGHTS, "function": function}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="which is code, not data, and was not executed"):
        read_checkpoint(tmp_path / "w.pth")


# Files, shards and folders


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("safetensors", "w.pth"),
        ("safetensors", "w.SAFETENSORS"),
        ("safetensors", "w"),
        ("pickle", "w.safetensors"),
        ("pickle", "w.npz"),
        ("npz", "w.pth"),
        ("npz", "w.NPZ"),
    ],
)
def test_suffixes_are_hints(tmp_path: Path, kind: str, name: str) -> None:
    right = {"safetensors": "a.safetensors", "pickle": "a.pth", "npz": "a.npz"}[kind]
    save_checkpoint(WEIGHTS, tmp_path / right)
    (tmp_path / right).rename(tmp_path / name)
    assert_same(read_checkpoint(tmp_path / name).state_dict, WEIGHTS)


def write_shards(folder: Path, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    weight_map = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(WEIGHTS)}
    for file in set(weight_map.values()):
        shard = {name: WEIGHTS[name].contiguous() for name in WEIGHTS if weight_map[name] == file}
        safetensors.torch.save_file(shard, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_shards(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "m")
    for path in (index, index.parent):
        assert_same(read_checkpoint(path).state_dict, WEIGHTS)
    (tmp_path / "m" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: .*model-00002-of-00003\.safetensors"):
        read_checkpoint(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds a list, not a JSON object"),
        ("{}", "is no index of weights"),
        ('{"weight_map": {"cls_token": 3}}', "is no index of weights"),
        ('{"weight_map": {"cls_token": "../secret.safetensors"}}', "no file of weights in its folder"),
        ('{"weight_map": {"cls_token": "/etc/passwd"}}', "no file of weights in its folder"),
    ],
)
def test_odd_indices(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "secret.safetensors").touch()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a directory without weights; expected an index"):
        read_checkpoint(tmp_path)
    torch.save(prefixed("timm_model."), tmp_path / "pytorch_model.bin")
    assert_same(read_checkpoint(tmp_path).state_dict, WEIGHTS)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is no JSON"):
        read_checkpoint(tmp_path)


# Odd weights

EXPANDED = torch.zeros(1).expand(900_000_000, 32)
ODD: dict[str, tuple[dict[str, Any], str]] = {
    "scalar table": ({"pos_embed": torch.tensor(1.0)}, "pos_embed must have 3 dimensions"),
    "empty table": ({"pos_embed": torch.zeros(1, 0, 32)}, "pos_embed must have 3 dimensions, none empty"),
    "one-token table": ({"pos_embed": torch.zeros(1, 1, 32)}, r"pos_embed must have shape \(1, 1 \+ height"),
    "table of two images": ({"pos_embed": torch.zeros(2, 5, 32)}, r"pos_embed must have shape \(1, 1 \+ height"),
    "all scalars": ({name: torch.tensor(0.0) for name in WEIGHTS}, "must have 3 dimensions"),
    "expanded": ({"head.weight": EXPANDED}, r"claims 115200000000 bytes .* expanded"),
    "int8": ({"blocks.0.mlp.fc1.weight": torch.zeros(64, 32, dtype=torch.int8)}, "has dtype torch.int8"),
    "bool": ({"cls_token": torch.ones(1, 1, 32, dtype=torch.bool)}, "cls_token has dtype torch.bool"),
    "complex": ({"norm.weight": torch.ones(32, dtype=torch.complex64)}, "norm.weight has dtype torch.complex64"),
    "float8": ({"norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}, "norm.weight has dtype torch.float8_e4m3fn"),
    "sparse": ({"head.weight": torch.eye(10, 32).to_sparse()}, "head.weight is torch.sparse_coo, not a plain dense"),
    "meta": ({"norm.weight": torch.ones(32, device="meta")}, "norm.weight has no values"),
    "huge number": ({f"blocks.{'9' * 5000}.norm1.weight": torch.ones(32)}, "unexpected"),
    "huge index": ({"blocks.99999999999.norm1.weight": torch.ones(32)}, "unexpected"),
    "mixed up": ({"tokens_to_token.attention1.norm1.weight": torch.ones(49)}, "of another shape"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("use", [read_checkpoint, lambda path: load_checkpoint(path, small())])
def test_odd_weights(tmp_path: Path, case: str, use: Callable[[Path], object]) -> None:
    change, message = ODD[case]
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {**WEIGHTS, **change}}, path)
    if use is read_checkpoint and message in ("unexpected", "of another shape"):
        assert len(read_checkpoint(path).state_dict) >= len(WEIGHTS)  # which model it is for is not asked yet
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        use(path)
    assert str(path) in str(caught.value)


def test_quantised_weights(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch will leave it to torchao
        quantised = torch.quantize_per_tensor(WEIGHTS["norm.weight"], 0.1, 0, torch.qint8)
    torch.save({**WEIGHTS, "norm.weight": quantised}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth: norm\.weight is quantised, not a plain dense tensor"):
        read_checkpoint(tmp_path / "w.pth")


def test_stored_in_other_precisions(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        weights = {name: value.to(dtype) for name, value in WEIGHTS.items()}
        got = loaded(tmp_path, weights)
        assert_same(got, {name: value.float() for name, value in weights.items()})


# Every failure is a documented one

LEAVES: list[Callable[[Tensor], Any]] = [
    lambda x: x.sum(),
    lambda x: x[..., :0],
    lambda x: x.unsqueeze(0),
    lambda x: x.flatten(),
    lambda x: x.reshape(-1)[:1].expand(2, 3, 5),
    lambda x: x.to(torch.int64),
    lambda x: x.to(torch.complex64),
    lambda x: x.to(torch.float8_e5m2),
    lambda x: x.to_sparse(),
    lambda x: x.to("meta"),
    lambda x: x.double() * float("nan"),
    lambda x: torch.zeros(1).expand(10**6, 10**6),
    lambda x: nn.Parameter(x.half()),
    lambda x: x.numpy(),
    lambda x: None,
    lambda x: "text",
    lambda x: {"cls_token": x},
    lambda x: torch.cat([x, x], dim=-1) if x.ndim else x,
]
NAMES = ["", ".", "head.", "head.1.weight", "blocks.-1.norm1.weight", "module.cls_token", "backbone.pos_embed", "é\n\0"]


def mutated(draw: random.Random) -> Any:
    """A narrow model's weights with a few things wrong, in some container."""
    weights: dict[Any, Any] = dict(WEIGHTS)
    for _ in range(draw.randint(0, 4)):
        name = draw.choice(list(WEIGHTS) if draw.random() < 0.6 else ["pos_embed", "cls_token", "head.weight"])
        kind = draw.random()
        if kind < 0.6:
            weights[name] = draw.choice(LEAVES)(WEIGHTS[name])
        elif kind < 0.75:
            weights.pop(name, None)
        elif kind < 0.9:
            weights[draw.choice(NAMES)] = WEIGHTS[name]
        else:
            weights = {f"{draw.choice(['module.', 'a.b.', 'ema.'])}{key}": value for key, value in weights.items()}
    key = draw.choice(["state_dict", "model", "state_dict_ema", "x", None, None])
    return weights if key is None else {key: weights, 3: draw.choice([1, None, [], {}])}


def test_every_failure_is_documented(tmp_path: Path) -> None:
    """Mutated files end as weights that are in the file or in the model, or as a CheckpointError with its name."""
    draw = random.Random(0)
    path = tmp_path / "w.pth"
    outcomes = collections.Counter[str]()
    for _ in range(200):
        content = mutated(draw)
        torch.save(content, path)
        model = small(seed=1, num_classes=draw.choice([10, 3, 0]), img_size=draw.choice([32, 64, (32, 64)]))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            got = load_checkpoint(path, model, strict=draw.random() < 0.8)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["loaded"] += 1
        for name, value in model.state_dict().items():
            kept = name.startswith("head.") or name not in got
            want = before[name] if kept and name not in WEIGHTS else got.get(name, before[name])
            assert torch.equal(value.nan_to_num(), want.to(value.dtype).nan_to_num()), name
    assert min(outcomes.values()) > 20


def test_damaged_bytes(tmp_path: Path) -> None:
    """Files with bytes changed or cut off are read, or refused with a CheckpointError."""
    draw = random.Random(1)
    for suffix in (".pth", ".safetensors", ".npz"):
        path = tmp_path / f"w{suffix}"
        save_checkpoint({name: value for name, value in WEIGHTS.items() if value.numel() < 200}, path)
        whole = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(draw.randint(1, 4)):
                damaged[draw.randrange(min(len(damaged), 3000))] = draw.randrange(256)
            path.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
            with pytest.raises(CheckpointError, match="w"):
                read_checkpoint(path)  # what is left of the weights is no T2T-ViT, if it can be read at all
