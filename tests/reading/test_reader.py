"""Reader: every batch once, in order, over any number of passes and interruptions."""

import copy
import itertools
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resume_cases import DataLoader, OwnSampler, Rows, SizedStatefulLoader, Stream, built
from torch.utils.data import Dataset, Sampler, get_worker_info

from manualloop import DataError
from manualloop.checkpoint.nested import put_together, take_apart
from manualloop.data.sampler import ordered_loader
from manualloop.randomness import get_random_state, is_same_random_state, set_random_state
from manualloop.reading.ranks import Shard
from manualloop.reading.reader import Reader
from manualloop.reading.sources import source_of

TWO = {"num_workers": 2}
KEPT = {"num_workers": 2, "persistent_workers": True}


def seed_all(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def rows_of(batch):
    return batch["id"].tolist()


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def given_by(reader):
    """The batches of a pass that begins now, each with whether it is the last."""
    return ((*window.batches, window.ends_epoch) for window in reader.windows(1))


def take(reader, num_batches):
    """The rows of some batches of a new pass, each counted as used, and then the place."""
    given, rows = given_by(reader), []
    for _ in range(num_batches):
        batch, is_last = next(given)
        rows.append(rows_of(batch))
        reader.settle(ends_epoch=is_last)
    return rows, reader.position()


def rest(reader):
    rows, ends = [], []
    for batch, is_last in given_by(reader):
        rows.append(rows_of(batch))
        ends.append(is_last)
        reader.settle(ends_epoch=is_last)
    assert ends == [False] * (len(ends) - 1) + [True]
    return rows


def through_json(position):
    """What a checkpoint on a disk makes of a place."""
    tensors = {}
    return put_together(json.loads(json.dumps(take_apart(position, "position", tensors))), tensors)


def prepared(seed=1, batch_size=2, **options):
    return ordered_loader(
        Rows(), "train", batch_size, shuffle=True, seed=seed, drop_last=False, **options
    )


class TooShort(list):
    """A list that says of itself that it is longer than it is."""

    def __len__(self):
        return super().__len__() + 2


class TooLong(list):
    def __len__(self):
        return super().__len__() - 2


@pytest.mark.parametrize("num_used", [0, 1, 3])
def test_a_wrong_length_is_still_reported_after_a_resume(num_used):
    batches = [{"id": torch.tensor([number])} for number in range(5)]
    _, place = take(Reader(source_of(TooShort(batches))), num_used)
    reader = Reader(source_of(TooShort(batches)), place if num_used else None)
    with pytest.raises(DataError, match=r"gave 5 batches, but its len\(\) is 7"):
        list(given_by(reader))
    reader = Reader(source_of(TooLong(batches)), place if num_used else None)
    if num_used < 3:
        with pytest.raises(DataError, match=r"gave more than 3 batches, but its len\(\) is 3"):
            list(given_by(reader))


def test_a_wrong_length_of_a_loader_is_reported_after_a_resume():
    class Short(OwnSampler):
        def __len__(self):
            return 20

    def make():
        return built(sampler=Short(random.Random(1)), shuffle=None)

    _, place = take(Reader(source_of(make())), 3)
    with pytest.raises(DataError, match=r"gave 7 batches, but its len\(\) is 10"):
        list(given_by(Reader(source_of(make()), place)))


@settings(max_examples=40)
@given(
    num_batches=st.integers(1, 8),
    window=st.integers(1, 3),
    cuts=st.lists(st.integers(0, 8), max_size=3),
    has_length=st.booleans(),
)
def test_batches_that_were_given_and_not_settled_are_given_again(
    num_batches, window, cuts, has_length
):
    class Unsized:
        def __iter__(self):
            return iter(batches)

    batches = [{"id": torch.tensor([number])} for number in range(num_batches)]
    loader = batches if has_length else Unsized()
    reader, used = Reader(source_of(loader)), []
    for cut in [*cuts, None]:
        unsettled = []
        for number, (batch, is_last) in enumerate(given_by(reader)):
            if number == cut:
                break
            unsettled += rows_of(batch)
            if len(unsettled) == window or is_last:
                used, unsettled = used + unsettled, []
                reader.settle(ends_epoch=is_last)
        if len(used) == num_batches:
            break
        # To and fro as a checkpoint would, and within the process.
        place = reader.position()
        assert place["num_batches"] == len(used)
        reader = Reader(source_of(loader), through_json(place))
    assert used == list(range(num_batches))


@pytest.mark.parametrize(
    "make",
    [prepared, built, lambda: DataLoader(Stream(), 2), SizedStatefulLoader],
    ids=["prepared", "built", "stream", "stateful loader"],
)
def test_of_an_unfinished_window_nothing_is_counted(make):
    seed_all(1)
    whole = rest(Reader(source_of(make())))
    seed_all(1)
    reader = Reader(source_of(make()))
    given = given_by(reader)
    for _ in range(3):
        next(given)
    reader.settle()
    before = through_json(reader.position())
    next(given), next(given)
    place = through_json(reader.position())
    assert place["num_batches"] == before["num_batches"] == 3
    seed_all(9)
    assert rest(Reader(source_of(make()), place)) == whole[3:]


def test_before_a_batch_was_asked_for_the_place_is_the_one_that_was_given():
    _, place = take(Reader(source_of(built())), 2)
    reader = Reader(source_of(built()), place)
    assert reader.position() == place
    assert Reader(source_of(built()), reader.position()).position() == place


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("has_generator", [False, True])
def test_a_whole_pass_draws_what_a_plain_for_loop_draws(has_generator, num_workers):
    def read_twice(read):
        seed_all(1)
        generator = torch.Generator().manual_seed(4)
        loader = built(num_workers=num_workers, generator=generator if has_generator else None)
        rows = [read(loader), read(loader)]
        return rows, get_random_state(devices=False), generator.get_state()

    expected = read_twice(lambda loader: [rows_of(batch) for batch in loader])
    for read in (
        lambda loader: rest(Reader(source_of(loader))),
        # Asked for its place at the last batch, before it is known that none follows.
        lambda loader: take(Reader(source_of(loader)), 7)[0],
    ):
        found = read_twice(read)
        assert found[0] == expected[0]
        assert is_same_random_state(found[1], expected[1])
        assert torch.equal(found[2], expected[2])


def test_at_the_end_of_a_pass_the_place_is_the_start_of_the_next():
    seed_all(1)
    reader = Reader(source_of(built()))
    rest(reader)
    place, state = through_json(reader.position()), get_random_state(devices=False)
    expected = rest(reader)
    assert (place["kind"], place["num_batches"]) == ("dataloader", 0)
    assert "random" not in place, "the next pass begins with that of its time"
    set_random_state(state)
    assert rest(Reader(source_of(built()), place)) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: built(generator=torch.Generator().manual_seed(random.getrandbits(30))),
        lambda: built(sampler=OwnSampler(random.Random(random.random())), shuffle=None),
        lambda: built(
            sampler=OwnSampler(np.random.default_rng(random.getrandbits(30))), shuffle=None
        ),
        lambda: built(
            sampler=OwnSampler(np.random.RandomState(random.getrandbits(30))), shuffle=None
        ),
    ],
    ids=["torch", "python", "numpy", "numpy, legacy"],
)
@pytest.mark.parametrize("num_passes", [0, 1, 2])
def test_generators_of_sampler_and_loader_go_on_where_they_were(make, num_passes):
    seed_all(1)
    reader = Reader(source_of(make()))
    for _ in range(num_passes):
        rest(reader)
    given = given_by(reader)
    for _ in range(3):
        next(given)
    reader.settle()
    place, state = through_json(reader.position()), get_random_state(devices=False)
    expected = [rows_of(batch) for batch, *_ in given]
    reader.settle(ends_epoch=True)
    following = rest(reader)
    seed_all(2)
    reader = Reader(source_of(make()), place)
    set_random_state(state)
    assert rest(reader) == expected
    assert rest(reader) == following


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (prepared, built),
        (built, prepared),
        (built, lambda: DataLoader(Stream(), 2)),
        (built, lambda: list(DataLoader(Rows(), 2))),
        (lambda: DataLoader(Stream(), 2), built),
        (lambda: list(DataLoader(Rows(), 2)), built),
        (SizedStatefulLoader, built),
        (built, SizedStatefulLoader),
    ],
    ids=lambda make: getattr(make, "__name__", "").strip("<>"),
)
def test_another_kind_of_loader_falls_back_on_the_number_of_rows_and_says_so(before, after, caplog):
    _, place = take(Reader(source_of(before())), 3)
    with caplog.at_level("INFO", logger="manualloop"):
        found = rest(Reader(source_of(after()), through_json(place)))
    assert sum(map(len, found)) == 8
    # A prepared loader needs to know nothing else than the number of rows.
    assert ("nothing tells the place but the number of rows" in caplog.text) == (
        after is not prepared
    )


