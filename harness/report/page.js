"use strict";
// The report's page: sorts, filters and turns the pages of the main table, shows a case, says what a dot stands for.
// The figures were made into words when the file was written; nothing is computed here, and nothing is fetched.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);

  // An element with its properties and children; text stays text, whatever it holds.
  function make(name, properties, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  // The main table

  const table = byId("main");
  if (table) {
    const body = table.tBodies[0];
    const PAGE = Number(table.dataset.pageful); // lines laid out at once: a browser stays quick with any number
    const more = byId("more");
    const lines = [...body.rows, ...(more ? more.content.querySelectorAll("tr") : [])].map((row, place) => ({
      row, place, found: row.dataset.found.split("|"), text: "",
    }));
    let sorted = lines, first = 0, column = -1, descending = false;

    // What a line is sorted by: a figure or a severity as a number, a name as text, nothing where there is none.
    const key = (line) => {
      const cell = line.row.cells[column];
      if (cell.dataset.key !== undefined) return Number(cell.dataset.key);
      return cell.className === "none" || cell.className === "figure" ? null : cell.firstChild?.textContent ?? "";
    };
    const compare = (a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null); // last in either order
      const order = typeof a.key === "number" ? a.key - b.key : a.key.localeCompare(b.key, "en", { numeric: true });
      return descending ? -order : order;
    };

    const names = (row) => [0, 1, 2].flatMap((place) => [...row.cells[place].childNodes]).map((own) => own.textContent).join(" ");
    const matching = () => {
      const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
      const verdict = byId("verdict").value;
      return sorted.filter((line) => {
        if (words.length) line.text ||= names(line.row).toLowerCase();
        return words.every((word) => line.text.includes(word)) && (!verdict || line.found.includes(verdict));
      });
    };

    const show = (size = PAGE) => {
      const found = matching();
      if (first >= found.length) first = 0;
      const shown = found.slice(first, first + size);
      body.replaceChildren(...shown.map((line) => line.row));
      const of = found.length === lines.length ? "" : ` (of ${lines.length.toLocaleString("en")})`;
      const span = found.length ? `${first + 1}–${first + shown.length} of ` : "";
      byId("count").textContent = `${span}${found.length.toLocaleString("en")} lines${of}`;
      byId("back").disabled = first === 0;
      byId("next").disabled = first + size >= found.length;
      document.querySelector(".pages").hidden = found.length <= size;
    };

    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, place) => {
      const button = make("button", { type: "button", title: header.title }, header.textContent);
      header.replaceChildren(button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        descending = column === place ? !descending : header.className === "figure"; // the largest figure first
        column = place;
        const keyed = lines.map((line) => ({ line, key: key(line) }));
        sorted = keyed.sort((a, b) => compare(a, b) || a.line.place - b.line.place).map((item) => item.line);
        headers.forEach((other) => other.setAttribute("aria-sort", "none"));
        header.setAttribute("aria-sort", descending ? "descending" : "ascending");
        first = 0;
        show();
      });
    });

    const again = () => { first = 0; show(); };
    byId("find").addEventListener("input", again);
    byId("verdict").addEventListener("change", again);
    byId("back").addEventListener("click", () => { first = Math.max(0, first - PAGE); show(); });
    byId("next").addEventListener("click", () => { first += PAGE; show(); });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    byId("controls").hidden = false;
    window.addEventListener("beforeprint", () => { first = 0; show(Infinity); });
    window.addEventListener("afterprint", again);
    show();
  }

  // A case, or all cases of a line: what an address ends in (#case-12, #row-3)

  const panel = byId("panel");
  const verdictOf = (found) => make("span", { className: `verdict ${found.tone}` }, `${found.sign} ${found.word}`);

  function facts([head, pairs]) {
    const list = pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
    return [make("h4", {}, head), make("dl", {}, ...list)];
  }

  function caseBody(found) {
    return [
      make("p", {}, found.reason),
      make("h4", {}, "To measure it again"),
      make("pre", { tabIndex: 0 }, found.command),
      ...found.groups.flatMap((place) => facts(data.groups[place])),
    ];
  }

  function folded(place, open) {
    const found = data.cases[place];
    const own = make("details", {}, make("summary", {}, verdictOf(found), ` ${found.title} `, make("b", {}, found.figure)));
    const fill = () => { if (own.open && own.children.length === 1) own.append(...caseBody(found)); };
    own.addEventListener("toggle", fill); // made when it is asked for
    own.open = open;
    fill();
    return own;
  }

  function follow() {
    const [, kind, place] = /^#(case|row)-(\d+)$/.exec(location.hash) || [];
    const found = kind && data[`${kind}s`][Number(place)];
    if (!found) {
      if (panel.open) panel.close();
      return;
    }
    const head = [make("h3", { id: "panel-title" }, found.title), make("p", { className: "where" }, found.where)];
    const body = () => [make("p", {}, verdictOf(found), " ", make("b", {}, found.figure)), ...caseBody(found)];
    const parts = kind === "case" ? body() : found.cases.map((own, order) => folded(own, order === 0));
    byId("details").replaceChildren(...head, ...parts);
    if (!panel.open) panel.showModal();
    panel.scrollTop = 0;
  }

  panel.addEventListener("close", () => history.replaceState(null, "", "#"));
  panel.addEventListener("click", (event) => { if (event.target === panel) panel.close(); }); // beside it
  byId("close").addEventListener("click", () => panel.close());
  window.addEventListener("hashchange", follow);
  follow();

  // What a dot stands for, under the pointer and with the keyboard

  const tip = byId("tip");
  const point = (event) => {
    const dot = event.target.closest && event.target.closest(".dot");
    tip.hidden = !dot;
    if (!dot) return;
    tip.textContent = dot.getAttribute("aria-label");
    const place = dot.querySelector(".reach").getBoundingClientRect();
    const left = Math.min(Math.max(place.left - tip.offsetWidth / 2, 8), innerWidth - tip.offsetWidth - 8);
    const above = place.top - tip.offsetHeight - 4;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 0 ? above : place.bottom + 4}px`;
  };
  document.addEventListener("pointerover", point);
  document.addEventListener("focusin", point);
})();
