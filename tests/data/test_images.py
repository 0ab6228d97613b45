"""Images from folders, arrays, caches and downloads: what arrives, and what is said when something is wrong."""

import gzip
import hashlib
import http.server
import io
import logging
import os
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoint.data import ImageFiles, Images, check, folder, load, resize, sources, stratified
from counterpoint.errors import InputError


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """No test sees the data or the cache of the machine."""
    monkeypatch.delenv("COUNTERPOINT_DATA", raising=False)
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))


def picture(seed=0, width=12, height=12, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def photos(root, count=4, **kind):
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i, **kind).save(root / f"{i:02}.png")
    return root


# --- the types ---


def test_images_refuse_what_they_are_not():
    with pytest.raises(InputError, match="uint8"):
        Images(torch.zeros(2, 1, 4, 4))
    with pytest.raises(InputError, match="2 images but 3 labels"):
        Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


def test_subset_takes_everything_along():
    images = Images(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.arange(5, 9), paths=tuple("abcd"))
    for index in ([2, 0], np.array([2, 0]), torch.tensor([2, 0])):
        some = images.subset(index)
        assert some.image.flatten().tolist() == [2, 0] and some.label.tolist() == [7, 5] and some.paths == ("c", "a")
    assert images.subset(torch.tensor([True, False, False, True])).paths == ("a", "d")
    assert images.subset(slice(1, 3)).paths == ("b", "c")
    assert len(images.subset([])) == 0


def test_split_is_stratified_disjoint_and_fixed():
    label = torch.tensor([0] * 50 + [1] * 10 + [2])
    images = Images(torch.arange(61, dtype=torch.uint8).view(61, 1, 1, 1), label)
    train, test = images.split(0.2, seed=1)
    assert test.label.bincount().tolist() == [10, 2]
    both = torch.cat([train.image, test.image]).flatten()
    assert torch.equal(both.sort().values, images.image.flatten())
    assert torch.equal(images.split(0.2, seed=1)[1].image, test.image)
    assert not torch.equal(images.split(0.2, seed=2)[1].image, test.image)


def test_split_without_labels_and_of_too_little():
    train, test = Images(torch.zeros(10, 1, 2, 2, dtype=torch.uint8)).split()
    assert (len(train), len(test)) == (8, 2)
    with pytest.raises(InputError, match="too few"):
        Images(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)).split()
    with pytest.raises(InputError, match="between 0 and 1"):
        stratified(torch.zeros(4), 1.0)


def test_channels_follow_the_luma_that_pillow_uses():
    colour = torch.from_numpy(np.asarray(picture(3)).transpose(2, 0, 1).copy())[None]
    grey = Images(colour).channels(1)
    assert np.array_equal(grey.image[0, 0].numpy(), np.asarray(picture(3).convert("L")))
    back = grey.channels(3).image
    assert back.shape == (1, 3, 12, 12) and all(torch.equal(back[:, i], grey.image[:, 0]) for i in range(3))
    with pytest.raises(InputError):
        grey.channels(2)


# --- resizing ---