def test_without_a_place_the_rows_that_were_used_are_read_and_dropped(caplog):
    with caplog.at_level("INFO", logger="manualloop"):
        found = rest(Reader(source_of(list(DataLoader(Rows(), 2))), {"num_samples": 6}))
    assert found == [[6, 7], [8, 9], [10, 11], [12, 13]]
    assert "they are read again and dropped" in caplog.text


def test_a_prepared_loader_goes_on_in_the_order_of_the_seed_it_began_with():
    expected = rest(Reader(source_of(prepared(seed=1))))
    _, place = take(Reader(source_of(prepared(seed=1))), 3)
    reader = Reader(source_of(prepared(seed=2)), through_json(place))
    assert rest(reader) == expected[3:]
    assert rest(reader) == rest(Reader(source_of(prepared(seed=2)))) != expected


@pytest.mark.parametrize("make", [prepared, built], ids=["prepared", "built"])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 14])
def test_another_batch_size_gives_the_rest_of_the_rows_in_the_same_order(make, batch_size):
    seed_all(1)
    whole = flat(rest(Reader(source_of(make()))))
    seed_all(1)
    _, place = take(Reader(source_of(make())), 3)
    found = rest(Reader(source_of(make(batch_size=batch_size)), through_json(place)))
    assert flat(found) == whole[6:]
    assert max(map(len, found)) <= batch_size


