"""The index against brute force, what it refuses, how it survives, and the two commands on files and on runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

import counterpoint as cp
from counterpoint import cli
from counterpoint.errors import InputError
from counterpoint.methods.image_text.clip import CLIP
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.methods.recommendation.sasrec import SASRec
from counterpoint.serve.index import KINDS, METRICS, Index, Names, ask, of_file


@pytest.fixture
def clusters():
    """4,000 vectors around 40 centres, and 50 queries around the same."""
    random = np.random.default_rng(0)
    centres = 3 * random.standard_normal((40, 24))
    at = centres[random.integers(0, 40, 4050)]
    vectors = (at + random.standard_normal(at.shape)).astype(np.float32)
    return vectors[:4000], vectors[4000:]


def brute_force(vectors, queries, metric, k):
    """In float64, by the definition."""
    vectors, queries = vectors.astype(float), queries.astype(float)
    if metric == "cosine":
        vectors, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, queries))
    nearness = -np.linalg.norm(queries[:, None] - vectors, axis=2) if metric == "euclidean" else queries @ vectors.T
    rows = (-nearness).argsort(axis=1)[:, :k]
    scores = np.take_along_axis(nearness, rows, 1)
    return (-scores if metric == "euclidean" else scores), rows


# ---- the answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_exact_is_brute_force(clusters, metric, tmp_path):
    vectors, queries = clusters
    scores, rows = brute_force(vectors, queries, metric, 7)
    built = Index.build(vectors, metric=metric)
    built.save(tmp_path / "index")
    for index in (built, Index.open(tmp_path / "index", metric=metric)):
        found, ids = index.search(queries, 7)
        assert found.dtype == np.float32 and ids.tolist() == rows.tolist()
        np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-5)
        assert (len(index), index.dim, index.metric, index.kind) == (4000, 24, metric, "exact")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "bound"), [("hnsw", 0.98), ("int8", 0.9)])
def test_the_others_find_nearly_the_same(clusters, metric, kind, bound, tmp_path):
    vectors, queries = clusters
    scores, rows = brute_force(vectors, queries, metric, 10)
    index = Index.build(vectors, metric=metric, kind=kind)
    found, ids = Index.open(index.save(tmp_path / "index")).search(queries, 10)
    recall = np.mean([len({*mine} & {*right}) / 10 for mine, right in zip(ids.tolist(), rows.tolist(), strict=True)])
    assert recall >= bound
    assert np.abs(found[:, 0] - scores[:, 0]).max() < 0.02 * np.abs(scores).max()
    size = (tmp_path / "index" / "index.faiss").stat().st_size
    assert size > vectors.nbytes if kind == "hnsw" else size < 0.3 * vectors.nbytes


def test_a_graph_returns_as_many_as_asked(clusters):
    index = Index.build(clusters[0][:300], kind="hnsw", M=2, ef_search=1)
    scores, ids = index.search(clusters[1], 300)
    assert all(sorted(row) == list(range(300)) for row in ids.tolist())
    assert (np.diff(scores) <= 1e-6).all()


def test_few_links_and_candidates_find_less(clusters):
    vectors, queries = clusters
    right = brute_force(vectors, queries, "cosine", 10)[1]
    found = [
        Index.build(vectors, kind="hnsw", M=M, ef_search=ef).search(queries, 10)[1] for M, ef in ((2, 1), (32, 128))
    ]
    few, many = ((ids[:, :, None] == right[:, None]).sum() for ids in found)
    assert few < many


def test_cosine_does_not_see_lengths_and_leaves_the_callers_array_alone(clusters):
    vectors, queries = clusters
    before, lengths = vectors.copy(), np.random.default_rng(1).uniform(1e-3, 1e25, (len(vectors), 1)).astype(np.float32)
    ids = Index.build(vectors).search(queries, 5)[1]
    assert (vectors == before).all()
    assert (Index.build(vectors * lengths).search(1e-20 * queries, 5)[1] == ids).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.from_numpy(x).to(torch.float16),
        lambda x: torch.nn.Parameter(torch.from_numpy(x)).bfloat16(),
        lambda x: x.astype(np.float64),
        lambda x: np.asfortranarray(x),
        lambda x: x.tolist(),
    ],
)
def test_numbers_of_every_kind(clusters, make):
    index = Index.build(make(clusters[0][:100]))
    assert index.search(make(clusters[0][:5]), 1)[1].ravel().tolist() == list(range(5))
    assert index.search(clusters[0][3], 1)[1].tolist() == [[3]]


def test_k_is_at_most_the_count(clusters):
    index = Index.build(clusters[0][:4], "abcd")
    assert index.search(clusters[1], 9)[1].shape == (50, 4) and index.like("a", 9)[1].shape == (3,)
    assert Index.build(clusters[0][:1]).like(0)[1].shape == (0,)
    assert Index.build(clusters[0]).search(np.empty((0, 24)))[1].shape == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_query_by_example_leaves_itself_out(clusters, kind):
    vectors = clusters[0][:500].copy()
    vectors[7] = vectors[3]  # a true duplicate is an answer, the item itself is not
    index = Index.build(vectors, [f"item {i}" for i in range(500)], kind=kind)
    scores, ids = index.like("item 3", 5)
    assert "item 3" not in ids and ids[0] == "item 7" and len(ids) == 5
    assert scores[0] == pytest.approx(1, abs=2e-2 if kind == "int8" else 1e-5)
    everything = index.search(vectors[3], 6)[1][0].tolist()
    assert [name for name in everything if name != "item 3"] == ids.tolist()


def test_an_id_that_repeats_is_left_out_wherever_it_stands(clusters):
    index = Index.build(clusters[0][:6], ["a", "b", "a", "c", "a", "d"])
    assert index.rows("a").tolist() == [0, 2, 4]
    assert sorted(index.like("a")[1]) == ["b", "c", "d"]


# ---- ids -------------------------------------------------------------------------------------------------------------


def test_names_of_any_text(tmp_path):
    given = ["a", "", "ab", "b", "a b\nc", "日本語", "a", "ä" * 5000, "b\t"]
    names = Names.of(given)
    names.save(tmp_path / "n.bin", tmp_path / "n.npy")
    for found in (names, Names.open(tmp_path / "n.bin", tmp_path / "n.npy")):
        assert [found[i] for i in range(len(found))] == given
        for name in given:
            assert found.find(name).tolist() == [i for i, other in enumerate(given) if other == name]
        assert not len(found.find("c")) and not len(found.find("a b"))


def test_row_numbers_are_ids_where_there_are_no_names(clusters):
    index = Index.build(clusters[0][:20])
    assert index.like(3)[1].tolist() == index.like("3")[1].tolist() == ask(index, "3")[1].tolist()
    assert index.search(clusters[1], 2)[1].dtype == np.int64
    with pytest.raises(InputError, match='no "20": its rows are numbered from 0 to 19'):
        index.like(20)


# ---- refusals --------------------------------------------------------------------------------------------------------


def broken(value):
    vectors = np.ones((9, 3))
    vectors[5] = value
    return vectors


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (np.empty((0, 3)), {}, "there are no vectors"),
        (np.ones((2, 0)), {}, r"shape \[2, 0\]"),
        (np.ones((2, 3, 4)), {}, r"shape \[2, 3, 4\]"),
        (np.array([["a"]]), {}, "not numbers"),
        (broken(np.nan), {}, "row 5 holds NaN"),
        (broken(np.inf), {"metric": "dot"}, "row 5 holds NaN or infinity"),
        (broken(1e39), {"metric": "dot"}, "row 5 holds NaN or infinity"),
        (broken(0), {}, "row 5 is zero, which has no direction"),
        (np.ones((2, 3)), {"metric": "cosin"}, 'no metric "cosin"; did you mean cosine'),
        (np.ones((2, 3)), {"kind": "hsnw"}, 'no kind "hsnw"; did you mean hnsw'),
        (np.ones((2, 3)), {"kind": "hnsw", "M": 0}, "M must be at least 2"),
        (np.ones((2, 3)), {"ids": "abc"}, "2 vectors but 3 ids"),
    ],
)
def test_what_cannot_be_indexed(vectors, options, message):
    with pytest.raises(InputError, match=message):
        Index.build(vectors, **options)


def test_what_cannot_be_asked(clusters, tmp_path):
    index = Index.build(clusters[0][:50], [f"photo-{i}.png" for i in range(50)])
    for query, k, message in (
        (np.ones(23), 1, "the query has 23 dimensions, but the index has 24"),
        (np.full(24, np.nan), 1, "holds NaN"),
        (np.zeros(24), 1, "no direction"),
        (np.ones(24), 0, "k is 0"),
    ):
        with pytest.raises(InputError, match=message):
            index.search(query, k)
    with pytest.raises(InputError, match=r"did you mean photo-12.png"):
        index.like("phot-12.png")
    with pytest.raises(InputError, match=r'no "photo-51.png"'):
        ask(index, "photo-51.png")
    assert Index.build(np.zeros((3, 2)), metric="euclidean").search(np.zeros(2), 1)[0] == 0
    index.save(tmp_path / "i")
    with pytest.raises(InputError, match="was made for cosine, not for dot"):
        Index.open(tmp_path / "i", metric="dot")
    with pytest.raises(InputError, match="is no index: it holds no index"):
        Index.open(tmp_path)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_an_open_index_reads_only_what_it_touches(tmp_path):
    """A gigabyte that does not exist: the file is a hole, and opening it allocates next to nothing."""
    Index.build(np.ones((1, 64), np.float32), metric="dot").save(tmp_path / "i")
    state = json.loads((tmp_path / "i/index.json").read_text())
    count = 2**22
    with (tmp_path / "i/index.faiss").open("r+b") as file:
        head = bytearray(file.read()[: -64 * 4])
        place = head.index((1).to_bytes(8, "little"))  # number of vectors, then number of bytes of codes at the end
        head[place : place + 8] = count.to_bytes(8, "little")
        head[-8:] = (count * 64).to_bytes(8, "little")
        file.seek(0)
        file.write(head)
        file.truncate(len(head) + count * 64 * 4)
    (tmp_path / "i/index.json").write_text(json.dumps(state | {"count": count}))
    script = """
