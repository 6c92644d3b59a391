"""The command line where it hurts: odd streams, names, numbers and signals end in one line and an exit code."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import t2t_fast
from t2t_fast.cli import export, main, predict

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(t2t_fast.__file__).parents[1])}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photo.png and with weights for 64 x 64 pixels: five.pth, of a t2t_vit_7 with 5 classes,
    none.pth, the same without a head, and like.pth, which could be one of two models with 10."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    five = t2t_fast.create_model("t2t_vit_7", num_classes=5, img_size=64).state_dict()
    t2t_fast.save_checkpoint(five, folder / "five.pth")
    t2t_fast.save_checkpoint({k: v for k, v in five.items() if not k.startswith("head.")}, folder / "none.pth")
    like = t2t_fast.create_model("t2t_vit_14", num_classes=10, img_size=64)
    t2t_fast.save_checkpoint(like.state_dict(), folder / "like.pth")
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "photo.png")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder with links to what was made, as the working directory."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = main(argv)
    except SystemExit as error:
        assert isinstance(error.code, int)
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the command ends with, and nothing else."""
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("t2t-fast: ")
    return line


PREDICT = ("predict", "photo.png", "--checkpoint", "five.pth", "--device", "cpu")


# Where results go


def test_json_to_devices_fifos_and_descriptors(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, *PREDICT, "--json", "/dev/null")
    assert (code, "photo.png" in out) == (0, True)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    for name in ("/dev/stdout", "-", "/dev/fd/1"):  # nothing but JSON, for `| jq`
        code, out, _ = run(capfd, *PREDICT, "--json", name)
        assert (code, json.loads(out)["images"][0]["file"]) == (0, "photo.png")
    reading, writing = os.pipe()  # as `--json >(jq .)` does
    code, out, _ = run(capfd, *PREDICT, "--json", f"/dev/fd/{writing}")
    os.close(writing)
    with open(reading) as pipe:
        assert json.load(pipe)["failed"] == []
    assert (code, "photo.png" in out) == (0, True)


def test_results_are_printed_in_spite_of_a_full_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *PREDICT, "--json", "/dev/full")
    assert (code, err) == (2, "t2t-fast: error: /dev/full: No space left on device\n")
    assert "photo.png" in out


