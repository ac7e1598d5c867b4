"use strict";
// Tables that sort and fold, metric tabs, and charts: a tooltip at each mark, a legend that hides
// and shows, and the dense part by itself. Without this script all of it stands on the page.

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => sortBy(table, heads, column));
  });
}

function sortBy(table, heads, column) {
  const head = heads[column];
  const descending = head.getAttribute("aria-sort") !== "descending";
  heads.forEach((h) => h.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows];
  const value = (row) => row.cells[column].dataset.sort;
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    // Unknown stays last whichever way the column is sorted.
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : Number(x) - Number(y);
    return descending ? -order : order;
  });
  table.tBodies[0].append(...rows);
  table.dispatchEvent(new Event("sorted"));
}

for (const tabs of document.querySelectorAll(".tabs")) {
  const buttons = [...tabs.querySelectorAll("button")];
  const show = (chosen) =>
    buttons.forEach((button) => {
      button.setAttribute("aria-pressed", String(button === chosen));
      document.getElementById(button.dataset.tab).hidden = button !== chosen;
    });
  buttons.forEach((button) => button.addEventListener("click", () => show(button)));
  tabs.hidden = false;
  show(buttons[0]);
}

// Long tables: the first rows and those that were chosen, until the rest is asked for.
const FOLDED_ROWS = 12;
const FOLDED_FROM = 18;

for (const table of document.querySelectorAll("table.folds")) fold(table);

function fold(table) {
  const body = table.tBodies[0];
  if (body.rows.length < FOLDED_FROM) return;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "unfold";
  const mark = () =>
    [...body.rows].forEach((row, i) =>
      row.classList.toggle("extra", i >= FOLDED_ROWS && !row.matches(".chosen, .on-front")),
    );
  const set = (folded) => {
    table.classList.toggle("folded", folded);
    button.setAttribute("aria-expanded", String(!folded));
    button.textContent = folded ? `Show all ${body.rows.length} rows` : "Show fewer rows";
  };
  mark();
  set(true);
  button.addEventListener("click", () => set(!table.classList.contains("folded")));
  table.addEventListener("sorted", mark);
  (table.closest(".scroll") || table).after(button);
}

// A link to a row of a folded table shows it.
function unfoldTarget() {
  const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const table = row && row.closest("table.folded");
  if (table) table.classList.remove("folded");
  if (row && row.matches("tr")) row.scrollIntoView({ block: "center" });
}
window.addEventListener("hashchange", unfoldTarget);
unfoldTarget();

for (const chart of document.querySelectorAll("figure.chart")) startChart(chart);

function startChart(chart) {
  const tip = document.createElement("output");
  tip.className = "tip";
  tip.hidden = true;
  const plot = chart.querySelector(".plot");
  plot.append(tip);
  const texts = new Map();
  for (const title of plot.querySelectorAll("svg g title, svg rect title")) {
    texts.set(title.parentElement, title.textContent);
    title.parentElement.setAttribute("class", `${title.parentElement.getAttribute("class") || ""} hit`.trim());
    title.remove(); // the browser would show it a second time
  }
  const say = (node) => {
    for (const lit of plot.querySelectorAll(".lit")) lit.classList.remove("lit");
    tip.hidden = !node;
    if (!node) return;
    node.classList.add("lit");
    tip.textContent = texts.get(node);
    const [mark, frame] = [node.getBoundingClientRect(), plot.getBoundingClientRect()];
    const left = mark.left + mark.width / 2 - frame.left - tip.offsetWidth / 2;
    const above = mark.top - frame.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(0, Math.min(left, frame.width - tip.offsetWidth))}px`;
    tip.style.top = `${above < 0 ? mark.bottom - frame.top + 8 : above}px`;
  };
  plot.addEventListener("pointerover", (event) => say(event.target.closest(".hit")));
  plot.addEventListener("pointerleave", () => say(null));
  plot.addEventListener("focusout", () => say(null));
  plot.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const svg = event.target.closest("svg");
    if (!by || !svg) return;
    const marks = [...svg.querySelectorAll(".hit")].filter((node) => !node.closest(".off"));
    if (!marks.length) return;
    event.preventDefault();
    const next = marks.findIndex((node) => node.classList.contains("lit")) + by;
    say(marks[(next + marks.length) % marks.length]);
  });
  for (const svg of plot.querySelectorAll("svg[role=img]")) {
    if (svg.querySelector(".hit")) svg.setAttribute("tabindex", "0");
  }
  startLegend(chart, plot);
  startZoom(chart);
}

// An entry hides the marks that name it; a mark is seen while all that it names are on.
function startLegend(chart, plot) {
  const entries = [...chart.querySelectorAll(".legend [data-key]")];
  if (entries.length < 2) return;
  const off = new Set();
  const named = [...plot.querySelectorAll("[data-k]")];
  for (const entry of entries) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.append(...entry.childNodes);
    entry.append(button);
    button.addEventListener("click", () => {
      const key = entry.dataset.key;
      if (!off.delete(key)) off.add(key);
      button.setAttribute("aria-pressed", String(!off.has(key)));
      for (const node of named) {
        node.classList.toggle("off", node.dataset.k.split(" ").some((k) => off.has(k)));
      }
    });
  }
}

function startZoom(chart) {
  const dense = chart.querySelector(".view.dense");
  if (!dense) return;
  const whole = chart.querySelector(".view");
  const button = document.createElement("button");
  button.type = "button";
  button.className = "zoom";
  button.setAttribute("aria-pressed", "false");
  button.textContent = "Zoom to the dense part";
  button.addEventListener("click", () => {
    const on = dense.hidden;
    dense.hidden = !on;
    whole.hidden = on;
    button.setAttribute("aria-pressed", String(on));
  });
  chart.querySelector(".plot").before(button);
}
