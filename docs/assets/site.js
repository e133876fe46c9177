// The theme leaves the dialog of the search without a name.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