@pytest.mark.parametrize(("length", "size"), [(6, 3), (5, 2), (105, 32), (7, 7), (9, 1)])
def test_shrinking_takes_the_exact_mean_of_the_covered_area(length, size):
    image = torch.randint(0, 256, (2, 1, length, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # by brute force: every pixel becomes size x size equal parts, every output pixel averages length x length of them
    fine = image.double().repeat_interleave(size, 2).repeat_interleave(size, 3)
    exact = torch.nn.functional.avg_pool2d(fine, length)
    assert (resize(image, size) - exact).abs().max() <= 0.5 + 1e-3


def test_growing_is_linear_and_sides_may_differ():
    image = torch.tensor([[0, 100]], dtype=torch.uint8).view(1, 1, 1, 2)
    assert resize(image, 4)[0, 0, 0].tolist() == [0, 25, 75, 100]
    wide = torch.full((3, 3, 4, 9), 77, dtype=torch.uint8)
    assert (resize(wide, 6) == 77).all() and resize(wide, 6).shape == (3, 3, 6, 6)
    assert resize(wide[:0], 6).shape == (0, 3, 6, 6)


# --- folders ---


def test_class_folders_become_labels(tmp_path):
    photos(tmp_path / "photos" / "dog", 3)
    photos(tmp_path / "photos" / "cat" / "deeper", 2)
    (tmp_path / "photos" / "empty").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    images = load(tmp_path / "photos")
    assert images.classes == ("cat", "dog") and images.label.tolist() == [0, 0, 1, 1, 1]
    assert images.image.shape == (5, 3, 12, 12) and images.name == "photos"
    assert images.paths[0] == "cat/deeper/00.png"
    assert torch.equal(images.image[2], torch.from_numpy(np.asarray(picture(0)).transpose(2, 0, 1).copy()))


def test_flat_folder_has_no_labels(tmp_path):
    photos(tmp_path / "flat", 2)
    photos(tmp_path / "flat" / "more", 2)
    images = load(str(tmp_path / "flat"))
    assert len(images) == 4 and images.label is None and images.classes == ()


def test_parts_share_their_class_numbers(tmp_path):
    for part, classes in {"train": "abc", "val": "bc"}.items():
        for name in classes:
            photos(tmp_path / "set" / part / name, 2)
    train, test = load(tmp_path / "set"), load(tmp_path / "set", "test")
    assert train.classes == test.classes == ("a", "b", "c")
    assert test.label.tolist() == [1, 1, 2, 2] and test.name == "set/val"
    with pytest.raises(InputError, match="no other/"):
        load(tmp_path / "set", "other")


def test_folder_without_parts_is_all_train(tmp_path):
    photos(tmp_path / "set" / "train", 2)
    photos(tmp_path / "set" / "other", 2)
    assert load(tmp_path / "set").classes == ("other", "train")
    with pytest.raises(InputError, match="hold out"):
        load(tmp_path / "set", "test")


def test_bad_files_are_left_out_counted_and_named(tmp_path, caplog):
    root = photos(tmp_path / "photos", 5, width=64, height=64)
    whole = (root / "01.png").read_bytes()
    (root / "01.png").write_bytes(whole[: len(whole) // 2])
    (root / "bad.jpg").write_text("hello")
    (root / "zero.jpg").touch()
    (root / "._00.png").write_bytes(b"shadow file")
    with caplog.at_level(logging.WARNING):
        images = load(root)
    assert [record.getMessage() for record in caplog.records] == [
        "photos/: 3 of 7 files could not be read and were left out: "
        "01.png (truncated), bad.jpg (not an image), zero.jpg (empty file)"
    ]
    assert images.paths == ("00.png", "02.png", "03.png", "04.png") and len(images) == 4
    assert images.skipped == (("01.png", "truncated"), ("bad.jpg", "not an image"), ("zero.jpg", "empty file"))
    # the gap was closed with the right pictures
    for i, seed in enumerate((0, 2, 3, 4)):
        expected = np.asarray(picture(seed, 64, 64)).transpose(2, 0, 1)
        assert np.array_equal(images.image[i].numpy(), expected)


def test_many_bad_files_are_named_briefly(tmp_path, caplog):
    root = photos(tmp_path / "photos", 1)
    for i in range(1200):
        (root / f"x{i:04}.jpg").touch()
    with caplog.at_level(logging.WARNING):
        load(root)
    text = caplog.records[0].getMessage()
    assert text.startswith("photos/: 1,200 of 1,201 files") and text.endswith("x0004.jpg (empty file) and 1,195 more")


def test_nothing_to_load_is_said(tmp_path):
    with pytest.raises(InputError, match="holds no images"):
        load(tmp_path)
    (tmp_path / "a.jpg").write_text("x")
    with pytest.raises(InputError, match=r"none of the 1 image files in .* can be read: a.jpg \(not an image\)"):
        load(tmp_path)
    with pytest.raises(InputError, match="no folder or file"):
        load(tmp_path / "missing" / "photos")
    with pytest.raises(InputError, match="did you mean fashion-mnist"):
        load("fashon-mnist")
    with pytest.raises(InputError, match="single file"):
        load(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="size is 0"):
        load("omniglot", size=0)


def test_shorter_side_is_resized_and_the_centre_kept(tmp_path):
    # thirds of red, green, blue: the centre square of a 90 x 30 image is the green third
    stripes = np.zeros((30, 90, 3), np.uint8)
    for i in range(3):
        stripes[:, 30 * i : 30 * i + 30, i] = 200
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    image = load(tmp_path, size=10).image[0]
    assert image.shape == (3, 10, 10)
    # the outermost columns see across the border, as anti-aliasing should
    assert (image[1, :, 2:-2] == 200).all() and (image[[0, 2], :, 2:-2] == 0).all() and image[1].min() > 150
    # no size: nothing is resampled
    assert torch.equal(load(tmp_path).image[0, 1], torch.full((30, 30), 200, dtype=torch.uint8))


def test_shrinking_a_file_does_not_alias(tmp_path):
    board = np.indices((128, 128)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    image = load(tmp_path, size=16).image.float()
    assert image.shape[1] == 1 and (image - 127.5).abs().max() < 8


def test_orientation_of_the_camera_is_respected(tmp_path):
    upright = Image.fromarray(np.repeat(np.array([[255], [0]], np.uint8), 16, 0).repeat(32, 1))  # bright above dark
    exif = Image.Exif()
    exif[274] = 6  # shown rotated by 90 degrees clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    image = load(tmp_path, size=32).image[0, 0].float()
    assert image[:12].mean() > 250 and image[-12:].mean() < 5


def test_every_mode_becomes_eight_bit_colour(tmp_path):
    base = Image.fromarray(np.full((8, 8, 3), (200, 100, 50), np.uint8))
    base.save(tmp_path / "a_rgb.png")
    base.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "b_palette.png")
    clear = base.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "c_transparent.png")
    base.convert("CMYK").save(tmp_path / "d_cmyk.tif")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "e_sixteen.png")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "f_float.tif")
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "g_one_bit.png")
    images = load(tmp_path).image
    at = images[:, :, 4, 4].tolist()
    assert at[:2] == [[200, 100, 50]] * 2
    assert at[2] == [255, 255, 255]
    assert max(abs(a - b) for a, b in zip(at[3], (200, 100, 50), strict=True)) <= 2
    assert at[4] == [round(40000 / 257)] * 3 and at[5] == [128] * 3 and at[6] == [255] * 3