@pytest.mark.parametrize("batch_sizes", [(2, 3, 2), (2, 4, 3), (4, 1, 5), (3, 5, 2)], ids=str)
def test_after_two_changes_of_the_batch_size_the_place_is_still_right(batch_sizes):
    seed_all(1)
    whole = flat(rest(Reader(source_of(built(batch_size=1)))))
    seed_all(1)
    used, place = [], None
    for number, batch_size in enumerate(batch_sizes):
        reader = Reader(source_of(built(batch_size=batch_size)), place)
        if number == len(batch_sizes) - 1:
            used += flat(rest(reader))
            break
        rows, place = take(reader, 1)
        used += flat(rows)
        place = through_json(place)
    assert used == whole


@pytest.mark.parametrize("make", [prepared, built], ids=["prepared", "built"])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 1), (1, 2)])
def test_another_number_of_workers_gives_the_same_rows(make, before, after):
    seed_all(1)
    whole = rest(Reader(source_of(make(num_workers=before))))
    seed_all(1)
    _, place = take(Reader(source_of(make(num_workers=before))), 3)
    state = get_random_state(devices=False)
    reader = Reader(source_of(make(num_workers=after)), through_json(place))
    set_random_state(state)
    assert rest(reader) == whole[3:]
    assert reader.position()["num_workers"] == after


class Numbers(Dataset):
    """Rows that tell which worker reads them, its seed, and what it has drawn."""

    def __len__(self):
        return 14

    def __getitem__(self, row):
        info = get_worker_info()
        drawn = torch.rand(()).item(), random.random(), np.random.rand()
        return row, info.id, info.seed, info.num_workers, init_calls[:], drawn


init_calls = []


def note_call(worker):
    info = get_worker_info()
    init_calls.append((worker, info.id, info.seed, torch.initial_seed()))


def numbered(**options):
    return DataLoader(
        Numbers(),
        2,
        shuffle=True,
        collate_fn=tuple,
        worker_init_fn=note_call,
        generator=torch.Generator().manual_seed(random.getrandbits(30)),
        **options,
    )


def read_all(reader, num_passes):
    found = []
    for _ in range(num_passes):
        for batch, is_last in given_by(reader):
            found.append(batch)
            reader.settle(ends_epoch=is_last)
    return found


@pytest.mark.parametrize(
    "options",
    [TWO, pytest.param(KEPT, marks=pytest.mark.exhaustive), {"num_workers": 1}],
    ids=["2 workers", "2 kept workers", "1 worker"],
)
def test_workers_have_their_number_and_seed_again_after_a_resume(options):
    seed_all(1)
    whole = read_all(Reader(source_of(numbered(**options)), count_rows=len), 2)
    assert {row[1] for batch in whole for row in batch} == set(range(options["num_workers"]))
    for batch in whole:
        for _, worker, seed, num_workers, calls, _ in batch:
            assert calls == [(worker, worker, seed, seed)]
            assert num_workers == options["num_workers"]
    for cut in (1, 2, 3, 6):
        seed_all(1)
        reader = Reader(source_of(numbered(**options)), count_rows=len)
        given = given_by(reader)
        first = [next(given)[0] for _ in range(cut)]
        reader.settle()
        place, state = through_json(reader.position()), get_random_state(devices=False)
        given.close()
        seed_all(2)
        reader = Reader(source_of(numbered(**options)), place, count_rows=len)
        set_random_state(state)
        assert first + read_all(reader, 2) == whole, f"cut after batch {cut}"


