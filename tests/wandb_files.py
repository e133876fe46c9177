"""Reads the files that W&B writes offline: records of protobuf in a log of LevelDB's format."""

import json
import struct

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 32768, 7


def read_records(path):
    """Give the records of a file, up to one that was not written to its end."""
    data, position, content = path.read_bytes(), _HEADER, b""
    while position + _HEADER <= len(data):
        if (left := _BLOCK - position % _BLOCK) < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        content += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            content = b""
            yield record


def read_rows(path):
    """Return the rows of the history, without what W&B adds to each."""
    rows = []
    for record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item for item in record.history.item}
            rows.append(
                {n: json.loads(i.value_json) for n, i in items.items() if n not in _ADDED}
                | {"_step": record.history.step.num}
            )
    return rows


_ADDED = ("_runtime", "_timestamp", "_step", "_wandb")


def read_config(path):
    config = {}
    for record in read_records(path):
        for part in (record.run.config, record.config):
            config |= {item.key: json.loads(item.value_json) for item in part.update}
    return config
