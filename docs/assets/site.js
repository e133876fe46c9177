// The theme leaves the dialog of the search without a name.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");

// A long name in a narrow table breaks behind an underscore, and nowhere else.
for (const code of document.querySelectorAll(".md-typeset td code")) {
  for (const text of [...code.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE)) {
    const parts = text.data.split(/(?<=_|\(|=|\.)(?=\w)/);
    text.replaceWith(...parts.flatMap((part, n) => (n ? [document.createElement("wbr"), part] : [part])));
  }
}

// A table that scrolls by itself can be scrolled by the keyboard.
addEventListener("load", () => {
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1;
  });
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((table) => observer.observe(table));
});
