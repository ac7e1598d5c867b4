"use strict";
// Sorting, metric tabs, and the image wall. Data reaches the page as text nodes only.

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

const dataElement = document.getElementById("wall-data");
if (dataElement) startWall(JSON.parse(dataElement.textContent));

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function startWall(data) {
  const byId = (id) => document.getElementById(id);
  const settings = new Map(data.settings.map((s) => [s.id, s]));
  const controls = Object.fromEntries(
    ["setting", "a", "b", "prompt", "seed", "search"].map((name) => [name, byId("f-" + name)]),
  );
  const PAGE = 60;
  let limit = PAGE;
  let items = [];

  const option = (value, text) => make("option", { value }, text);
  const badge = (id) => (data.badges[id] ? " (" + data.badges[id].join(", ") + ")" : "");
  const many = new Set(data.settings.map((s) => s.task)).size > 1;
  const short = (text) => (text.length > 60 ? text.slice(0, 59) + "…" : text);

  function fillSettings(select, first) {
    if (first) select.append(option("", first));
    for (const task of new Set(data.settings.map((s) => s.task))) {
      const members = data.settings.filter((s) => s.task === task);
      const options = members.map((s) => option(s.id, s.name + badge(s.id)));
      if (many) select.append(make("optgroup", { label: task }, ...options));
      else select.append(...options);
    }
  }
  fillSettings(controls.setting, "All settings");
  fillSettings(controls.a);
  fillSettings(controls.b);
  controls.prompt.append(option("", "All prompts"));
  data.prompts.forEach((p, i) => {
    const level = p.level ? p.level + ": " : "";
    controls.prompt.append(option(String(i), short(level + p.text)));
  });
  controls.seed.append(option("", "All seeds"));
  const seeds = [...new Set(data.tiles.map((t) => t.seed))].sort(
    (a, b) => a.length - b.length || (a < b ? -1 : 1), // texts of digits: they pass 2^53
  );
  for (const seed of seeds) controls.seed.append(option(seed, seed));
  setDefaults();

  function setDefaults() {
    const [a, b] = data.first;
    if (a) controls.setting.value = controls.a.value = a;
    if (b) controls.b.value = b;
  }

  const view = () => byId("filters").elements.view.value;

  // The prompt's own columns in its file: "category=animals".
  function ownColumns(prompt) {
    return Object.entries(prompt.own || {}).map(([name, value]) => name + "=" + value);
  }

  function matches(tile) {
    if (controls.prompt.value !== "" && tile.prompt !== Number(controls.prompt.value)) return false;
    if (controls.seed.value !== "" && tile.seed !== controls.seed.value) return false;
    const words = controls.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const prompt = data.prompts[tile.prompt];
    const text = [prompt.text, ...ownColumns(prompt)].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  }

  function select() {
    const tiles = data.tiles.filter(matches);
    if (view() === "wall") {
      const setting = controls.setting.value;
      return tiles.filter((t) => !setting || t.setting === setting).map((t) => [t]);
    }
    const key = (t) => t.prompt + "/" + t.seed;
    const right = new Map(
      tiles.filter((t) => t.setting === controls.b.value).map((t) => [key(t), t]),
    );
    return tiles
      .filter((t) => t.setting === controls.a.value && right.has(key(t)))
      .map((t) => [t, right.get(key(t))]);
  }

  function image(index, alt) {
    const img = make("img", { src: data.images[index], alt });
    img.addEventListener("load", () => img.classList.toggle("pixel", img.naturalWidth <= 128));
    return img;
  }

  function frame(tile) {
    if (tile.image === null) {
      return make("span", { class: "frame failed" }, tile.error || "image is gone");
    }
    const name = settings.get(tile.setting).name;
    const alt = data.prompts[tile.prompt].text + ", seed " + tile.seed + ", " + name;
    return make("span", { class: "frame" }, image(tile.image, alt));
  }

  const scores = (tile) => tile.scores.map(([name, value]) => name + " " + value).join(" · ");

  function opener(index, label, ...children) {
    const button = make("button", { type: "button", class: "open", "aria-label": label }, ...children);
    button.addEventListener("click", () => openViewer(index));
    return button;
  }

  function tileElement([tile], index) {
    const prompt = data.prompts[tile.prompt];
    const under = ["seed " + tile.seed];
    if (!controls.setting.value) under.unshift(settings.get(tile.setting).name);
    return make(
      "figure",
      { class: "tile", "data-setting": tile.setting, "data-seed": tile.seed },
      opener(index, "Enlarge: " + prompt.text + ", seed " + tile.seed, frame(tile)),
      make(
        "figcaption",
        {},
        make("bdi", { class: "text", title: prompt.text }, prompt.text),
        make("span", { class: "under" }, under.join(" · ")),
        make("span", { class: "under" }, scores(tile)),
      ),
    );
  }

  function sides(pair) {
    const prompt = data.prompts[pair[0].prompt];
    const found = pair.map((tile, i) => ({
      caption: (pair.length > 1 ? "AB"[i] + ": " : "") + settings.get(tile.setting).name,
      node: frame(tile),
      tile,
    }));
    if (prompt.init !== null) {
      const node = make("span", { class: "frame" }, image(prompt.init, "Init image"));
      found.unshift({ caption: "init image", node, tile: null });
    }
    return found;
  }

  function pairElement(pair, index) {
    const prompt = data.prompts[pair[0].prompt];
    const columns = sides(pair).map((side) =>
      make(
        "span",
        { class: "side" },
        side.node,
        make("span", { class: "cap", title: side.caption }, side.caption),
        make("span", { class: "under" }, side.tile ? scores(side.tile) : ""),
      ),
    );
    return make(
      "div",
      { class: "pair", "data-seed": pair[0].seed },
      opener(
        index,
        "Enlarge the pair: " + prompt.text + ", seed " + pair[0].seed,
        make("span", { class: "sides" }, ...columns),
      ),
      make("bdi", { class: "text", title: prompt.text }, prompt.text),
      make("span", { class: "under" }, "seed " + pair[0].seed),
    );
  }

  function draw() {
    items = select();
    const compare = view() === "compare";
    const shown = items.slice(0, limit).map(compare ? pairElement : tileElement);
    byId("wall").className = compare ? "compare" : "";
    byId("wall").replaceChildren(...shown);
    byId("more").hidden = items.length <= limit;
    const noun = compare ? "pair" : "image";
    byId("count").textContent = items.length + " " + noun + (items.length === 1 ? "" : "s");
    for (const node of document.querySelectorAll(".only-compare")) node.hidden = !compare;
    for (const node of document.querySelectorAll(".only-wall")) node.hidden = compare;
  }

  function restart() {
    limit = PAGE;
    draw();
  }

  // How a pair is laid out when enlarged; further ways of looking are further entries.
  const VIEWS = {
    "side by side": (pair) => make("div", { class: "stage" }, ...sides(pair).map(stageFigure)),
  };

  const MARKS = new Map([[true, "✓ "], [false, "✗ "], [null, ""]]);

  function stageFigure(side) {
    const caption = make("figcaption", {}, side.caption);
    if (side.tile) {
      const parts = side.tile.parts.map(([name, held]) =>
        make("li", { class: held === false ? "no" : "yes" }, MARKS.get(held) + name),
      );
      caption.append(make("span", { class: "under" }, scores(side.tile)));
      if (parts.length) caption.append(make("ul", { class: "parts" }, ...parts));
    }
    return make("figure", {}, side.node, caption);
  }

  const viewer = byId("viewer");
  let at = 0;

  function openViewer(index) {
    at = index;
    drawViewer();
    if (!viewer.open) viewer.showModal();
  }

  function drawViewer() {
    const pair = items[at];
    const prompt = data.prompts[pair[0].prompt];
    byId("viewer-title").replaceChildren(make("bdi", {}, prompt.text));
    const about = ["seed " + pair[0].seed, pair[0].width + "×" + pair[0].height];
    if (prompt.level) about.push("level " + prompt.level);
    if (prompt.negative) about.push("negative prompt: " + prompt.negative);
    if (prompt.init_prompt) about.push("init image: " + prompt.init_prompt);
    about.push(...ownColumns(prompt), at + 1 + " of " + items.length);
    byId("viewer-body").replaceChildren(
      VIEWS["side by side"](pair),
      make("p", { class: "note" }, about.join(" · ")),
    );
    byId("viewer-prev").disabled = at === 0;
    byId("viewer-next").disabled = at === items.length - 1;
  }

  function step(by) {
    at = Math.min(Math.max(at + by, 0), items.length - 1);
    drawViewer();
  }

  byId("viewer-prev").addEventListener("click", () => step(-1));
  byId("viewer-next").addEventListener("click", () => step(1));
  byId("viewer-close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  byId("more").addEventListener("click", () => {
    limit += PAGE;
    draw();
  });
  byId("swap").addEventListener("click", () => {
    [controls.a.value, controls.b.value] = [controls.b.value, controls.a.value];
    restart();
  });
  byId("filters").addEventListener("input", restart);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () =>
    // The form's own reset happens after this event.
    setTimeout(() => {
      controls.setting.value = "";
      restart();
    }),
  );
  byId("wall-app").hidden = false;
  draw();
}
