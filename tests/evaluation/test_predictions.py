"""``Predictions`` as a table: short text, names, smaller tables, and files that read back."""

import json
import pickle

import helpers
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from pyarrow import parquet

from manualloop import (
    ConfigError,
    DataError,
    Predictions,
    compare_predictions,
    predict_loop,
    prepare_dataloaders,
)
from manualloop.report.predicted import _found_in

NAMES = ("negative", "positive")


def of_classes(num_rows=6, **options):
    numbers = np.arange(num_rows)
    scores = np.stack([1 - numbers % 2 * 0.75, numbers % 2 * 0.75], axis=1).astype(np.float32)
    kept = {"id": [f"row-{number}" for number in numbers], "weight": [0.5 * n for n in numbers]}
    fields = {"kept": kept, "names": NAMES, **options}
    return Predictions(numbers * 10, numbers % 2, scores, (numbers + 1) % 2, **fields)


def of_tokens():
    predictions = np.array([[0, 1, 2, 0], [1, 1, -100, -100]])
    references = np.array([[-100, 1, 2, -100], [0, 1, -100, -100]])
    return Predictions(np.arange(2), predictions, None, references, {}, ("O", "B-PER", "I-PER"))


def of_labels():
    predictions = np.array([[1, 0, 1], [0, 0, 0]])
    scores = np.array([[0.9, 0.1, 0.75], [0.25, 0.125, 0.5]], np.float32)
    references = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], np.float32)
    return Predictions(np.arange(2), predictions, scores, references, {}, ("toxic", "rude", "spam"))


def of_values():
    return Predictions(np.arange(3), np.array([0.5, 1.25, -2], np.float32), None, np.ones(3))


def of_texts():
    texts = ["a, b", 'says "no"', "", "two\nlines"]
    return Predictions(np.arange(4), texts, None, ["ä", "b", "c", "d"], {"id": list("wxyz")})


def of_dicts():
    spans = [{"start": 1, "text": "a"}, {"start": 2, "text": "b"}]
    return Predictions(np.arange(2), spans, None, [["x"], []])


COLUMNS = {
    "classes": {
        "index": [0, 10, 20],
        "id": ["row-0", "row-1", "row-2"],
        "weight": [0.0, 0.5, 1.0],
        "prediction": [0, 1, 0],
        "label": ["negative", "positive", "negative"],
        "reference": [1, 0, 1],
        "reference_label": ["positive", "negative", "positive"],
        "score_negative": [1.0, 0.25, 1.0],
        "score_positive": [0.0, 0.75, 0.0],
    },
    "tokens": {
        "index": [0, 1],
        "prediction": [[1, 2], [1, 1]],
        "label": [["B-PER", "I-PER"], ["B-PER", "B-PER"]],
        "reference": [[1, 2], [0, 1]],
        "reference_label": [["B-PER", "I-PER"], ["O", "B-PER"]],
    },
    "labels": {
        "index": [0, 1],
        "prediction": [[1, 0, 1], [0, 0, 0]],
        "label": [["toxic", "spam"], []],
        "reference": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        "reference_label": [["toxic"], ["rude"]],
        "score_toxic": [0.9, 0.25],
        "score_rude": [0.1, 0.125],
        "score_spam": [0.75, 0.5],
    },
    "values": {"index": [0, 1, 2], "prediction": [0.5, 1.25, -2.0], "reference": [1.0, 1.0, 1.0]},
    "texts": {
        "index": [0, 1, 2, 3],
        "id": ["w", "x", "y", "z"],
        "prediction": ["a, b", 'says "no"', "", "two\nlines"],
        "reference": ["ä", "b", "c", "d"],
    },
    "dicts": {
        "index": [0, 1],
        "prediction": [{"start": 1, "text": "a"}, {"start": 2, "text": "b"}],
        "reference": [["x"], []],
    },
    "without an index": {"prediction": [1, 0]},
}
MAKE = {
    "classes": lambda: of_classes(3),
    "tokens": of_tokens,
    "labels": of_labels,
    "values": of_values,
    "texts": of_texts,
    "dicts": of_dicts,
    "without an index": lambda: Predictions(None, np.array([1, 0]), None, None),
}


