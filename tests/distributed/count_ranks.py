"""Print how many ranks run; each must see the same number."""

from manualloop import prepare_strategy

if __name__ == "__main__":
    strategy = prepare_strategy()
    found = strategy.gather(strategy.rank)
    assert len(found) == strategy.world_size
    if strategy.is_main:
        print(f"RANKS {found}", flush=True)
