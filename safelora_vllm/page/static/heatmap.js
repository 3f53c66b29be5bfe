// Layers × modules in colours that people with any colour vision tell apart, each with its number.

import { el, figure, printable } from "./dom.js";

// Stops of cividis (sequential), and of blue over grey to orange (diverging).
const SEQUENTIAL = ["#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838"];
const DIVERGING = ["#08519c", "#5a9bd0", "#e9e9e9", "#e8983e", "#9c4a00"];

// The order in which a layer computes them.
const USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

const signed = (value) => (value === null ? "–" : `${value < 0 ? "−" : "+"}${figure(Math.abs(value), 2)}`);
const short = (value) => (value === null ? "–" : figure(value, value < 0.0995 ? 3 : 2));

export const MEASURES = [
  {
    id: "similarity", label: "Similarity over chance", colours: DIVERGING, text: signed,
    value: (m) => (m.similarity === null ? null : m.similarity - m.null_similarity),
    range: (values) => { const most = Math.max(0.05, ...values.map(Math.abs)); return [-most, most]; },
    meaning: "How much the projected change resembles the uploaded one, less what a random change of the same shape scores. At 0 it scores like a random one.",
  },
  {
    id: "retained", label: "Retained norm", colours: SEQUENTIAL, text: short,
    value: (m) => m.retained, range: (values) => [0, Math.max(1, ...values)],
    meaning: "The size of the served change as a share of the uploaded one. At 1 nothing was taken away.",
  },
  {
    id: "relative_norm", label: "Relative norm", colours: SEQUENTIAL, text: short,
    value: (m) => m.relative_norm, range: (values) => [0, Math.max(1e-9, ...values)],
    meaning: "The size of the uploaded change, relative to the weight of the module that it changes.",
  },
];

/** Where each module stands: rows of layers, columns of kinds. */
export function arranged(modules) {
  const rows = new Map(), columns = new Set();
  for (const module of modules) {
    const found = /^(.*?)\.(\d+)\.(.+)$/.exec(module.name);
    const [row, column] = found ? [Number(found[2]), found[3]] : ["–", module.name];
    const key = found ? `${found[1]}.${row}` : row;
    columns.add(column);
    if (!rows.has(key)) rows.set(key, { key, row, cells: new Map() });
    rows.get(key).cells.set(column, module);
  }
  const sorted = [...rows.values()].sort((a, b) => Number(a.row === "–") - Number(b.row === "–") || a.row - b.row);
  const place = (name) => { const at = USUAL.indexOf(name.slice(name.lastIndexOf(".") + 1)); return at < 0 ? USUAL.length : at; };
  return { rows: sorted, columns: [...columns].sort((a, b) => place(a) - place(b)) };
}

/** The map with its choice of measure, legend and the figures of the module that is pointed at. */
export function heatMap(modules, enforced) {
  const frame = el("div", { class: "heat" });
  const readout = el("p", { class: "readout" });
  const grid = el("div", { class: "scroll" }), legend = el("div", { class: "legend" });
  const meaning = el("p", { class: "meaning" });
  const kinds = arranged(modules);
  const show = (measure) => {
    meaning.textContent = measure.meaning;
    readout.textContent = "Point at a cell, or move with the arrow keys, to see its figures.";
    const values = modules.map(measure.value).filter((value) => value !== null);
    const range = measure.range(values.length ? values : [0]);
    grid.replaceChildren(gridOf(kinds, measure, range, (module) => { readout.textContent = sentence(module); }));
    legend.replaceChildren(...legendOf(measure, range, modules, enforced));
  };
  const choice = el("fieldset", { class: "choice" }, el("legend", { class: "hidden-text" }, "What the colours show"),
    MEASURES.map((measure, index) => el("label", {},
      el("input", { type: "radio", name: "measure", value: measure.id, checked: index === 0, onchange: () => show(measure) }),
      el("span", {}, measure.label))));
  frame.append(choice, meaning, grid, legend, readout);
  show(MEASURES[0]);
  return frame;
}

