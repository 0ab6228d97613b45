"""WebDataset shards: what a pattern names, what is in an archive, and what is said when something is wrong."""

import http.server
import io
import json
import logging
import os
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoint.data import captions, shards
from counterpoint.encoders.text import byte_tokenizer
from counterpoint.errors import InputError
from counterpoint.train.batches import Batches


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.delenv("COUNTERPOINT_DATA", raising=False)
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))


def picture(number, kind="PNG", side=6):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def tar(path, content, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, value in content.items():
            info = tarfile.TarInfo(name)
            value = value.encode() if isinstance(value, str) else value
            info.size = len(value)
            archive.addfile(info, io.BytesIO(value))
    return path


def shard(path, numbers):
    return tar(
        path, {f"{i:04}.{kind}": value for i in numbers for kind, value in (("png", picture(i)), ("txt", f"n {i}"))}
    )


def numbers(pairs):
    """The number of every sample by its caption, having seen that its picture is the right one."""
    found = []
    for i in range(len(pairs)):
        number = int(pairs.of(i)[0].split()[1])
        image = pairs.images.image[i] if hasattr(pairs.images, "image") else pairs.images[i]["image"]
        right = np.asarray(Image.open(io.BytesIO(picture(number))))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), right)
        found.append(number)
    return found


# ------------------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("a.tar", ["a.tar"]),
        ("s/{000..002}.tar", ["s/000.tar", "s/001.tar", "s/002.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{0..2}", ["0", "1", "2"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{train,val}-{0..1}.tar", ["train-0.tar", "train-1.tar", "val-0.tar", "val-1.tar"]),
        ("{a,b{1..2}}", ["a", "b1", "a", "b2"]),
        ("{x}/{}.tar", ["{x}/{}.tar"]),
        ("{1..2", ["{1..2"]),
    ],
)
def test_braces(pattern, names):
    assert shards.braces(pattern) == names


@pytest.mark.parametrize("pattern", ["{0..99999999999}.tar", "{0..9999}{0..9999}.tar"])
def test_a_pattern_of_far_too_many_names_is_refused_at_once(pattern):
    with pytest.raises(InputError, match="too many files"):
        shards.braces(pattern)


def test_archives_by_every_way_to_name_them(tmp_path):
    paths = [shard(tmp_path / "s" / f"{i:03}.tar", [i]) for i in range(4)]
    for data in (
        tmp_path / "s" / "{000..003}.tar",
        str(tmp_path / "s" / "{000..003}.tar"),
        f"file://{tmp_path}/s/{{000..003}}.tar",
        str(tmp_path / "s" / "*.tar"),
        str(tmp_path / "s" / "00?.tar"),
        [str(path) for path in paths],
        (paths[0], str(tmp_path / "s" / "{001,002,003}.tar"), paths[0]),
    ):
        assert shards.are_shards(data) and shards.find_shards(data) == paths
    assert numbers(captions.load(str(tmp_path / "s" / "{002..001}.tar"))) == [2, 1]
    assert numbers(captions.load(tmp_path / "s")) == [0, 1, 2, 3]
    assert numbers(captions.load(paths[3])) == [3]
    for other in ("a.csv", ["a.jpg"], [("a.tar", "b.tar")], [], 3, None):
        assert not shards.are_shards(other)


def test_a_name_full_of_pattern_characters_is_the_file_of_that_name(tmp_path):
    path = shard(tmp_path / "a[1]{0..3}.tar", [5])
    assert shards.find_shards(str(path)) == [path]


def test_missing_archives_are_named(tmp_path):
    for i in (0, 1, 4):
        shard(tmp_path / f"{i:03}.tar", [i])
    with pytest.raises(InputError, match=r"2 of 5 archives are missing: there is no file .*/002.tar, .*/003.tar$"):
        captions.load(str(tmp_path / "{000..004}.tar"))
    with pytest.raises(InputError, match=r"997 of 1,000 .*/002.tar, .*/003.tar, .*/005.tar, .*007.tar and 992 more"):
        captions.load(str(tmp_path / "{000..999}.tar"))
    with pytest.raises(InputError, match=r"^there is no file .*/x.tar$"):
        captions.load(tmp_path / "x.tar")
    with pytest.raises(InputError, match=r"no file matches .*/x\*.tar"):
        captions.load(str(tmp_path / "x*.tar"))
    with pytest.raises(InputError, match="not s3://"):
        captions.load("s3://bucket/{000..001}.tar")


# ------------------------------------------------------------------------------------------------------------- members


def test_a_member_opens_as_its_own_file(tmp_path):
    first, second = os.urandom(20_000), os.urandom(777)
    index = shards.members(tar(tmp_path / "a.tar", {"a": first, "./b": second, "empty": b""}))
    assert set(index) == {"a", "b", "empty"}
    for name, content in (("a", first), ("b", second), ("empty", b"")):
        with shards.Member(*index[name]).open("rb") as file:
            assert file.read() == content
            assert file.seek(-5, os.SEEK_END) >= 0 and file.read(100) == content[-5:]
            file.seek(3)
            assert file.tell() == 3 and file.read(4) == content[3:7] and file.seek(2, os.SEEK_CUR) == file.tell()
            file.seek(10**6)
            assert file.read(1) == b""


def test_samples_are_members_with_one_key(tmp_path, caplog):
    path = tar(
        tmp_path / "a.tar",
        {
            "x/1.jpg": picture(1, "JPEG"), "x/1.json": json.dumps({"caption": "one", "width": 6}),
            "2.WEBP": picture(2, "WEBP"), "2.txt": "  two\n lines ", "2.json": '{"caption": "not this"}',
            "3.cls": "7", "3.json": '{"text": ["three", "3"]}', "3.jpeg": picture(3, "JPEG"), "3.seg.png": b"mask",
            "y/1.png": picture(4), "y/1.txt": "other folder",
            "bare.png": picture(5), "wordless.png": picture(6), "wordless.json": '{"width": 6}',
            "blind.txt": "nothing to see", "no_extension": b"", "meta.json": "[]",
        },
    )  # fmt: skip
    pairs = captions.load(path)
    assert [pairs.of(i) for i in range(len(pairs))] == [["one"], ["two lines"], ["three", "3"], ["other folder"]]
    assert pairs.images.paths == ("a.tar/x/1.jpg", "a.tar/2.WEBP", "a.tar/3.jpeg", "a.tar/y/1.png")
    assert pairs.skipped == (
        ("a.tar/bare.png", "no caption"),
        ("a.tar/blind", "a caption without an image"),
        ("a.tar/meta", "a caption without an image"),
        ("a.tar/wordless.png", "no caption"),
    )
    assert len(caplog.records) == 1 and "4 of 8 images were left out" in caplog.text


def test_broken_images_in_an_archive(tmp_path, caplog):
    content = {
        "1.png": picture(1),
        "1.txt": "n 1",
        "2.png": picture(2)[:60],
        "2.txt": "n 2",
        "3.png": b"",
        "3.txt": "n 3",
    }
    pairs = captions.load(tar(tmp_path / "a.tar", content))
    assert numbers(pairs) == [1]
    assert pairs.skipped == (("a.tar/2.png", "truncated"), ("a.tar/3.png", "empty file"))


def test_archives_of_one_name_are_told_apart(tmp_path):
    paths = [shard(tmp_path / part / "0.tar", [number]) for part, number in (("a", 3), ("b", 3), ("c", 7))]
    pairs = captions.load(paths)
    assert numbers(pairs) == [3, 3, 7] and len(set(pairs.images.paths)) == 3 and len(pairs.texts) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        ({"1.png": picture(1), "1.txt": b"fine\nna\xefve"}, r"line 2 of 1.txt in a.tar is not UTF-8 \(byte 0xef\)"),
        ({"1.png": picture(1), "1.json": "{"}, "1.json in a.tar is not JSON"),
        ({"1.png": picture(1)}, r"none of the 1 images can be used: a.tar/1.png \(no caption\)"),
        (
            {"1.npy": b"", "1.txt": "A"},
            "holds no samples: members that share a key, jpg, jpeg, png, webp with txt or json",
        ),
        ({}, "holds no samples"),
    ],
)
def test_archives_without_usable_samples(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        captions.load(tar(tmp_path / "a.tar", content))


def test_archives_that_cannot_be_read(tmp_path):
    whole = shard(tmp_path / "a.tar", range(3)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1700])
    (tmp_path / "text.tar").write_text("no archive" * 100)
    (tmp_path / "empty.tar").touch()
    tar(tmp_path / "b.tar.gz", {"1.txt": "A"}, "w:gz")
    for name in ("cut.tar", "text.tar", "empty.tar"):
        with pytest.raises(InputError, match=f"{name} cannot be read as a tar"):
            captions.load(tmp_path / name)
    with pytest.raises(InputError, match=r"b.tar.gz cannot be read as a tar .*compressed.*: decompress it"):
        captions.load(tmp_path / "b.tar.gz")
    with pytest.raises(InputError, match="has no split 'test'"):
        captions.load(tmp_path / "a.tar", "test")


