"""Histories: leave-one-out by hand, every way of reading, and what people do wrong."""

import gzip
import logging

import numpy as np
import pytest
import torch

from counterpoint.data import interactions, sources
from counterpoint.data.interactions import load
from counterpoint.errors import InputError

LISTS = {"ann": [3, 1, 4, 1, 5], "bob": [9, 2, 6], "cid": [5, 3], "dee": [8]}


def rows(histories):
    """(history, target, user) of every row, in names."""
    batch = histories.take(torch.arange(len(histories)))
    name = ("-", *histories.catalogue)
    found = []
    for seq, length, target, user in zip(
        batch["item_seq"], batch["item_seq_len"], batch["target"], batch["user"], strict=True
    ):
        assert (seq[length:] == 0).all() and (seq[:length] > 0).all()
        found.append(([name[i] for i in seq[:length]], name[target], histories.users[user]))
    return found


def csv(path, text):
    path.write_text(text)
    return path


def test_splits_are_the_leave_one_out_convention():
    assert rows(load(LISTS)) == [
        (["3"], "1", "ann"),
        (["3", "1"], "4", "ann"),
        (["5"], "3", "cid"),  # two items: nothing held out, one to predict
    ]
    assert rows(load(LISTS, "valid")) == [(["3", "1", "4"], "1", "ann"), (["9"], "2", "bob")]
    assert rows(load(LISTS, "test")) == [(["3", "1", "4", "1"], "5", "ann"), (["9", "2"], "6", "bob")]
    assert [(seq, target) for seq, target, _ in rows(load(LISTS, "all"))] == [
        (["3", "1", "4", "1", "5"], "-"),
        (["9", "2", "6"], "-"),
        (["5", "3"], "-"),
        (["8"], "-"),
    ]


def test_every_training_item_but_the_first_is_a_target_once():
    random = np.random.default_rng(0)
    lists = [random.integers(1, 30, random.integers(1, 15)).tolist() for _ in range(40)]
    histories = load(lists, max_length=4)
    expected = []
    for user, line in enumerate(lists):
        trains = line[:-2] if len(line) >= 3 else line
        expected += [
            (list(map(str, trains[max(0, t - 4) : t])), str(trains[t]), str(user)) for t in range(1, len(trains))
        ]
    assert rows(histories) == expected


def test_codes_start_at_one_in_the_order_of_numbers_else_of_letters():
    assert load([[10, 9, 2, 10]]).catalogue == ("2", "9", "10")
    assert load([["10", "b", "9", "a"]]).catalogue == ("10", "9", "a", "b")
    assert load([[10, 9, 2, 10]]).item.tolist() == [3, 2, 1, 3]


def test_a_batch_has_the_promised_tensors():
    histories = load(LISTS, max_length=7)
    batch = histories.take(torch.tensor([1, 0]))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "item_seq": (torch.int64, (2, 7)),
        **dict.fromkeys(("item_seq_len", "target", "user", "index"), (torch.int64, (2,))),
    }
    assert batch["index"].tolist() == [1, 0] and batch["item_seq_len"].tolist() == [2, 1]
    assert histories.lengths is None and load(LISTS, "test").lengths.tolist() == [4, 2]
    assert histories.nbytes > 0


def test_long_histories_keep_their_last_items():
    (row,) = rows(load([[1, 2, 3, 4, 5, 6]], "test", max_length=3))
    assert row[:2] == (["3", "4", "5"], "6")
    with pytest.raises(InputError, match="max_length is 0"):
        load([[1, 2, 3]], max_length=0)


def test_subset_and_part():
    histories = load(LISTS, "test")
    assert rows(histories.subset([1])) == rows(histories)[1:]
    assert rows(histories.subset(torch.tensor([False, True]))) == rows(histories)[1:]
    assert rows(histories.part("train")) == rows(load(LISTS))
    assert load(histories.subset([1]), "test") is not None and len(load(histories.subset([1]), "test")) == 1
    with pytest.raises(InputError, match='no split "dev"; there are train, valid, test, all'):
        histories.part("dev")
    with pytest.raises(InputError, match="chosen rows cannot get another catalogue"):
        load(histories.subset([1]), "test", catalogue=("1", "2"))


def test_popularity_counts_training_items_only():
    histories = load(LISTS)
    counts = dict(zip(("-", *histories.catalogue), histories.popularity().tolist(), strict=True))
    assert counts == {"-": 0, "1": 1, "2": 0, "3": 2, "4": 1, "5": 1, "6": 0, "8": 1, "9": 1}
    assert torch.equal(histories.popularity(), load(LISTS, "test").popularity())


def test_limit_is_a_seeded_subset_of_users_with_their_own_catalogue():
    lists = {f"u{i}": [10 * i, 10 * i + 1, 10 * i + 2] for i in range(50)}
    some = load(lists, "test", limit=10, seed=1)
    assert len(some.users) == 10 and len(some.catalogue) == 30
    assert rows(some) == rows(load(lists, "test", limit=10, seed=1))
    assert some.users != load(lists, "test", limit=10, seed=2).users
    assert set(some.users) < set(load(lists, "test", limit=20, seed=1).users)
    every = rows(load(lists, "test"))
    assert all(row in every for row in rows(some))
    assert rows(load(load(lists, "all"), "test", limit=10, seed=1)) == rows(some)
    with pytest.raises(InputError, match="limit is 0"):
        load(lists, limit=0)


