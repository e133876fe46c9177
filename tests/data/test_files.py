"""Files and frames of a user's own: read as they are, or refused with the line that reads them."""

import json

import datasets
import pandas
import pytest
from helpers import fixes_in, labels_of, run_fix, tiny_bert, tiny_tokenizer

from manualloop import DataError, prepare_dataloaders
from manualloop.data.files import read_rows

TEXTS = ["good movie", "bad plot", "fine", "very dull", "good", "bad"]
FRAME = pandas.DataFrame(
    {"id": range(6), "text": TEXTS, "label": ["pos", "neg", "pos", "neg", "pos", "neg"]}
)


def written(folder, name, frame=FRAME):
    """A file of the frame, by the ending of its name and what stands before it."""
    path = folder / name
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    elif name.endswith((".jsonl", ".json")):
        frame.to_json(path, orient="records", lines=name.endswith("l"))
    else:
        separators = {"semicolon": ";", "tab": "\t", "pipe": "|", "rows.tsv": "\t"}
        separator = next((s for kind, s in separators.items() if kind in name), ",")
        encoding = next((e for e in ("utf-8-sig", "utf-16", "cp1252") if e in name), "utf-8")
        frame.to_csv(path, index="index" in name, sep=separator, encoding=encoding)
    return path


FILES = [
    *("rows.csv", "semicolon.csv", "tab.csv", "pipe.txt", "rows.tsv", "index.csv"),
    *("utf-8-sig.csv", "utf-16.csv", "rows.json", "rows.jsonl", "rows.parquet"),
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_the_dataset_of_its_rows(name, tmp_path):
    path = written(tmp_path, name)
    given = {"train": path} if "index" in name else path if "rows" in name else str(path)
    loaders = prepare_dataloaders(given, tiny_tokenizer(), model=tiny_bert())
    assert labels_of(loaders["train"]) == [1, 0, 1, 1, 0, 0]


def test_a_frame_is_read_without_its_index(caplog):
    frame = FRAME.sample(frac=1.0, random_state=1)
    loaders = prepare_dataloaders({"train": frame, "test": FRAME}, tiny_tokenizer(), keep="id")
    assert labels_of(loaders["test"]) == [1, 0, 1, 0, 1, 0]
    assert next(iter(loaders["test"]))["id"] == [0, 1, 2, 3, 4, 5]
    assert "__index_level_0__" not in caplog.text


def test_all_problems_of_a_file_come_in_one_message_whose_lines_run(tmp_path):
    frame = FRAME.copy()
    frame.loc[1, "text"] = None
    frame.loc[4, "label"] = None
    path = written(tmp_path, "semicolon.csv", frame)
    with pytest.raises(DataError) as refused:
        prepare_dataloaders({"train": path}, tiny_tokenizer())
    message = str(refused.value)
    assert "Row 1 of train has text=None" in message
    assert "Row 4 of train has label=None" in message
    made = message.rpartition(" Here dataset = ")[2].removesuffix(".")
    assert made == f'{{"train": datasets.Dataset.from_csv("{path}", sep=";")}}'
    dataset = eval(made, {"datasets": datasets})
    for line in fixes_in(message):
        dataset = run_fix(line, dataset)
    loaders = prepare_dataloaders(dataset, tiny_tokenizer())
    assert sorted(labels_of(loaders["train"])) == [0, 0, 1, 1]


def test_the_lines_for_a_single_file_and_a_frame_run(tmp_path):
    frame = FRAME.copy()
    frame.loc[4, "label"] = None
    path = written(tmp_path, "rows.jsonl", frame)
    for given, code in (
        (path, f'datasets.Dataset.from_json("{path}")'),
        (frame, "datasets.Dataset.from_pandas(frame, preserve_index=False)"),
    ):
        with pytest.raises(DataError) as refused:
            prepare_dataloaders(given, tiny_tokenizer())
        assert str(refused.value).endswith(f" Here dataset = {code}.")
        dataset = eval(code, {"datasets": datasets, "frame": frame})
        (line,) = fixes_in(refused.value)
        assert len(prepare_dataloaders(run_fix(line, dataset), tiny_tokenizer())["train"]) == 1


def test_an_old_encoding_is_refused_with_the_line_that_reads_it(tmp_path):
    frame = FRAME.copy()
    frame.loc[3, "text"] = "trop mauvais, déjà vu"
    path = written(tmp_path, "cp1252-semicolon.csv", frame)
    with pytest.raises(DataError, match="is not UTF-8: byte 0xe9 in line 5") as refused:
        prepare_dataloaders(path, tiny_tokenizer())
    line = "pandas.read_csv" + str(refused.value).rpartition("pandas.read_csv")[2].removesuffix(".")
    read = eval(line, {"pandas": pandas})
    assert read["text"][3] == "trop mauvais, déjà vu"
    assert prepare_dataloaders(read, tiny_tokenizer())


REFUSED = {
    "missing.csv": "there is no file",
    "": "there is a folder",
    "rows.xlsx": "whose kind '.xlsx' is unknown",
    "ragged.csv": "cannot be read: ParserError",
    "empty.csv": "cannot be read: EmptyDataError",
    "broken.json": "cannot be read: JSONDecodeError",
    "broken.parquet": "cannot be read: ",
}
CONTENTS = {
    "rows.xlsx": "PK",
    "ragged.csv": "a,b\n1,2\n1,2,3,4\n",
    "empty.csv": "",
    "broken.json": "[{",
    "broken.parquet": "PAR1",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named(name, tmp_path):
    if name in CONTENTS:
        (tmp_path / name).write_text(CONTENTS[name])
    with pytest.raises(DataError, match=REFUSED[name]):
        prepare_dataloaders({"train": tmp_path / name}, tiny_tokenizer())


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_strings_of_json_stay_strings(name, tmp_path):
    """As in a dataset of the file: pandas would make one class of "01" and "1", and dates."""
    rows = [
        {"text": "001", "label": "01", "date": "2020-01-01", "id": "0012", "size": 0.1},
        {"text": "2", "label": "1", "date": "x", "id": None, "size": 2**53 + 1},
    ]
    lines = "\n\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(lines if name.endswith("l") else json.dumps(rows))
    read = read_rows("train", tmp_path / name)
    texts = ["text", "label", "date", "id"]
    assert read.select_columns(texts).to_list() == [{n: r[n] for n in texts} for r in rows]
    assert read["size"][0] == 0.1


LONGER = {
    "a separator behind each row": ("text,title,label\na,b,1,\nc,d,0,\n", ["a", "c"]),
    "numbers of rows, as R writes them": ('"text","label"\n"1","a",NA\n"2","c",NA\n', ["a", "c"]),
    "commas in texts": ("text,label\ngood, really,1\nbad, too,0\n", "'good, really,1'"),
    "commas in the first text": ("text,label\ngood, really,1\nbad,0\n", "'good, really,1'"),
    "names of rows": ("text,label\nx,a,1\ny,c,0\n", "'x,a,1'"),
    "two more": ("text,label\nx,1,a,1\ny,2,c,0\n", "'x,1,a,1'"),
}


@pytest.mark.parametrize("name", LONGER)
def test_rows_with_more_cells_than_the_header_are_not_shifted(name, tmp_path):
    content, found = LONGER[name]
    path = tmp_path / "rows.csv"
    path.write_text(content)
    if isinstance(found, list):
        assert read_rows("train", path)["text"][:] == found
        return
    with pytest.raises(DataError, match=f"names in its header, .* in the row {found}") as refused:
        read_rows("train", path)
    line = "pandas.read_csv" + str(refused.value).rpartition("pandas.read_csv")[2].removesuffix(".")
    assert len(eval(line, {"pandas": pandas})) == 2


def test_a_column_of_mixed_kinds_is_named():
    frame = FRAME.assign(label=["pos", 1, "pos", 2.5, "pos", "neg"])
    with pytest.raises(DataError, match="The table of train cannot be read: Arrow"):
        prepare_dataloaders(frame, tiny_tokenizer())


def test_a_file_of_a_header_alone_has_0_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="train has 0 rows"):
        prepare_dataloaders(tmp_path / "rows.csv", tiny_tokenizer())


# Strange tables. ----------------------------------------------------------------------------------


def test_all_problems_of_a_table_whose_label_nobody_named_come_in_one_message(tmp_path):
    frame = FRAME.rename(columns={"text": "Comment", "label": "target"}).assign(when="2024-01-31")
    frame.loc[1, "Comment"] = None
    frame.loc[4, "target"] = None
    path = written(tmp_path, "index-semicolon.csv", frame)
    with pytest.raises(DataError) as refused:
        prepare_dataloaders(path, tiny_tokenizer(), model=tiny_bert())
    message = str(refused.value)
    for part in (
        *("Did you mean 'target'? Use label_column=\"target\".", "Row 4 of train has target=None"),
        *("Row 1 of train has Comment=None", "Here dataset = datasets.Dataset.from_csv("),
    ):
        assert part in message
    made = message.rpartition(" Here dataset = ")[2].removesuffix(".")
    dataset = eval(made, {"datasets": datasets})
    for line in fixes_in(message):
        if line not in made:
            dataset = run_fix(line, dataset)
    loaders = prepare_dataloaders(
        dataset, tiny_tokenizer(), model=tiny_bert(), label_column="target"
    )
    assert len(loaders["train"].dataset) == 4


def test_classes_that_differ_in_case_or_spaces_are_joined_by_one_line():
    frame = FRAME.assign(label=["Spam", "ham", "spam ", "ham", "HAM", "ham"])
    with pytest.raises(DataError, match=r"'HAM' and 'ham', and 1 more, which differ") as refused:
        prepare_dataloaders(frame, tiny_tokenizer())
    (line,) = (line for line in fixes_in(refused.value) if ".map(" in line)
    dataset = run_fix(line, datasets.Dataset.from_pandas(frame))
    loaders = prepare_dataloaders(dataset, tiny_tokenizer(), model=tiny_bert())
    assert sorted(labels_of(loaders["train"])) == [0, 0, 0, 0, 1, 1]


def test_a_file_without_a_header_is_refused_with_the_line_that_names_its_columns(tmp_path):
    path = tmp_path / "bare.csv"
    FRAME[["text", "label"]].to_csv(path, index=False, header=False, sep=";")
    with pytest.raises(DataError, match="has no header: its first line, good movie, pos,") as e:
        prepare_dataloaders(path, tiny_tokenizer())
    line = "pandas.read_csv" + str(e.value).rpartition("pandas.read_csv")[2].removesuffix(".")
    frame = eval(line, {"pandas": pandas})
    loaders = prepare_dataloaders(
        frame, tiny_tokenizer(), text_columns="column0", label_column="column1"
    )
    assert labels_of(loaders["train"]) == labels_of(
        prepare_dataloaders(FRAME, tiny_tokenizer())["train"]
    )


SENTENCES = [f"this is message {number} of many" for number in range(12)]
SPAM = ["spam", "ham"] * 6
WITH_HEADER = {
    "a class as name": {"message": SENTENCES, "spam": SPAM},
    "a number as name": {"comment": SENTENCES, "1": [0, 1] * 6},
    "columns of 0 and 1 by number": {"review": SENTENCES, "1": [0, 1] * 6, "2": [1, 0] * 6},
    "no names": {"0": SENTENCES, "1": [0, 1] * 6},
    "numbers of pixels": {str(n): [n, 1, 255] * 4 for n in range(5)},
    "years": {str(n): [n / 3, 2.0, n] * 4 for n in range(2019, 2023)},
    "an index": {"": range(12), "message": SENTENCES, "spam": SPAM},
    "yes": {"question": SENTENCES, "yes": ["yes", "no"] * 6},
    "true": {"statement": SENTENCES, "True": [True, False] * 6},
}
WITHOUT = {
    "classes": [(text, label) for text, label in zip(SENTENCES, SPAM, strict=True)],
    "numbers": [(text, number % 2) for number, text in enumerate(SENTENCES)],
    "numbers alone": [(6 + n, 148 - n, 72, n / 2, n % 2) for n in range(12)],
    "an id": [(f"id{n:04}", text, n % 3) for n, text in enumerate(SENTENCES)],
    "two of one class": [(text, "no", "no") for text in SENTENCES],
    "truths": [(text, number % 2 == 0) for number, text in enumerate(SENTENCES)],
    "quoted": [(f'{text}, "quoted"', label) for text, label in zip(SENTENCES, SPAM, strict=True)],
}


@pytest.mark.parametrize("sep", [",", ";"])
def test_a_header_is_one_though_columns_are_named_like_their_values(sep, tmp_path):
    for name, columns in WITH_HEADER.items():
        path, frame = tmp_path / f"{name}.csv", pandas.DataFrame(columns)
        frame.to_csv(path, index=False, sep=sep)
        assert len(read_rows("train", path)) == 12, name
    for name, rows in WITHOUT.items():
        path = tmp_path / f"{name}.csv"
        pandas.DataFrame(rows).to_csv(path, index=False, header=False, sep=sep)
        with pytest.raises(DataError, match="has no header") as refused:
            read_rows("train", path)
        line = "pandas.read_csv" + str(refused.value).rpartition("pandas.read_csv")[2]
        frame = eval(line.removesuffix("."), {"pandas": pandas})
        assert frame.values.tolist() == [list(row) for row in rows], name


def test_what_may_be_a_header_or_a_row_is_refused_with_the_lines_for_both(tmp_path):
    frame = pandas.DataFrame({"phrase": ["good", "run", "do", "is"], "verb": ["noun", "verb"] * 2})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match="If it is a header, pass a frame") as refused:
        read_rows("train", tmp_path / "rows.csv")
    line = str(refused.value).split("pass a frame: ")[1].split(". Else")[0]
    assert len(read_rows("train", eval(line, {"pandas": pandas}))) == 4