import sys
from counterpoint.serve import Index
import faiss
def mine(): return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
before = mine()
index = Index.open(sys.argv[1])
assert len(index) == 2**22 and not index.vector(3_000_000).any()
print((mine() - before) / 1e3)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "i"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 50


def test_saving_replaces_and_leaves_nothing_behind(clusters, tmp_path):
    for count, ids in ((10, None), (20, range(20)), (30, range(30)), (5, None)):
        Index.build(clusters[0][:count], ids).save(tmp_path / "i")
        assert len(Index.open(tmp_path / "i")) == count
        assert len(list((tmp_path / "i").iterdir())) == (2 if ids is None else 4)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_killed_write_leaves_the_old_index(clusters, tmp_path, step):
    Index.build(clusters[0][:50], [f"old {i}" for i in range(50)]).save(tmp_path / "i")
    before = Index.open(tmp_path / "i").like("old 3")[1].tolist()
    script = """
import os, sys
import numpy as np
from counterpoint.serve import Index
left, replace = int(sys.argv[2]), os.replace
def die(*arguments):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    replace(*arguments)
os.replace = die
Index.build(np.ones((9, 3)), range(9)).save(sys.argv[1])
"""
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "i", str(step)])
    assert killed.returncode == 9
    assert Index.open(tmp_path / "i").like("old 3")[1].tolist() == before
    Index.build(clusters[0][:7]).save(tmp_path / "i")  # what the killed one left is swept out
    assert sorted(file.suffix for file in (tmp_path / "i").iterdir()) == [".faiss", ".json"]