# ---- files -----------------------------------------------------------------------------------------------------------

TABLE = "userId,rating,movieId,timestamp\n1,5,a,30\n2,1,b,5\n1,4,b,10\n1,3,c,20\n2,2,a,5\n2,2,c,1\n1,1,d,40\n"
SORTED = [(["b", "c"], "a", "1"), (["c"], "b", "2")]


def test_unsorted_timestamps_are_sorted_and_ties_keep_the_order_of_the_file(tmp_path):
    pytest.importorskip("pandas")
    # user 2 has b and a at one time: b comes first in the file
    assert rows(load(csv(tmp_path / "ratings.csv", TABLE), "valid")) == SORTED


@pytest.mark.parametrize(
    "times",
    [
        ("2020-01-03", "2020-01-01", "2020-01-02", "2020-01-04"),
        ("1.5e9", "1.1e9", "1.4e9", "1.6e9"),
        ("2020-01-01T10:00:00Z", "2020-01-01T08:00:00Z", "2020-01-01T09:00:00+00:00", "2020-01-02"),
    ],
)
def test_times_may_be_dates_or_numbers(times, tmp_path):
    pytest.importorskip("pandas")
    lines = "".join(f"u\t{item}\t{time}\n" for item, time in zip("abcd", times, strict=True))
    path = csv(tmp_path / "log.tsv", "User ID\tItem ID\tDate\n" + lines)
    assert rows(load(path, "test")) == [(["b", "c", "a"], "d", "u")]


def test_tables_come_in_every_usual_form(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(csv(tmp_path / "a.csv", TABLE))
    assert rows(load(frame, "valid")) == SORTED
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(TABLE.encode()))
    assert rows(load(tmp_path / "a.csv.gz", "valid")) == SORTED
    moments = frame.assign(timestamp=pandas.to_datetime(frame["timestamp"], unit="D"))
    assert rows(load(moments, "valid")) == SORTED
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "a.parquet")
    assert rows(load(tmp_path / "a.parquet", "valid")) == SORTED


def test_names_are_kept_as_they_are_written(tmp_path):
    pytest.importorskip("pandas")
    path = csv(tmp_path / "x.csv", "user,item\nNA,007\nNA,7\nNA,null\n")
    histories = load(path, "test")
    assert histories.users == ("NA",) and set(histories.catalogue) == {"007", "7", "null"}


def test_recbole_files_and_their_folder(tmp_path):
    pytest.importorskip("pandas")
    folder = tmp_path / "set"
    folder.mkdir()
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + TABLE.split("\n", 1)[1].replace(",", "\t")
    lines = [line.split("\t") for line in text.splitlines()]
    body = "\n".join("\t".join((c[0], c[2], c[1], c[3])) for c in lines[1:])
    csv(folder / "set.inter", "\t".join(lines[0]) + "\n" + body + "\n")
    csv(folder / "set.item", "item_id:token\tname:token_seq\n")
    assert rows(load(folder / "set.inter", "valid")) == SORTED
    assert rows(load(folder, "valid")) == SORTED
    csv(folder / "other.inter", "")
    with pytest.raises(InputError, match=r"one RecBole .inter file, but there is other\.inter, set\.inter"):
        load(folder)


def test_lines_of_users_and_items(tmp_path):
    path = csv(tmp_path / "Seq.txt", "1 10 20 30\n2 20 30\n1 40\n\n")
    assert rows(load(path, "test")) == [(["10", "20", "30"], "40", "1")]  # user 1 has two lines
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert rows(load(tmp_path / "z.txt.gz", "test")) == rows(load(path, "test"))


def test_a_known_set_is_found_in_the_data_folder(tmp_path, monkeypatch):
    folder = tmp_path / "recsys" / "amazon_sequences"
    folder.mkdir(parents=True)
    (folder / "Beauty.txt.gz").write_bytes(gzip.compress(b"1 1 2 3 4\n2 3 2 1\n"))
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path))
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    histories = load("beauty", "test")
    assert histories.name == "beauty" and rows(histories) == [(["1", "2", "3"], "4", "1"), (["3", "2"], "1", "2")]

    def download(address, path, sha256):
        asked.append((address, path, sha256))
        return csv(tmp_path / "Toys.txt", "1 1 2 3\n")

    asked = []
    monkeypatch.setattr(sources, "download", download)
    assert len(load("toys", "test")) == 1
    ((address, path, sha256),) = asked
    assert address.endswith("/Toys_and_Games.txt") and len(sha256) == 64
    assert path == tmp_path / "cache" / "recsys" / "amazon_sequences" / "Toys_and_Games.txt"
    assert set(interactions.NAMES) == {"beauty", "toys", "sports", "ml-100k"}


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_wrong_columns_are_listed(tmp_path):
    pytest.importorskip("pandas")
    path = csv(tmp_path / "x.csv", "who,what,timestamp\n1,2,3\n")
    with pytest.raises(InputError, match="no column for the user and the item; its columns are who, what, timestamp"):
        load(path)
    with pytest.raises(InputError, match="no column for the item; its columns are user, thing"):
        load(csv(tmp_path / "y.csv", "user,thing\n1,2\n"))


