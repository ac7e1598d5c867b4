// Ways to look at a pair of images. Without this script they stand side by side.
"use strict";

const GAIN = 4;
const BLINK_MS = 500;
const SAID = {
  side: "baseline, candidate",
  slider: "baseline left, candidate right",
  blink: "candidate",
  difference: `difference × ${GAIN}`,
};

function drawDifference(duel) {
  const [before, after] = duel.querySelectorAll("img");
  const canvas = duel.querySelector("canvas");
  canvas.width = before.naturalWidth;
  canvas.height = before.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const pixels = [before, after].map((image) => {
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    return context.getImageData(0, 0, canvas.width, canvas.height);
  });
  const [a, b] = pixels.map((p) => p.data);
  for (let i = 0; i < a.length; i += 1) {
    a[i] = i % 4 === 3 ? 255 : Math.min(255, GAIN * Math.abs(a[i] - b[i]));
  }
  context.putImageData(pixels[0], 0, 0);
}

function show(section, mode) {
  for (const button of section.querySelectorAll(".modes button")) {
    button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  }
  for (const duel of section.querySelectorAll(".duel")) {
    duel.dataset.mode = mode;
    duel.classList.remove("off");
    duel.querySelector(".which").textContent = SAID[mode];
    if (mode === "difference") drawDifference(duel);
  }
}

for (const modes of document.querySelectorAll(".modes")) {
  modes.hidden = false;
  const section = modes.closest("section");
  modes.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) show(section, button.dataset.mode);
  });
}

for (const range of document.querySelectorAll(".duel input")) {
  range.addEventListener("input", () => {
    range.closest(".duel").style.setProperty("--at", `${range.value}%`);
  });
}

setInterval(() => {
  for (const duel of document.querySelectorAll('.duel[data-mode="blink"]')) {
    duel.querySelector(".which").textContent = duel.classList.toggle("off") ? "baseline" : "candidate";
  }
}, BLINK_MS);
