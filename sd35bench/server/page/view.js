// The queue and the result, as the server tells them. All of it goes on the page as text, never as
// markup: prompts are what anybody typed.

import { $, local, session } from "./client.js";

export const OVER = new Set(["success", "error", "cancelled"]);
const WORDS = {
  created: "waiting", starting: "starting", processing: "running",
  success: "done", error: "failed", cancelled: "cancelled",
};
const rows = new Map(); // execution id → its elements
const handlers = { show: () => {}, cancel: () => {} };

export function onRow(wanted) {
  Object.assign(handlers, wanted);
}

// Put a row out of reach while its cancel is on its way; returns what undoes that.
export function holdRow(id) {
  const { stop, open } = rows.get(id);
  open.focus(); // its button is about to go
  stop.disabled = true;
  return () => { stop.disabled = false; };
}

// Show the list, the newest first, and the chosen one large.
export function render(executions, shownId) {
  const list = $("rows");
  $("none").hidden = executions.length > 0;
  const open = executions.filter((e) => !OVER.has(e.status)).length;
  $("pace").textContent = open ? `${open} not done yet` : "";
  for (const [id, row] of rows) {
    if (!executions.some((e) => e.id === id)) {
      row.item.remove();
      rows.delete(id);
    }
  }
  executions.forEach((execution, place) => {
    if (!rows.has(execution.id)) rows.set(execution.id, makeRow(execution));
    const { item } = rows.get(execution.id);
    updateRow(rows.get(execution.id), execution, execution.id === shownId);
    if (list.children[place] !== item) list.insertBefore(item, list.children[place] ?? null);
  });
  const shown = executions.find((e) => e.id === shownId);
  if (shown) show(shown, executions);
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function makeRow(execution) {
  const prompt = execution.input?.prompt ?? execution.id;
  const item = element("li");
  const open = element("button", "open");
  open.type = "button";
  open.addEventListener("click", () => handlers.show(execution.id));
  const thumb = element("span", "thumb");
  const words = element("span", "words");
  const meta = element("span", "meta");
  const badge = element("span", "badge");
  const times = element("span", "times");
  meta.append(badge, times);
  words.append(element("span", "row-prompt", prompt), meta);
  open.append(element("span", "sr", "Show: "), thumb, words);
  const stop = element("button", "cancel", "Cancel");
  stop.type = "button";
  stop.setAttribute("aria-label", `Cancel: ${prompt}`);
  stop.addEventListener("click", () => handlers.cancel(execution.id));
  item.append(open, stop);
  return { item, thumb, badge, times, stop, open };
}

function updateRow(row, execution, isShown) {
  const { status } = execution;
  const isOver = OVER.has(status);
  if (isOver && document.activeElement === row.stop) row.open.focus();
  row.stop.hidden = isOver;
  row.item.classList.toggle("current", isShown);
  row.open.setAttribute("aria-current", String(isShown));
  row.badge.className = `badge ${status}`;
  row.badge.textContent = WORDS[status] ?? status;
  row.times.textContent = timesOf(execution).join(" · ");
  if (status === "success" && !row.thumb.firstChild) {
    const image = element("img");
    image.alt = "";
    image.loading = "lazy";
    image.addEventListener("error", () => image.remove());
    image.src = local(execution.output);
    row.thumb.append(image);
  }
}

function timesOf(execution) {
  const { created_at: created, started_at: started, run_time: ran } = execution;
  const parts = [new Date(created).toLocaleTimeString()];
  if (started) parts.push(`waited ${seconds((Date.parse(started) - Date.parse(created)) / 1000)}`);
  if (ran !== null) parts.push(`ran ${seconds(ran)}`);
  return parts;
}

function seconds(value) {
  const positive = Math.max(value, 0);
  return positive < 10 ? `${positive.toFixed(2)} s` : `${positive.toFixed(0)} s`;
}

export function bringToView() {
  if (matchMedia("(max-width: 899px)").matches) $("stage").scrollIntoView({ block: "start" });
}

function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

function show(execution, executions) {
  const { status } = execution;
  const picture = $("picture");
  const isDone = status === "success";
  $("stage").classList.toggle("empty", !isDone);
  $("stage").classList.toggle("failed", status === "error");
  $("bar").hidden = OVER.has(status);
  $("stage-text").hidden = isDone;
  picture.hidden = !isDone;
  $("about").hidden = false;
  describe(execution);
  if (isDone) {
    const url = local(execution.output);
    if (picture.getAttribute("src") !== url) picture.src = url;
    picture.alt = execution.input.prompt;
    say(`Done in ${seconds(execution.run_time)}.`);
    return;
  }
  picture.removeAttribute("src");
  const text = situation(execution, executions);
  $("stage-text").textContent = text;
  say(text);
}

function situation({ id, status, output }, executions) {
  if (status === "error") return `Failed: ${output?.error_message ?? "the server gave no reason"}`;
  if (status === "cancelled") return "Cancelled.";
  if (status !== "created") return "Being made…";
  const place = executions.findIndex((e) => e.id === id);
  const ahead = executions.slice(place + 1).filter((e) => !OVER.has(e.status)).length;
  return ahead ? `Waiting; ${ahead} of yours before it.` : "Waiting for its turn…";
}

function describe(execution) {
  const { input, status } = execution;
  const isDone = status === "success";
  $("about-prompt").textContent = input.prompt;
  const facts = [["Seed", input.seed], ["Steps", input.steps], ["CFG", input.cfg], ["Ratio", input.aspect_ratio]];
  if (input.image) facts.push(["Strength", input.prompt_strength]);
  if (isDone) {
    const total = (Date.parse(execution.completed_at) - Date.parse(execution.created_at)) / 1000;
    facts.push(["Predict time", seconds(execution.run_time)], ["Total", seconds(total)]);
  }
  $("facts").replaceChildren(...facts.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", String(value)));
    return pair;
  }));
  $("file").hidden = !isDone;
  if (isDone) $("file").href = local(execution.output);
  const text = curl(execution);
  if ($("curl").textContent !== text) $("curl").textContent = text;
}

function curl({ model, input }) {
  const quoted = JSON.stringify({ model, input }, null, 2).replaceAll("'", "'\\''");
  const lines = [`curl -X POST ${new URL("v1/prediction", location.href)}`];
  if (session.key) lines.push('-H "X-API-Key: $API_KEY"');
  lines.push("-H 'Content-Type: application/json'", `-d '${quoted}'`);
  return lines.join(" \\\n  ");
}

async function copy() {
  const range = document.createRange();
  range.selectNodeContents($("curl"));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    $("copy").textContent = "Copied";
  } catch {
    $("copy").textContent = "Selected: press Ctrl + C"; // a page without https has no clipboard
  }
  setTimeout(() => { $("copy").textContent = "Copy"; }, 2500);
}

$("picture").addEventListener("load", ({ target }) => {
  target.classList.toggle("small", Math.max(target.naturalWidth, target.naturalHeight) < 256);
});
$("copy").addEventListener("click", copy);