def lists(columns):
    as_list = {n: v.tolist() if isinstance(v, np.ndarray) else list(v) for n, v in columns.items()}
    floats = {n for n in as_list if n.startswith("score_")}
    return {n: np.float32(v).tolist() if n in floats else v for n, v in as_list.items()}


@pytest.mark.parametrize("kind", COLUMNS)
def test_the_columns_of_every_kind_read_back_from_every_table(kind, tmp_path):
    table, expected = MAKE[kind](), lists(COLUMNS[kind])
    assert lists(table.to_pandas()) == expected
    assert lists(table.to_dataset().to_dict()) == expected
    table.to_parquet(tmp_path / "table.parquet")
    assert lists(parquet.read_table(tmp_path / "table.parquet").to_pydict()) == expected
    table.to_csv(tmp_path / "table.csv")
    frame = pd.read_csv(tmp_path / "table.csv", keep_default_na=False)
    read = {
        name: [json.loads(v) if isinstance(expected[name][0], list | dict) else v for v in column]
        for name, column in lists(frame).items()
    }
    assert read == expected


@pytest.mark.parametrize("kind", COLUMNS)
def test_rows_and_smaller_tables(kind):
    table, expected = MAKE[kind](), lists(COLUMNS[kind])
    number = len(table)
    for place in (0, number - 1, -1, np.int64(-number)):
        row = {name: values[place] for name, values in expected.items()}
        assert lists({n: [v] for n, v in table[place].items()}) == {n: [v] for n, v in row.items()}
    assert len(list(table)) == number
    mask = np.arange(number) % 2 == 0
    for rows in (slice(1, None), slice(None, None, -1), mask, mask.tolist(), torch.tensor(mask)):
        places = np.arange(number)[rows if isinstance(rows, slice) else np.asarray(rows)]
        wanted = {name: [values[p] for p in places] for name, values in expected.items()}
        assert lists(table[rows].to_pandas()) == wanted
        assert lists(table[places].to_pandas()) == wanted
        assert table[rows].names == table.names
    assert len(table[:0]) == len(table[[]]) == 0 == len(table[:0].to_pandas())
    assert lists(table[:0].to_dataset().to_dict()) == {name: [] for name in expected}
    with pytest.raises(IndexError, match=f"Row {number} of {number}"):
        table[number]


@pytest.mark.parametrize("key", [True, "label", 1.5, [[0], [1]], None, (0.5,)])
def test_other_keys_are_refused(key):
    with pytest.raises(IndexError, match="a number, a slice, a mask or a list of places"):
        of_classes()[key]


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(IndexError, match="A mask of 5 for 6 rows"):
        of_classes()[np.ones(5, bool)]


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_table_prints_short(kind):
    assert len(repr(MAKE[kind]())) < 300


def test_a_table_prints_its_counts():
    assert repr(of_classes()) == (
        "Predictions(6 rows; index 0 to 50; predictions: int64 (6,) negative 3, positive 3; "
        "references: int64 (6,) negative 3, positive 3; scores: float32 (6, 2); kept: id, weight)"
    )
    assert "3 B-PER" not in repr(of_tokens())
    assert "B-PER 3, O 2, I-PER 1" in repr(of_tokens())
    assert "toxic 1, spam 1, rude 0" in repr(of_labels())
    assert "from -2 to 1.25" in repr(of_values())
    assert "4 str, such as 'a, b'" in repr(of_texts())


