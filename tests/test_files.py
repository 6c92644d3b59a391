"""Writing files: whole or not at all where they are regular, directly where they are devices, FIFOs or descriptors."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from small_models import small

import t2t_fast
from t2t_fast import CheckpointError, files, save_checkpoint
from t2t_fast.bench.common import result_path, write_json
from t2t_fast.deploy import export as export_module
from t2t_fast.usage import UsageError


@contextlib.contextmanager
def read_from(fifo: Path) -> Iterator[list[bytes]]:
    """What a reader of ``fifo`` has got, in the list after the context."""
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()), daemon=True)
    reader.start()
    yield got
    reader.join(10)
    assert not reader.is_alive()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Every write beyond ``size`` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Regular files


def test_new_files_honour_the_umask_and_old_ones_keep_their_permissions(tmp_path: Path) -> None:
    path = tmp_path / "x"
    before = os.umask(0o027)
    try:
        files.write_bytes(path, b"new")
        assert mode_of(path) == 0o640
        path.chmod(0o606)
        files.write_text(str(path), "é")
    finally:
        os.umask(before)
    assert (path.read_bytes(), mode_of(path)) == ("é".encode(), 0o606)
    assert os.listdir(tmp_path) == ["x"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link, outer, target = tmp_path / "link", tmp_path / "outer", tmp_path / "real" / "x"
    link.symlink_to("real/x")  # dangling, so far
    outer.symlink_to(link)
    for content in (b"one", b"two"):
        files.write_bytes(outer, content)
        assert target.read_bytes() == content
    with files.replacing(link) as temporary:
        temporary.write_bytes(b"three")
    assert target.read_bytes() == b"three"
    assert (os.readlink(link), os.readlink(outer), target.is_symlink()) == ("real/x", str(link), False)
    assert os.listdir(tmp_path / "real") == ["x"]


def test_the_longest_name_is_possible(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / ("x." + "y" * 253), b"data")
    assert [len(name) for name in os.listdir(tmp_path)] == [255]


def test_errors_name_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "astray").symlink_to("nowhere/x")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    for name, number in {
        "absent/x": errno.ENOENT,
        "astray": errno.ENOENT,
        "": errno.EISDIR,
        "new/": errno.EISDIR,
        "file/x": errno.ENOTDIR,
        "loop": errno.ELOOP,
        "y" * 256: errno.ENAMETOOLONG,
        "socket": errno.ENXIO,
    }.items():
        path = f"{tmp_path}/{name}"
        for write in (lambda path: files.write_bytes(path, b""), files.check_target):
            with pytest.raises(OSError) as raised:
                write(path)
            assert (raised.value.errno, raised.value.filename) == (number, path)
    with pytest.raises(FileNotFoundError, match="no file name"):
        files.write_bytes("", b"")
    with pytest.raises(ValueError, match=r"path='a\\x00b' contains a NUL"):
        files.check_target("a\0b")
    assert sorted(os.listdir(tmp_path)) == ["astray", "file", "loop", "socket"]


def test_a_full_disk_costs_neither_the_old_file_nor_leaves_another(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"old")
    weights = small("t2t_vit_c_14").state_dict()
    with largest_file(5000):
        with pytest.raises(OSError) as raised:
            files.write_bytes(path, bytes(6000))
        assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
        with pytest.raises(OSError) as raised, files.replacing(path) as temporary:
            temporary.write_bytes(bytes(6000))
        assert raised.value.filename == str(path)
        for suffix in (".pth", ".npz", ".safetensors"):
            with pytest.raises(OSError) as raised:
                save_checkpoint(weights, path.with_suffix(suffix))
            assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path.with_suffix(suffix)))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("w.pth", b"old")]


def test_missing_permissions_are_told_before_the_work() -> None:
    """A folder or an old file that only others may write to; as root, by somebody else's eyes."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        folder.chmod(0o777)
        (folder / "closed").mkdir(mode=0o555)
        (folder / "kept").write_bytes(b"old")
        (folder / "kept").chmod(0o444)
        if user == 0:
            os.seteuid(65534)
        try:
            for path in (folder / "closed" / "x", folder / "kept"):
                for write in (lambda path: files.write_bytes(path, b""), files.check_target):
                    with pytest.raises(PermissionError) as raised:
                        write(path)
                    assert raised.value.filename == str(path)
        finally:
            os.seteuid(user)
        assert (folder / "kept").read_bytes() == b"old"
        assert sorted(os.listdir(folder)) == ["closed", "kept"]


def test_what_is_raised_while_replacing_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        assert (temporary.suffix, temporary.parent) == (".pt2", tmp_path)
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError, match="elsewhere"), files.replacing(path):
        (tmp_path / "elsewhere").read_bytes()
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.pt2", b"old")]


# Everything else


