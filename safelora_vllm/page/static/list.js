// The table of adapters, with search, filter and sort, and the newest refusals.

import { badge, bytesText, counted, el, figure, nameOf, printable, section, table, timeOf } from "./dom.js";

const PAGE = 100; // rows that are shown at once: a thousand adapters stay quick
const ORDER = { refused: 0, unavailable: 1, served: 2 };
export const linkTo = (name) => `#/adapter/${encodeURIComponent(name)}`;

const COLUMNS = [
  { id: "name", label: "Adapter", value: (a) => a.name, cell: (a) => el("a", { href: linkTo(a.name) }, nameOf(a.name)) },
  { id: "state", label: "State", value: (a) => ORDER[a.state], cell: stateCell },
  { id: "version", label: "Version", kind: "number", value: (a) => a.version, cell: (a) => a.version ?? el("span", { title: "of --lora-modules: the command line of the server" }, "fixed") },
  { id: "created", label: "Changed", kind: "wide", value: (a) => a.created, cell: (a) => timeOf(a.created), newest: true },
  { id: "rank", label: "Rank", kind: "number wide", value: (a) => a.rank, cell: (a) => a.rank ?? "–" },
  { id: "bytes", label: "Size", kind: "number wide", value: (a) => a.bytes, cell: (a) => bytesText(a.bytes), newest: true },
  { id: "projected", label: "Projected", kind: "number mid", value: (a) => a.figures?.projected, cell: projectedCell },
  { id: "retained", label: "Least retained", kind: "number wide", value: (a) => a.figures?.least_retained, cell: (a) => (asUploaded(a) ? "all" : figure(a.figures?.least_retained)) },
  { id: "norm", label: "Total norm", kind: "number mid", value: (a) => a.figures?.total_norm, cell: (a) => figure(a.figures?.total_norm, 4), newest: true },
];

const reportOnly = (adapter) => Boolean(adapter.mode) && adapter.mode !== "enforce";
const asUploaded = (adapter) => reportOnly(adapter) || adapter.method === "none";
const unguarded = (adapter) => reportOnly(adapter) || (asUploaded(adapter) && !adapter.second_opinion && !adapter.exam?.enforced);

function projectionTag(adapter) {
  if (unguarded(adapter)) return el("span", { class: "tag warn" }, "unprojected");
  return asUploaded(adapter) ? el("span", { class: "tag", title: "nothing is projected; a second opinion or an enforced exam looks at harm" }, "as uploaded") : null;
}

function projectedCell({ figures, ...adapter }) {
  if (!figures) return "–";
  return asUploaded(adapter) ? `none of ${figures.modules}` : `${figures.projected} of ${figures.modules}`;
}

function stateCell(adapter) {
  return [badge(adapter.state), projectionTag(adapter),
    adapter.override ? el("span", { class: "tag", title: "an admin allowed rules that are less strict" }, "override") : null,
    adapter.second_opinion ? el("span", { class: "tag", title: "each request is also given to the aligned model" }, "second opinion") : null,
    adapter.reasons.length ? el("span", { class: "codes" }, [...new Set(adapter.reasons.map((r) => r.code))].join(", ")) : null];
}

