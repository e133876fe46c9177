"""Check that the built site loads nothing from elsewhere, and that it has all types it names.

    python docs/tools/check_site.py site

A reader's browser then asks nobody but the place that serves the site, which may be a folder.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADED = {  # attributes whose address a browser fetches by itself
    "script": ("src",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "link": ("href",),
    "use": ("href", "xlink:href"),
    "image": ("href", "xlink:href"),
}


class Loads(HTMLParser):
    """Collect the addresses that a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag loads."""
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev", "alternate"):
            return
        self.found += [values[name] or "" for name in LOADED.get(tag, ()) if name in values]
        self.found += re.findall(r"url\(([^)]*)\)", values.get("style") or "")


def is_elsewhere(address: str) -> bool:
    """Tell whether an address is outside of the site."""
    return bool(re.match(r"\s*[\"']?(?:[a-z]+:)?//", address, re.I))


def loads_of(path: Path) -> list[str]:
    """Return the addresses that a page or a style sheet loads."""
    text = path.read_text()
    if path.suffix == ".css":
        found = re.findall(r"url\(([^)]*)\)|@import\s+[\"']([^\"']*)", text)
        return [address or imported for address, imported in found]
    parser = Loads()
    parser.feed(text)
    return parser.found


def types_without_entry(site: Path) -> set[str]:
    """Return types of signatures that no page of the reference describes.

    The types that these are made of in turn need no entry.
    """
    pattern = r'<span title="(manualloop\.[\w.]*\.[A-Z]\w*)"'
    pages = [path for path in site.rglob("*.html") if path.name != "types.html"]
    return {name for path in pages for name in re.findall(pattern, path.read_text())}


def main(site: Path) -> None:
    """Print what was looked at; end with an error if something is wrong."""
    files = [path for path in sorted(site.rglob("*")) if path.suffix in (".html", ".css")]
    found = [
        f"{path.relative_to(site)}: {address}"
        for path in files
        for address in loads_of(path)
        if is_elsewhere(address)
    ]
    print(f"{len(files)} pages and style sheets, {len(found)} addresses outside of the site")
    if found or not files:
        sys.exit("\n".join(dict.fromkeys(found)) or f"{site} is empty")
    if missing := types_without_entry(site):
        sys.exit(f"docs/reference/types.md has no entry for {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
