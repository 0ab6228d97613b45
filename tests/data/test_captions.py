"""Image-text pairs from everything that people have, and the batches made of them."""

import gzip
import io
import json
import logging
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from counterpoint.data import captions, sources
from counterpoint.data.captions import PairFiles, PairItems, Pairs, from_classes
from counterpoint.data.images import ImageFiles, Images
from counterpoint.encoders.text import byte_tokenizer
from counterpoint.errors import InputError
from counterpoint.train.batches import Batches

SAID = {"a.png": ["A dog.", "One dog runs."], "b.png": ["A cat."], "c.png": ["A dog.", "Grass.", "A long green field."]}


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """No test sees the data or the cache of the machine."""
    monkeypatch.delenv("COUNTERPOINT_DATA", raising=False)
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)


def save(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number)).save(path)


def photos(root, names=tuple(SAID)):
    for number, name in enumerate(names):
        save(root / name, number)
    return root


def rows(said=SAID):
    return [(image, line) for image, lines in said.items() for line in lines]


def csv(path, header, content):
    path.write_text("\n".join(",".join(f'"{cell}"' for cell in row) for row in [header, *content]) + "\n")
    return path


def said(pairs):
    return {path: pairs.of(i) for i, path in enumerate(pairs.images.paths)}


def is_picture(image, number):
    return np.array_equal(image.permute(1, 2, 0).numpy(), pixels(number))


# --------------------------------------------------------------------------------------------------------------- types


def made():
    """Four images; the second has one caption, the others share some."""
    image = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2).contiguous()
    numbers = torch.tensor([[0, 1, 2], [3, -1, -1], [0, 4, -1], [2, 2, -1]])
    return Pairs(Images(image, torch.tensor([0, 1, 0, 1])), ("a long one", "xx", "yyy", "zzzz", "v"), numbers)


def test_subset_keeps_only_its_captions_and_numbers_them_anew():
    some = made().subset([2, 1])
    assert some.texts == ("a long one", "zzzz", "v") and some.captions.tolist() == [[0, 2], [1, -1]]
    assert some.images.image[:, 0, 0, 0].tolist() == [2, 1] and some.label.tolist() == [0, 1]
    for index in (np.array([2, 1]), torch.tensor([2, 1])):
        assert made().subset(index).captions.tolist() == some.captions.tolist()
    assert made().subset(torch.tensor([False, True, False, False])).captions.tolist() == [[0]]
    whole = made().subset(slice(None))
    assert [whole.of(i) for i in range(4)] == [
        ["a long one", "xx", "yyy"],
        ["zzzz"],
        ["a long one", "v"],
        ["yyy", "yyy"],
    ]
    assert len(made().subset([])) == 0


def test_split_holds_out_images_of_every_class():
    n = 40
    label = torch.arange(n) % 2
    pairs = Pairs(
        Images(torch.arange(n, dtype=torch.uint8)[:, None, None, None], label),
        tuple(map(str, range(n))),
        torch.arange(n)[:, None],
    )
    train, test = pairs.split(0.25, seed=3)
    assert (len(train), len(test)) == (30, 10) and test.label.sum() == 5
    assert not set(train.texts) & set(test.texts)
    # every caption went with its image
    for part in (train, test):
        assert [int(part.of(i)[0]) for i in range(len(part))] == part.images.image.flatten().tolist()
    assert pairs.split(0.25, seed=3)[1].texts == test.texts != pairs.split(0.25, seed=4)[1].texts


@pytest.mark.parametrize(
    "numbers, message",
    [
        ([[0], [1]], r"captions must be int64 \[3, K\]"),
        ([[0], [-1], [0]], "each image needs a caption"),
        ([[-1, 0], [1, -1], [0, 0]], "each image needs a caption"),
        ([[0, -1, 1]] * 3, "-1 may only stand after the last one"),
        ([[0], [1], [2]], "caption 2 is asked for, but there are 2"),
    ],
)
def test_pairs_refuse_what_does_not_fit(numbers, message):
    with pytest.raises(InputError, match=message):
        Pairs(Images(torch.zeros(3, 1, 2, 2, dtype=torch.uint8)), ("a", "b"), torch.tensor(numbers))


