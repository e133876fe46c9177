"""Talk to the other ranks again and again; one of them is struck.

talk.py FAULT VICTIM
"""

import os
import signal
import sys
import time

from manualloop import prepare_strategy

if __name__ == "__main__":
    fault, victim = sys.argv[1], int(sys.argv[2])
    strategy = prepare_strategy(timeout=4)
    for number in range(200):
        if number == 10 and strategy.rank == victim:
            if fault == "raise":
                raise ValueError("first line\nsecond line of the message")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])
        assert strategy.gather(number) == [number] * strategy.world_size
        time.sleep(0.01)