function sentence(m) {
  const error = m.similarity_error ? ` ± ${figure(m.similarity_error)}` : "";
  return `${printable(m.name)}: ${m.decision}${m.uncertain ? " (uncertain)" : ""}; rank ${m.rank}; similarity ${figure(m.similarity)}${error}, ` +
    `of a random change ${figure(m.null_similarity)}; retained norm ${figure(m.retained)}; relative norm ${figure(m.relative_norm, 4)}`;
}

function gridOf({ rows, columns }, measure, range, pointed) {
  const last = columns.map((name) => name.slice(name.lastIndexOf(".") + 1));
  const heads = new Set(last).size === columns.length ? last : columns;
  const several = new Set(rows.map((row) => row.row)).size < rows.length;
  const cells = rows.map((row) => columns.map((column) => {
    const module = row.cells.get(column);
    if (!module) return el("td", { role: "gridcell", class: "none", tabindex: "-1", "aria-label": `layer ${row.row}, ${printable(column)}: not in the adapter` });
    const value = measure.value(module);
    const cell = el("td", {
      role: "gridcell", tabindex: "-1", class: module.decision === "kept" ? "cell kept" : "cell",
      "data-text": measure.text(value),
      "aria-label": `layer ${row.row}, ${printable(column)}: ${measure.label.toLowerCase()} ${measure.text(value)}, ${module.decision}`,
      onmouseenter: () => pointed(module), onfocus: () => pointed(module),
    });
    if (value !== null) {
      const colour = colourOf(measure.colours, (value - range[0]) / (range[1] - range[0]));
      cell.style.backgroundColor = `rgb(${colour.join(" ")})`;
      if (luminance(colour) > 0.22) cell.classList.add("bright");
    }
    return cell;
  }));
  const move = (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -columns.length], End: [0, columns.length] };
    const step = steps[event.key], y = cells.findIndex((row) => row.includes(event.target));
    if (!step || y < 0) return;
    event.preventDefault();
    const clamp = (at, count) => Math.min(count - 1, Math.max(0, at));
    const next = cells[clamp(y + step[0], rows.length)][clamp(cells[y].indexOf(event.target) + step[1], columns.length)];
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  };
  if (cells.length) cells[0][0].tabIndex = 0;
  return el("table", { role: "grid", class: "map", "aria-label": `${measure.label} by layer and module`, onkeydown: move },
    el("thead", {}, el("tr", { role: "row" }, el("th", { scope: "col", role: "columnheader" }, "layer"),
      heads.map((name, index) => el("th", { scope: "col", role: "columnheader", title: printable(columns[index]) }, el("bdi", {}, printable(name)))))),
    el("tbody", {}, rows.map((row, y) => el("tr", { role: "row" },
      el("th", { scope: "row", role: "rowheader" }, several ? printable(row.key) : String(row.row)), cells[y]))));
}

function legendOf(measure, [low, high], modules, enforced) {
  const ramp = el("span", { class: "ramp", "aria-hidden": "true" });
  for (let at = 0; at < 40; at += 1) {
    const step = el("i");
    step.style.backgroundColor = `rgb(${colourOf(measure.colours, at / 39).join(" ")})`;
    ramp.append(step);
  }
  const kept = modules.filter((module) => module.decision === "kept").length;
  return [
    el("span", {}, measure.text(low)), ramp, el("span", {}, measure.text(high)),
    kept ? el("span", { class: "key" }, el("i", { class: "cell kept sample", "aria-hidden": "true" }), `corner cut: ${enforced ? "" : "would be "}kept as uploaded`) : null,
    el("span", { class: "key" }, `${enforced ? "" : "would be "}projected: ${kept ? modules.length - kept : "all"} of ${modules.length}`),
  ].filter(Boolean);
}

function colourOf(stops, share) {
  const at = Math.min(1, Math.max(0, share)) * (stops.length - 1), below = Math.min(stops.length - 2, Math.floor(at));
  const [from, to] = [stops[below], stops[below + 1]].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return from.map((value, i) => Math.round(value + (to[i] - value) * (at - below)));
}

function luminance(rgb) {
  const [r, g, b] = rgb.map((v) => { const c = v / 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
