"""From datasets to batches: which columns, in which order, padded how."""