def test_users_with_few_items_are_counted_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        load(LISTS)
    assert "2 of 4 users have fewer than 3 items" in caplog.text
    caplog.clear()
    load([[1, 2, 3]], "test")
    assert not caplog.text


def test_users_with_one_interaction_alone_teach_nothing():
    with pytest.raises(InputError, match="nothing to train on"):
        load([[1], [2], [3]])
    with pytest.raises(InputError, match="no user has three items, so nothing is held out"):
        load([[1, 2], [2, 1]], "test")
    assert len(load([[1], [2]], "all")) == 2


def test_items_that_a_model_does_not_know_are_left_out_and_said(caplog):
    known = ("1", "2", "3", "4")
    lists = {"a": [1, 9, 2, 3, 4], "b": [1, 2, 9], "c": [9, 8, 7], "d": [1, 9, 3]}
    with caplog.at_level(logging.WARNING):
        test = load(lists, "test", catalogue=known)
    # 9 is skipped in histories; whoever's held-out item is unknown is not measured, and no earlier item takes its place
    assert rows(test) == [(["1", "2", "3"], "4", "a"), (["1"], "3", "d")]
    assert rows(test.part("valid")) == [(["1", "2"], "3", "a"), (["1"], "2", "b")]
    assert rows(test.part("train")) == [(["1"], "2", "a")]
    assert rows(test.part("all"))[1] == (["1", "2"], "-", "b")
    assert test.catalogue == known
    assert "6 of 14 interactions are with 3 items that the model has not seen" in caplog.text
    assert "4 of them are held-out targets" in caplog.text
    with pytest.raises(InputError, match="has no item of the 2 that the model was trained on"):
        load(lists, catalogue=("x", "y"))
    assert rows(load(load(lists), "test", catalogue=known)) == rows(test)


def test_times_that_are_none(tmp_path):
    pytest.importorskip("pandas")
    with pytest.raises(InputError, match=r"1 of 3 values of time are no timestamps, the first is 'soon' in row 2"):
        load(csv(tmp_path / "x.csv", "user,item,time\n1,a,5\n1,b,soon\n1,c,6\n"))
    with pytest.raises(InputError, match=r"2 of 2 values of time are no timestamps"):
        load(csv(tmp_path / "y.csv", "user,item,time\n1,a,x\n1,b,\n"))


def test_rows_without_user_or_item_are_left_out_and_said(tmp_path, caplog):
    pandas = pytest.importorskip("pandas")
    path = csv(tmp_path / "x.csv", "user,item,time\n1,a,1\n,b,2\n1,,3\n1,c,4\n1,d,5\n")
    with caplog.at_level(logging.WARNING):
        assert rows(load(path, "test")) == [(["a", "c"], "d", "1")]
    assert "2 of 5 rows lack the user or the item" in caplog.text
    frame = pandas.DataFrame({"user": [1, 1, 1, 1], "item": [5, None, 6, 7]})  # the gap makes floats of the others
    assert rows(load(frame, "test")) == [(["5", "6"], "7", "1")]


def test_without_timestamps_the_order_of_rows_counts(tmp_path):
    pytest.importorskip("pandas")
    path = csv(tmp_path / "x.csv", "item,user\nz,1\ny,2\ny,1\nx,1\n")
    assert rows(load(path, "test")) == [(["z", "y"], "x", "1")]


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"'beuty' is neither a file nor one of .*did you mean beauty"):
        load("beuty")
    with pytest.raises(InputError, match="there is no file"):
        load(tmp_path / "none.csv")
    with pytest.raises(InputError, match="holds no interactions"):
        load([])
    with pytest.raises(InputError, match="but there is none"):
        load(tmp_path)
    with pytest.raises(InputError, match="not int"):
        load(3)
    with pytest.raises(InputError, match="the history of user a is 'xyz', not a list"):
        load({"a": "xyz"})


def test_damaged_files(tmp_path):
    pytest.importorskip("pandas")
    for name in ("x.csv.gz", "x.parquet", "x.txt.gz"):
        (tmp_path / name).write_bytes(b"\x1f\x8b broken")
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            load(tmp_path / name)
    with pytest.raises(InputError, match="looks like a table"):
        load(csv(tmp_path / "x.txt", "user,item,time\n1,2,3\n"))


def test_a_user_without_items_in_a_text_file_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(load(csv(tmp_path / "x.txt", "1 2 3 4\n7\n"), "test")) == 1
    assert "1 of 2 lines name a user without items" in caplog.text