def test_no_content_prints_long():
    long = "\N{PILE OF POO}\n" * 5000
    numbers = np.arange(1000)
    for table in (
        Predictions(
            numbers,
            numbers,
            None,
            numbers,
            {key: [] for key in [long, *map(str, numbers)]},
            (long,) * 1000,
        ),
        Predictions(numbers, [long] * 1000, None, [{long: long}] * 1000),
        Predictions(numbers, [type(long[:9] * n, (), {})() for n in range(1, 1001)], None, None),
        Predictions(numbers, np.full(1000, np.nan), None, np.full((1000, 3), np.inf)),
        Predictions(numbers[:0], numbers[:0], np.zeros((0, 2), np.float32), numbers[:0]),
        Predictions(numbers + 2**62, numbers - 2**62, None, None, {}, NAMES),
    ):
        assert len(repr(table)) <= 1000


def test_numbers_that_are_no_classes_have_no_names():
    numbers = np.arange(4)
    assert Predictions(numbers, numbers, None, None, {}, NAMES).labels is None
    assert Predictions(numbers, numbers / 2, None, None, {}, NAMES).labels is None
    assert Predictions(numbers, ["a"] * 4, None, None, {}, NAMES).labels is None
    counts = Predictions(numbers, numbers % 2, None, numbers, {}, NAMES)
    assert counts.labels == ["negative", "positive"] * 2
    assert "reference_label" not in counts.to_pandas()
    hidden = Predictions(numbers, numbers % 2, None, np.array([0, -100, 1, -1]), {}, NAMES)
    assert hidden.to_pandas()["reference_label"].tolist() == ["negative", None, "positive", None]


def test_labels_of_a_postprocess():
    is_on = np.array([[True, False], [True, True]])
    assert Predictions(np.arange(2), is_on, None, None, {}, NAMES).labels == [
        ["negative"],
        ["negative", "positive"],
    ]
    floats = is_on.astype(np.float32)
    table = Predictions(np.arange(2), is_on.astype(int), None, floats, {}, NAMES)
    assert table.labels == [["negative"], ["negative", "positive"]]
    # Two tokens a row look the same, except for their references.
    tokens = Predictions(np.arange(2), is_on.astype(int), None, is_on.astype(int), {}, NAMES)
    assert tokens.labels == [["positive", "negative"], ["positive", "positive"]]


def test_padding_without_references_is_left_out_too():
    table = Predictions(np.arange(2), np.array([[1, 0], [1, -100]]), None, None, {}, NAMES)
    assert table.labels == [["positive", "negative"], ["positive"]]
    assert table.to_pandas()["prediction"].tolist() == [[1, 0], [1]]


def test_a_map_of_classes_keeps_its_shape():
    maps = np.array([[[0, 1], [1, 1]]])
    table = Predictions(np.arange(1), maps, None, maps, {}, NAMES)
    assert table.to_dataset()["prediction"][:] == maps.tolist()
    assert table.labels == [[["negative", "positive"], ["positive", "positive"]]]


def test_columns_never_hide_each_other():
    kept = {"index": ["a"], "kept_index": ["b"], "score_negative": [1], "label": ["c"]}
    table = Predictions(
        np.array([7]), np.array([0]), np.ones((1, 2), np.float32), None, kept, ("negative",) * 2
    )
    assert list(table.to_pandas()) == [
        *("index", "kept_index", "kept_kept_index", "score_negative", "kept_label"),
        *("prediction", "label", "score_negative_0", "score_negative_1"),
    ]
    assert table.to_pandas()["kept_index"].tolist() == ["a"]