/** The view of the list. Its `update(overview, refusals)` shows what is new. */
export function listView({ upload }) {
  let adapters = [], found = [], from = 0, by = COLUMNS[0], down = false, mayUpload = false;
  const search = el("input", { type: "search", id: "search", placeholder: "name, reason or policy", autocomplete: "off", spellcheck: "false", oninput: () => { from = 0; render(); } });
  const state = el("select", { id: "state", onchange: () => { from = 0; render(); } },
    ["all", "served", "refused", "unavailable"].map((value) => el("option", { value }, value)));
  const count = el("p", { class: "count", role: "status" });
  const head = el("tr"), body = el("tbody"), more = el("p", { class: "more" }), empty = el("div", { class: "empty" });
  const frame = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Adapters" },
    el("table", { class: "adapters" }, el("caption", { class: "hidden-text" }, "Adapters"), el("thead", {}, head), body));
  const tools = el("div", { class: "tools" },
    el("label", { for: "search" }, "Search"), search, el("label", { for: "state" }, "State"), state, count);
  const refusals = el("div");
  const view = el("div", {}, el("h1", { tabindex: "-1" }, "Adapters"), tools, frame, more, empty, refusals);

  const heads = () => head.replaceChildren(...COLUMNS.map((column) =>
    el("th", { scope: "col", class: column.kind, "aria-sort": column === by ? (down ? "descending" : "ascending") : null },
      el("button", { type: "button", class: "sort", onclick: () => sort(column) }, column.label,
        el("span", { class: "arrow", "aria-hidden": "true" }, column === by ? (down ? " ▾" : " ▴") : "")))));
  const sort = (column) => {
    from = 0;
    down = column === by ? !down : Boolean(column.newest);
    by = column;
    heads();
    render();
    head.children[COLUMNS.indexOf(column)].firstChild.focus();
  };
  const compare = (a, b) => {
    const [x, y] = [by.value(a) ?? null, by.value(b) ?? null];
    if (x === null || y === null) return (x === null) - (y === null); // what has no figure comes last
    const order = x < y ? -1 : x > y ? 1 : 0;
    return (down ? -order : order) || (a.name < b.name ? -1 : 1);
  };
  const text = (a) => [a.name, a.state, a.method, a.mode, a.by, a.second_opinion ? "second opinion" : "", ...a.reasons.map((r) => r.code)].join(" ").toLowerCase();
  const row = (adapter) => el("tr", {}, COLUMNS.map((column) => el("td", { class: column.kind }, column.cell(adapter))));
  const turn = (label, step) => el("button", { type: "button", disabled: from + step < 0 || from + step >= found.length,
    onclick: () => { from += step; render(); frame.scrollIntoView(); frame.focus({ preventScroll: true }); } }, label);
  const render = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = adapters.filter((a) => (state.value === "all" || a.state === state.value) && words.every((word) => text(a).includes(word))).sort(compare);
    if (from >= found.length) from = 0;
    const focused = document.activeElement?.closest?.("tbody") === body ? document.activeElement.getAttribute("href") : null;
    body.replaceChildren(...found.slice(from, from + PAGE).map(row));
    if (focused) body.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
    more.replaceChildren(...(found.length > PAGE ? [turn("Previous", -PAGE), ` ${from + 1} to ${Math.min(found.length, from + PAGE)} of ${found.length} `, turn("Next", PAGE)] : []));
    frame.hidden = tools.hidden = !adapters.length;
    frame.hidden ||= !found.length;
    empty.replaceChildren(...(found.length ? [] : emptyText()));
    count.textContent = countText();
  };
  const emptyText = () => {
    if (adapters.length) return [el("p", {}, "No adapter matches. "), el("button", { type: "button", onclick: () => { search.value = ""; state.value = "all"; render(); search.focus(); } }, "Clear the search")];
    if (!mayUpload) return [el("p", {}, "There is no adapter that this key may use.")];
    return [el("p", {}, "No adapters yet."), el("p", {}, "Drop the folder that PEFT saved anywhere on this page, or"),
      el("button", { type: "button", class: "primary", onclick: () => upload() }, "Upload an adapter")];
  };
  const countText = () => {
    const of = (wanted) => adapters.filter((a) => a.state === wanted).length;
    const parts = ["served", "refused", "unavailable"].filter((wanted) => of(wanted)).map((wanted) => `${of(wanted)} ${wanted}`);
    return found.length === adapters.length ? `${counted(adapters.length, "adapter")}: ${parts.join(", ")}` : `${found.length} of ${counted(adapters.length, "adapter")}`;
  };
  const update = (overview, records) => {
    adapters = overview.adapters;
    mayUpload = overview.may_upload;
    render();
    refusals.replaceChildren(...(records?.length ? [refusalsOf(records)] : []));
  };
  heads();
  return { view, update };
}

function refusalsOf(records) {
  return section("Newest refusals", table("Newest refusals",
    [["Time", ""], ["Adapter", ""], ["Reasons", ""], ["Action", "mid"], ["By", "wide"]],
    records.map((r) => [[timeOf(Date.parse(r.time) / 1000)], [nameOf(r.adapter)], [el("code", {}, printable(r.reasons.join(", ") || "–"))], [r.action, "mid"], [nameOf(r.actor), "wide"]])));
}
