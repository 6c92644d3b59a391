"""Everything public, as literal data: a change here is a change for the users."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import t2t_fast
from t2t_fast import config
from t2t_fast.cli import make_parser
from t2t_fast.ops.common import extension
from t2t_fast.usage import OneLineParser

ROOT = Path(__file__).resolve().parents[1]

FUNCTIONS = {
    "create_model": "(name=None, *, checkpoint=None, pretrained=False, use_ema=True, **kwargs)",
    "explain": "(model, *inputs, **kwargs)",
    "export": "(model, path, format=None, *, max_batch=1024, int8=None)",
    "freeze": "(model, dtype=None)",
    "list_models": "(filter='*')",
    "load_checkpoint": "(path, model=None, *, use_ema=True, strict=True, grid_size=None)",
    "optimize": "(model, backend='auto')",
    "save_checkpoint": "(state_dict, path, layout='official', grid_size=None)",
    "use_backend": "(backend)",
}
CLASSES = {
    "BackendUnavailable",
    "CheckpointError",
    "ExportError",
    "FrozenT2TViT",
    "GraphRunner",
    "Int8",
    "T2TViT",
    "T2TViTDense",
}
_LAYER = "proj_weight, proj_bias, {norm}_weight, {norm}_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias"
_SPLIT = "kernel_size, stride, padding, grid=None"
_BRANCH = "*, residual=None, branch_scale=None, backend='auto'"
OPS = {
    "add_layer_norm": "(x, y, norm_weight, norm_bias, *, eps=1e-05, branch_scale=None, backend='auto')",
    "attention": "(q, k, v, scale, dropout_p=0.0, *, backend='auto')",
    "layer_norm_linear": "(x, weight, bias, norm_weight, norm_bias, *, eps=1e-05, gelu=False, backend='auto')",
    "linear": "(x, weight, bias=None, *, gelu=False, backend='auto')",
    "mlp": f"(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, {_BRANCH})",
    "performer_attention": "(k, q, v, w, eps=1e-08, *, backend='auto')",
    "se_gate": f"(x, w_reduce, w_expand, {_BRANCH})",
    "se_mlp": f"(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, w_reduce, w_expand, {_BRANCH})",
    "soft_split": f"(x, {_SPLIT}, *, backend='auto')",
    "soft_split_linear": f"(x, weight, bias, norm_weight, norm_bias, {_SPLIT}, eps=1e-05, *, folded=False, "
    "backend='auto')",
    "soft_split_performer": f"(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias, w, {_LAYER.format(norm='norm2')}, "
    f"{_SPLIT}, proj_drop=0.0, mlp_drop=0.0, eps=1e-08, norm1_eps=1e-05, norm2_eps=1e-05, *, folded=False, "
    "backend='auto')",
    "token_performer": f"(kqv, w, {_LAYER.format(norm='norm')}, proj_drop=0.0, mlp_drop=0.0, eps=1e-08, "
    "norm_eps=1e-05, *, backend='auto')",
}
# In torch.ops.t2t_fast: saved programs hold these names and arguments.
OPERATORS = {
    "add_layer_norm": (
        "(Tensor x, Tensor y, Tensor? weight, Tensor? bias, Tensor? scale, float eps, bool differentiate) -> "
        "(Tensor, Tensor, Tensor, Tensor)"
    ),
    "add_layer_norm_backward": (
        "(Tensor? d_total, Tensor d_normed, Tensor total, Tensor mean, Tensor rstd, Tensor? weight, Tensor? "
        "scale, ScalarType x_dtype, ScalarType y_dtype, bool has_bias) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "linear": "(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor",
    "performer_attention": "(Tensor k, Tensor q, Tensor v, Tensor w, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    "performer_attention_backward": (
        "(Tensor grad, Tensor k, Tensor q, Tensor v, Tensor w, Tensor largest, Tensor total, Tensor summary, "
        "float eps, bool needs_dw) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "soft_split": "(Tensor image, int[2] kernel_size, int[2] stride, int[2] padding) -> Tensor",
    "soft_split_backward": (
        "(Tensor grad, SymInt[4] size, bool channels_last, int[2] kernel_size, int[2] stride, int[2] padding) -> Tensor"
    ),
    "soft_split_linear": (
        "(Tensor image, Tensor weight, Tensor? offset, ScalarType dtype, int[2] kernel_size, int[2] stride, "
        "int[2] padding, bool norm, float eps, bool differentiate) -> (Tensor, Tensor, Tensor)"
    ),
    "soft_split_linear_backward_input": (
        "(Tensor grad, Tensor image, Tensor weight, Tensor? offset, Tensor tokens, Tensor mean, Tensor rstd, "
        "ScalarType dtype, int[2] kernel_size, int[2] stride, int[2] padding, bool norm) -> Tensor"
    ),
    "soft_split_linear_backward_weight": (
        "(Tensor grad, Tensor image, Tensor mean, Tensor rstd, ScalarType dtype, int[2] kernel_size, int[2] "
        "stride, int[2] padding, bool norm, bool has_offset) -> (Tensor, Tensor)"
    ),
    "token_performer": (
        "(Tensor kqv, Tensor w, Tensor proj_weight, Tensor proj_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor "
        "fc2_weight, Tensor fc2_bias, Tensor? seed, ScalarType dtype, float proj_drop, float mlp_drop, float eps, "
        "float norm_eps) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "token_performer_backward": (
        "(Tensor grad, Tensor kqv, Tensor w, Tensor proj_weight, Tensor proj_bias, Tensor fc1_weight, Tensor "
        "fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor? seed, Tensor largest, Tensor total, Tensor "
        "summary, ScalarType dtype, float proj_drop, float mlp_drop, float eps, float norm_eps) -> (Tensor, "
        "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}
OPERATORS_OF_EXTENSION = {
    "attention": "(Tensor q, Tensor k, Tensor v, float scale, bool differentiate) -> (Tensor output, Tensor lse)",
    "attention_backward": (
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse, float scale) -> (Tensor q, Tensor k, "
        "Tensor v)"
    ),
    "performer_layer": (
        "(Tensor kqv, Tensor? proj_mask, Tensor? mlp_mask, Tensor w, Tensor proj_weight, Tensor proj_bias, Tensor "
        "norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, float "
        "eps, float norm_eps) -> (Tensor output, Tensor total, Tensor summary)"
    ),
    "performer_layer_backward": (
        "(Tensor grad, Tensor kqv, Tensor? proj_mask, Tensor? mlp_mask, Tensor w, Tensor proj_weight, Tensor "
        "proj_bias, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, "
        "Tensor fc2_bias, Tensor total, Tensor summary, float eps, float norm_eps, bool needs_w) -> Tensor[]"
    ),
    "se_gate": (
        "(Tensor x, Tensor w_reduce, Tensor w_expand, Tensor? residual, Tensor? scale) -> (Tensor output, Tensor "
        "mean, Tensor reduced, Tensor gate)"
    ),
    "se_gate_backward": (
        "(Tensor grad, Tensor x, Tensor mean, Tensor reduced, Tensor gate, Tensor w_reduce, Tensor w_expand, "
        "Tensor? scale) -> (Tensor x, Tensor w_reduce, Tensor w_expand, Tensor scale)"
    ),
    "se_mlp": (
        "(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor w_reduce, "
        "Tensor w_expand, Tensor? residual, Tensor? scale, bool differentiate) -> (Tensor output, Tensor hidden, "
        "Tensor product, Tensor mean, Tensor reduced, Tensor gate)"
    ),
    "se_mlp_backward": (
        "(Tensor grad, Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor "
        "w_reduce, Tensor w_expand, Tensor? scale, Tensor hidden, Tensor product, Tensor mean, Tensor reduced, "
        "Tensor gate) -> (Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, "
        "Tensor w_reduce, Tensor w_expand, Tensor scale)"
    ),
    "windows_linear": (
        "(Tensor image, Tensor weight, Tensor? offset, int[2] kernel_size, int[2] stride, int[2] padding, bool normed, "
        "float eps) -> Tensor"
    ),
}
# Arguments of each command, and of each script in benchmarks/.
COMMANDS = {
    "predict": "IMAGE --model --checkpoint --pretrained --img-size --batch-size --device --dtype --backend --top-k "
    "--json --class-names",
    "macs": "MODEL --img-size --json --output",
    "list": "PATTERN --json",
    "convert": "SRC DST --to --no-ema --force",
    "export": "DST --format --model --checkpoint --pretrained --img-size --random-weights --dtype --max-batch "
    "--int8 --calibrate --min-agreement --force",
    "bench": "arguments",  # of benchmarks/throughput.py
    "env": "--json",
}
SCRIPTS = {
    "compare": "A B --fail-below",
    "gpu_report": "--out --minutes --stages --dry-run",
    "kernels": "--ops --batch-size --dtype --device --time-budget --no-compile --output",
    "memory": "--models --variants --precision --batch-size --img-size --device --output",
    "overhead": "--tokens --heads --precision --rounds --output",
    "report": "--check",
    "resources": "--arch --kind --dry-run --json",
    "scaling": "--batch-size --result --flops --efficiency --bandwidth --node --link --network --latency --overlap "
    "--write",
    "throughput": "--models --variants --backends --mode --precision --dtype --batch-size --latency --grid --img-size "
    "--device --repeats --time-budget --images --synthetic --with-loader --output --resume --no-plot",
    "tune": "--tables --kinds --batch-size --time-budget --again --tiny --output",
}
VARIABLES = ["T2T_FAST_BACKEND", "TRITON_INTERPRET", "T2T_FAST_NO_EXT", "T2T_FAST_CPU_CAPABILITY"]
# Number of entries of the state dict, and a digest of their names and shapes in order.
STATE_DICTS = {
    "t2t_vit_7": (111, "4dc2e9de41bb092d"),
    "t2t_vit_10": (144, "1c3b1e24f5b2ff40"),
    "t2t_vit_12": (166, "c03f368e7024ea57"),
    "t2t_vit_14": (188, "5dddd82f1eff2ccf"),
    "t2t_vit_19": (243, "bb5d8ecb4f6e5bde"),
    "t2t_vit_24": (298, "1e58bbf4dd0b578d"),
    "t2t_vit_t_14": (184, "2fd9e39d43cf0a6c"),
    "t2t_vit_t_19": (239, "5d2d47d4dc725189"),
    "t2t_vit_t_24": (294, "e5aa0ca57a6481ba"),
    "t2t_vit_c_14": (166, "d2e0d276e3666ebd"),
    "t2t_vit_14_resnext": (188, "5dddd82f1eff2ccf"),
    "t2t_vit_14_wide": (78, "2b1f78c6a7e8c7a3"),
    "t2t_vit_14_se": (216, "b6f5bdde63910b20"),
    "t2t_vit_14_se_mlp": (216, "c014a8d02a3b4e57"),
    "t2t_vit_16_ghost": (322, "71635b75f67db04f"),
    "t2t_vit_dense": (287, "58f7fc5e9b380e8e"),
}


def test_names() -> None:
    assert set(t2t_fast.__all__) == {*FUNCTIONS, *CLASSES, "ops"}
    assert all(inspect.isclass(getattr(t2t_fast, name)) for name in CLASSES)
    assert t2t_fast.ops.__all__ == sorted(OPS)
    assert set(t2t_fast.list_models()) == set(STATE_DICTS)


@pytest.mark.parametrize("name", [*FUNCTIONS, *OPS])
def test_signature(name: str) -> None:
    owner, expected = (t2t_fast, FUNCTIONS[name]) if name in FUNCTIONS else (t2t_fast.ops, OPS[name])
    signature = inspect.signature(getattr(owner, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == expected


@pytest.mark.parametrize("name", [*OPERATORS, *OPERATORS_OF_EXTENSION])
def test_operator(name: str) -> None:
    """The import of the package registers it, with arguments that saved programs can call."""
    if name in OPERATORS_OF_EXTENSION and extension.module is None:
        pytest.skip(f"the extension is not loaded: {extension.why_not_loaded}")
    schema = (OPERATORS | OPERATORS_OF_EXTENSION)[name]
    assert str(getattr(torch.ops.t2t_fast, name).default._schema) == f"t2t_fast::{name}{schema}"


def _arguments(parser: argparse.ArgumentParser) -> str:
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction | argparse._SubParsersAction)]
    return " ".join(word for a in actions for word in (a.option_strings or [str(a.metavar or a.dest)]))


def test_commands() -> None:
    parser = make_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert (parser.prog, _arguments(parser)) == ("t2t-fast", "--version")
    assert {name: _arguments(command) for name, command in commands.choices.items()} == COMMANDS


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    def parse(self: OneLineParser, *args: Any) -> None:
        raise Parsed(_arguments(self))

    monkeypatch.setattr(OneLineParser, "parse_args", parse)
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(f"t2t_fast.bench.{name}").main([])
    assert str(parsed.value) == SCRIPTS[name]


def test_every_script_is_known() -> None:
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == {*SCRIPTS, "test_ops"}


def test_environment_variables() -> None:
    """Those that config.py tells of are all there are."""
    assert re.findall(r"^``(\w+)``$", str(config.__doc__), re.MULTILINE) == VARIABLES
    sources = [*(ROOT / "t2t_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py"), ROOT / "setup.py"]
    named = {name for path in sources for name in re.findall(r"[\"']([A-Z0-9]+_[A-Z0-9_]+)[\"']", path.read_text())}
    assert {name for name in named if name.startswith(("T2T_FAST_", "TRITON_"))} - {"T2T_FAST_"} == set(VARIABLES)


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict(name: str) -> None:
    with torch.device("meta"):
        entries = t2t_fast.create_model(name).state_dict()
    text = "\n".join(f"{key} {tuple(value.shape)}" for key, value in entries.items())
    assert (len(entries), hashlib.sha256(text.encode()).hexdigest()[:16]) == STATE_DICTS[name]