def test_take_gives_every_caption_of_an_image_as_it_is_tokenised_alone(tokenizer):
    pairs = made()
    items = pairs.tokenised(tokenizer, 16)
    assert isinstance(items, PairItems) and len(items) == 4 and items.lengths is None
    state = torch.random.get_rng_state()
    batch = items.take(torch.tensor([2, 0, 1]))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert batch["image"][:, 0, 0, 0].tolist() == [2, 0, 1] and batch["index"].tolist() == [2, 0, 1]
    assert batch["label"].tolist() == [0, 0, 1] and batch["caption"].tolist() == [[0, 4, -1], [0, 1, 2], [3, -1, -1]]
    longest = max(len(tokenizer(text)["input_ids"]) for text in pairs.texts)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 3, longest)
    for b, row in enumerate(batch["caption"].tolist()):
        for k, number in enumerate(row):
            alone = tokenizer(pairs.texts[number])["input_ids"] if number >= 0 else []
            assert batch["attention_mask"][b, k].tolist() == [1] * len(alone) + [0] * (longest - len(alone))
            assert batch["input_ids"][b, k].tolist() == alone + [tokenizer.pad_token_id] * (longest - len(alone))
    # as long as the longest of this batch, and not longer because of a caption that fills up nothing
    short = items.take(torch.tensor([1]))["input_ids"]
    assert short.shape == (1, 3, len(tokenizer("zzzz")["input_ids"]))
    assert (
        items.nbytes > items.images.nbytes
        and items.take(torch.tensor([], dtype=torch.int64))["input_ids"].shape[0] == 0
    )


def test_items_keep_caption_numbers_in_a_subset_and_on_another_device(tokenizer):
    items = made().tokenised(tokenizer, 16)
    some = items.subset([3, 2]).to(torch.device("cpu"))
    whole, part = items.take(torch.tensor([3, 2])), some.take(torch.tensor([0, 1]))
    assert all(torch.equal(whole[name], part[name]) for name in whole if name != "index")


def test_long_captions_are_cut_and_said_once(tokenizer, caplog):
    caplog.set_level(logging.WARNING)
    image = Images(torch.zeros(2, 1, 2, 2, dtype=torch.uint8))
    pairs = Pairs(image, ("a" * 10_000, "b" * 50, "c"), torch.tensor([[0, 1], [2, 0]]))
    items = pairs.tokenised(tokenizer, 8)
    assert items.take(torch.arange(2))["input_ids"].shape == (2, 2, 8) and items.truncated == 2
    assert [record.getMessage() for record in caplog.records] == ["pairs: 2 of 3 sentences cut to 8 tokens"]


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_pairs_are_the_resident_ones_whatever_the_number_of_processes(tmp_path, tokenizer, workers):
    table = csv(photos(tmp_path) / "t.csv", ("image", "caption"), rows())
    resident, streamed = (captions.load(table, resident=kind).tokenised(tokenizer, 16) for kind in (True, False))
    assert isinstance(resident, PairItems) and isinstance(streamed, PairFiles) and not hasattr(streamed, "take")
    longest = int(resident.ids.lengths.max())
    for batch in Batches(streamed, 2, shuffle=False, workers=workers):
        other = resident.take(batch["index"])
        assert batch.keys() == other.keys() and batch["input_ids"].shape[1:] == (3, longest)
        length = other["input_ids"].shape[-1]
        for name, value in other.items():
            assert torch.equal(
                batch[name][..., :length] if name in ("input_ids", "attention_mask") else batch[name], value
            )
        assert not batch["attention_mask"][..., length:].any()
    some = streamed.subset([2, 0])
    assert torch.equal(some[0]["caption"], resident.captions[2]) and torch.equal(
        some[0]["image"], resident.images.image[2]
    )