@pytest.mark.parametrize("name", ["absent/x.json", "folder", "new/", "photo.png/x.json", "loop"])
def test_json_that_cannot_be_written_is_told_first(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    monkeypatch.setattr(predict, "load_model", lambda args: pytest.fail("computed"))
    assert fails(capsys, *PREDICT, "--json", name).startswith(f"t2t-fast: error: {name}: ")


def test_failures_alone_are_valid_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.png").write_text("no image")
    for names in (["bad.png"], ["no*.png"]):  # with a model loaded, and without
        code, out, _ = run(capsys, "predict", *names, *PREDICT[2:], "--json", "out.json")
        record = json.loads((folder / "out.json").read_text())
        assert (code, out, record["images"]) == (2, "", [])
        assert [failure["file"] for failure in record["failed"]] == names
        assert record["weights"] == "five.pth"


def test_convert_to_a_full_disk_and_through_links(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "full.pth").symlink_to("/dev/full")
    code, out, err = run(capsys, "convert", "five.pth", "full.pth")
    assert (code, err) == (2, "t2t-fast: error: full.pth: No space left on device\n")
    assert out.startswith("read   five.pth: ")
    (folder / "link.npz").symlink_to("new.npz")
    assert run(capsys, "convert", "five.pth", "link.npz")[0] == 0
    assert np.load(folder / "new.npz")["head.bias"].shape == (5,)
    assert "link.npz: exists" in fails(capsys, "convert", "five.pth", "link.npz")


# Streams


class Wrapped(io.TextIOWrapper):
    """A standard output whose encoding lacks characters."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    def bytes(self) -> bytes:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_the_encoding_lacks(folder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    undecodable = os.fsdecode(b"bad\xff.png")
    for name in ("图片.png", undecodable):
        shutil.copy("photo.png", name)
    with monkeypatch.context() as patch:
        output = Wrapped(encoding)
        patch.setattr(sys, "stdout", output)
        names = ("predict", "图片.png", undecodable, *PREDICT[2:])
        assert main([*names, "--json", "图.json"]) == 0
        assert main(["convert", "five.pth", "图.pth"]) == 0
        assert main(["list", "t2t_vit_14_se_mlp"]) == 0  # has dashes for what the paper does not tell
        assert output.errors == "strict"  # as it was
    for text in (rb"\u56fe\u7247.png", rb"bad\udcff.png", rb"wrote  \u56fe.pth", b"t2t_vit_14_se_mlp"):
        assert text in output.bytes()
    assert [image["file"] for image in json.loads((folder / "图.json").read_text())["images"]] == list(names[1:3])


@pytest.mark.parametrize("argv", [("list",), ("list", "--json"), ("env",), ("--version",), ("list", "--help")])
def test_full_output(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(argv) == 2
    assert capsys.readouterr().err == "t2t-fast: error: standard output: No space left on device\n"


def test_closed_output(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)  # what Python makes of >&-
        assert main([*PREDICT, "--json", "out.json"]) == 2
    assert capsys.readouterr().err == "t2t-fast: error: standard output: Bad file descriptor\n"
    assert len(json.loads((folder / "out.json").read_text())["images"]) == 1


def test_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["list"]) == 141
    assert capsys.readouterr().err == ""


def test_closed_and_full_messages(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are lost, not printed among the results; the exit code is as ever."""
    command = ("predict", "photo.png", "absent.png", "--checkpoint", "like.pth", "--device", "cpu", "--json", "-")
    with open("/dev/full", "w") as full:
        for stream in (None, full):
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stderr", stream)
                assert main(command) == 1
            record = json.loads(capsys.readouterr().out)
            assert [len(record["images"]), len(record["failed"])] == [1, 1]


# What is said, and how often


def test_every_fact_is_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ("--device", "cpu")
    _, _, err = run(capsys, "predict", "photo.png", "--checkpoint", "like.pth", *rest)
    (line,) = err.splitlines()
    assert line.startswith("t2t-fast: warning: ")
    assert all(name in line for name in ("like.pth", "t2t_vit_14", "t2t_vit_14_resnext"))
    for argv in (("--checkpoint", "like.pth", "--model", "t2t_vit_14"), ("--checkpoint", "five.pth")):
        assert run(capsys, "predict", "photo.png", *argv, *rest)[2] == ""
    for argv in ((), ("--model", "t2t_vit_7")):
        assert "has no head" in fails(capsys, "predict", "photo.png", "--checkpoint", "none.pth", *argv, *rest)
    _, _, err = run(capsys, "predict", "photo.png", "--model", "t2t_vit_7", "--img-size", "64", *rest)
    assert "the weights are random" in err
    assert len(err.splitlines()) == 1


def test_random_weights_are_exported_on_request_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(export, "freeze", lambda model, dtype: model)
    done = {"format": "torch", "bytes": 1, "error": None, "checked_by": "nothing"}
    monkeypatch.setattr(export, "export", lambda model, path, *args, **kwargs: written.append(path) or done)
    command = ("export", "m.pt2", "--model", "t2t_vit_7", "--img-size", "32")
    assert "or --random-weights to write random weights" in fails(capsys, *command)
    assert "goes with neither" in fails(capsys, *command, "--random-weights", "--checkpoint", "five.pth")
    assert written == []
    assert run(capsys, *command, "--random-weights")[::2] == (0, "")
    assert written == ["m.pt2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["m.bin"], "must end in .onnx, .xml or .pt2"),
        (["m.onnx", "--format", "aoti"], "must end in .pt2"),
        (["absent/m.pt2"], "absent/m.pt2: no such folder"),
        (["m.pt2/"], "is a folder"),
        (["photo.pt2"], "exists; pass --force"),
        (["m.onnx", "--dtype", "bfloat16"], "ONNX is written in float32 or float16"),
        (["m.pt2", "--max-batch", "3"], "max_batch must be at least 4"),
        (["m.onnx"], "writing ONNX needs onnxscript: pip install onnxscript"),
    ],
)
def test_export_asks_before_it_builds(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    (folder / "photo.pt2").touch()
    monkeypatch.setattr(export, "load_model", lambda args: pytest.fail("computed"))
    needed = "onnxscript" if message.startswith("writing") else ""
    monkeypatch.setattr(sys.modules["t2t_fast.deploy.export"], "_has", lambda name: name != needed)
    assert message in fails(capsys, "export", *argv, "--random-weights")


# Hostile names and numbers


def test_what_is_no_regular_file_is_not_opened(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of these would wait, or read, for ever."""
    (folder / "images").mkdir()
    os.mkfifo(folder / "images" / "x.png")
    os.mkfifo(folder / "fifo.pth")
    line = "t2t-fast: images/x.png: not a regular file"
    assert fails(capsys, "predict", "images", *PREDICT[2:]) == line
    assert fails(capsys, "predict", "images/x.png", *PREDICT[2:]) == line
    assert fails(capsys, "predict", "/dev/zero", *PREDICT[2:]) == "t2t-fast: /dev/zero: not a regular file"
    for source in ("fifo.pth", "/dev/zero"):
        for command in (["predict", "photo.png", "--checkpoint", source], ["convert", source, "x.pth"]):
            assert fails(capsys, *command) == f"t2t-fast: error: {source}: not a regular file"
        assert "not a regular file" in fails(capsys, "export", "x.pt2", "--checkpoint", source)


@pytest.mark.parametrize("number", ["999999999999999999999", "8193", "09" * 3000, "-1", "1e3", "", "½", "nan"])
def test_absurd_numbers(capsys: pytest.CaptureFixture[str], number: str) -> None:
    for command in (["macs", "t2t_vit_7"], ["predict", "photo.png"], ["export", "m.pt2"]):
        line = fails(capsys, *command, "--img-size", number)
        assert "argument --img-size: " in line
        assert len(line) < 11_000
    counts = (("predict", "photo.png", "--batch-size"), ("predict", "photo.png", "--top-k"))
    for command in (*counts, ("export", "m.pt2", "--max-batch")):
        if number != "8193":
            assert f"argument {command[-1]}: " in fails(capsys, *command, number)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["macs", ""], "no model matches ''"),
        (["list", ""], "no model matches ''"),
        (["predict", "a\0b"], "contains a NUL character"),
        ([*PREDICT, "--backend", "native"], "invalid choice: 'native'"),
        ([*PREDICT, "--device", "hpu"], "--device hpu cannot be used here"),
        ([*PREDICT, "--model", ""], "name='' is no T2T-ViT"),
        (["predict", "photo.png", "--checkpoint", ""], "'' is not a file name"),
        (["predict", ""], "t2t-fast: '': no such file"),
        (["predict", "two  spaces.png"], "two  spaces.png: no such file"),
        (["predict", "x\n\x1b[31my.png"], r"x\n\x1b[31my.png"),
    ],
)
def test_odd_arguments(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    if "--checkpoint" not in argv:
        argv = [*argv, "--checkpoint", "five.pth"] if argv[0] == "predict" else argv
    assert message in fails(capsys, *argv)


def test_memory_that_runs_out(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: object, **kwargs: object) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(predict, "create_model", exhausted)
    assert "out of memory; a smaller --img-size" in fails(capsys, *PREDICT)


NASTY = (
    *("", " ", "-", "--", "-x", "--json", "--help", "[", "a\0b", "é\n", os.fsdecode(b"\xff"), "x" * 300, "½"),
    *("/dev/full", "/dev/null", "/dev/stdin", "folder", "loop", "fifo.png", "fifo.pth", "absent/x.json", "new/"),
    *("photo.png", "five.pth", "none.pth", "bad.png", "names.txt", "t2t_vit_14.x", "0", "-1", "1e9", "9" * 30, "nan"),
)
# Per command what its positional arguments and its options should be; None for a flag.
GOOD: dict[str, tuple[str, dict[str, str | None]]] = {
    "predict": ("photo.png", {"--model": "t2t_vit_7", "--checkpoint": "five.pth", "--img-size": "32", "--top-k": "2",
                              "--batch-size": "2", "--device": "cpu", "--dtype": "bfloat16", "--backend": "aten",
                              "--json": "new.json", "--class-names": "names.txt"}),
    "macs": ("t2t_vit_7", {"--img-size": "64", "--json": None}),
    "list": ("t2t_vit_7", {"--json": None}),
    "convert": ("five.pth", {"--to": "paddlevit", "--no-ema": None, "--force": None}),
    "export": ("new.pt2", {"--model": "t2t_vit_7", "--checkpoint": "five.pth", "--img-size": "32", "--force": None,
                           "--format": "torch", "--max-batch": "4", "--random-weights": None}),
    "env": ("env", {"--json": None}),
}  # fmt: skip


def arguments(chance: random.Random) -> list[str]:
    """A command with one or two positional arguments and a few options, each as it should be or not."""
    command = chance.choice([*GOOD])
    positional, options = GOOD[command]
    argv = [chance.choice((positional, chance.choice(NASTY))) for _ in range(chance.choice((1, 1, 2)))]
    for option in chance.sample([*options], chance.randrange(min(len(options), 5) + 1)):
        good = options[option]
        argv += [option] if good is None else [option, chance.choice((good, good, chance.choice(NASTY)))]
    return [command if chance.random() < 0.97 else chance.choice(NASTY), *argv]


def test_fuzzed_arguments(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the arguments: a documented exit code, and with 2 lines of the program's own, the last one an error."""
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    for name in ("fifo.png", "fifo.pth"):
        os.mkfifo(name)
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "names.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    done = {"format": "torch", "bytes": 1, "error": None, "checked_by": "nothing"}
    monkeypatch.setattr(export, "freeze", lambda *args: None)  # they take seconds
    monkeypatch.setattr(export, "export", lambda *args, **kwargs: done)
    monkeypatch.setattr("t2t_fast.cli.env.collect_env", lambda: {"torch": "2"})
    chance, codes = random.Random(0), set[int]()
    for _ in range(200):
        argv = arguments(chance)
        code, _, err = run(capsys, *argv)
        codes.add(code)
        assert code in (0, 1, 2), argv
        lines = err.splitlines()
        assert all(line.startswith("t2t-fast: ") for line in lines), (argv, err)
        assert code != 2 or lines, argv
        assert sum(line.startswith("t2t-fast: error: ") for line in lines) <= 1, (argv, err)
    assert codes == {0, 1, 2}


# The program


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, *command],
        text=True,
        env={**ENVIRONMENT, **environment},
        # Processes that a shell starts in the background ignore Ctrl-C, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **pipes,
    )


