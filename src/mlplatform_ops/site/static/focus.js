// What scrolls sideways can be reached by the keyboard too, and has a name for who hears the page.
const reach = () => {
  for (const box of document.querySelectorAll("pre, .cell_output, .table-wrapper, .picture")) {
    if (box.scrollWidth <= box.clientWidth || box.hasAttribute("tabindex")) continue;
    box.setAttribute("tabindex", "0");
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "scrolls sideways, " + ++reach.count);
  }
};
reach.count = 0;
addEventListener("load", reach);
addEventListener("resize", reach);