def test_a_picture_that_breaks_later_is_replaced_together_with_its_captions(tmp_path, tokenizer, caplog):
    table = csv(photos(tmp_path) / "t.csv", ("image", "caption"), rows())
    items = captions.load(table, resident=False).tokenised(tokenizer, 16)
    (tmp_path / "b.png").write_bytes(b"")
    item = items[1]
    assert item["index"] == 2 and is_picture(item["image"], 2) and torch.equal(item["caption"], items.captions[2])
    assert "b.png could not be read (empty file)" in caplog.text


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "jsonl", "parquet", "txt", "frame", "columns", "list"])
def test_tables_of_every_kind(tmp_path, kind, monkeypatch):
    path, content = photos(tmp_path / "set") / f"list.{kind}", rows()
    data = path
    match kind:
        case "csv":
            csv(path, ("image", "caption"), content)
        case "csv.gz":
            path.write_bytes(
                gzip.compress(
                    csv(tmp_path / "plain", ("id", "path", "text"), [("1", *r) for r in content]).read_bytes()
                )
            )
        case "tsv":
            path.write_text("\n".join("\t".join(row) for row in [("Filename", "Title"), *content]))
        case "jsonl":
            lines = [{"file_name": name, "captions": lines} for name, lines in SAID.items()]
            path.write_text("\n".join(map(json.dumps, lines)))
        case "txt":
            path.write_text("\n".join(f"{name}#{i}\t{line}" for i, (name, line) in enumerate(content)))
        case "columns" | "frame" | "parquet":
            data = {"image_path": [row[0] for row in content], "description": [row[1] for row in content]}
            if kind != "columns":
                data = pytest.importorskip("pandas").DataFrame(data)
            if kind == "parquet":
                pytest.importorskip("pyarrow")
                data.to_parquet(path)
                data = path
        case "list":
            data = content
    monkeypatch.chdir(tmp_path / "set")
    pairs = captions.load(data)
    assert said(pairs) == SAID and pairs.skipped == ()
    # the same words are one text, so that a false negative can be seen
    assert len(pairs.texts) == 5 and pairs.captions.tolist() == [[0, 1, -1], [2, -1, -1], [0, 3, 4]]
    assert pairs.images.image.shape == (3, 3, 6, 6) and all(is_picture(pairs.images.image[i], i) for i in range(3))


def test_titles_in_a_text_file_and_columns_by_name(tmp_path):
    photos(tmp_path)
    (tmp_path / "captions.txt").write_text('image,caption\na.png,"One, two"\nb.png,Three\n')
    assert said(captions.load(tmp_path)) == {"a.png": ["One, two"], "b.png": ["Three"]}
    table = csv(tmp_path / "t.csv", ("thumbnail", "image", "title", "text"), [("x.png", "a.png", "no", "A dog.")])
    with pytest.raises(InputError, match="title and text could both hold captions"):
        captions.load(table)
    assert said(captions.load(table, columns=("image", "text"))) == {"a.png": ["A dog."]}
    with pytest.raises(InputError, match="no column texts; did you mean text"):
        captions.load(table, columns=("image", "texts"))
    with pytest.raises(InputError, match="columns names two"):
        captions.load(table, columns="text")


