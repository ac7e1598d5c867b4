// The form: filled and checked by the server's own schema, complaints in words where they belong.

import { $, call, put } from "./client.js";

const REUSE_UPLOAD_MS = 10 * 60_000;
const NUMBERS = ["steps", "cfg", "output_quality", "prompt_strength"];
const form = $("form");

let properties = {}; // of the schema's input, by name
let upload = null; // {file, url, at}: what the chosen image became at the server

function rangeOf(name) {
  const property = properties[name];
  const number = property.anyOf?.find((choice) => "minimum" in choice) ?? property;
  return { low: number.minimum, high: number.maximum, whole: number.type === "integer" };
}

export function fillForm(schema) {
  properties = schema.properties;
  for (const name of NUMBERS) {
    const { low, high, whole } = rangeOf(name);
    Object.assign($(name), { min: low, max: high, step: whole ? 1 : "any", value: properties[name].default });
    $(`${name}-hint`).textContent = `${low} to ${high}`;
  }
  $("prompt_strength-hint").textContent += "; 1 keeps nothing of the image";
  $("seed-hint").textContent = "Empty: random";
  const { enum: ratios, default: square } = properties.aspect_ratio;
  $("aspect_ratio").replaceChildren(...ratios.map((ratio) => ratioChoice(ratio, ratio === square)));
  const { enum: formats, default: first } = properties.output_format;
  $("output_format").replaceChildren(...formats.map((f) => new Option(f, f, f === first, f === first)));
  $("image-field").hidden = Boolean(properties.image.enum); // a model that makes images from text only
  $("fields").disabled = false;
  showQuality();
}

function ratioChoice(ratio, checked) {
  const [width, height] = ratio.split(":").map(Number);
  const scale = 20 / Math.max(width, height);
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), {
    type: "radio", name: "aspect_ratio", value: ratio, checked, className: "sr",
  });
  const shape = Object.assign(document.createElement("span"), { className: "shape" });
  shape.style.width = `${width * scale}px`;
  shape.style.height = `${height * scale}px`;
  const box = Object.assign(document.createElement("span"), { className: "shape-box" });
  box.append(shape);
  label.append(input, box, ratio);
  return label;
}

function showQuality() {
  $("quality-field").hidden = $("output_format").value === "png";
}

// Complain about a field: in words, beside the button, with the focus where it has to be mended.
export function complain(message, field) {
  const alert = $("alert");
  alert.textContent = "";
  alert.textContent = message;
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
}

export function clearComplaints() {
  $("alert").textContent = "";
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

export class Wrong extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

function readNumber(name) {
  const field = $(name);
  const { low, high, whole } = rangeOf(name);
  const value = field.valueAsNumber;
  if (!(value >= low && value <= high) || (whole && !Number.isInteger(value))) {
    const title = field.labels[0].textContent;
    const given = field.value === "" ? "empty or not a number" : field.value;
    throw new Wrong(field, `${title} is ${given}: it must be ${whole ? "a whole number" : "a number"} from ${low} to ${high}.`);
  }
  return value;
}

function readSeed() {
  const text = $("seed").value.trim();
  if (text === "") return null;
  const { low, high } = rangeOf("seed");
  if (!/^\d+$/.test(text) || BigInt(text) < BigInt(low) || BigInt(text) > BigInt(high)) {
    throw new Wrong($("seed"), `Seed is ${text}: it must be a whole number from ${low} to ${high}, or empty for a random one.`);
  }
  return text; // the server reads it exactly
}

export function readForm() {
  const prompt = $("prompt").value;
  if (!prompt.trim()) throw new Wrong($("prompt"), "Prompt is empty: say what the image shows.");
  const input = {
    prompt,
    aspect_ratio: form.elements.aspect_ratio.value,
    steps: readNumber("steps"),
    cfg: readNumber("cfg"),
    seed: readSeed(),
    output_format: $("output_format").value,
  };
  if (input.output_format !== "png") input.output_quality = readNumber("output_quality");
  if ($("image").files.length) input.prompt_strength = readNumber("prompt_strength");
  return input;
}

function showChosen() {
  const [file] = $("image").files;
  URL.revokeObjectURL($("preview").src);
  $("chosen").hidden = !file;
  upload = null;
  if (file) $("preview").src = URL.createObjectURL(file);
  else $("preview").removeAttribute("src");
}

// The URL of the chosen init image, uploaded unless it just was; null where none is chosen.
export async function uploaded() {
  const [file] = $("image").files;
  if (!file) return null;
  if (upload?.file === file && Date.now() - upload.at < REUSE_UPLOAD_MS) return upload.url;
  const ticket = await call("POST", "v1/upload/presign", { content_type: file.type, file_type: "image" });
  await put(ticket.presigned_url, ticket.required_headers, file);
  upload = { file, url: ticket.public_url, at: Date.now() };
  return upload.url;
}

$("output_format").addEventListener("change", showQuality);
$("image").addEventListener("change", showChosen);
$("remove-image").addEventListener("click", () => {
  $("image").value = "";
  showChosen();
  $("image").focus();
});
