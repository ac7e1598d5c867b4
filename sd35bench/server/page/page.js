// One client of the public API, without a framework: the form asks, the list tells, the stage shows.

import { $, Refused, call, session, spent, untilFree } from "./client.js";
import { Wrong, clearComplaints, complain, fillForm, readForm, uploaded } from "./form.js";
import { OVER, bringToView, holdRow, onRow, render } from "./view.js";

const SHOWN_ROWS = 30;
const form = $("form");

let slug = null; // what the server calls its model; null until it has told the schema
let executions = []; // as the server lists them: the newest first
let shownId = null;
let timer = 0;
let polling = false;
let pollAgain = false; // something happened while an answer was on its way
let trouble = ""; // why the last poll failed

// Generating ----------------------------------------------------------------------------------

async function generate(event) {
  event.preventDefault();
  if ($("generate").getAttribute("aria-disabled") === "true") return;
  clearComplaints();
  $("generate").setAttribute("aria-disabled", "true");
  try {
    const input = readForm();
    const image = await uploaded();
    if (image) input.image = image;
    const { predictionID } = await call("POST", "v1/prediction", { model: slug, input });
    shownId = predictionID;
    bringToView();
    await poll();
  } catch (error) {
    if (error instanceof Wrong) complain(error.message, error.field);
    else if (error instanceof Refused) refuse(error);
    else throw error;
  } finally {
    $("generate").removeAttribute("aria-disabled");
  }
}

function refuse(error) {
  if (error.status === 401) return askForKey();
  const named = /^(\w+)[=:]/.exec(error.message);
  complain(error.message, named ? $(named[1]) : null);
}

async function cancel(id) {
  const release = holdRow(id);
  try {
    await call("POST", `v1/prediction/${encodeURIComponent(id)}/cancel`);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    release();
    complain(error.message);
  }
  await poll();
}

// Polling -------------------------------------------------------------------------------------

async function poll() {
  pollAgain = polling;
  if (polling) return;
  clearTimeout(timer);
  polling = true;
  let wait = 0;
  try {
    const listing = await call("GET", `v1/executions?limit=${SHOWN_ROWS}`);
    executions = listing.executions;
    if (trouble && $("alert").textContent === trouble) $("alert").textContent = "";
    trouble = "";
    render(executions, shownId);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) return askForKey();
    wait = Math.max(error.retryAfter ?? 0, 5) * 1000;
    if (trouble !== error.message) complain(error.message); // said once, not at every attempt
    trouble = error.message;
  } finally {
    polling = false;
  }
  schedule(pollAgain ? 0 : Math.max(wait, pace()));
}

// A second while one runs; slower while many wait, while nothing does, and as the minute fills up.
function pace() {
  const open = executions.filter((e) => !OVER.has(e.status));
  const running = open.some((e) => e.status !== "created");
  const wanted = open.length === 0 ? 30_000 : running ? 1000 * Math.min(open.length, 5) : 1000;
  const used = spent();
  return Math.max(wanted, used < 20 ? 0 : used < 35 ? 2000 : 4000);
}

function schedule(wait) {
  clearTimeout(timer);
  if (document.hidden) return; // goes on when the page is seen again
  timer = setTimeout(poll, Math.max(wait, untilFree()));
}

function choose(id) {
  shownId = id;
  render(executions, shownId);
  bringToView();
}

function again() {
  const shown = executions.find((e) => e.id === shownId);
  $("seed").value = shown.input.seed;
  $("seed").focus();
}

// The key, and the beginning -------------------------------------------------------------------

function askForKey() {
  clearTimeout(timer);
  $("key-alert").textContent = session.key ? "The server does not know this key." : "";
  session.key = "";
  sessionStorage.removeItem("key");
  $("fields").disabled = true;
  form.hidden = slug === null; // without the schema there is nothing in it to read
  $("key-form").hidden = false;
  $("forget").hidden = true;
  $("key").focus();
}

function forgetKey() {
  sessionStorage.removeItem("key");
  location.reload();
}

async function open() {
  try {
    const model = await call("GET", "v1/model");
    fillForm(model.request_schema);
    slug = model.slug;
    form.hidden = false;
    $("forget").hidden = !session.key;
    $("key-form").hidden = true;
    await poll();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) askForKey();
    else complain(error.message);
  }
}

async function begin() {
  try {
    const health = await call("GET", "healthz");
    const condition = health.status === "ready" ? "" : ` (${health.status})`;
    $("serving").textContent = `${health.model} on ${health.backend}${condition}`;
    document.title = `${health.model} on ${health.backend} · sd35bench serve`;
    if (health.model === "nano") {
      $("prompt").placeholder = "a red circle left of a blue square on white";
      $("prompt-hint").textContent = "nano draws coloured shapes. Ctrl + Enter generates.";
    }
    if (!health.auth) session.key = "";
    else if (!session.key) return askForKey();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    $("serving").textContent = error.message;
    return;
  }
  await open();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  session.key = $("key").value.trim();
  $("key-alert").textContent = session.key ? "" : "Type the key first.";
  if (!session.key) return;
  sessionStorage.setItem("key", session.key);
  open();
});
form.addEventListener("submit", generate);
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
$("forget").addEventListener("click", forgetKey);
$("again").addEventListener("click", again);
onRow({ show: choose, cancel });
document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden && slug) poll();
});
begin();