def test_a_killed_first_write_can_be_repeated_but_a_folder_of_others_is_not_touched(clusters, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("counterpoint.atomic.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(InputError, match=r"cannot write the index .* \(No space left"):
            Index.build(clusters[0]).save(tmp_path / "i")
    (tmp_path / "i" / "index.faiss").write_bytes(b"half")
    Index.build(clusters[0]).save(tmp_path / "i")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    for place in ("photos", "photos/a.jpg"):
        with pytest.raises(InputError, match="is there and is no index"):
            Index.build(clusters[0]).save(tmp_path / place)
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_damage_is_named(clusters, tmp_path):
    folder = Index.build(clusters[0][:50], range(50)).save(tmp_path / "i")
    whole = {file: file.read_bytes() for file in folder.iterdir()}

    def refused(name, content):
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=r"damaged.*make the index again"):
            Index.open(folder)
        for file, before in whole.items():
            file.write_bytes(before)

    refused("index.json", b"{")
    refused("index.json", b"[]")
    refused("index.faiss", whole[folder / "index.faiss"][:100])
    refused("index.faiss", b"")
    refused("items.bin", b"\0a\0")
    refused("items.npy", b"x")
    refused("index.json", whole[folder / "index.json"].replace(b'"count": 50', b'"count": 51'))
    (folder / "index.faiss").unlink()
    with pytest.raises(InputError, match="damaged"):
        Index.open(folder)


# ---- files of embeddings ---------------------------------------------------------------------------------------------


def test_embedding_files(tmp_path):
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "a.npy", vectors)
    np.savez(tmp_path / "a.npz", vector=vectors, label=[0, 1, 0], path=["x.png", "y.png", "z.png"])
    save_file({"embeddings": vectors.astype(np.float16)}, tmp_path / "a.safetensors")
    for file, expected in (("a.npy", None), ("a.npz", ["x.png", "y.png", "z.png"]), ("a.safetensors", None)):
        found, ids = of_file(tmp_path / file)
        assert np.array_equal(found, vectors) and ids == expected
    np.savez(tmp_path / "b.npz", image=vectors)
    np.save(tmp_path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "d.npz").write_bytes(b"no zip")
    (tmp_path / "e.txt").touch()
    for file, message in (
        ("b.npz", "holds image, but no array named vector"),
        ("c.npy", "cannot be read"),
        ("d.npz", "cannot be read"),
        ("e.txt", "no embedding file"),
        ("f.npz", "no file"),
    ):
        with pytest.raises(InputError, match=message):
            of_file(tmp_path / file)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path / "nothing"))
    return tmp_path


