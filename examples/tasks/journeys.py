"""Texts about journeys among other sentences, and questions that a span of them answers."""

import random

from datasets import Dataset

WHO = ["Anna", "Ben", "Carol", "Dan", "Emma", "Fred"]
WHERE = ["Athens", "Bern", "Cairo", "Dublin", "Essen", "Fes"]
WHEN = ["on Monday", "last week", "in May", "two days ago", "on Sunday night", "in 1999"]
REST = ["The rain had stopped", "Nobody was at home", "It was a quiet year", "Trains were late"]


def example(number: int, draw: random.Random) -> dict:
    (start, end), who, when = draw.sample(WHERE, 2), draw.choice(WHO), draw.choice(WHEN)
    told = [f"{who} went from {start} to {end} {when}", *draw.choices(REST, k=12)]
    context = ". ".join(draw.sample(told, len(told))) + "."
    asked = {"Who travelled?": who, "Where from?": start, "Where to?": end, "When?": when}
    question, answer = draw.choice([*asked.items()])
    answers = {"text": [answer], "answer_start": [context.index(answer)]}
    return {"id": str(number), "question": question, "context": context, "answers": answers}


def load_journeys(num_rows: int, seed: int) -> Dataset:
    draw = random.Random(seed)
    return Dataset.from_list([example(number, draw) for number in range(num_rows)])