def test_numbers_where_a_text_is_wanted_get_the_line_that_makes_texts():
    frame = pandas.DataFrame({"text": range(10), "label": [0, 1] * 5})
    with pytest.raises(
        DataError, match="Column 'text' of train holds numbers, not text"
    ) as refused:
        prepare_dataloaders(frame, tiny_tokenizer())
    (line,) = fixes_in(str(refused.value).partition(" Here ")[0])
    dataset = run_fix(line, datasets.Dataset.from_pandas(frame))
    assert prepare_dataloaders(dataset, tiny_tokenizer())


def test_a_file_is_read_once(tmp_path, monkeypatch):
    read = []
    of_pandas = pandas.read_csv
    monkeypatch.setattr(pandas, "read_csv", lambda *a, **o: read.append(a) or of_pandas(*a, **o))
    prepare_dataloaders({"train": written(tmp_path, "rows.csv")}, tiny_tokenizer())
    assert len(read) == 1


@pytest.mark.parametrize(
    "columns",
    [
        {"label": pandas.Categorical(["a", "b"] * 3)},
        {"text": pandas.array(["good"] * 6, dtype="string"), "label": pandas.array([0, 1] * 3)},
        {"label": [True, False] * 3},
        {"d": pandas.to_datetime(["2024-01-01"] * 6)},
        {"text": ['good, "bad"\nmovie; a|b'] * 6},
    ],
    ids=["category", "string and Int64", "bool", "dates", "quotes"],
)
def test_columns_of_any_kind_are_read(columns, tmp_path):
    frame = FRAME.assign(**columns)
    for given in (frame, written(tmp_path, "rows.csv", frame)):
        (loader,) = prepare_dataloaders(given, tiny_tokenizer(), model=tiny_bert()).values()
        assert len(labels_of(loader)) == 6
