"""The parts that a page is made of, as plain data. The template draws each by its ``kind``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeAlias

from markupsafe import Markup


class Cell(NamedTuple):
    """A cell of a table that is more than a text.

    Attributes:
        text: Its text.
        share: Length of a bar behind the text, 0 to 1; None draws none.
        heat: Strength of the colour behind the text, 0 to 1; None leaves it out.
        is_strong: Whether it is emphasized.
    """

    text: str
    share: float | None = None
    heat: float | None = None
    is_strong: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table. The first cell of each row is its header.

    Attributes:
        caption: What the table shows.
        columns: Headers of the columns.
        rows: Cells of each row: texts, or more than that.
        texts: Numbers of the columns that hold texts; others hold numbers, which stand aligned.
        note: A sentence under the table.
        is_matrix: Whether the cells form a picture, so that all columns are equally wide.
        across: Header over all columns but the first.
    """

    kind: ClassVar = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    texts: frozenset[int] = frozenset({0})
    note: str = ""
    is_matrix: bool = False
    across: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with the same numbers as a table, which opens on demand.

    Attributes:
        title: What it shows.
        picture: The picture.
        table: The numbers.
        legend: Names of what is drawn, by class of the style.
    """

    kind: ClassVar = "chart"
    title: str
    picture: Markup
    table: Table | None = None
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Charts:
    """Pictures side by side, where the page is wide enough.

    Attributes:
        charts: The pictures.
    """

    kind: ClassVar = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph.

    Attributes:
        text: Its text.
        is_small: Whether it is a remark.
    """

    kind: ClassVar = "text"
    text: str
    is_small: bool = False


@dataclass(frozen=True, slots=True)
class Code:
    """Lines that run.

    Attributes:
        title: What they do.
        code: The lines.
    """

    kind: ClassVar = "code"
    title: str
    code: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Names with their values.

    Attributes:
        facts: Values by name.
        title: Heading of them; empty for none.
    """

    kind: ClassVar = "facts"
    facts: Mapping[str, str]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Details:
    """Parts that open on demand, and are printed.

    Attributes:
        title: What they hold.
        parts: The parts.
    """

    kind: ClassVar = "details"
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class Example:
    """A row of the data with what was predicted of it.

    Attributes:
        title: Name of the row.
        facts: What was predicted, by name.
        texts: Texts of the row, by name.
    """

    title: str
    facts: Mapping[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows of the data.

    Attributes:
        examples: The rows.
    """

    kind: ClassVar = "examples"
    examples: Sequence[Example]


Part: TypeAlias = "Table | Chart | Charts | Text | Code | Facts | Details | Examples"


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a page.

    Attributes:
        key: Its id.
        title: Its heading.
        parts: What it holds; a section that holds nothing is left out.
    """

    key: str
    title: str
    parts: Sequence[Part]


class Tile(NamedTuple):
    """A number at the top of a page.

    Attributes:
        name: What it is.
        value: The number.
        note: A word on it.
        is_first: Whether it is the one that matters most.
    """

    name: str
    value: str
    note: str = ""
    is_first: bool = False