def test_kept_tensors_become_numbers():
    table = Predictions(
        None, np.array([0, 1]), None, None, {"at": [torch.tensor(3), torch.tensor([1, 2])]}
    )
    assert table.to_pandas()["at"].tolist() == [3, [1, 2]]
    assert table[:1].to_dataset()["at"][:] == [3]


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ([{"a": 1}, {"b": 2}], r"dicts with other keys: \['a'\] and \['b'\]"),
        ([[{"a": 1}], [{"a": 1, "b": 2}]], "dicts with other keys"),
        ([1, "a"], "cannot be stored"),
        ([object(), object()], "cannot be stored"),
        ([2**70, 1], "cannot be stored"),
        ([{0: "a"}, {0: "b"}], "cannot be stored"),
    ],
)
def test_what_no_table_can_hold_is_refused(objects, reason, tmp_path):
    table = Predictions(np.arange(2), objects, None, None)
    assert table.to_pandas()["prediction"].tolist() == objects
    for make in (table.to_dataset, lambda: table.to_parquet(tmp_path / "a")):
        with pytest.raises(DataError, match=reason):
            make()
    assert not (tmp_path / "a").exists()


def test_missing_values_stay_missing(tmp_path):
    table = Predictions(np.arange(3), ["a", None, "b"], None, None, {"n": [1, None, 2**62 + 1]})
    table.to_parquet(tmp_path / "table.parquet")
    expected = {"index": [0, 1, 2], "n": [1, None, 2**62 + 1], "prediction": ["a", None, "b"]}
    assert parquet.read_table(tmp_path / "table.parquet").to_pydict() == expected
    assert lists(table.to_pandas()) == expected


@pytest.fixture(scope="module")
def predict():
    """Predicts the rows of a frame, whose labels are not those of their neighbours."""
    model, tokenizer = helpers.tiny_bert(), helpers.tiny_tokenizer()

    def predict_frame(frame, **options):
        made = prepare_dataloaders({"test": frame}, tokenizer, model=model, **options)
        return predict_loop(model, made["test"])

    return predict_frame


def frame_of_rows():
    rows = helpers.table_of(["text"], 12).to_pandas().drop(columns="idx")
    rows["label"] = [0, 1, 1, 0, 1, 0, 0, 0, 1, 0, 1, 1]
    return rows


FRAMES = {
    "as it was read": lambda rows: rows,
    "gaps": lambda rows: rows.iloc[[1, 5, 7, 8]],
    "another order": lambda rows: rows.sample(frac=1, random_state=3),
    "names": lambda rows: rows.set_index(pd.Index(list("abcdefghijkl"), name="id")),
    "two levels": lambda rows: rows.set_index([np.arange(12) % 2, np.arange(12)]),
    "dates": lambda rows: rows.set_index(pd.date_range("2026-01-01", periods=12))[::-1],
}


@pytest.mark.parametrize("name", FRAMES)
def test_predictions_stand_beside_the_rows_of_their_frame(name, predict):
    frame = FRAMES[name](frame_of_rows())
    table = predict(frame)
    assert table.to_pandas().index.equals(frame.index)
    assert table.index.tolist() == list(range(len(frame)))  # in the dataset, as of other data
    joined = frame.join(pickle.loads(pickle.dumps(table)).to_pandas())
    assert joined["reference"].tolist() == joined["label"].tolist()
    some = table[[2, 0]].to_pandas()
    assert frame.loc[some.index, "label"].tolist() == some["reference"].tolist()
    for mask in (frame["label"] == 1, frame["label"].iloc[::-1] == 1):
        assert table[mask].references.tolist() == [1] * (frame["label"] == 1).sum()


def test_a_preprocess_that_makes_other_rows_leaves_their_numbers(predict):
    def twice(rows):
        return {**helpers.tiny_tokenizer()(2 * rows["text"]), "labels": 2 * rows["label"]}

    table = predict(frame_of_rows().iloc[3:], preprocess=twice)
    assert table.to_pandas().index.tolist() == list(range(18))


