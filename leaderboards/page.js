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

  const made = (tag, parent, text, more) => {
    const element = Object.assign(document.createElement(tag), { textContent: text }, more);
    parent.append(element);
    return element;
  };
  const sheets = [...document.querySelectorAll(".sheet")];
  const nameOf = (row) => row.dataset.name ?? row.cells[0].firstChild.textContent.trim();
  const markOf = (row) => row.cells[0].querySelector("sup:not(.mark)")?.textContent ?? "";
  const remarksOf = (sheet) =>
    [...document.querySelectorAll(`#${sheet.id}-remarks li`)].map((line) => line.textContent);
  const rowsOf = (sheet) => [...sheet.tBodies]
    .filter((body) => !body.classList.contains("line"))
    .flatMap((body) => [...body.rows]);
  // The parts of a cell: mean, deviation, interval.
  const partsOf = (cell) => {
    const part = (tag) => cell.querySelector(tag)?.textContent ?? "";
    const [deviation, interval] = [part("i"), part("small")];
    const text = cell.textContent.trim();
    const length = text.length - deviation.length - part("sup").length - interval.length;
    return [text.slice(0, length), deviation.slice(1), interval];
  };
  const plain = (number) => number.replace("−", "-").replace(/,/g, "");

  // Sorting: within the groups, so that what stands below the line stays there; missing last.
  const sort = (sheet, column, descending) => {
    const key = (row) => {
      if (!column) return nameOf(row);
      const text = partsOf(row.cells[column])[0];
      return text === "–" ? "" : plain(text);
    };
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en") : x - y;
      return descending ? -order : order;
    };
    for (const body of sheet.tBodies) {
      if (!body.classList.contains("line")) body.append(...[...body.rows].sort(compare));
    }
  };
  for (const sheet of sheets) {
    for (const head of sheet.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const first = button.textContent.includes("↑") ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        for (const cell of head.parentElement.cells) cell.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", order);
        sort(sheet, head.cellIndex, order === "descending");
      });
    }
  }

  // Records: the last cell of a row links to them; in a mean, to those of all its attacks.
  const link = (row, parent) => {
    for (const group of row.dataset.at?.split("|") ?? []) {
      const [head, ...tails] = group.split(" ");
      for (const tail of tails) {
        const href = `${row.closest("table").dataset.base ?? ""}${head}-s${tail}.json`;
        made("a", parent, tail.split("-")[0], { href, title: `record of seed ${tail}` });
      }
    }
  };
  const unfold = (details, row, over) => {
    for (const sheet of over) {
      const own = rowsOf(sheet).find((other) => nameOf(other) === nameOf(row));
      const name = sheet.closest("details").querySelector("summary").textContent;
      if (own?.dataset.at) link(own, made("span", details, `${name} `));
    }
  };
  for (const sheet of sheets) {
    const over = sheet.dataset.over?.split(" ").map((id) => document.getElementById(id)) ?? [];
    const linked = (part) => part.querySelector("[data-at]");
    if (![sheet, ...over].some(linked)) continue;
    made("th", sheet.tHead.rows[0], "records", { className: "words" });
    for (const row of rowsOf(sheet)) {
      const cell = made("td", row, "", { className: "words records" });
      link(row, cell);
      if (!over.length) continue;
      const details = made("details", cell, "");
      made("summary", details, "show");
      details.addEventListener("toggle", () => unfold(details, row, over), { once: true });
    }
    const line = sheet.querySelector(".line th");
    if (line) line.colSpan += 1;
  }

  // Downloads: the tables as they stand, sorted and filtered.
  const columnsOf = (sheet) => [...sheet.tHead.rows[0].cells]
    .map((cell) => cell.textContent).filter((heading) => heading !== "records");
  const titleOf = (sheet) => document.getElementById(`${sheet.id}-of`).textContent;
  const shownOf = (sheet) => rowsOf(sheet).filter((row) => !row.hidden);
  const csv = (found) => {
    const headings = [...new Set(found.flatMap(columnsOf))];
    const field = (text) => {
      const safe = /^[=+@]|^-(?![0-9.]+$)/.test(text) ? `'${text}` : text;
      return /[",\n]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
    };
    const lines = [["table", ...headings.flatMap((heading) =>
      heading === "defense" ? [heading] : [heading, "±"]), "remarks"]];
    for (const sheet of found) {
      const [columns, remarks] = [columnsOf(sheet), remarksOf(sheet)];
      for (const row of shownOf(sheet)) {
        lines.push([titleOf(sheet), ...headings.flatMap((heading) => {
          const cell = row.cells[columns.indexOf(heading)];
          if (heading === "defense") return [nameOf(row)];
          const [mean, deviation] = cell ? partsOf(cell) : ["", ""];
          return [mean === "–" ? "" : plain(mean), deviation];
        }), remarks[markOf(row) - 1] ?? ""]);
      }
    }
    return lines.map((line) => line.map(field).join(",") + "\n").join("");
  };
  const escapes = {
    "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}",
    "↑": "$\\uparrow$", "↓": "$\\downarrow$", "–": "--", "−": "$-$", "·": "$\\cdot$",
  };
  const tex = (text) => text.replace(/[\\~^↑↓–−·]|[{}&%$#_]/g, (sign) => escapes[sign] ?? `\\${sign}`);
  const latex = (found) => found.map((sheet) => {
    const columns = columnsOf(sheet);
    const line = (row) => columns.map((_, index) => {
      if (!index) return tex(nameOf(row)) + (markOf(row) && `$^{${markOf(row)}}$`);
      const [mean, deviation] = partsOf(row.cells[index]);
      const text = tex(mean) + (deviation && ` $\\pm$ ${deviation}`);
      return row.cells[index].querySelector("b") ? `\\textbf{${text}}` : text;
    }).join(" & ") + " \\\\\n";
    const groups = [...sheet.tBodies].map((body) =>
      [...body.rows].filter((row) => !row.hidden && row.cells.length > 1).map(line).join(""));
    const align = columns.map((name) => name === "defense" ? "l" : "r").join("");
    const notes = remarksOf(sheet).map((text, index) => `$^{${index + 1}}$ ${tex(text)}`);
    return `\\begin{table}\n\\centering\n\\caption{${tex(titleOf(sheet))}.}\n`
      + `\\begin{tabular}{${align}}\n\\toprule\n${columns.map(tex).join(" & ")} \\\\\n\\midrule\n`
      + groups.filter(Boolean).join("\\midrule\n")
      + `\\bottomrule\n\\end{tabular}\n${notes.map((note) => `\\par ${note}\n`).join("")}\\end{table}\n`;
  }).join("\n");
  for (const button of document.querySelectorAll("[data-file]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const found = [...button.closest(".board").querySelectorAll(".sheet")];
      const text = button.dataset.file.endsWith(".csv") ? csv(found) : latex(found);
      const href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
      Object.assign(document.createElement("a"), { href, download: button.dataset.file }).click();
      URL.revokeObjectURL(href);
    });
  }

  // Filtering: by the name of the defense, in every table of the board.
  for (const board of document.querySelectorAll(".board")) {
    const label = board.querySelector(".filter");
    const main = rowsOf(board.querySelector(".sheet"));
    const maps = [...board.querySelectorAll(".heat")];
    const rows = [...board.querySelectorAll(".sheet"), ...maps].flatMap(rowsOf);
    label.hidden = false;
    label.querySelector("input").addEventListener("input", (event) => {
      const part = event.target.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !nameOf(row).toLowerCase().includes(part);
      const shown = main.filter((row) => !row.hidden).length;
      board.querySelector(".found").textContent = part ? `${shown} of ${main.length}` : "";
    });
  }
})();
