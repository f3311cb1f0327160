"""Files are whole or not there, damage is named, and one process at a time writes into a folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.files import (
    FileFaultError,
    locked,
    read_arrays,
    read_json,
    read_table,
    write_arrays,
    write_table,
    write_whole,
)


def test_random_bytes_in_a_page_of_parquet_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    table = pa.table({"ttft_s": np.random.default_rng(0).random(4000)})
    write_table(path, table)
    assert read_table(path).equals(table)
    content = bytearray(path.read_bytes())
    for place in (1000, 12_000, 20_000):
        damaged = content.copy()
        damaged[place : place + 4] = b"\x5a\xa5\x5a\xa5"
        path.write_bytes(damaged)
        with pytest.raises(FileFaultError, match=r"requests\.parquet: not readable as parquet"):
            read_table(path, ["ttft_s"])


def test_any_byte_of_parquet_that_is_not_as_written_is_refused_where_the_digest_is_known(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    table = pa.table({"ttft_s": np.arange(40.0)})
    write_table(path, table)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert read_table(path, sha256=digest).equals(table)
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(FileFaultError, match=r"requests\.parquet: damaged or edited"):
            read_table(path, sha256=digest)


def test_a_flipped_byte_of_stored_arrays_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agreement.npz"
    write_arrays(path, {"rank": np.random.default_rng(0).integers(0, 255, 4000, dtype=np.uint8)})
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFaultError, match=r"agreement\.npz: not readable as numpy arrays"):
        read_arrays(path, ["rank"])


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_broken_json_is_refused_by_the_name_of_its_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(content)
    with pytest.raises(FileFaultError, match=r"machine\.json: not readable as JSON") as refusal:
        read_json(path)
    assert "\n" not in str(refusal.value)


def test_a_file_in_place_of_a_folder_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match=r"cannot be written.*out/summary\.json"):
        write_whole(tmp_path / "out" / "summary.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from engine.files import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: write_whole(Path(sys.argv[1]), bytes(1000))\n"
        "except OSError as error: print(error.filename)\n"
    )
    path = tmp_path / "requests.parquet"
    said = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_the_folder_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = "import sys; from pathlib import Path; from engine.files import locked\n"
    holder += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FileFaultError, match="another process is writing into this folder"), locked(tmp_path):
            pass
        other.kill()
        other.wait()
    with locked(tmp_path):
        assert list(tmp_path.iterdir()) == []