def test_images_lie_beside_the_table_in_images_or_in_an_archive(tmp_path):
    save(tmp_path / "a.png", 0)
    save(tmp_path / "images" / "b.png", 1)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        buffer = io.BytesIO()
        Image.fromarray(pixels(2)).save(buffer, "PNG")
        for name in ("./deep/c.png", "images/x/d.png", "one/e.png", "two/e.png"):
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            archive.addfile(info, io.BytesIO(buffer.getvalue()))
    save(tmp_path / "elsewhere" / "f.png", 5)
    names = ["a.png", "b.png", "c.png", "x/d.png", str(tmp_path / "elsewhere" / "f.png"), "./one/e.png"]
    table = csv(tmp_path / "t.csv", ("image", "caption"), [(name, name) for name in names])
    for resident in (True, False):
        pairs = captions.load(table, resident=resident)
        image = [pairs.images[i]["image"] for i in range(6)] if not resident else pairs.images.image
        assert pairs.texts == tuple(names)
        assert all(is_picture(image[i], number) for i, number in enumerate([0, 1, 2, 2, 5, 2]))
    # two files of that name: neither is meant
    with pytest.raises(InputError, match=r"none of the 1 images can be used: e\.png \(missing\)"):
        captions.load(csv(tmp_path / "u.csv", ("image", "caption"), [("e.png", "E")]))


def test_the_split_column(tmp_path):
    photos(tmp_path)
    content = [("a.png", "A", "train"), ("b.png", "B", "Val"), ("c.png", "C", "restval"), ("a.png", "AA", "train")]
    table = csv(tmp_path / "captions.csv", ("image", "caption", "split"), content)
    assert said(captions.load(table)) == {"a.png": ["A", "AA"]}
    for split in ("valid", "val", "test"):  # as everywhere, validation data stand in for a missing test part
        assert said(captions.load(tmp_path, split)) == {"b.png": ["B"]}
    assert said(captions.load(table, "restval")) == {"c.png": ["C"]}
    with pytest.raises(InputError, match="has the splits restval, train, val, not 'other'"):
        captions.load(table, "other")
    with pytest.raises(InputError, match=r"plain.csv has no split 'test'; load it whole and use \.split"):
        captions.load(csv(tmp_path / "plain.csv", ("image", "caption"), rows()), "test")


def test_bad_images_and_captions_are_left_out_counted_and_named_once(tmp_path, caplog):
    photos(tmp_path)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    bad = [("gone.png", "A"), ("broken.png", "B"), ("text.png", "C"), ("", "D"), ("b.png", " "), ("c.png", "")]
    said_of_b = {"a.png": SAID["a.png"], "c.png": SAID["c.png"]}
    table = csv(tmp_path / "t.csv", ("image", "caption"), [*bad, *rows(said_of_b)])
    with caplog.at_level(logging.WARNING):
        pairs = captions.load(table)
    assert {path: set(lines) for path, lines in said(pairs).items()} == {k: set(v) for k, v in said_of_b.items()}
    assert dict(pairs.skipped) == {
        "gone.png": "missing", "broken.png": "truncated", "text.png": "not an image", "row 4": "no image named",
        "b.png": "no caption",
    }  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == [
        "t.csv: 2 empty captions left out",
        "t.csv: 5 of 7 images were left out: b.png (no caption), broken.png (truncated), gone.png (missing), row 4 (no image "
        "named), text.png (not an image)",
    ]
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"image": [str(tmp_path / "a.png"), None, "x"], "caption": ["A", "B", None]})
    assert captions.load(frame).skipped == (("row 2", "no image named"), ("x", "no caption"))


