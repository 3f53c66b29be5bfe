// Elements and figures. Text from elsewhere goes into the page as text only: there is no markup in strings.

/** An element. props: attributes, "class", and on… handlers; children: nodes or text, others are left out. */
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** A name that somebody chose: its writing direction stays its own. */
export const nameOf = (text) => el("bdi", { class: "name" }, printable(text));

/** With the characters that cannot be seen, or turn the direction of what follows, as their code. */
export function printable(text) {
  return String(text).replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (c) => `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`);
}

export function figure(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(1);
  return value.toFixed(digits);
}

export function bytesText(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 999.5 && unit < units.length - 1) { count /= 1000; unit += 1; }
  return `${count >= 100 || unit === 0 ? count.toFixed(0) : count.toFixed(1)} ${units[unit]}`;
}

export const counted = (count, noun, nouns = `${noun}s`) => `${count} ${count === 1 ? noun : nouns}`;

/** A time, as how long ago it was; the whole time is its title. seconds: since 1970. */
export function timeOf(seconds, now = Date.now() / 1000) {
  if (seconds === null || seconds === undefined) return el("span", {}, "–");
  const when = new Date(seconds * 1000);
  return el("time", { datetime: when.toISOString(), title: when.toLocaleString() }, agoText(now - seconds, when));
}

function agoText(seconds, when) {
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  if (seconds < 30 * 86400) return counted(Math.floor(seconds / 86400), "day") + " ago";
  return when.toISOString().slice(0, 10);
}

/** A state in a word, with a sign besides its colour. */
export function badge(state) {
  const signs = { served: "●", accepted: "●", refused: "✕", unavailable: "◌", removed: "–", projected: "●", kept: "○" };
  return el("span", { class: `badge ${signs[state] ? state : ""}` },
    el("span", { "aria-hidden": "true" }, `${signs[state] ?? "·"} `), state);
}

/** A table in a frame that scrolls sideways where it has to. heads: [text, class]; rows: of [content, class]. */
export function table(caption, heads, rows) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {},
      el("caption", { class: "hidden-text" }, caption),
      el("thead", {}, el("tr", {}, heads.map(([text, kind]) => el("th", { scope: "col", class: kind }, text)))),
      el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map(([content, kind]) => el("td", { class: kind }, content)))))));
}

export function section(title, ...children) {
  return el("section", {}, el("h2", {}, title), ...children);
}

/** Reasons of a refusal: code and sentence. */
export function reasonList(reasons) {
  return el("ul", { class: "reasons" }, reasons.map((reason) =>
    el("li", {}, el("code", {}, printable(reason.code)), " ", el("bdi", {}, printable(reason.message)))));
}