@pytest.fixture
def script(tmp_path: Path) -> str:
    """What installers write for the entry point."""
    path = tmp_path / "t2t-fast"
    path.write_text("import sys\nfrom t2t_fast.cli import main\nsys.exit(main())\n")
    return str(path)


def test_a_refused_variable_is_one_line(script: str) -> None:
    for command in (("-m", "t2t_fast", "list"), ("-mt2t_fast", "list"), (script, "list")):
        process = start(*command, T2T_FAST_BACKEND="garbage")
        out, err = process.communicate(timeout=60)
        accepted = "auto, reference, aten, triton, native"
        assert (process.returncode, out) == (2, "")
        assert re.fullmatch(f"t2t-fast: error: T2T_FAST_BACKEND='garbage' .*accepted: {accepted}\n", err)


def test_interrupts_while_importing(script: str, tmp_path: Path) -> None:
    begun, slow = tmp_path / "begun", tmp_path / "slow"
    slow.mkdir()
    (slow / "timm.py").write_text(f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(60)\n")
    path = os.pathsep.join(filter(None, (str(slow), ENVIRONMENT.get("PYTHONPATH"))))
    for command in (("-m", "t2t_fast", "list"), (script, "list")):
        process = start(*command, PYTHONPATH=path)
        while not begun.exists():
            assert process.poll() is None
            time.sleep(0.01)
        begun.unlink()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (130, "", "")


def test_a_full_output_of_the_program() -> None:
    """Python's own last attempt to write, when it exits, is silent, too."""
    command = f"exec {sys.executable} -m t2t_fast list > /dev/full"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (2, "t2t-fast: error: standard output: No space left on device\n")