def test_grey_folders_keep_one_channel(tmp_path):
    photos(tmp_path / "grey", 2, mode="L")
    Image.fromarray(np.full((12, 12), 65535, np.uint16)).save(tmp_path / "grey" / "x.png")
    assert load(tmp_path / "grey").image.shape == (3, 1, 12, 12)


def test_different_sizes_get_a_common_one(tmp_path):
    picture(0, 30, 40).save(tmp_path / "a.png")
    picture(1, 50, 40).save(tmp_path / "b.png")
    assert load(tmp_path).image.shape == (2, 3, 224, 224)


def test_streamed_images_equal_resident_ones(tmp_path, monkeypatch):
    for name in ("x", "y"):
        photos(tmp_path / "set" / name, 4, width=20, height=16)
    resident, streamed = load(tmp_path / "set", size=8), load(tmp_path / "set", size=8, resident=False)
    assert isinstance(streamed, ImageFiles) and len(streamed) == 8 and streamed.classes == ("x", "y")
    for i in range(8):
        item = streamed[i]
        assert torch.equal(item["image"], resident.image[i])
        assert item["label"] == resident.label[i] and item["index"] == i
    assert [streamed.subset([6, 1])[i]["label"] for i in range(2)] == [1, 0]
    assert [len(part) for part in streamed.split(0.25)] == [6, 2]
    batch = next(iter(torch.utils.data.DataLoader(streamed, batch_size=3)))
    assert batch["image"].shape == (3, 3, 8, 8) and batch["label"].tolist() == [0, 0, 0]
    # too large for a quarter of the memory: streamed without being asked
    monkeypatch.setattr(folder, "physical_memory", lambda: 4 * 8 * 3 * 64 - 4)
    assert isinstance(load(tmp_path / "set", size=8), ImageFiles)
    assert isinstance(load(tmp_path / "set", size=8, resident=True), Images)
    monkeypatch.setattr(folder, "physical_memory", lambda: 4 * 8 * 3 * 64)
    assert isinstance(load(tmp_path / "set", size=8), Images)


