"""Whatever the metrics, the newest checkpoints and the best one are there, and nothing else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manualloop import SingleDevice, TrainState, load_checkpoint, save_checkpoint

VALUES = st.one_of(
    st.none(), st.sampled_from([0.0, 0.5, 1.0, math.nan]), st.floats(-1, 1), st.just(math.inf)
)


@pytest.mark.parametrize("number", [15, pytest.param(150, marks=pytest.mark.exhaustive)])
def test_the_newest_and_the_best_are_kept(number, tmp_path_factory):
    @settings(max_examples=number)
    @given(
        st.lists(VALUES, min_size=1, max_size=6),
        st.integers(1, 3),
        st.sampled_from(["score", "-score"]),
    )
    def check(values, keep, best_metric):
        check_a_run(tmp_path_factory.mktemp("run"), values, keep, best_metric)

    check()


def check_a_run(folder, values, keep, best_metric):
    model = torch.nn.Linear(1, 1)
    state = TrainState(model, torch.optim.SGD(model.parameters()))
    cpu = SingleDevice("cpu")
    sign = -1 if best_metric[0] == "-" else 1

    def worth(step):
        value = values[step - 1]
        return -math.inf if math.isnan(value) else sign * value

    (folder / "step-9").mkdir()
    for step, value in enumerate(values, start=1):
        state.progress.num_steps = step
        with torch.no_grad():
            model.weight.fill_(step)
        metrics = None if value is None else {"score": value}
        save_checkpoint(
            folder, state, metrics=metrics, keep=keep, best_metric=best_metric, strategy=cpu
        )
        scored = [n for n in range(1, step + 1) if values[n - 1] is not None]
        best = [max(scored, key=worth)] if scored else []  # max: the first of equals
        newest = list(range(max(1, step - keep + 1), step + 1))
        found = sorted(int(path.name[5:]) for path in folder.glob("step-0*"))
        assert found == sorted({*newest, *best})
        if best:
            info = load_checkpoint(folder, state, which="best", strategy=cpu)
            assert info.step == best[0] == model.weight.item()
            assert repr(info.metrics["score"]) == repr(float(values[best[0] - 1]))
        assert load_checkpoint(folder, state, strategy=cpu).step == step
    assert (folder / "step-9").is_dir()