def test_many_bad_images_are_named_briefly(tmp_path, caplog):
    save(tmp_path / "a.png", 0)
    names = ["a.png", *(f"{i:02}.png" for i in range(20))]
    captions.load(csv(tmp_path / "t.csv", ("image", "caption"), [(name, "A") for name in names]))
    assert len(caplog.records) == 1 and "20 of 21 images were left out" in caplog.text
    assert "04.png (missing) and 15 more" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [
        ("image,id\na.png,x\n", "t.csv has the columns image, id, and none is known to hold captions"),
        ("photo,caption\na.png,x\n", "t.csv has the columns photo, caption, and none is known to hold images"),
        ("url,caption\na.png,x\n", "none is known to hold images"),
        ("image,path,caption\na.png,a.png,x\n", "image and path could both hold images"),
        ("image,caption\na.png,17\na.png,3.5\n", "column caption of t.csv holds something that is no caption"),
        ("image,caption\n", "t.csv has no row"),
        ("", "has the columns none"),
        ("image,caption\na.png\n", "row 2 of t.csv has 1 cells"),
        (
            "image,caption\nx.png,X\ny.png,Y\n",
            r"none of the 2 images can be used: x.png \(missing\), y.png .*relative to",
        ),
        ("image,caption\na.png,\n", r"none of the 1 images can be used: a.png \(no caption\)"),
        ("image,caption\nhttps://host/a.png,x\n", "holds web addresses"),
        (f"image,caption\n{'long ' * 900},a.png\n", "none of the 1 images can be used: long long"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, content, message):
    photos(tmp_path)
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(InputError, match=message) as refused:
        captions.load(tmp_path / "t.csv")
    assert "\n" not in str(refused.value)


def test_lines_that_are_not_utf8_are_named(tmp_path):
    photos(tmp_path)
    (tmp_path / "t.csv").write_bytes(b"image,caption\na.png,fine\nb.png,na\xefve\n")
    with pytest.raises(InputError, match=r"line 3 of .*t.csv is not UTF-8 \(byte 0xef\)"):
        captions.load(tmp_path / "t.csv")
    (tmp_path / "t.csv").unlink()
    (tmp_path / "b.txt").write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(InputError, match=r"line 2 of .*b.txt is not UTF-8"):
        captions.load(tmp_path)


@pytest.mark.parametrize(
    "data, message",
    [
        (7, "not from int"),
        (np.zeros((3, 4)), "not from ndarray"),
        (Images(torch.zeros(2, 1, 2, 2, dtype=torch.uint8)), "not from Images; .*from_classes"),
        ([], "the list has no row"),
        ({}, "the table has the columns none"),
        ([("a.png", "A"), "b.png"], "item 1 of the list is 'b.png', not a pair"),
        ([("a.png", "A"), (3, "B")], r"item 1 of the list is \(3, 'B'\), not a pair"),
        ([("a.png", 3)], "column caption of the list holds something that is no caption"),
        ({"image": ["a.png"], "caption": "A dog"}, "column caption of the table is one string"),
        ({"image": ["a.png"], "caption": ["A", "B"]}, "columns of the table differ in length: image 1, caption 2"),
        ({"image": [b"a"], "caption": ["A"]}, "column image of the table holds bytes, not paths"),
        ("flickr8", "neither a file or folder nor one of .*did you mean flickr8k"),
        ("nothing.csv", "'nothing.csv' is neither a file"),
        ("a dog " * 900, "'a dog a dog .*is neither a file"),
        ("flickr8k", r"captions.csv.gz \(image, caption\) is not on this machine; put it into image_text/flickr8k_1k/"),
        ("flickr8k:other", "flickr8k has the splits train, valid and test, not 'other'"),
    ],
)
def test_what_is_no_set_of_pairs(data, message):
    with pytest.raises(InputError, match=message):
        captions.load(data)


def test_wrong_options(tmp_path):
    photos(tmp_path)
    for options, message in (({"size": 0}, "size is 0"), ({"channels": 4}, "not 4"), ({"limit": 0}, "limit is 0")):
        with pytest.raises(InputError, match=message):
            captions.load([(tmp_path / "a.png", "A")], **options)


def test_size_channels_limit_and_residence(tmp_path, monkeypatch):
    names = [f"{i}.png" for i in range(8)]
    table = csv(photos(tmp_path, names) / "t.csv", ("image", "caption"), [(name, f"of {name}") for name in names])
    pairs = captions.load(table, size=4, channels=1, limit=3, seed=1)
    assert pairs.images.image.shape == (3, 1, 4, 4) and len(pairs.texts) == 3
    assert all(lines == [f"of {path}"] for path, lines in said(pairs).items())
    assert said(captions.load(table, limit=3, seed=1)) == said(pairs) != said(captions.load(table, limit=3, seed=2))
    assert said(pairs).items() <= said(captions.load(table, limit=5, seed=1)).items()
    # what is there already keeps its captions
    again = captions.load(captions.load(table), size=4, channels=1, limit=3, seed=1)
    assert said(again) == said(pairs) and again.images.image.shape == (3, 1, 4, 4)
    files = captions.load(captions.load(table, resident=False), size=4, channels=1)
    assert isinstance(files.images, ImageFiles) and files.images[0]["image"].shape == (1, 4, 4)
    monkeypatch.setattr("counterpoint.data.folder.physical_memory", lambda: 4 * 8 * 3 * 6 * 6)
    assert isinstance(captions.load(table).images, Images)
    monkeypatch.setattr("counterpoint.data.folder.physical_memory", lambda: 4 * 8 * 3 * 6 * 6 - 4)
    assert isinstance(captions.load(table).images, ImageFiles)


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_with_a_text_beside_each_image(tmp_path, caplog):
    for name, lines in SAID.items():
        save(tmp_path / "part" / name, list(SAID).index(name))
        (tmp_path / "part" / name).with_suffix(".txt").write_text("\n".join(["", *lines, "", ""]))
    (tmp_path / "README.txt").write_text("about")
    assert said(captions.load(tmp_path)) == {f"part/{name}": lines for name, lines in SAID.items()}
    assert caplog.text == ""
    save(tmp_path / "bare.png", 0)
    save(tmp_path / "blank.png", 0)
    (tmp_path / "blank.txt").write_text(" \n\n")
    pairs = captions.load(tmp_path)
    assert len(pairs) == 3 and pairs.skipped == (("bare.png", "no caption"), ("blank.png", "no caption"))
    assert len(caplog.records) == 1 and "2 of 5 images were left out: bare.png (no caption)" in caplog.text


def test_a_folder_with_parts(tmp_path):
    for part, number in (("train", 0), ("valid", 1), ("test", 2)):
        csv(
            photos(tmp_path / part, [f"{number}.png"]) / "captions.csv", ("image", "caption"), [(f"{number}.png", part)]
        )
    for split in ("train", "valid", "test"):
        pairs = captions.load(tmp_path, split)
        assert pairs.texts == (split,) and pairs.name == f"{tmp_path.name}/{split}/captions.csv"
    for path in tmp_path.glob("*/captions.csv"):
        path.unlink()
    (tmp_path / "test" / "2.txt").write_text("one\ntwo")
    assert captions.load(tmp_path, "test").of(0) == ["one", "two"]
    with pytest.raises(InputError, match="holds no captions"):
        captions.load(tmp_path)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match=r"holds no captions: no captions.csv"):
        captions.load(photos(tmp_path))
    with pytest.raises(InputError, match="has no train/ and test/"):
        captions.load(tmp_path, "test")
    for name in ("captions.csv", "captions.txt"):
        (tmp_path / name).write_text("image,caption\na.png,A\n")
    with pytest.raises(InputError, match=r"holds captions.csv and captions.txt: name the file"):
        captions.load(tmp_path)
    assert said(captions.load(tmp_path / "captions.txt")) == {"a.png": ["A"]}
    (tmp_path / "captions.txt").write_text("a.png\tA\n\nno separator\n")
    with pytest.raises(InputError, match=r"line 3 of captions.txt is 'no separator', not image, tab or comma, caption"):
        captions.load(tmp_path / "captions.txt")
    with pytest.raises(InputError, match="no kind of file we read"):
        captions.load(tmp_path / "a.png")