def test_streaming_survives_a_truncated_file(tmp_path, caplog):
    root = photos(tmp_path / "set", 3, width=64, height=64)
    whole = (root / "01.png").read_bytes()
    (root / "01.png").write_bytes(whole[: len(whole) // 2])
    streamed = load(root, size=8, resident=False)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(streamed[1]["image"], streamed[2]["image"]) and streamed[1]["index"] == 2
    assert [record.getMessage() for record in caplog.records] == [
        "set: 01.png could not be read (truncated); another takes its place"
    ]


def test_limit_is_a_seeded_subset(tmp_path):
    root = photos(tmp_path / "set", 20)
    some = load(root, limit=5, seed=1)
    assert len(some) == 5 and some.paths == load(root, limit=5, seed=1).paths != load(root, limit=5, seed=2).paths
    assert set(some.paths) <= set(load(root, limit=9, seed=1).paths)
    with pytest.raises(InputError, match="limit is 0"):
        load(root, limit=0)


def test_identical_images_are_pointed_out(caplog):
    same = torch.full((120, 1, 4, 4), 9, dtype=torch.uint8)
    with caplog.at_level(logging.WARNING):
        load(same)
    assert "all 120 images are identical" in caplog.text
    caplog.clear()
    same[3, 0, 0, 0] = 8
    check(Images(same))
    assert caplog.text == ""


# --- arrays ---


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 9, 3), (5, 3, 8, 9), (5, 8, 9, 1), (5, 1, 8, 9)])
def test_layouts_are_told_apart(shape):
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images = load(values)
    channels = 3 if 3 in shape else 1
    assert images.image.shape == (5, channels, 8, shape[2] if shape[1] != channels else shape[3]) or shape == (5, 8, 8)
    last = values if shape[-1] in (1, 3) else (values[..., None] if len(shape) == 3 else values.transpose(0, 2, 3, 1))
    assert np.array_equal(images.image.numpy(), last.transpose(0, 3, 1, 2))
    assert torch.equal(load(torch.from_numpy(values)).image, images.image)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8, 8, 3), "single image"),
        ((3, 8, 8), "single image"),
        ((5, 3, 8, 3), "second or its last"),
        ((5, 2, 8, 8), "1 or 3 channels"),
        ((5, 8), "images are"),
        ((0, 8, 8), "no images"),
        ((2, 3, 4, 5, 6), "images are"),
    ],
)
def test_unclear_shapes_are_refused(shape, words):
    with pytest.raises(InputError, match=words):
        load(np.zeros(shape, np.uint8))


def test_values_are_brought_to_bytes_or_refused():
    ramp = np.linspace(0, 1, 2 * 16).reshape(2, 4, 4)
    assert np.array_equal(load(ramp).image.numpy().squeeze(), np.round(ramp.astype(np.float64) * 255).astype(np.uint8))
    assert load(ramp > 0.5).image.unique().tolist() == [0, 255]
    assert load((ramp * 255).astype(np.int32)).image.max() == 255
    assert load((ramp * 255).astype(">u2")).image.max() == 255
    for wrong, words in (
        (ramp * 255, r"floats from 0 to 255; use floats in \[0, 1\] or uint8"),
        (ramp - 0.5, "floats from -0.5"),
        ((ramp * 999).astype(np.int64), "integers from 0 to 999"),
        (ramp.astype(complex), "not numbers"),
    ):
        with pytest.raises(InputError, match=words):
            load(wrong)
    ramp[1, 2, 2] = np.nan
    with pytest.raises(InputError, match="1 of 2 images hold NaN"):
        load(ramp)


def test_array_files(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), np.uint8)
    np.save(tmp_path / "a.npy", x)
    assert load(tmp_path / "a.npy").label is None
    np.savez(tmp_path / "b.npz", X=x, y=np.array([[0], [1], [2], [0], [1], [2]]))
    images = load(tmp_path / "b.npz", size=4)
    assert images.label.tolist() == [0, 1, 2, 0, 1, 2] and images.classes == ("0", "1", "2") and images.name == "b"
    assert images.image.shape == (6, 3, 4, 4)
    # an array that is already smaller is left to the views
    assert load(tmp_path / "b.npz", size=10).image.shape == (6, 3, 5, 5)
    np.savez(tmp_path / "c.npz", image=x, label=np.array(list("zzyyxx")))
    images = load(tmp_path / "c.npz")
    assert images.classes == ("x", "y", "z") and images.label.tolist() == [2, 2, 1, 1, 0, 0]
    some = load(tmp_path / "c.npz", limit=3, seed=5)
    for image, label in zip(some.image, some.label, strict=True):
        assert (images.image[images.label == label] == image).flatten(1).all(1).any()
    with pytest.raises(InputError, match="no split 'test'"):
        load(tmp_path / "c.npz", "test")