def test_parts_of_a_folder_may_be_shards(tmp_path):
    for part, number in (("train", 1), ("val", 2)):
        shard(tmp_path / part / "0.tar", [number])
    assert numbers(captions.load(tmp_path)) == [1] and numbers(captions.load(tmp_path, "val")) == [2]


# ----------------------------------------------------------------------------------------------------- random access


def test_streamed_shards_do_not_depend_on_processes_and_resume_exactly(tmp_path):
    for i in range(3):
        shard(tmp_path / f"{i}.tar", range(7 * i, 7 * i + 7))
    pairs = captions.load(str(tmp_path / "{0..2}.tar"), resident=False)
    assert numbers(pairs) == list(range(21))
    assert sorted(numbers(pairs.split(0.3, seed=1)[0]) + numbers(pairs.split(0.3, seed=1)[1])) == list(range(21))
    items = pairs.tokenised(byte_tokenizer(), 8)
    runs = []
    for workers in (0, 1, 2):
        batches = Batches(items, 4, seed=5, workers=workers)
        runs.append(list(batches))
        assert len(runs[-1]) == 5
    for run in runs[1:]:
        assert all(torch.equal(one[name], other[name]) for one, other in zip(runs[0], run, strict=True) for name in one)
    again = Batches(items, 4, seed=5, workers=1)
    again.batch = 3
    rest = list(again)
    assert [b["index"].tolist() for b in rest] == [b["index"].tolist() for b in runs[0][3:]]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(rest, runs[0][3:], strict=True))


# ------------------------------------------------------------------------------------------------------------ download


@pytest.fixture
def server(tmp_path):
    """A web server over tmp_path/web that counts what it was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "web"))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_web_shards_are_fetched_once(tmp_path, server, caplog):
    caplog.set_level(logging.INFO)
    address, asked = server
    for i in range(2):
        shard(tmp_path / "web" / f"{i}.tar", [i])
        shard(tmp_path / "web" / "other" / f"{i}.tar", [i + 5])
    assert numbers(captions.load(address + "/{0..1}.tar")) == [0, 1]
    assert numbers(captions.load(address + "/{0..1}.tar")) == [0, 1]
    assert asked == ["/0.tar", "/1.tar"]
    # the same file name at another address is another file
    assert numbers(captions.load([address + "/other/0.tar?token=1", tmp_path / "web" / "1.tar"])) == [5, 1]
    with pytest.raises(InputError, match=r"9.tar is not on this machine and could not be downloaded \(HTTP Error 404"):
        captions.load(address + "/{0..9}.tar".replace("0..9", "9,0"))
    assert not [file for _, _, files in os.walk(tmp_path / "cache") for file in files if "partial" in file]
