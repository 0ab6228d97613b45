"""The obvious input to `fit` and `encode`, and the scikit-learn transformer."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

import counterpoint as cp
from counterpoint.data import Images, load
from counterpoint.errors import InputError
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.methods.recommendation.sasrec import SASRec

QUICK = {"encoder": "convnet-4", "projection": (8, 4), "epochs": 1, "batch_size": 8}
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
SENTENCES = [f"{who} {does}" for who in ("a man", "the cat", "rain", "she") for does in ("eats", "sleeps", "falls")]
HISTORIES = [[*map(int, np.random.default_rng(user).permutation(8)[: 4 + user % 4])] for user in range(12)]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path / "nothing"))
    return tmp_path


def files() -> list[str]:
    """The pixels as files whose alphabetical order is theirs."""
    Path("photos").mkdir(exist_ok=True)
    names = [f"photos/{i:02}.png" for i in range(len(PIXELS))]
    for name, pixels in zip(names, PIXELS, strict=True):
        Image.fromarray(pixels).save(name)
    return names


def saved(name, write):
    write(name)
    return name


def events() -> pd.DataFrame:
    rows = [(f"u{user:02}", item, when) for user, line in enumerate(HISTORIES) for when, item in enumerate(line)]
    return pd.DataFrame(rows, columns=["user", "item", "timestamp"]).sample(frac=1, random_state=0)


IMAGES = {
    "uint8 array": lambda: PIXELS,
    "float array": lambda: PIXELS / 255,
    "float32 tensor, channels first": lambda: torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255,
    "uint8 tensor": lambda: torch.from_numpy(PIXELS),
    "array file": lambda: saved("x.npy", lambda name: np.save(name, PIXELS)),
    "folder": lambda: Path(files()[0]).parent,
    "folder by name": lambda: str(Path(files()[0]).parent),
    "list of paths": lambda: files(),
    "list of Path": lambda: [Path(name) for name in files()],
    "array of paths": lambda: np.array(files()),
    "Series of paths": lambda: pd.Series(files(), index=range(5, 17)),
    "list of PIL images": lambda: [Image.fromarray(pixels) for pixels in PIXELS],
    "tuple of arrays": lambda: tuple(PIXELS),
    "list of tensors": lambda: list(torch.from_numpy(PIXELS)),
    "DataFrame with paths": lambda: pd.DataFrame({"id": range(12), "path": files(), "label": ["a", "b"] * 6}),
    "DataFrame with images": lambda: pd.DataFrame({"Image": [Image.fromarray(pixels) for pixels in PIXELS]}),
    "DataFrame with arrays": lambda: pd.DataFrame({"image": list(PIXELS)}),
    "mapping": lambda: {"image": PIXELS},
    "Images": lambda: load(PIXELS),
}
TEXTS = {
    "list": lambda: SENTENCES,
    "tuple": lambda: tuple(SENTENCES),
    "array": lambda: np.array(SENTENCES),
    "array of objects": lambda: np.array(SENTENCES, dtype=object),
    "Series": lambda: pd.Series(SENTENCES, index=range(5, 17)),
    "file": lambda: saved("s.txt", lambda name: Path(name).write_text("\n".join(SENTENCES))),
    "table file": lambda: saved("s.csv", lambda name: pd.DataFrame({"n": 1, "text": SENTENCES}).to_csv(name)),
    "DataFrame": lambda: pd.DataFrame({"id": range(12), "sentence": SENTENCES}),
    "mapping": lambda: {"text": SENTENCES},
}
USERS = {
    "lists": lambda: HISTORIES,
    "tuples of arrays": lambda: tuple(np.array(line) for line in HISTORIES),
    "Series of lists": lambda: pd.Series(HISTORIES),
    "array of lists": lambda: np.array([np.array(line) for line in HISTORIES], dtype=object),
    "mapping": lambda: {f"u{user:02}": line for user, line in enumerate(HISTORIES)},
    "DataFrame": events,
    "file": lambda: saved("h.csv", lambda name: events().to_csv(name, index=False)),
}


# ---- fit and encode --------------------------------------------------------------------------------------------------


def same_as_plain(method, plain, given):
    """`given` trains, and embeds as the plain form of the same data does."""
    run = cp.fit(method, given, epochs=1, batch_size=8, progress=False, run="run")
    vectors = method.encode(given)
    assert vectors.dtype == np.float32 and len(vectors) == 12
    np.testing.assert_allclose(vectors, method.encode(plain), atol=1e-6)
    np.testing.assert_allclose(run.encode(given), vectors, atol=1e-6)


@pytest.mark.parametrize("form", IMAGES)
def test_images_of_every_form(form):
    # files are brought to twice the size of the views: here to the side that they have, as arrays keep theirs
    same_as_plain(cp.SimCLR("convnet-4", image_size=8, projection=(8, 4)), PIXELS, IMAGES[form]())


@pytest.mark.parametrize("form", TEXTS)
def test_sentences_of_every_form(form):
    same_as_plain(SimCSE("transformer-32-1", max_length=16), SENTENCES, TEXTS[form]())


@pytest.mark.parametrize("form", USERS)
def test_histories_of_every_form(form):
    same_as_plain(SASRec(dim=8, hidden=16, max_length=5), HISTORIES, USERS[form]())


def test_a_table_brings_its_labels():
    table = pd.DataFrame({"image_path": files(), "class": ["b", "a", "c"] * 4})
    images = load(table, limit=5, seed=1)
    assert images.classes == ("a", "b", "c") and images.paths == load(table.image_path, limit=5, seed=1).paths
    assert [images.classes[i] for i in images.label] == [["b", "a", "c"][int(path[-6:-4]) % 3] for path in images.paths]
    pictures = load(pd.DataFrame({"image": [Image.fromarray(x) for x in PIXELS], "label": range(12)}), limit=5, seed=1)
    assert torch.equal(pictures.label, load({"image": PIXELS, "label": range(12)}, limit=5, seed=1).label)
    assert torch.equal(pictures.image, images.image)


def test_unreadable_files_of_a_list_are_left_out_and_named(caplog):
    names = files()
    Path(names[3]).write_bytes(b"nothing")
    table = pd.DataFrame({"path": [*names, "absent.jpg"], "label": range(13)})
    images = load(table)
    assert [record.getMessage() for record in caplog.records] == [
        "the table: 2 of 13 files could not be read and were left out: absent.jpg (missing), photos/03.png (not an image)"
    ]
    assert images.label.tolist() == [0, 1, 2, *range(4, 12)]
    streamed = load(table, resident=False)
    assert torch.equal(streamed[3]["image"], images.image[3]) and streamed[3]["label"] == 4


def test_pictures_of_several_sizes_and_modes_become_alike(caplog):
    pictures = [Image.new(mode, size, 255) for mode, size in (("L", (8, 20)), ("RGBA", (30, 9)), ("I;16", (7, 7)))]
    assert load(pictures, size=6).image.shape == (3, 3, 6, 6) and load(pictures).image.shape == (3, 3, 224, 224)
    assert load(pictures[::2], size=6).image.shape == (2, 1, 6, 6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the list holds no images"),
        (["a.png", None], "item 1 of the list is of type NoneType, not a path, as the first is"),
        ([1, 2], "item 0 of the list is of type int, not a path, a PIL image, an array or a tensor"),
        ([PIXELS[0], PIXELS[0, :8]], r"item 1 of the list is uint8 \[8, 16, 3\], but the first is uint8 \[16, 16, 3\]"),
        (["absent.png"], r"none of the 1 image files of the list can be read: absent.png \(missing\)"),
        (pd.DataFrame({"a": [1], "b": [2]}), "no column of images, but a, b; name it image or path"),
        ({"image": PIXELS, "label": [1]}, "12 images but labels of shape|12 images but 1 labels"),
        (object(), "not from object"),
        (3, "not from int"),
    ],
)
def test_what_holds_no_images(data, message):
    with pytest.raises(InputError, match=message):
        load(data)
    with pytest.raises(InputError, match="no split"):
        load(data, "test")


# ---- the transformer -------------------------------------------------------------------------------------------------


def test_it_trains_as_fit_does(place):
    embedder = cp.Embedder("simclr", random_state=3, **QUICK)
    vectors = embedder.fit_transform(PIXELS)
    assert vectors.shape == (12, 32) and vectors.dtype == np.float32
    assert embedder.run_ is None and not list(place.iterdir())  # nothing is left lying about
    torch.manual_seed(3)
    method = cp.SimCLR("convnet-4", image_size=16, projection=(8, 4))
    cp.fit(method, PIXELS, epochs=1, batch_size=8, seed=3, progress=False, run="run")
    assert np.array_equal(vectors, method.encode(PIXELS))
    assert (
        embedder.method_.image_size == 16
        and cp.Embedder("simclr", image_size=8, **QUICK).fit(PIXELS).method_.image_size == 8
    )


def test_the_random_state_is_the_seed():
    def vectors(state):
        return cp.Embedder("simclr", random_state=state, **QUICK).fit_transform(PIXELS)

    assert np.array_equal(vectors(1), vectors(np.int64(1))) and not np.array_equal(vectors(1), vectors(2))
    first = vectors(np.random.RandomState(0))
    assert np.array_equal(first, vectors(np.random.RandomState(0)))
    np.random.seed(0)
    assert np.array_equal(first, vectors(None)) and not np.array_equal(first, vectors(None))
    with pytest.raises(InputError, match="its random_state"):
        cp.Embedder("simclr", seed=1).fit(PIXELS)


def test_parameters_clones_and_words():
    embedder = cp.Embedder("moco", temperature=0.3, **QUICK)
    assert embedder.get_params() == {
        "method": "moco", "run": None, "folder": None, "random_state": 0, "temperature": 0.3, **QUICK,
    }  # fmt: skip
    copy = clone(embedder)
    assert copy.get_params() == embedder.get_params() and copy is not embedder
    assert copy.set_params(temperature=0.4, method="simclr", queue=8) is copy
    assert copy.get_params()["temperature"] == 0.4 and embedder.get_params()["temperature"] == 0.3
    assert "queue" not in embedder.get_params() and copy.method == "simclr"
    assert "temperature=0.3" in repr(embedder) and "Embedder" in embedder._repr_html_()
    with pytest.raises(InputError, match='neither SimCLR nor fit has an option "queue"'):
        copy.fit(PIXELS)
    with pytest.raises(InputError, match='no method or recipe named "simlcr"; did you mean simclr'):
        cp.Embedder("simlcr").fit(PIXELS)


def test_in_a_pipeline_on_images():
    """Bright and dark pictures: any encoder tells them apart."""
    dark = np.arange(40) % 2
    images = (np.random.default_rng(0).random((40, 16, 16)) * np.where(dark, 0.4, 1)[:, None, None]).astype(np.float32)
    pipeline = make_pipeline(cp.Embedder("simclr", **QUICK), LogisticRegression())
    assert pipeline.fit(images[:30], dark[:30]).score(images[30:], dark[30:]) == 1
    assert cross_val_score(pipeline, images, dark, cv=2).mean() == 1
    again = pickle.loads(pickle.dumps(pipeline))
    assert np.array_equal(again.predict_proba(images), pipeline.predict_proba(images))
    assert pipeline[:-1].get_feature_names_out()[:2].tolist() == ["embedder0", "embedder1"]
    frame = pipeline[0].set_output(transform="pandas").transform(images)
    assert frame.shape == (40, 32) and frame.columns[3] == "embedder3"


def test_in_a_pipeline_on_sentences_and_in_a_search():
    long = ["a man eats", "rain falls", "she sleeps"] * 6
    texts = [sentence * (1 + 5 * (i % 2)) + str(i) for i, sentence in enumerate(long)]
    label = [i % 2 for i in range(18)]
    options = {"encoder": "transformer-32-1", "max_length": 64, "epochs": 1, "batch_size": 8}
    pipeline = make_pipeline(cp.Embedder("simcse", **options), LogisticRegression(C=100, max_iter=1000))
    assert pipeline.fit(texts, label).score(texts, label) > 0.9
    search = GridSearchCV(pipeline, {"embedder__temperature": [0.05, 0.5], "embedder__dropout": [0.1]}, cv=2)
    search.fit(texts, label)
    assert search.best_estimator_[0].method_.temperature == search.best_params_["embedder__temperature"]
    assert search.best_estimator_[0].get_params()["dropout"] == 0.1
    assert len(search.predict(texts)) == 18


def test_histories_are_rows_where_they_are_lists():
    embedder = cp.Embedder("sasrec", dim=8, hidden=16, epochs=1, batch_size=8).fit(HISTORIES)
    assert embedder.transform(HISTORIES[:3]).shape == (3, 8)
    assert embedder.transform(events()).shape == (12, 8)
    with pytest.raises(InputError, match="1 of 2 items cannot be embedded"):
        embedder.transform([HISTORIES[0], []])


def test_rows_never_shift():
    names = files()
    embedder = cp.Embedder("simclr", **QUICK).fit(names)
    assert embedder.transform(names[:1]).shape == (1, 32)
    Path(names[3]).write_bytes(b"nothing")
    with pytest.raises(InputError, match="1 of 12 items cannot be embedded"):
        embedder.transform(names)


def test_a_finished_run_is_ready_at_once(place):
    first = cp.Embedder("simclr", folder="kept", **QUICK).fit(PIXELS)
    assert first.run_.folder == Path("kept/simclr-1") and (place / "kept/simclr-1/metrics.jsonl").exists()
    assert cp.Embedder("simclr", folder="kept", **QUICK).fit(PIXELS).run_.folder == Path("kept/simclr-2")
    vectors = first.transform(PIXELS)
    for run in ("kept/simclr-1", first.run_.folder):
        ready = clone(cp.Embedder(run=run))
        assert np.array_equal(ready.transform(PIXELS), vectors)
        assert np.array_equal(ready.fit(PIXELS[:3]).transform(PIXELS), vectors)
        assert ready.run_.folder == first.run_.folder
    with pytest.raises(InputError, match="takes no options, but there is epochs"):
        cp.Embedder(run="kept/simclr-1", epochs=3).fit(PIXELS)
    with pytest.raises(InputError, match="absent is no run folder"):
        cp.Embedder(run="absent").transform(PIXELS)


def test_an_encoder_can_stay_as_it_comes(place):
    torch.manual_seed(0)
    plain = SimCSE("transformer-32-1")
    plain.encoder.model.save_pretrained("encoder")
    plain.encoder.tokenizer.save_pretrained("encoder")
    embedder = cp.Embedder("simcse", encoder="transformer-32-1", epochs=0).fit(SENTENCES)
    assert np.array_equal(embedder.transform(SENTENCES), plain.eval().encode(SENTENCES)) and embedder.run_ is None
    assert cp.Embedder("sasrec", dim=8, epochs=0).fit(HISTORIES).transform(HISTORIES).shape == (12, 8)


def test_transform_before_fit_is_sklearns_error():
    with pytest.raises(NotFittedError, match="not fitted yet"):
        cp.Embedder("simclr").transform(PIXELS)


def test_flat_rows_are_refused_with_the_shapes_that_fit():
    with pytest.raises(InputError, match=r"\[12, 768\]; images are \[N, H, W\]"):
        cp.Embedder("simclr", **QUICK).fit(PIXELS.reshape(12, -1))


def test_the_package_stays_light():
    script = (
        "import sys, counterpoint; dir(counterpoint); assert not {'sklearn', 'faiss', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_images_in_memory_pass_through():
    assert isinstance(load(load(PIXELS)), Images)


def test_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "scikit-learn.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python[^\n]*\n(.*?)^```", page, re.S | re.M)
    names = {"images": PIXELS, "labels": np.arange(12) % 2, "sentences": SENTENCES}
    for block in code:
        exec(block, names)
    assert len(code) == 3 and names["vectors"].shape == (12, 128) and Path("runs/simclr-1").is_dir()