def test_array_files_that_cannot_be_used(tmp_path):
    x = np.zeros((6, 5, 5), np.uint8)
    np.savez(tmp_path / "a.npz", image=x, label=np.arange(5))
    with pytest.raises(InputError, match=r"6 images but labels of shape \[5\]"):
        load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", other=x)
    with pytest.raises(InputError, match="holds other, but no array named image"):
        load(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", image=x, label=np.arange(6) + 0.5)
    with pytest.raises(InputError, match="whole numbers or names"):
        load(tmp_path / "c.npz")
    (tmp_path / "d.npz").write_text("not a zip")
    np.save(tmp_path / "e.npy", np.array([object()]), allow_pickle=True)
    for name in ("d.npz", "e.npy"):
        with pytest.raises(InputError, match="cannot be read as an array file"):
            load(tmp_path / name)


def test_images_pass_through(tmp_path):
    images = load(np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8))
    assert load(images) is images
    assert load(images, size=4, limit=3).image.shape == (3, 1, 4, 4)


# --- public sets and downloads ---


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(header + array.tobytes())


def made_mnist(root, part, count):
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(count)
    x, y = random.integers(0, 256, (count, 28, 28), np.uint8), (np.arange(count) % 10).astype(np.uint8)
    (root / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(x))
    (root / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(y))
    return x, y


def test_idx_sets_are_found_in_the_data_folder_first(tmp_path, monkeypatch):
    made_mnist(tmp_path / "cache" / "fashion_mnist", "train", 12)
    assert len(load("fashion-mnist")) == 12
    x, y = made_mnist(tmp_path / "data" / "fashion_mnist", "train", 30)
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path / "data"))
    images = load("fashion-mnist")
    assert np.array_equal(images.image[:, 0].numpy(), x) and np.array_equal(images.label.numpy(), y)
    assert images.name == "fashion-mnist/train" and images.classes[9] == "ankle boot"
    x, _ = made_mnist(tmp_path / "data" / "mnist", "t10k", 20)
    some = load("mnist", "test", limit=7, seed=4)
    at = torch.randperm(20, generator=torch.Generator().manual_seed(4))[:7].sort().values
    assert np.array_equal(some.image[:, 0].numpy(), x[at.numpy()])
    with pytest.raises(InputError, match="splits train and test"):
        load("mnist", "validation")


def test_a_cut_off_idx_file_is_named(tmp_path, monkeypatch):
    root = tmp_path / "data" / "mnist"
    made_mnist(root, "t10k", 20)
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path / "data"))
    path = root / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for broken in (whole[:-500], b"junk", gzip.compress(b"\0\0\x0d\x01"), b""):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte.gz cannot be read"):
            load("mnist", "test")


def test_cifar_from_jpeg_bytes_is_decoded_once(tmp_path, monkeypatch):
    root = tmp_path / "data" / "cifar10"
    root.mkdir(parents=True)
    jpegs = []
    for i in range(20):
        buffer = io.BytesIO()
        picture(i, 32, 32).save(buffer, "JPEG")
        jpegs.append(buffer.getvalue())
    offsets = np.cumsum([0] + [len(j) for j in jpegs])
    label = (np.arange(20) % 10).astype(np.uint8)
    np.savez(root / "train.npz", jpeg=np.frombuffer(b"".join(jpegs), np.uint8), offsets=offsets, labels=label)
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path / "data"))

    some = load("cifar10", limit=6, seed=2)
    assert not (tmp_path / "cache").exists()
    whole = load("cifar10")
    assert np.array_equal(whole.image[7].numpy(), np.asarray(Image.open(io.BytesIO(jpegs[7]))).transpose(2, 0, 1))
    assert whole.classes[3] == "cat" and whole.label.tolist() == label.tolist()
    assert len(os.listdir(tmp_path / "cache" / "decoded")) == 1

    monkeypatch.setattr(sources, "_decode", lambda jpegs: pytest.fail("decoded again"))
    assert torch.equal(load("cifar10").image, whole.image)
    assert torch.equal(load("cifar10", limit=6, seed=2).image, some.image)
    # another source file of the same name is not served from the old array
    os.utime(root / "train.npz", (1, 1))
    with pytest.raises(BaseException, match="decoded again"):
        load("cifar10")


