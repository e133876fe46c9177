"""Say how many processes run, and how each of them sees it."""

from manualloop import prepare_strategy

if __name__ == "__main__":
    strategy = prepare_strategy()
    found = strategy.gather(strategy.rank)
    assert len(found) == strategy.world_size
    if strategy.is_main:
        print(f"RANKS {found}", flush=True)
