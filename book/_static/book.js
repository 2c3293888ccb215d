// What the theme gets wrong for those who do not see the page, or use no mouse (checked by axe-core).
document.addEventListener("DOMContentLoaded", () => {
  // A name that differs from the words on a control can't be spoken by those who read these.
  document.querySelectorAll(".search-button-field, .theme-switch-button, summary").forEach((control) => control.removeAttribute("aria-label"));
  document.querySelectorAll(".theme-switch-button").forEach((control) => (control.title = "Colours: light, dark or the system's"));
  document.querySelectorAll("[role=list].citation-list").forEach((list) => list.removeAttribute("role"));  // its children are no list items
  document.querySelectorAll(".bd-article table").forEach((table) => {
    if (table.scrollWidth > table.clientWidth) table.tabIndex = 0;  // scrolls inside its own box: by the arrow keys too
  });
});