# ---------------------------------------------------------------------------------------------------------- known sets


def test_captions_from_class_names():
    label = torch.tensor([1, 0, 2, 1])
    labelled = Images(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), label, ("polar_bear", "T-shirt/top", "owl", "unseen"))
    pairs = from_classes(labelled, ["{a}", "one {} here"])
    assert [pairs.of(i) for i in range(4)] == [
        ["a T-shirt or top", "one T-shirt or top here"],
        ["a polar bear", "one polar bear here"],
        ["an owl", "one owl here"],
        ["a T-shirt or top", "one T-shirt or top here"],
    ]
    assert torch.equal(pairs.captions[0], pairs.captions[3]) and len(pairs.texts) == 6
    assert torch.equal(pairs.label, label) and pairs.classes == labelled.classes
    assert from_classes(labelled, "{}").captions.shape == (4, 1)
    for templates, message in (([], "empty list"), (["{}", "a photo"], "'a photo' does not name the class")):
        with pytest.raises(InputError, match=message):
            from_classes(labelled, templates)
    with pytest.raises(InputError, match="no labels with names"):
        from_classes(Images(labelled.image))


def test_fashion_mnist_captions(tmp_path, monkeypatch, tokenizer):
    root = tmp_path / "data" / "fashion_mnist"
    root.mkdir(parents=True)
    for part, n in (("train", 30), ("t10k", 20)):
        image = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        header = b"\0\0\x08\x03" + np.array([n, 28, 28], ">i4").tobytes()
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + image.tobytes()))
        label = (np.arange(n) % 10).astype(np.uint8)
        header = b"\0\0\x08\x01" + np.array([n], ">i4").tobytes()
        (root / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + label.tobytes()))
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path / "data"))
    train, test = captions.load("fashion-mnist-captions"), captions.load("fashion-mnist-captions:test", channels=1)
    assert train.images.image.shape == (30, 3, 28, 28) and test.images.image.shape == (20, 1, 28, 28)
    assert train.name == "fashion-mnist-captions/train" and train.texts == test.texts
    assert len(train.texts) == 10 * len(captions.TEMPLATES) == 10 * train.captions.shape[1]
    for i in range(10):
        assert all(sources.FASHION_CLASSES[i].replace("/", " or ") in text for text in train.of(i))
    batch = captions.load("fashion-mnist-captions", limit=5).tokenised(tokenizer, 16).take(torch.arange(5))
    assert batch["label"].shape == (5,) and batch["input_ids"].ndim == 3


