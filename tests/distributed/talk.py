"""Exchange values with the other ranks; one of them fails.

talk.py FAULT VICTIM
"""

import os
import signal
import sys

from limits import FOREVER, wait_patiently, wait_until_stopped

from manualloop import prepare_strategy

if __name__ == "__main__":
    fault, victim = sys.argv[1], int(sys.argv[2])
    # A stopped rank sends no news. Rank 0 then asks who is there: rank 1 has ten seconds to answer.
    stopped = {"_REPORT": 0.2, "_ANSWER": 10.0 if victim != 0 else 0.2}
    wait_patiently(**(stopped if fault == "stop" else {}))
    strategy = prepare_strategy(timeout=FOREVER)
    pids = strategy.gather(os.getpid())
    for number in range(20):
        if number == 10 and fault == "stop" and strategy.rank != victim:
            wait_until_stopped(pids[victim])
        if number == 10 and strategy.rank == victim:
            if fault == "raise":
                raise ValueError("first line\nsecond line of the message")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])
        assert strategy.gather(number) == [number] * strategy.world_size
