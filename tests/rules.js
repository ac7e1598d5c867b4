// The accessibility rules that matter here, as axe names them; returns what breaks them, in words.
// No rule is bent to the pages: each looks at the document as a screen reader would meet it.
() => {
  const found = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const seen = (node) =>
    node.checkVisibility({ opacityProperty: false, visibilityProperty: true }) &&
    node.getClientRects().length > 0;
  const where = (node) => {
    const id = node.id ? "#" + node.id : "";
    const kind = node.getAttribute("class") ? "." + node.getAttribute("class").split(" ")[0] : "";
    return node.tagName.toLowerCase() + id + kind + " " + (node.textContent || "").trim().slice(0, 30);
  };
  const fail = (rule, node) => found.push(rule + ": " + (node ? where(node) : ""));

  const nameOf = (node) => {
    const by = node.getAttribute("aria-labelledby");
    if (by) return by.split(" ").map((id) => document.getElementById(id)?.textContent || "").join("").trim();
    const own = node.getAttribute("aria-label");
    if (own) return own.trim();
    if (node.labels && node.labels.length) return [...node.labels].map((l) => l.textContent).join("").trim();
    const images = [...node.querySelectorAll("img[alt], svg > title")];
    const alt = images.map((n) => n.alt || n.textContent).join("");
    return ((node.alt || "") + node.textContent + alt + (node.title || "")).trim();
  };

  // document: language, title, landmarks
  if (!document.documentElement.lang) fail("html-has-lang");
  if (!document.title.trim()) fail("document-title");
  if (all("main").length !== 1) fail("landmark-one-main");
  for (const nav of all("nav, [role=region], section")) {
    if (nav.matches("section") && !nav.hasAttribute("aria-labelledby")) continue;
    if (!nameOf(nav)) fail("landmark-unique", nav);
  }
  const regions = all("nav, [role=region]").filter(seen).map((n) => n.tagName + n.getAttribute("aria-label"));
  for (const name of regions) {
    if (regions.filter((other) => other === name).length > 1) found.push("landmark-unique: " + name);
  }
  for (const node of document.body.children) {
    const landmark = node.matches("header, nav, main, footer, script, dialog, .skip, style, template");
    if (!landmark && seen(node)) fail("region", node);
  }

  // ids and what refers to them
  const ids = all("[id]").map((n) => n.id);
  for (const id of new Set(ids)) if (ids.filter((i) => i === id).length > 1) found.push("duplicate-id: " + id);
  for (const name of ["aria-labelledby", "aria-describedby", "aria-controls", "for"]) {
    for (const node of all("[" + name + "]")) {
      for (const id of node.getAttribute(name).split(" ")) if (!document.getElementById(id)) fail(name, node);
    }
  }

  // headings: one h1, no level left out on the way down
  const headings = all("h1, h2, h3, h4, h5, h6").filter(seen);
  if (headings.filter((h) => h.tagName === "H1").length !== 1) fail("page-has-heading-one");
  headings.reduce((last, h) => {
    const level = Number(h.tagName[1]);
    if (level > last + 1) fail("heading-order", h);
    if (!h.textContent.trim()) fail("empty-heading", h);
    return level;
  }, 0);

  // names
  for (const node of all("button, a[href], select, textarea, input:not([type=hidden]), summary, iframe")) {
    if (seen(node) && !nameOf(node)) fail("name", node);
  }
  for (const node of all("dialog, [role=img], [role=group], fieldset")) {
    const legend = node.querySelector(":scope > legend, :scope > title");
    if (seen(node) && !legend && !nameOf(node)) fail("name", node);
  }
  for (const img of all("img, canvas, svg:not([aria-hidden=true])")) {
    const named = img.matches("img") ? img.hasAttribute("alt") : nameOf(img) || img.getAttribute("role");
    if (!named) fail("image-alt", img);
  }

  // structure
  for (const list of all("ul, ol")) {
    for (const child of list.children) if (!child.matches("li, script, template")) fail("list", list);
  }
  for (const list of all("dl")) {
    for (const child of list.children) if (!child.matches("div, dt, dd, script")) fail("definition-list", list);
  }
  for (const item of all("li")) if (!item.parentElement.matches("ul, ol, menu")) fail("listitem", item);
  for (const head of all("th")) if (!head.textContent.trim()) fail("empty-table-header", head);
  for (const node of all("button button, a a, button a, a button, summary button")) fail("nested-interactive", node);

  // roles and states that exist
  const ROLES = "alert button dialog grid group img link list listitem navigation none note option presentation progressbar radio region row search status switch tab table tablist tabpanel toolbar".split(" ");
  for (const node of all("[role]")) if (!ROLES.includes(node.getAttribute("role"))) fail("aria-roles", node);
  const TRUTH = ["aria-pressed", "aria-expanded", "aria-hidden", "aria-modal", "aria-busy"];
  for (const name of TRUTH) {
    for (const node of all("[" + name + "]")) {
      if (!["true", "false"].includes(node.getAttribute(name))) fail(name, node);
    }
  }
  for (const node of all("[aria-pressed]")) if (!node.matches("button")) fail("aria-allowed-attr", node);
  for (const node of all("[aria-hidden=true]")) {
    if (node.querySelector("a[href], button, input, select, [tabindex='0']")) fail("aria-hidden-focus", node);
  }

  for (const node of all("p, pre, code, span, div, strong, bdi").filter((n) => !n.hasAttribute("role"))) {
    if (node.matches("[aria-label], [aria-labelledby]")) fail("aria-prohibited-attr", node);
  }

  // keyboard: no order of one's own; what scrolls can be reached
  for (const node of all("[tabindex]")) if (node.tabIndex > 0) fail("tabindex", node);
  for (const node of all("body *")) {
    const style = getComputedStyle(node);
    if (!/auto|scroll/.test(style.overflowX + style.overflowY) || !seen(node)) continue;
    const scrolls = node.scrollWidth > node.clientWidth + 1 || node.scrollHeight > node.clientHeight + 1;
    const inside = node.querySelector("a[href], button, input, select, [tabindex='0']");
    if (scrolls && node.tabIndex < 0 && !inside) fail("scrollable-region-focusable", node);
  }

  // contrast of text, 4.5 to 1, or 3 to 1 where it is large
  const parse = (text) => {
    const numbers = text.match(/[\d.]+/g).map(Number);
    return { rgb: numbers.slice(0, 3), alpha: numbers.length > 3 ? numbers[3] : 1 };
  };
  const over = (top, bottom) => top.rgb.map((c, i) => c * top.alpha + bottom[i] * (1 - top.alpha));
  const canvas = parse(getComputedStyle(document.body).backgroundColor);
  const page = canvas.alpha === 0 ? [255, 255, 255] : canvas.rgb;
  const known = new Map([[null, page]]);
  const backdrop = (node) => {
    if (!known.has(node)) {
      known.set(node, over(parse(getComputedStyle(node).backgroundColor), backdrop(node.parentElement)));
    }
    return known.get(node);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const judged = new Set(all("input, select, textarea").filter((n) => n.value));
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    if (text.data.trim()) judged.add(text.parentElement);
  }
  for (const node of judged) {
    if (!seen(node) || node.closest("script, style, title, .sr, .skip, option, [disabled]")) continue;
    const style = getComputedStyle(node);
    const ink = parse(node.closest("svg") ? style.fill : style.color);
    const below = backdrop(node.closest("svg") ? node.closest("svg") : node);
    const [a, b] = [light(over(ink, below)), light(below)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) fail("color-contrast " + ratio.toFixed(2), node);
  }
  return [...new Set(found)];
}