def test_flickr8k_is_read_from_its_archive_in_our_three_parts(tmp_path, monkeypatch):
    root = tmp_path / "data" / "image_text" / "flickr8k_1k"
    root.mkdir(parents=True)
    lines = ["image,caption"]
    with tarfile.open(root / "images.tar", "w") as archive:
        for i in range(240):
            buffer = io.BytesIO()
            Image.new("RGB", (9, 6), (i, 0, 0)).save(buffer, "PNG")
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(buffer.getvalue())
            archive.addfile(info, io.BytesIO(buffer.getvalue()))
            lines += [f"{i}.png,caption {k} of {i}" for k in range(5)]
    (root / "captions.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path / "data"))
    parts = {split: captions.load("flickr8k", split) for split in ("train", "valid", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 40, "valid": 100, "test": 100}
    seen = [path for part in parts.values() for path in part.images.paths]
    assert len(seen) == len(set(seen)) == 240
    for part in parts.values():
        assert part.captions.shape[1] == 5
        for i in range(len(part)):
            number = int(part.images.image[i, 0, 0, 0])
            assert part.of(i) == [f"caption {k} of {number}" for k in range(5)]
    assert captions.load("flickr8k:val").images.paths == parts["valid"].images.paths
    assert len(captions.load("flickr8k", limit=7)) == 7


def test_default_collation_of_streamed_pairs(tmp_path, tokenizer):
    items = captions.load(csv(photos(tmp_path) / "t.csv", ("image", "caption"), rows()), resident=False)
    batch = next(iter(DataLoader(items.tokenised(tokenizer, 16), batch_size=3)))
    assert {name: value.dtype for name, value in batch.items()} == {
        "image": torch.uint8, "index": torch.int64, "input_ids": torch.int64, "attention_mask": torch.int64,
        "caption": torch.int64,
    }  # fmt: skip
