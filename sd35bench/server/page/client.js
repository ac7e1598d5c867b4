// Asking the server: with the key, counted, and with every failure as words.

const WINDOW_MS = 60_000;
const MOST_A_MINUTE = 45; // of the 60 that a key has by default: the rest is for its owner's scripts
const asked = []; // when requests went out, within the last minute

export const session = { key: sessionStorage.getItem("key") ?? "" };

export const $ = (id) => document.getElementById(id);

export class Refused extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export function spent() {
  const since = performance.now() - WINDOW_MS;
  while (asked.length && asked[0] < since) asked.shift();
  return asked.length;
}

export async function call(method, path, body) {
  const headers = session.key ? { "X-API-Key": session.key } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  asked.push(performance.now());
  let reply;
  try {
    reply = await fetch(path, { method, headers, body: body && JSON.stringify(body), cache: "no-store" });
  } catch {
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
  const said = await reply.text().then(parse).catch(() => null);
  if (!reply.ok) {
    const wait = Number(reply.headers.get("Retry-After")) || 0;
    throw new Refused(reply.status, inWords(reply.status, said?.error ?? said?.detail, wait), wait);
  }
  return said;
}

// JSON with long seeds, and their range, as text: JavaScript's numbers are exact up to 2^53 only.
function parse(text) {
  return JSON.parse(text.replace(/"(seed|maximum)":\s*(\d{16,})/g, '"$1":"$2"'));
}

function inWords(status, reason, wait) {
  const text = typeof reason === "string" ? reason.replaceAll("input.", "") : `The server answered ${status}.`;
  return status === 429 && wait ? `${text} Try again in ${wait} s.` : text;
}

// An address as the server wrote it may name another host than the one in the address bar.
export function local(url) {
  const { pathname, search } = new URL(url, location.href);
  return pathname + search;
}

// How long to wait until one more request fits into the minute.
export function untilFree() {
  return spent() >= MOST_A_MINUTE ? asked[0] + WINDOW_MS - performance.now() : 0;
}

// PUT a file to a presigned address, which is its own permission: no key goes there.
export async function put(url, headers, body) {
  const reply = await fetch(local(url), { method: "PUT", headers, body }).catch(() => null);
  if (reply?.ok) return;
  const said = await reply?.json().catch(() => null);
  throw new Refused(reply?.status ?? 0, said?.error ?? "The server did not take the init image.");
}