def trained(method, data, **options):
    torch.manual_seed(0)
    return cp.fit(method, data, epochs=1, batch_size=8, progress=False, run="run", **options)


@pytest.fixture
def photos(place):
    random = np.random.default_rng(0)
    for i in range(12):
        file = Path("photos", "red" if i % 2 else "blue", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[:, :, 0 if i % 2 else 2] += 180
        Image.fromarray(pixels).save(file)
    return trained(cp.SimCLR("convnet-4", image_size=16, projection=(8, 4)), "photos")


def said(capsys, *argv):
    capsys.readouterr()
    assert cli.main([*map(str, argv)]) == 0
    return capsys.readouterr().out


def answers(capsys, *argv):
    return json.loads(said(capsys, "search", *argv, "--json"))


def refused(capsys, *argv):
    assert cli.main([*map(str, argv)]) == 2
    message = capsys.readouterr().err.strip()
    assert "Traceback" not in message and "\n" not in message
    return message


def test_images_from_the_command_line(capsys, photos):
    assert "run/index: 12 vectors of 32 dimensions, cosine, exact" in said(capsys, "index", "run")
    by_id, by_file = answers(capsys, "run/index", "red/1.png", "photos/red/1.png", "-k", "3")
    assert by_id["results"] == by_file["results"] and [row["rank"] for row in by_id["results"]] == [1, 2, 3]
    assert "red/1.png" not in [row["id"] for row in by_id["results"]]
    vectors = photos.encode("photos")  # in the order of the files: blue/0, blue/10, blue/2 ...
    names = [
        f"{colour}/{i}.png" for colour, start in (("blue", 0), ("red", 1)) for i in sorted(range(start, 12, 2), key=str)
    ]
    scores, places = brute_force(vectors, vectors[[names.index("red/1.png")]], "cosine", 12)
    score = {names[i]: value for i, value in zip(places[0], scores[0], strict=True) if names[i] != "red/1.png"}
    # by score, not by name: an untrained net sees some of them as the same up to rounding
    given = [row["score"] for row in by_id["results"]]
    np.testing.assert_allclose(given, [score[row["id"]] for row in by_id["results"]], atol=1e-5)
    np.testing.assert_allclose(given, sorted(score.values(), reverse=True)[:3], atol=1e-5)
    Path("new.png").write_bytes(Path("photos/red/3.png").read_bytes())
    (new,) = answers(capsys, "-k", "2", "run/index", "new.png")
    assert new["results"][0]["id"] == "red/3.png" and new["results"][0]["score"] == pytest.approx(1, abs=1e-4)
    table = said(capsys, "search", "run/index", "red/1.png")
    assert "cosine" in table and "nearest to red/1.png" in table and table.count(".png") == 11  # the title and ten
    assert "neither" not in refused(capsys, "search", "run/index", "red/2.png")
    Path("moved").mkdir()
    Path("run").rename("moved/run")  # the index lies in its run and moves with it
    assert answers(capsys, "moved/run/index", "new.png", "-k", 2) == [new]


def test_a_run_that_is_gone_or_another_answers_by_example_only(capsys, photos):
    said(capsys, "index", "run", "--data", "photos", "--out", "deep/index", "--kind", "int8", "--metric", "euclidean")
    Path("new.png").write_bytes(Path("photos/red/3.png").read_bytes())
    assert answers(capsys, "deep/index", "new.png", "-k", "1")[0]["results"][0]["id"] == "red/3.png"
    checkpoint = Path("run/checkpoints/last.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes() + b" ")
    assert "is not what it was when the index was made" in refused(capsys, "search", "deep/index", "new.png")
    Path("run").rename("gone")
    assert "is gone; ask with an id" in refused(capsys, "search", "deep/index", "new.png")
    assert answers(capsys, "deep/index", "red/3.png", "-k", "1")


def test_sentences_from_the_command_line(capsys, place):
    sentences = ["a man eats", "a woman eats", "the cat sleeps", "the dog sleeps", "rain", "a man eats", ""]
    Path("s.txt").write_text("\n".join(sentences) + "\n")
    run = trained(SimCSE("transformer-32-1", max_length=16), "s.txt")
    assert "5 vectors of 32" in said(capsys, "index", "run", "--out", "i")
    ids = [row["id"] for row in answers(capsys, "i", "a man eats")[0]["results"]]
    assert sorted(ids) == sorted({*sentences} - {"a man eats", ""})
    (new,) = answers(capsys, "i", "the cat slept", "-k", 5)
    vectors, queries = run.encode(sentences[:5]), run.encode(["the cat slept"])
    scores, rows = brute_force(vectors, queries, "cosine", 5)
    assert [row["id"] for row in new["results"]] == [sentences[i] for i in rows[0]]
    np.testing.assert_allclose([row["score"] for row in new["results"]], scores[0], atol=1e-5)
    assert "the query is empty" in refused(capsys, "search", "i", " ")


def test_histories_from_the_command_line(capsys, place):
    random = np.random.default_rng(0)
    Path("h.txt").write_text("\n".join(f"u{u} " + " ".join(f"i{i}" for i in random.permutation(9)) for u in range(20)))
    run = trained(SASRec(dim=8, hidden=16, max_length=5), "h.txt")
    assert "9 vectors of 8 dimensions, dot" in said(capsys, "index", "run")
    method = run.model()
    table = method.encoder.table[1:].detach().numpy()
    (one, history) = answers(capsys, "run/index", "i3", "i3 i4,i0", "-k", "100")
    _, rows = brute_force(table, table[[3]], "dot", 9)
    assert [row["id"] for row in one["results"]] == [f"i{i}" for i in rows[0] if i != 3]
    state = method.encode([["i3", "i4", "i0"]])
    _, rows = brute_force(table, state, "dot", 9)
    assert [row["id"] for row in history["results"]] == [f"i{i}" for i in rows[0] if i not in (3, 4, 0)]
    assert 'no "i11"; did you mean i' in refused(capsys, "search", "run/index", "i3 i11")
    assert "leave --data away" in refused(capsys, "index", "run", "--data", "h.txt")


def test_words_and_images_find_images_where_a_method_embeds_both(capsys, place):
    random = np.random.default_rng(0)
    lines = ["image,caption"]
    for i in range(16):
        pixels = random.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[:, :, 0 if i % 2 else 2] += 180
        Image.fromarray(pixels).save(f"{i}.png")
        lines.append(f"{i}.png,something {'red' if i % 2 else 'blue'} {i}")
    Path("t.csv").write_text("\n".join(lines))
    method = CLIP("convnet-4", text="transformer-32-1", dim=8, image_size=16, max_length=24)
    trained(method, "t.csv")
    said(capsys, "index", "run")
    (words, image) = answers(capsys, "run/index", "something red", "3.png", "-k", 3)
    names = [f"{i}.png" for i in range(16)]
    vectors = method.encode(names)
    _, rows = brute_force(vectors, method.encode_text(["something red"]), "cosine", 3)
    assert [row["id"] for row in words["results"]] == [names[i] for i in rows[0]]
    _, rows = brute_force(vectors, vectors[[3]], "cosine", 4)
    assert [row["id"] for row in image["results"]] == [names[i] for i in rows[0] if i != 3]


def test_files_from_the_command_line(capsys, place, clusters):
    vectors, queries = clusters
    np.savez("v.npz", vector=vectors, path=[f"{i}.png" for i in range(len(vectors))])
    np.save("v.npy", vectors)
    np.save("q.npy", queries)
    assert "v.index: 4,000 vectors of 24 dimensions, cosine, hnsw" in said(capsys, "index", "v.npz", "--kind", "hnsw")
    found = answers(capsys, "v.index", "--vector", "q.npy", "-k", "3")
    right = brute_force(vectors, queries, "cosine", 3)[1]
    assert [[row["id"] for row in answer["results"]] for answer in found] == [
        [f"{i}.png" for i in row] for row in right
    ]
    assert said(capsys, "index", "v.npy", "--out", "deep/rows", "--metric", "dot")
    assert [row["id"] for row in answers(capsys, "deep/rows", "3", "-k", 2)[0]["results"]] == [
        i for i in brute_force(vectors, vectors[[3]], "dot", 3)[1][0] if i != 3
    ][:2]
    for argv, message in (
        ("search v.index", "there is no query"),
        ("search v.index x.jpg", 'no "x.jpg"'),
        ("search v.index 3.pn", "did you mean"),
        ("search v.index 3.png -k 0", "k is 0"),
        ("search v.index 3.png --metric dot", "was made for cosine, not for dot"),
        ("search v.index --vector short.npy", "3 dimensions, but the index has 24"),
        ("search v.npz 3.png", "is no index"),
        ("search absent x", "is no index"),
        ("index absent", "no file absent"),
        ("index .", "neither a run folder"),
        ("index v.npz --data photos", "leave --data away"),
        ("index v.npz --metric cosin", "invalid choice: 'cosin'"),
        ("index v.npz --out v.npy", "is there and is no index"),
        ("index nan.npy", "row 2 holds NaN"),
        ("index empty.npy", "there are no vectors"),
    ):
        np.save("short.npy", np.ones((2, 3)))
        np.save("nan.npy", np.array([[1.0], [2], [np.nan]]))
        np.save("empty.npy", np.empty((0, 3)))
        assert message in refused(capsys, *argv.split()), argv


def test_ids_are_shown_as_they_are(capsys, place):
    np.savez("v.npz", vector=np.eye(2), id=["[red]a[/red]", "b"])
    said(capsys, "index", "v.npz")
    assert "[red]a[/red]" in said(capsys, "search", "v.index", "b")


def test_the_page_runs(place):
    page = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    names = {}
    exec(code, names)
    assert names["ids"].shape == (3,) and "photo-7" not in names["ids"]
