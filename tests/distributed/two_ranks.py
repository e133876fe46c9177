"""Run on each of two ranks: scripts of this folder, one after the other in the same processes.

two_ranks.py FOLDER "SCRIPT ARGUMENT ..." ...

A script is a module with a function ``main``, which gets a folder of its own and whole numbers.
"""

import sys
from importlib import import_module
from pathlib import Path

from manualloop import prepare_strategy

if __name__ == "__main__":
    assert prepare_strategy().world_size == 2
    for text in sys.argv[2:]:
        script, *arguments = text.split()
        import_module(script).main(Path(sys.argv[1]) / script, *map(int, arguments))
        print(f"passed: {text}", flush=True)