def test_devices_stay_devices(tmp_path: Path) -> None:
    link = tmp_path / "full.pth"
    link.symlink_to("/dev/full")
    files.write_bytes("/dev/null", b"data")
    with files.replacing("/dev/null") as temporary:
        temporary.write_bytes(b"data")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError) as raised:
        files.write_bytes("/dev/full", b"data")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "/dev/full")
    with pytest.raises(OSError) as raised:
        save_checkpoint(small("t2t_vit_c_14").state_dict(), link)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(link))
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_checkpoints_go_through_fifos(tmp_path: Path) -> None:
    """Their formats seek, which a FIFO cannot."""
    weights = small("t2t_vit_c_14").state_dict()
    for suffix in (".pth", ".npz", ".safetensors"):
        fifo = tmp_path / f"w{suffix}"
        os.mkfifo(fifo)
        with read_from(fifo) as got:
            save_checkpoint(weights, fifo)
        if suffix == ".pth":
            found = torch.load(io.BytesIO(got[0]), weights_only=True)["state_dict"]
        elif suffix == ".npz":
            found = {name: torch.from_numpy(value) for name, value in np.load(io.BytesIO(got[0])).items()}
            assert found.pop("grid_size").tolist() == [2, 2]
        else:
            found = safetensors.torch.load(got[0])
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], value) for name, value in weights.items())
        assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_open_descriptors_are_written_to_where_they_stand(tmp_path: Path) -> None:
    """Opening /dev/fd/N anew would begin at the start of a file that the shell has opened, and truncate it."""
    path = tmp_path / "x"
    with open(path, "wb", buffering=0) as file:
        file.write(b"before ")
        files.write_bytes(f"/dev/fd/{file.fileno()}", b"data")
        with files.replacing(f"/proc/self/fd/{file.fileno()}") as temporary:
            temporary.write_bytes(b" more")
        file.write(b" after")
        number = file.fileno()
    assert path.read_bytes() == b"before data more after"
    with pytest.raises(OSError) as raised:
        files.check_target(f"/dev/fd/{number}")
    assert (raised.value.errno, raised.value.filename) == (errno.EBADF, f"/dev/fd/{number}")
    ours, theirs = socket.socketpair()
    with ours, theirs:  # which cannot be opened by name at all
        files.write_bytes(f"/dev/fd/{ours.fileno()}", b"data")
        assert theirs.recv(10) == b"data"


def test_standard_output_by_name(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    print("first")
    files.write_text("/dev/stdout", "second\n")
    assert capfd.readouterr().out == "first\nsecond\n"
    (tmp_path / "link").symlink_to("/dev/stdout")
    names = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", str(tmp_path / "link"))
    assert [files.open_descriptor(name) for name in (*names, "/dev/stderr")] == [1, 1, 1, 1, 2]
    assert not any(map(files.open_descriptor, ("/dev/null", "1", "", "/proc/self/fd", str(tmp_path))))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file") as raised:
            files.require_regular(path)
        assert raised.value.filename == str(path)
    for path in (tmp_path, tmp_path / "absent", Path(__file__)):
        files.require_regular(path)


# What writes by it


def test_export_to_a_fifo_and_to_a_full_device(tmp_path: Path) -> None:
    model, fifo, full = small("t2t_vit_c_14").eval(), tmp_path / "m.pt2", tmp_path / "full.pt2"
    os.mkfifo(fifo)
    full.symlink_to("/dev/full")
    with read_from(fifo) as got:
        assert t2t_fast.export(model, fifo)["bytes"] > 0
    images = torch.rand(2, 3, 32, 32)
    program = torch.export.load(io.BytesIO(got[0])).module()
    torch.testing.assert_close(program(images), model(images).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(OSError) as raised:
        t2t_fast.export(model, full)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(full))


def test_export_asks_for_the_target_before_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "freeze", lambda model: pytest.fail("computed"))
    with pytest.raises(FileNotFoundError) as raised:
        t2t_fast.export(small("t2t_vit_c_14"), tmp_path / "absent" / "m.pt2")
    assert raised.value.filename == str(tmp_path / "absent" / "m.pt2")
    with pytest.raises(ValueError, match=r"max_batch .*4 .*2147483647, got 1000000000000"):
        t2t_fast.export(small("t2t_vit_c_14"), tmp_path / "m.pt2", max_batch=10**12)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:ComplexHalf")
def test_tensors_that_a_format_cannot_hold(tmp_path: Path) -> None:
    value = torch.arange(8.0).reshape(2, 4)
    save_checkpoint({"w": value.to(torch.float8_e4m3fn)}, tmp_path / "w.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "w.npz")["w"], value.numpy())
    (tmp_path / "w.npz").unlink()
    quantised = torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
    for bad, word in ((value.to_sparse(), "sparse"), (value.to("meta"), "meta"), (quantised, "quantised")):
        for suffix in (".pth", ".npz", ".safetensors"):
            with pytest.raises(CheckpointError, match=rf"state_dict\['w'\] is .*{word}.*; accepted: dense"):
                save_checkpoint({"w": bad}, tmp_path / f"w{suffix}")
    for suffix in (".npz", ".safetensors"):
        with pytest.raises(CheckpointError, match=r"cannot hold these tensors \(torch.complex32\)"):
            save_checkpoint({"w": value.to(torch.complex32)}, tmp_path / f"w{suffix}")
    with pytest.raises(TypeError, match=r"state_dict\['w'\] must be a tensor, got float"):
        save_checkpoint({"w": 1.0}, tmp_path / "w.pth")  # type: ignore[dict-item]
    assert os.listdir(tmp_path) == []


def test_benchmarks_write_by_it(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "real.json").read_text() == '{\n "a": 1\n}\n'
    null = result_path(Path("/dev/null"), "cpu", {"torch": "2", "triton": None}, datetime(2026, 1, 1))
    write_json(null, {})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(UsageError, match=r"/dev/full could not be written \(No space left"):
        write_json(Path("/dev/full"), {})