def test_cifar_decodes_where_the_cache_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "file" / "cache"))
    sources._keep(sources.cache() / "decoded" / "x.npy", np.zeros(3))


def test_cifar_from_the_official_archive(tmp_path):
    root = tmp_path / "cache" / "cifar10"
    root.mkdir(parents=True)
    records = np.random.default_rng(0).integers(0, 10, (6, 4, 3073), np.uint8)
    with tarfile.open(root / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for i, name in enumerate([f"data_batch_{i}.bin" for i in (1, 2, 3, 4, 5)] + ["test_batch.bin"]):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = records[i].nbytes
            archive.addfile(info, io.BytesIO(records[i].tobytes()))
    train, test = load("cifar10"), load("cifar10", "test")
    assert train.image.shape == (20, 3, 32, 32) and test.image.shape == (4, 3, 32, 32)
    assert np.array_equal(train.image[5].numpy(), records[1, 1, 1:].reshape(3, 32, 32))
    assert train.label[5] == records[1, 1, 0] and test.label.tolist() == records[5, :, 0].tolist()


@pytest.fixture
def server():
    """A web server on this machine: /file answers with CONTENT, /short breaks off half-way, all else is 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in ("/file", "/short"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT if self.path == "/file" else CONTENT[: len(CONTENT) // 2])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


CONTENT = bytes(range(256)) * 8192
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_download_keeps_only_the_published_file(server, tmp_path):
    path = sources.resolve("made", f"{server}/file", DIGEST)
    assert path == tmp_path / "cache" / "made" / "file" and path.read_bytes() == CONTENT
    # now it is there, and no server is asked
    assert sources.resolve("made", "http://127.0.0.1:9/file", DIGEST) == path

    wrong = "0" * 64
    with pytest.raises(InputError, match=f"has SHA-256 {DIGEST} instead of {wrong}, so it was not kept"):
        sources.download(f"{server}/file", tmp_path / "other" / "file", wrong)
    with pytest.raises(InputError, match=r"ended at 1,048,576 of 2,097,152 bytes|could not be downloaded"):
        sources.download(f"{server}/short", tmp_path / "other" / "file", DIGEST)
    with pytest.raises(InputError, match="404"):
        sources.download(f"{server}/nothing", tmp_path / "other" / "file", DIGEST)
    assert os.listdir(tmp_path / "other") == []


def test_offline_says_where_to_put_the_file(tmp_path):
    with pytest.raises(InputError) as refused:
        sources.resolve("made", "http://127.0.0.1:9/file.gz", DIGEST)
    text = str(refused.value)
    assert "file.gz is not on this machine" in text and f"put it into {tmp_path}/cache/made" in text
    assert "COUNTERPOINT_DATA" in text and "\n" not in text


def test_an_unwritable_cache_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="set COUNTERPOINT_CACHE to another folder"):
        sources.download(f"{server}/file", tmp_path / "file" / "made" / "file", DIGEST)


def test_every_public_file_has_a_checksum_and_an_original_source():
    assert len(sources.SHA256) == 9
    for url, digest in sources.SHA256.items():
        assert url.startswith("http") and len(bytes.fromhex(digest)) == 32


def test_factors_travel_with_their_images():
    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 2, 2)
    images = Images(pixels, factors={"angle": torch.arange(6.0), "shape": torch.arange(6) % 2})
    some = images.subset(torch.tensor([4, 1])).to(torch.device("cpu")).channels(3)
    batch = some.take(torch.tensor([1]))
    assert batch["angle"].tolist() == [1.0] and batch["shape"].tolist() == [1]
    with pytest.raises(InputError, match="factor angle"):
        Images(pixels, factors={"angle": torch.arange(5.0)})
    with pytest.raises(InputError, match="factor label"):
        Images(pixels, factors={"label": torch.arange(6)})