def test_with_other_workers_what_the_old_ones_had_is_not_given_to_them():
    reader = Reader(source_of(numbered(**TWO)), count_rows=len)
    given = given_by(reader)
    for _ in range(3):
        next(given)
    reader.settle()
    place = reader.position()
    assert set(place["workers"]) == {"0", "1"}
    reader = Reader(source_of(numbered(num_workers=1)), place, count_rows=len)
    first, *_ = next(given_by(reader))
    reader.settle()
    _, worker, seed, _, _, drawn = first[0]
    assert worker == 0
    assert drawn[0] == torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    assert drawn[1] == random.Random(seed).random()
    place = reader.position()
    assert set(place["workers"]) == {"0"}
    assert place["last_worker"] == 0


@pytest.mark.parametrize("num_passes", [1, 2])
def test_kept_workers_keep_their_seed_and_number_also_from_a_later_pass(num_passes):
    seed_all(1)
    whole = read_all(Reader(source_of(numbered(**KEPT)), count_rows=len), num_passes + 2)
    seed_all(1)
    reader = Reader(source_of(numbered(**KEPT)), count_rows=len)
    first = read_all(reader, num_passes)
    given = given_by(reader)
    first += [next(given)[0] for _ in range(3)]
    reader.settle()
    place, state = through_json(reader.position()), get_random_state(devices=False)
    seed_all(2)
    reader = Reader(source_of(numbered(**KEPT)), place, count_rows=len)
    set_random_state(state)
    assert first + read_all(reader, 2) == whole


@pytest.mark.parametrize("options", [{}, TWO], ids=["in the process", "2 workers"])
def test_the_loader_is_the_users_own_again_as_soon_as_the_pass_has_begun(options):
    loader = built(worker_init_fn=note_call if options else None, **options)
    before = dict(vars(loader))
    reader = Reader(source_of(loader))
    given = given_by(reader)
    batch, *_ = next(given)
    assert isinstance(batch, dict)
    assert {key: value for key, value in vars(loader).items() if key != "_iterator"} == {
        key: value for key, value in before.items() if key != "_iterator"
    }
    reader.settle()
    given = given_by(Reader(source_of(loader), reader.position()))
    next(given)
    assert loader.batch_sampler is before["batch_sampler"]
    assert loader.collate_fn is before["collate_fn"]
    assert len(list(loader)) == 7


def test_the_loader_is_the_users_own_again_when_it_cannot_be_read():
    class Broken(Sampler):
        def __len__(self):
            return 14

        def __iter__(self):
            raise RuntimeError("no order today")

    loader = built(sampler=Broken(), shuffle=None, **TWO)
    before = loader.collate_fn
    with pytest.raises(RuntimeError, match="no order today"):
        next(given_by(Reader(source_of(loader))))
    assert loader.collate_fn is before
    assert loader.worker_init_fn is None


def test_a_place_is_not_moved_by_what_comes_after_it():
    for make in (built, prepared, lambda: DataLoader(Stream(), 2), lambda: built(**TWO)):
        reader = Reader(source_of(make()))
        given = given_by(reader)
        next(given)
        reader.settle()
        place = reader.position()
        before = through_json(copy.deepcopy(place))
        for _ in range(3):
            next(given)
        reader.settle()
        assert repr(through_json(place)) == repr(before)
        given.close()


def test_a_pass_opened_at_a_place_gives_as_many_batches_as_it_says():
    for make in (built, prepared, SizedStatefulLoader, lambda: list(DataLoader(Rows(), 2))):
        whole = source_of(make()).open({}, Shard())
        assert whole.left == len(list(whole.items)) == 7
        _, place = take(Reader(source_of(make())), 3)
        begun = source_of(make()).open(place, Shard())
        assert begun.num_used == 3
        assert begun.left == len(list(begun.items)) == 4


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (prepared, "prepared"),
        (built, "dataloader"),
        (lambda: DataLoader(Stream(), 2), "stream"),
        (SizedStatefulLoader, "stateful"),
        (list, "iterable"),
    ],
)
def test_a_place_tells_the_kind_of_its_loader(make, kind):
    loader = make()
    place = source_of(loader).position({}, 0)
    assert (place["kind"], place["num_batches"], place["num_workers"]) == (kind, 0, 0)
    assert place["batch_size"] == (2 if isinstance(loader, DataLoader) else None)
    through_json(place)


def test_rows_before_the_place_are_never_loaded():
    for make in (built, prepared, lambda: DataLoader(Stream(), 2)):
        seed_all(1)
        rows, place = take(Reader(source_of(make())), 3)
        loader = make()
        found = rest(Reader(source_of(loader), place))
        dataset = getattr(loader.dataset, "rows", loader.dataset)
        # A stream is read one batch ahead, and that one is kept beside the place.
        ahead = found[0] if isinstance(loader.dataset, Stream) else []
        assert [*ahead, *dataset.loaded] == flat(found)
        assert not set(dataset.loaded) & set(flat(rows))