def test_masks_of_pandas():
    table = of_classes()[[1, 3]]
    assert table[pd.Series([False, True])].index.tolist() == [30]
    by_number = pd.Series([False, True], index=[30, 10])
    assert table[by_number].index.tolist() == [10]
    assert table[pd.Series(True, index=range(0, 60, 10))].index.tolist() == [10, 30]
    with pytest.raises(IndexError, match="another index than the rows"):
        table[pd.Series([True, False], index=["a", "b"])]
    shuffled = Predictions(np.array([1, 0]), np.array([4, 5]), None, None)
    with pytest.raises(IndexError, match="another index") as error:  # of the table or of the data
        shuffled[mask := pd.Series([True, False])]
    for line, index in {
        "table[mask.to_numpy()]": [1],
        "table[mask[table.to_pandas().index].to_numpy()]": [0],
    }.items():
        assert line in str(error.value)
        assert eval(line, {"table": shuffled, "mask": mask}).index.tolist() == index


def test_rows_of_two_frames_in_two_orders_are_compared_by_their_index(predict):
    rows = frame_of_rows()
    a, b = predict(rows), predict(rows.sample(frac=1, random_state=3))
    found = compare_predictions(a, b, "accuracy")
    assert "12 rows, 0 of them predicted differently" in str(found)


def test_texts_of_a_frame_with_more_rows_or_another_order(predict):
    rows = frame_of_rows()
    table = predict(rows.iloc[[7, 2, 5]])
    assert _found_in(rows, [0, 1], table) == [7, 2]
    assert _found_in(rows.iloc[[2, 5, 7]], [0, 1], table) == [2, 0]
    assert _found_in(rows.iloc[[7, 2, 5]], [0, 1], table) == [0, 1]
    assert _found_in(["x", "y", "z"], [0, 1], table) == [0, 1]
    table = predict(rows.sample(frac=1, random_state=3))
    with pytest.raises(ConfigError, match="Pass the frame that was predicted"):
        _found_in(rows, [0, 1], table)


class OfLabels(torch.nn.Module):
    """A classifier of three labels a row, whose config names them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = transformers.BertConfig(
            id2label={0: "a", 1: "b", 2: "c"}, problem_type="multi_label_classification"
        )
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"logits": x + self.weight}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("labels", [None, torch.int64, torch.float32])
def test_names_of_several_labels_by_a_threshold_of_ones_own(dtype, labels):
    logits = torch.tensor([[0.5, -1, 2], [-1, -1, -1], [0.1, 3, 0.7]])
    batch = {"x": logits} if labels is None else {"x": logits, "labels": (logits > 1).to(labels)}
    table = predict_loop(
        OfLabels(), [batch], postprocess=lambda o, b: (o["logits"] > 0.2).to(dtype)
    )
    names = [["a", "c"], [], ["b", "c"]]
    assert table.labels == names
    assert list(table.to_pandas()["label"]) == names
    assert pickle.loads(pickle.dumps(table))[1:].labels == names[1:]
    assert repr(table).count("c 2, a 1, b 1") == 1


def test_names_of_classes_by_rank():
    """Numbers of classes beside targets of several labels: each is a class of its own."""
    logits = torch.tensor([[0.5, -1, 2], [0, 1, 2]])
    batch = {"x": logits, "labels": (logits > 1).float()}
    ranked = predict_loop(OfLabels(), [batch], postprocess=lambda o, b: o["logits"].argsort(-1))
    assert ranked.labels == [["b", "a", "c"], ["a", "b", "c"]]
    best = predict_loop(OfLabels(), [batch], postprocess=lambda o, b: o["logits"].topk(2).indices)
    assert best.labels == [["c", "a"], ["c", "b"]]


def test_whole_numbers_beside_none_stay_whole_in_a_csv_file(tmp_path):
    numbers = [1_234_567_890_123_456_789, None, 7]  # of posts, of which one is missing
    kept = {"id": numbers, "ok": [True, None, False]}
    Predictions(np.arange(3), np.arange(3), None, None, kept).to_csv(tmp_path / "x.csv")
    rows = [line.split(",") for line in (tmp_path / "x.csv").read_text().splitlines()]
    assert [row[1:3] for row in rows[1:]] == [[str(numbers[0]), "True"], ["", ""], ["7", "False"]]
