"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");

  // Theme: what the system wants, until the reader says otherwise.
  const toggle = document.getElementById("theme");
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const name = () => { toggle.textContent = isDark() ? "Light" : "Dark"; };
  const stored = (value) => {
    try { // a file: page may have no storage
      return value ? localStorage.setItem("theme", value) : localStorage.getItem("theme");
    } catch { return null; }
  };
  const wanted = stored();
  if (wanted === "dark" || wanted === "light") root.dataset.theme = wanted;
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(root.dataset.theme);
    name();
  });
  systemDark.addEventListener("change", name);
  name();

  // Sorting: within the groups, so that what stands below the line stays there; missing last.
  const sort = (table, column, descending) => {
    const key = (row) => row.cells[column].dataset.sort;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en") : x - y;
      return descending ? -order : order;
    };
    for (const body of table.tBodies) {
      if (!body.classList.contains("line")) body.append(...[...body.rows].sort(compare));
    }
  };
  for (const button of document.querySelectorAll(".sheet thead button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const first = button.textContent.includes("↑") ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      for (const cell of head.parentElement.cells) cell.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      sort(head.closest("table"), head.cellIndex, order === "descending");
    });
  }

  // Filtering: by the name of the defense, in every table of the board.
  for (const board of document.querySelectorAll(".board")) {
    const label = board.querySelector(".filter");
    const rows = [...board.querySelectorAll("tr[data-name]")];
    label.hidden = false;
    label.querySelector("input").addEventListener("input", (event) => {
      const part = event.target.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.dataset.name.toLowerCase().includes(part);
      const main = rows.filter((row) => row.closest("table") === board.querySelector("table"));
      const shown = main.filter((row) => !row.hidden).length;
      board.querySelector(".found").textContent = part ? `${shown} of ${main.length}` : "";
    });
  }
})();
