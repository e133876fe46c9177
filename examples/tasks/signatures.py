"""Words of signatures and their tags: the name of a function, its arguments, and their defaults."""

import ast
import re
from collections import Counter
from itertools import islice

from datasets import Dataset, DatasetDict
from stdlib import functions

from manualloop import load_metric


def tagged(node: ast.FunctionDef) -> dict[str, list[str]]:
    args, defaults = node.args.args, node.args.defaults
    parts = [(node.name, "NAME")]
    for arg, default in zip(args, [None] * (len(args) - len(defaults)) + defaults, strict=True):
        parts += [(arg.arg, "ARG")] + ([(ast.unparse(default), "DEFAULT")] if default else [])
    words, tags = [], []
    for text, kind in parts:
        found = re.findall(r"[a-z0-9]+|[^a-z0-9_\s]", text.lower())
        words += found
        tags += [f"{'I' if place else 'B'}-{kind}" for place in range(len(found))]
    return {"words": words, "tags": tags}


def load_signatures(num_rows: int | None = None) -> DatasetDict:
    rows = (tagged(node) for node in functions() if len(node.args.args) > 1)
    return Dataset.from_list([*islice(rows, num_rows)]).train_test_split(300, seed=0)


def usual_tags(data: DatasetDict) -> float:
    """Return the F1 of a guess by the most frequent tag of each word."""
    usual: dict[str, Counter] = {}
    for row in data["train"]:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            usual.setdefault(word, Counter())[tag] += 1
    words, other = data["test"]["words"], Counter(["B-ARG"])
    tags = [[usual.get(word, other).most_common(1)[0][0] for word in row] for row in words]
    scores = load_metric("seqeval").compute(predictions=tags, references=data["test"]["tags"][:])
    return scores["overall_f1"]
