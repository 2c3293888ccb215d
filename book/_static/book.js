// What the theme gets wrong for those who do not see the page, or use no mouse (checked by axe-core).
document.addEventListener("DOMContentLoaded", () => {
  // A name that differs from the words on a control can't be spoken by those who read these.
  document.querySelectorAll(".search-button-field, .theme-switch-button, summary").forEach((control) => control.removeAttribute("aria-label"));
  document.querySelectorAll(".theme-switch-button").forEach((control) => (control.title = "Colours: light, dark or the system's"));
  document.querySelectorAll("[role=list].citation-list").forEach((list) => list.removeAttribute("role"));  // its children are no list items
  reachTables();
  unfold();
});

// A table that scrolls inside its own box does so by the arrow keys too. What is folded has no size yet.
function reachTables() {
  document.querySelectorAll(".bd-article table").forEach((table) => {
    if (table.scrollWidth > table.clientWidth) table.tabIndex = 0;
  });
}
document.addEventListener("toggle", reachTables, true);

// What a link leads to may lie in a fold, and paper has none.
function unfold() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let fold = target && target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  if (target) target.scrollIntoView();
}
window.addEventListener("hashchange", unfold);
window.addEventListener("beforeprint", () => document.querySelectorAll("details.more").forEach((fold) => (fold.open = true)));
