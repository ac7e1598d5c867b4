// The images: a grid over two fields, a wall, a comparison, and a viewer. Tiles are columns of
// numbers with an index by setting, prompt and seed, so a filter reads the rows of its rarest value
// alone; only what is shown becomes elements. What is shown is in the address, after "#". Data
// reaches the page as text nodes only.

const dataElement = document.getElementById("wall-data");
if (dataElement) startImages(JSON.parse(dataElement.textContent));

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function decode(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Kind(bytes.buffer);
}

function startImages(data) {
  const byId = (id) => document.getElementById(id);
  const form = byId("filters");
  const { settings, prompts, seeds, fields } = data;
  const columns = {};
  for (const [name, text] of Object.entries(data.columns)) columns[name] = decode(text, Int32Array);
  const scored = data.scores.map(([name, text]) => ({
    name,
    values: decode(text, Float32Array),
    sign: data.lower.includes(name) ? 1 : -1,
  }));
  const count = columns.setting.length;
  const settingOf = new Map(settings.map((s, i) => [s.id, i]));
  const promptOf = new Map(prompts.map((p, i) => [p.ref, i]));
  const controls = {};
  for (const name of ["setting", "a", "b", "prompt", "seed", "search", "order", "x", "y", "ref"]) {
    controls[name] = byId("f-" + name);
  }
  const holds = new Map();
  const PAGE = 60;
  const MOST_OPTIONS = 500;
  const HOLD_MS = 200;
  let limit = PAGE;
  let items = [];

  // Choices -----------------------------------------------------------------------------------

  const option = (value, text) => make("option", { value }, text);
  const badge = (id) => (data.badges[id] ? " (" + data.badges[id].join(", ") + ")" : "");
  const short = (text) => (text.length > 60 ? text.slice(0, 59) + "…" : text);
  const several = new Set(settings.map((s) => s.task)).size > 1;

  function fillSettings(select, first) {
    if (first) select.append(option("", first));
    for (const task of new Set(settings.map((s) => s.task))) {
      const members = settings.filter((s) => s.task === task);
      const options = members.map((s) => option(s.id, s.name + badge(s.id)));
      if (several) select.append(make("optgroup", { label: task }, ...options));
      else select.append(...options);
    }
  }

  // Of very many prompts those that the search finds are listed, and of these the first.
  function fillPrompts() {
    const kept = controls.prompt.value;
    const { found } = searched();
    const shown = [];
    let more = 0;
    for (let i = 0; i < prompts.length; i += 1) {
      if (!found[i]) continue;
      if (shown.length < MOST_OPTIONS) {
        const level = prompts[i].level ? prompts[i].level + ": " : "";
        shown.push(option(prompts[i].ref, short(level + prompts[i].text)));
      } else more += 1;
    }
    if (more) {
      const rest = option("", more + " more: search for them");
      rest.disabled = true;
      shown.push(rest);
    }
    controls.prompt.replaceChildren(option("", "All prompts"), ...shown);
    if (kept && !shown.some((o) => o.value === kept)) {
      const chosen = prompts[promptOf.get(kept)];
      if (chosen) controls.prompt.append(option(kept, short(chosen.text)));
    }
    controls.prompt.value = kept;
  }

  function fillChoices() {
    fillSettings(controls.setting, "All settings");
    fillSettings(controls.a);
    fillSettings(controls.b);
    fillSettings(controls.ref, "No reference");
    controls.seed.append(option("", "All seeds"));
    controls.seed.append(...seeds.slice(0, MOST_OPTIONS).map((seed) => option(seed, seed)));
    controls.order.append(option("", "as made"));
    if (scored.length) {
      controls.order.append(option("best", scored[0].name + ", best first"));
      controls.order.append(option("worst", scored[0].name + ", worst first"));
    }
    for (const select of [controls.x, controls.y]) {
      select.append(...fields.map((f) => option(f.name, f.label)));
    }
    for (const field of fields) {
      const select = make("select", { id: "f-hold-" + field.name, "data-field": field.name });
      select.append(...field.values.map((value, i) => option(String(i), value)));
      if (field.at.includes(-1)) select.append(option("-1", "none"));
      byId("holds").append(make("label", { class: "field" }, field.label, select));
      holds.set(field.name, select);
    }
    fillPrompts();
  }

  function setDefaults() {
    const [a, b] = data.first;
    if (a) controls.setting.value = controls.a.value = a;
    if (b) controls.b.value = b;
    const names = fields.map((f) => f.name);
    controls.x.value = names.includes("steps") ? "steps" : names[0];
    const varies = fields.filter((f) => f.values.length > 1 && !["steps", "task"].includes(f.name));
    controls.y.value = (varies.find((f) => f.name === "cfg") || varies[0] || fieldOf("cfg")).name;
    holdLike(Object.values(data.chosen)[0] || a);
  }

  // Holds every field at what a setting has, and takes its task's reference.
  function holdLike(id) {
    const index = settingOf.get(id);
    if (index === undefined) return;
    for (const field of fields) holds.get(field.name).value = String(field.at[index]);
    const task = settings[index].task;
    const beside = data.beside[task] || [data.chosen[task]];
    controls.ref.value = beside[0] || "";
  }

  // The prompt's own columns in its file: "category=animals".
  function ownColumns(prompt) {
    return Object.entries(prompt.own || {}).map(([name, value]) => name + "=" + value);
  }

  // Filters -----------------------------------------------------------------------------------

  const texts = prompts.map((p) => [p.text, ...ownColumns(p)].join(" ").toLowerCase());

  // Rows of each value of a column, one value after the other, each in order.
  function indexed(values, kinds) {
    const starts = new Int32Array(kinds + 1);
    for (let i = 0; i < count; i += 1) starts[values[i] + 1] += 1;
    for (let k = 0; k < kinds; k += 1) starts[k + 1] += starts[k];
    const [next, rows] = [starts.slice(), new Int32Array(count)];
    for (let i = 0; i < count; i += 1) rows[next[values[i]]++] = i;
    return (k) => rows.subarray(starts[k], starts[k + 1]);
  }

  const rowsOf = {
    setting: indexed(columns.setting, settings.length),
    prompt: indexed(columns.prompt, prompts.length),
    seed: indexed(columns.seed, seeds.length),
  };
  let read = 0; // rows that were looked at since the last drawing: what a filter costs

  let search = { text: "", found: new Uint8Array(prompts.length).fill(1), rows: count };

  // Which prompts have the words that were searched, and how many rows these have.
  function searched() {
    const text = controls.search.value.toLowerCase();
    if (text === search.text) return search;
    const words = text.split(/\s+/).filter(Boolean);
    const found = new Uint8Array(prompts.length);
    let rows = 0;
    for (let i = 0; i < found.length; i += 1) {
      found[i] = words.every((word) => texts[i].includes(word)) ? 1 : 0;
      if (found[i]) rows += rowsOf.prompt(i).length;
    }
    search = { text, found, rows };
    return search;
  }

  function rowsSearched({ found, rows }) {
    const kept = new Int32Array(rows);
    let size = 0;
    for (let i = 0; i < found.length; i += 1) {
      if (!found[i]) continue;
      const own = rowsOf.prompt(i);
      kept.set(own, size);
      size += own.length;
    }
    read += rows;
    return kept.sort();
  }

  // Rows by the first score. A key is the score as 31 bits over the row's number as 20: numbers
  // sort ten times as fast as a comparison function does.
  function ordered(rows, order) {
    if (!order || !scored.length) return rows;
    const { values, sign } = scored[0];
    const known = rows.filter((i) => !Number.isNaN(values[i]));
    let [low, high] = [Infinity, -Infinity];
    for (const i of known) {
      if (values[i] < low) low = values[i];
      if (values[i] > high) high = values[i];
    }
    const rising = (order === "best") === sign > 0;
    const scale = 2 ** 31 / (high - low || 1);
    const keys = new Float64Array(known.length);
    for (let k = 0; k < keys.length; k += 1) {
      const value = values[known[k]];
      keys[k] = Math.round((rising ? value - low : high - value) * scale) * 2 ** 20 + known[k];
    }
    keys.sort();
    read += rows.length;
    const found = new Int32Array(rows.length);
    for (let k = 0; k < keys.length; k += 1) found[k] = keys[k] % 2 ** 20;
    found.set(rows.filter((i) => Number.isNaN(values[i])), known.length);
    return found;
  }

  // Rows that the filters leave, of one setting where `setting` is one: those of the value, or of
  // the words, that has the fewest, without those that another filter takes away.
  function select(setting) {
    const words = searched();
    const chosen = { setting, prompt: -1, seed: -1 };
    if (controls.prompt.value !== "") chosen.prompt = promptOf.get(controls.prompt.value);
    if (controls.seed.value !== "") chosen.seed = seeds.indexOf(controls.seed.value);
    const filters = Object.entries(chosen)
      .filter(([, value]) => value >= 0)
      .map(([name, value]) => {
        const rows = rowsOf[name](value);
        return { size: rows.length, rows: () => rows, keeps: (i) => columns[name][i] === value };
      });
    const keeps = (i) => words.found[columns.prompt[i]] === 1;
    filters.push({ size: words.rows, rows: () => rowsSearched(words), keeps });
    const told = filters.filter((f) => f.size < count).sort((a, b) => a.size - b.size);
    if (!told.length) return all(controls.order.value);
    let rows = told[0].rows();
    for (const { keeps } of told.slice(1)) {
      read += rows.length;
      rows = rows.filter(keeps);
    }
    return ordered(rows, controls.order.value);
  }

  const orders = new Map();

  // All rows in an order, which is found once.
  function all(order) {
    if (!orders.has(order)) orders.set(order, ordered(everyRow(), order));
    return orders.get(order);
  }

  const everyRow = () => Int32Array.from({ length: count }, (_, i) => i);

  const pairKey = (i) => columns.prompt[i] * seeds.length + columns.seed[i];

  function selectPairs() {
    const right = new Map();
    for (const i of select(settingOf.get(controls.b.value))) right.set(pairKey(i), i);
    const found = [];
    for (const i of select(settingOf.get(controls.a.value))) {
      if (right.has(pairKey(i))) found.push([i, right.get(pairKey(i))]);
    }
    return found;
  }

  function partner(i, id) {
    const setting = settingOf.get(id);
    const same = (j) => columns.setting[j] === setting && columns.seed[j] === columns.seed[i];
    const found = rowsOf.prompt(columns.prompt[i]).find(same);
    return found === undefined ? -1 : found;
  }

  // Pieces ------------------------------------------------------------------------------------

  const view = () => form.elements.view.value;
  const promptAt = (i) => prompts[columns.prompt[i]];
  const settingAt = (i) => settings[columns.setting[i]];
  const seedAt = (i) => seeds[columns.seed[i]];
  const fixed = (value) => String(Math.round(value * 1000) / 1000);

  function scores(i) {
    const known = scored.filter((s) => !Number.isNaN(s.values[i]));
    return known.map((s) => s.name + " " + fixed(s.values[i])).join(" · ");
  }

  function address(image) {
    const name = data.images[image];
    return data.base && !name.startsWith("..") ? data.base + name.slice(0, 2) + "/" + name : name;
  }

  function picture(image, alt) {
    const img = make("img", { alt, loading: "lazy", decoding: "async" });
    img.addEventListener("load", () => img.classList.toggle("pixel", img.naturalWidth <= 128));
    img.src = address(image);
    return img;
  }

  function frame(i) {
    if (columns.image[i] < 0) {
      return make("span", { class: "frame failed" }, data.errors[i] || "image is gone");
    }
    const alt = promptAt(i).text + ", seed " + seedAt(i) + ", " + settingAt(i).name;
    return make("span", { class: "frame" }, picture(columns.image[i], alt));
  }

  // While a pointer is held on an image, the reference's image stands in its place.
  function holdToCompare(node, i) {
    const img = node.querySelector("img");
    if (!img) return;
    let timer = 0;
    const show = () => {
      const other = controls.ref.value ? partner(i, controls.ref.value) : -1;
      if (other < 0 || columns.image[other] < 0) return;
      img.src = address(columns.image[other]);
      node.classList.add("held");
    };
    const back = () => {
      clearTimeout(timer);
      if (node.classList.contains("held")) img.src = address(columns.image[i]);
      node.classList.remove("held");
    };
    node.addEventListener("pointerdown", () => {
      timer = setTimeout(() => {
        node.dataset.skip = "1";
        show();
      }, HOLD_MS);
    });
    for (const name of ["pointerup", "pointerleave", "pointercancel"]) {
      node.addEventListener(name, back);
    }
    node.addEventListener("contextmenu", (event) => node.dataset.skip && event.preventDefault());
    node.compare = (on) => (on ? show() : back());
  }

  function opener(index, label, ...children) {
    const button = make("button", { type: "button", class: "open", "aria-label": label }, ...children);
    button.addEventListener("click", () => {
      const held = button.dataset.skip;
      delete button.dataset.skip;
      if (!held) openViewer(index);
    });
    return button;
  }

  function tileElement([i], index) {
    const prompt = promptAt(i);
    const under = ["seed " + seedAt(i)];
    if (!controls.setting.value) under.unshift(settingAt(i).name);
    const button = opener(index, "Enlarge: " + prompt.text + ", seed " + seedAt(i), frame(i));
    holdToCompare(button, i);
    return make(
      "figure",
      { class: "tile", "data-setting": settingAt(i).id, "data-seed": seedAt(i) },
      button,
      make(
        "figcaption",
        {},
        make("bdi", { class: "text", title: prompt.text }, prompt.text),
        make("span", { class: "under" }, under.join(" · ")),
        make("span", { class: "under" }, scores(i)),
      ),
    );
  }

  function sides(pair) {
    const prompt = promptAt(pair[0]);
    const found = pair.map((i, k) => ({
      caption: (pair.length > 1 ? "AB"[k] + ": " : "") + settingAt(i).name,
      node: frame(i),
      row: i,
    }));
    if (prompt.init !== null) {
      const node = make("span", { class: "frame" }, picture(prompt.init, "Init image"));
      found.unshift({ caption: "init image", node, row: -1 });
    }
    return found;
  }

  function pairElement(pair, index) {
    const prompt = promptAt(pair[0]);
    const shown = sides(pair).map((side) =>
      make(
        "span",
        { class: "side" },
        side.node,
        make("span", { class: "cap", title: side.caption }, side.caption),
        make("span", { class: "under" }, side.row >= 0 ? scores(side.row) : ""),
      ),
    );
    return make(
      "div",
      { class: "pair", "data-seed": seedAt(pair[0]) },
      opener(
        index,
        "Enlarge the pair: " + prompt.text + ", seed " + seedAt(pair[0]),
        make("span", { class: "sides" }, ...shown),
      ),
      make("bdi", { class: "text", title: prompt.text }, prompt.text),
      make("span", { class: "under" }, "seed " + seedAt(pair[0])),
    );
  }

  // The grid ----------------------------------------------------------------------------------

  const fieldOf = (name) => fields.find((f) => f.name === name);
  const grid = { prompts: [], at: 0, seed: "" };

  // Settings that have every held field's value; x and y are free.
  function heldSettings() {
    const free = [controls.x.value, controls.y.value];
    const held = fields.filter((f) => !free.includes(f.name));
    return settings.map((_, i) =>
      held.every((f) => f.at[i] === Number(holds.get(f.name).value)),
    );
  }

  let reached = { by: "", there: null };

  // Which prompts some of these settings have a row of; looked for once for the same settings.
  function reachedBy(kept) {
    const by = kept.map(Number).join("");
    if (by === reached.by) return reached.there;
    const there = new Uint8Array(prompts.length);
    if (kept.every(Boolean)) {
      for (let i = 0; i < there.length; i += 1) there[i] = rowsOf.prompt(i).length ? 1 : 0;
    } else {
      kept.forEach((on, setting) => {
        if (!on) return;
        const rows = rowsOf.setting(setting);
        read += rows.length;
        for (const i of rows) there[columns.prompt[i]] = 1;
      });
    }
    reached = { by, there };
    return there;
  }

  function gridPrompts(kept) {
    const [{ found }, there] = [searched(), reachedBy(kept)];
    const shown = [];
    for (let i = 0; i < there.length; i += 1) if (there[i] && found[i]) shown.push(i);
    return shown;
  }

  function heading(field, place, kept) {
    const members = settings.filter((_, i) => kept[i] && field.at[i] === place);
    const mean = (name) => {
      const known = members.map((s) => s[name]).filter((v) => v !== null);
      return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
    };
    const [latency, quality] = [mean("latency"), mean("quality")];
    const said = [];
    if (latency !== null) said.push(Number(latency.toPrecision(3)) + " s");
    if (quality !== null) said.push(members[0].metric + " " + fixed(quality));
    return [
      make("span", { class: "at" }, field.label + " " + field.values[place]),
      ...said.map((text) => make("span", { class: "under" }, text)),
    ];
  }

  function drawGrid() {
    const [x, y] = [fieldOf(controls.x.value), fieldOf(controls.y.value)];
    const kept = heldSettings();
    grid.prompts = gridPrompts(kept);
    const asked = controls.prompt.value === "" ? -1 : promptOf.get(controls.prompt.value);
    grid.at = Math.max(0, grid.prompts.indexOf(asked));
    const prompt = grid.prompts[grid.at];
    const rows = new Map();
    let seed = seeds.indexOf(controls.seed.value);
    const own = prompt === undefined ? [] : rowsOf.prompt(prompt);
    read += own.length;
    for (const i of own) {
      if (!kept[columns.setting[i]]) continue;
      if (seed < 0) seed = columns.seed[i];
      if (columns.seed[i] === seed) rows.set(columns.setting[i], i);
    }
    grid.seed = seed < 0 ? "" : seeds[seed];
    const cells = new Map();
    settings.forEach((_, i) => {
      if (!kept[i]) return;
      const key = x.at[i] + "/" + (x === y ? x.at[i] : y.at[i]);
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(i);
    });
    const placesOf = (field) =>
      field.values.map((_, p) => p).filter((p) => settings.some((_, i) => kept[i] && field.at[i] === p));
    const [across, down] = [placesOf(x), x === y ? [-1] : placesOf(y)];
    items = [];
    const head = make("tr", {}, make("td"));
    for (const p of across) head.append(make("th", { scope: "col" }, ...heading(x, p, kept)));
    const body = down.map((q) => {
      const line = make("tr");
      line.append(q < 0 ? make("td") : make("th", { scope: "row" }, ...heading(y, q, kept)));
      for (const p of across) {
        const found = cells.get(p + "/" + (q < 0 ? p : q)) || [];
        const setting = found.find((i) => rows.has(i));
        line.append(make("td", {}, cellElement(found, rows.get(setting))));
      }
      return line;
    });
    const table = make(
      "table",
      { class: "cells" },
      make("caption", { class: "sr" }, x.label + " across, " + y.label + " down"),
      make("thead", {}, head),
      make("tbody", {}, ...body),
    );
    byId("wall").replaceChildren(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Grid of images" }, table));
    const text = prompt === undefined ? "no prompt has these" : prompts[prompt].text;
    byId("grid-prompt").replaceChildren(make("bdi", {}, text));
    byId("grid-prev").disabled = grid.at <= 0;
    byId("grid-next").disabled = grid.at >= grid.prompts.length - 1;
    byId("count").textContent =
      "prompt " + (grid.prompts.length ? grid.at + 1 : 0) + " of " + grid.prompts.length +
      (grid.seed === "" ? "" : ", seed " + grid.seed);
  }

  function cellElement(found, row) {
    if (!found.length) return make("span", { class: "frame failed" }, "not run");
    if (row === undefined) return make("span", { class: "frame failed" }, "not in this file");
    const setting = settingAt(row);
    const label = "Enlarge: " + setting.name + ", " + promptAt(row).text + ", seed " + seedAt(row);
    const button = opener(items.push([row]) - 1, label, frame(row));
    button.dataset.setting = setting.id;
    holdToCompare(button, row);
    const mark = data.badges[setting.id];
    const under = make("span", { class: "under" }, scores(row));
    if (mark) under.prepend(make("span", { class: "badge" }, mark.join(", ")), " ");
    return make("div", { class: "cell" }, button, under);
  }

  function stepPrompt(by) {
    const next = grid.prompts[grid.at + by];
    if (next === undefined) return;
    const ref = prompts[next].ref;
    if (![...controls.prompt.options].some((o) => o.value === ref)) {
      controls.prompt.append(option(ref, short(prompts[next].text)));
    }
    controls.prompt.value = ref;
    restart();
  }

  // Drawing -----------------------------------------------------------------------------------

  function draw() {
    read = 0;
    drawView(view());
    byId("wall").dataset.read = read;
  }

  function drawView(kind) {
    byId("wall").className = kind;
    for (const node of form.querySelectorAll("[data-only]")) {
      node.hidden = !node.dataset.only.split(" ").includes(kind);
    }
    for (const [name, select] of holds) {
      const varies = [...select.options].length > 1;
      select.parentElement.hidden = !varies || [controls.x.value, controls.y.value].includes(name);
    }
    byId("grid-bar").hidden = kind !== "grid";
    if (kind === "grid") {
      byId("more").hidden = true;
      drawGrid();
      return;
    }
    if (kind === "compare") items = selectPairs();
    else {
      const rows = select(controls.setting.value ? settingOf.get(controls.setting.value) : -1);
      items = { length: rows.length, at: (k) => [rows[k]] };
    }
    const shown = [];
    for (let k = 0; k < Math.min(limit, items.length); k += 1) {
      shown.push((kind === "compare" ? pairElement : tileElement)(items.at(k), k));
    }
    byId("wall").replaceChildren(...shown);
    byId("more").hidden = items.length <= limit;
    const noun = kind === "compare" ? "pair" : "image";
    byId("count").textContent = items.length + " " + noun + (items.length === 1 ? "" : "s");
  }

  function restart() {
    limit = PAGE;
    draw();
    writeAddress();
  }

  // The address ------------------------------------------------------------------------------

  const ASKED = {
    grid: ["x", "y", "prompt", "seed", "search", "ref"],
    wall: ["setting", "prompt", "seed", "search", "order"],
    compare: ["a", "b", "prompt", "seed", "search"],
  };

  function writeAddress(more = {}) {
    const said = new URLSearchParams({ view: view() });
    for (const name of ASKED[view()]) {
      if (controls[name].value !== "") said.set(name, controls[name].value);
    }
    if (view() === "grid") {
      for (const [name, select] of holds) {
        if (!select.parentElement.hidden) said.set("f." + name, labelOf(select));
      }
    }
    for (const [name, value] of Object.entries(more)) said.set(name, value);
    history.replaceState(null, "", "#" + said);
  }

  const labelOf = (select) => (select.selectedOptions[0] || { textContent: "" }).textContent;

  function readAddress() {
    const text = location.hash.slice(1);
    if (!text.includes("view=")) return false;
    const said = new URLSearchParams(text);
    const kind = said.get("view");
    if (!(kind in ASKED)) return false;
    form.elements.view.value = kind;
    controls.search.value = said.get("search") || "";
    controls.prompt.value = "";
    fillPrompts();
    for (const name of ASKED[kind]) {
      const value = said.get(name);
      if (name === "prompt" && promptOf.has(value)) {
        controls.prompt.append(option(value, short(prompts[promptOf.get(value)].text)));
      }
      if (value !== null) controls[name].value = value;
      else if (["prompt", "seed", "order", "setting"].includes(name)) controls[name].value = "";
    }
    for (const [name, select] of holds) {
      const wanted = said.get("f." + name);
      const found = [...select.options].find((o) => o.textContent === wanted);
      if (found) select.value = found.value;
    }
    limit = PAGE;
    draw();
    byId("images").scrollIntoView();
    if (said.has("open")) openViewer(placeOf(said.get("open")));
    return true;
  }

  // Which item an address opens: a setting's cell of the grid, else the first.
  function placeOf(id) {
    for (let k = 0; k < items.length; k += 1) {
      if (settingAt(items.at(k)[0]).id === id) return k;
    }
    return 0;
  }

  // The viewer --------------------------------------------------------------------------------

  const MARKS = new Map([[true, "✓ "], [false, "✗ "], [null, ""]]);
  const viewer = byId("viewer");
  let at = 0;

  function stageFigure(side) {
    const caption = make("figcaption", {}, side.caption);
    if (side.row >= 0) {
      const seen = data.parts[columns.parts[side.row]].map(([name, held]) =>
        make("li", { class: held === false ? "no" : "yes" }, MARKS.get(held) + name),
      );
      caption.append(make("span", { class: "under" }, scores(side.row)));
      if (seen.length) caption.append(make("ul", { class: "parts" }, ...seen));
      holdToCompare(side.node, side.row);
    }
    return make("figure", {}, side.node, caption);
  }

  function openViewer(index) {
    if (!items.length) return;
    at = index;
    drawViewer();
    if (!viewer.open) viewer.showModal();
  }

  function drawViewer() {
    const pair = items.at(at);
    const prompt = promptAt(pair[0]);
    byId("viewer-title").replaceChildren(make("bdi", {}, prompt.text));
    const size = data.sizes[columns.size[pair[0]]];
    const about = ["seed " + seedAt(pair[0]), size.join("×")];
    if (prompt.level) about.push("level " + prompt.level);
    if (prompt.negative) about.push("negative prompt: " + prompt.negative);
    if (prompt.init_prompt) about.push("init image: " + prompt.init_prompt);
    about.push(...ownColumns(prompt), at + 1 + " of " + items.length);
    const stage = make("div", { class: "stage" }, ...sides(pair).map(stageFigure));
    const note = make("p", { class: "note" }, about.join(" · "));
    byId("viewer-body").replaceChildren(stage, note);
    if (controls.ref.value) {
      const name = settings[settingOf.get(controls.ref.value)].name;
      note.append(make("br"), "Hold an image, or the key R, to see " + name + " in its place.");
    }
    byId("viewer-prev").disabled = at === 0;
    byId("viewer-next").disabled = at === items.length - 1;
    const open = settingAt(pair[0]).id;
    writeAddress({ prompt: prompt.ref, seed: seedAt(pair[0]), open });
  }

  function step(by) {
    at = Math.min(Math.max(at + by, 0), items.length - 1);
    drawViewer();
  }

  function compareAll(on) {
    for (const node of viewer.querySelectorAll(".stage .frame")) {
      if (node.compare) node.compare(on);
    }
  }

  // Events ------------------------------------------------------------------------------------

  byId("viewer-prev").addEventListener("click", () => step(-1));
  byId("viewer-next").addEventListener("click", () => step(1));
  byId("viewer-close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("close", () => writeAddress());
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
    if (event.key.toLowerCase() === "r" && !event.repeat) compareAll(true);
  });
  viewer.addEventListener("keyup", (event) => event.key.toLowerCase() === "r" && compareAll(false));
  byId("more").addEventListener("click", () => {
    limit += PAGE;
    draw();
  });
  byId("swap").addEventListener("click", () => {
    [controls.a.value, controls.b.value] = [controls.b.value, controls.a.value];
    restart();
  });
  byId("grid-prev").addEventListener("click", () => stepPrompt(-1));
  byId("grid-next").addEventListener("click", () => stepPrompt(1));
  byId("images").addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, dialog");
    if (view() !== "grid" || typing || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    stepPrompt(event.key === "ArrowRight" ? 1 : -1);
    if (!document.activeElement || document.activeElement === document.body) byId("grid-next").focus();
  });
  form.addEventListener("input", (event) => {
    if (event.target === controls.search) fillPrompts();
    if (event.target.dataset.field === "task") {
      const task = labelOf(event.target);
      const like = data.chosen[task] || (settings.find((s) => s.task === task) || {}).id;
      if (like) holdLike(like);
    }
    restart();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    const kind = view();
    // The form's own reset happens after this event.
    setTimeout(() => {
      form.elements.view.value = kind;
      fillPrompts();
      setDefaults();
      controls.setting.value = "";
      restart();
    });
  });
  window.addEventListener("hashchange", readAddress);
  fillChoices();
  setDefaults();
  byId("wall-app").hidden = false;
  if (!readAddress()) draw();
}
