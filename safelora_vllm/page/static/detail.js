// One adapter: decision, heat map, versions, audit trail, and what can be done with it.

import * as api from "./api.js";
import { confirmed, uploadDialog } from "./dialogs.js";
import { badge, bytesText, el, nameOf, printable, reasonList, section, table, timeOf } from "./dom.js";
import { facts, policyText, reportView } from "./report.js";
import { trafficView } from "./traffic.js";

const quiet = (promise) => promise.catch((error) => { if (error.status === 401) throw error; return null; });

/** Fill a place with an adapter's view. item: its entry of the overview; changed(sentence) after each change. */
export async function detailView(item, overview, changed, failed) {
  const [report, versions, trail] = await Promise.all([
    item.state === "served" ? quiet(api.report(item.name)) : null,
    item.version === null ? null : quiet(api.versions(item.name)),
    item.changeable ? quiet(api.audit({ adapter: item.name, limit: 50 })) : null,
  ]);
  const act = async (ask, work, sentence) => {
    if (ask && !(await confirmed(...ask))) return;
    try {
      await work();
      changed(sentence, work.gone);
    } catch (error) {
      failed(error);
    }
  };
  const remove = Object.assign(() => api.remove(item.name), { gone: true });
  const buttons = item.changeable ? el("div", { class: "buttons" },
    el("button", { type: "button", onclick: () => uploadDialog({ most: overview.max_adapter_bytes, replaces: item.name,
      done: (r) => changed(`${item.name} is replaced: version ${r.version} is served.`) }) }, "Replace"),
    el("button", { type: "button", class: "danger", onclick: () => act([`Remove ${printable(item.name)}?`,
      "The name and all its versions go, on every server. Requests that run end on it. This cannot be undone.", "Remove"],
    remove, `${item.name} is removed.`) }, "Remove")) : null;
  return [
    el("p", { class: "back" }, el("a", { href: "#/" }, "← All adapters")),
    el("div", { class: "title" }, el("h1", { tabindex: "-1" }, nameOf(item.name)), badge(item.state), buttons),
    ...(report ? reportView(report, aboutVersion(item, report)) : notServed(item)),
    trafficView(report?.traffic),
    versions ? versionsOf(item, versions, act) : null,
    trail ? trailOf(trail) : null,
  ].filter(Boolean);
}

function aboutVersion(item, report) {
  return [
    ["Version", item.version === null ? "fixed by --lora-modules" : String(item.version)],
    ["Changed", item.created === null ? "" : el("span", {}, timeOf(item.created), " by ", nameOf(item.by))],
    ["Size and rank", item.bytes === null ? "" : `${bytesText(item.bytes)}, rank ${item.rank}`],
    ["Override", report.override ? "an admin allowed rules that are less strict" : ""],
    ["Why", report.reason ? el("bdi", {}, printable(report.reason)) : ""],
  ];
}

function notServed(item) {
  return [
    el("p", { class: "verdict" }, badge(item.state), " Not served: ", el("bdi", {}, printable(item.problem))),
    item.reasons.length ? reasonList(item.reasons) : null,
    facts([["Version", item.version], ["Changed", item.created === null ? "" : timeOf(item.created)]]),
  ].filter(Boolean);
}

function versionsOf(item, { current, versions }, act) {
  const rows = [...versions].reverse().map((v) => {
    const live = v.version === current;
    const back = el("button", { type: "button", onclick: () => act([`Roll back to version ${v.version}?`,
      "Its content is judged by today's rules and served as a new version. Requests that run end on the present weights.", "Roll back"],
    () => api.rollBack(item.name, v.version), `${item.name} serves the content of version ${v.version} again.`) },
    "Roll back", el("span", { class: "hidden-text" }, ` to version ${v.version}`));
    const drop = el("button", { type: "button", class: "quiet", onclick: () => act([`Remove version ${v.version}?`,
      "It does not count against a quota any more, and there is no way back to it.", "Remove version"],
    () => api.removeVersion(item.name, v.version), `Version ${v.version} of ${item.name} is removed.`) },
    "Remove", el("span", { class: "hidden-text" }, ` version ${v.version}`));
    const why = v.reason ? el("bdi", {}, printable(v.reason)) : Object.keys(v.policy).length ? policyText(v.policy) : "–";
    return [[String(v.version)], [live ? badge(item.state) : "kept"], [timeOf(v.created)], [nameOf(v.by), "mid"],
      [bytesText(v.bytes), "number mid"], [v.rank, "number wide"], [el("code", { title: v.digest }, v.digest.slice(0, 8)), "wide"], [why, "wide"],
      [item.changeable && !live ? el("span", { class: "buttons" }, back, drop) : ""]];
  });
  return section("Versions", table("Versions", [["Version"], ["State"], ["Made"], ["By", "mid"], ["Size", "number mid"],
    ["Rank", "number wide"], ["Digest", "wide"], ["Why", "wide"], [item.changeable ? "Change" : ""]], rows));
}

function trailOf({ records, complete }) {
  return section("Audit trail",
    records.length ? table("Audit trail", [["Time"], ["Action"], ["Decision"], ["By", "mid"], ["Version", "number mid"], ["Reasons"]],
      records.map((r) => [[timeOf(Date.parse(r.time) / 1000)], [r.action], [badge(r.decision)], [nameOf(r.actor), "mid"],
        [r.version ?? "–", "number mid"], [printable([...r.reasons, r.reason].filter(Boolean).join(", ") || "–")]]))
      : el("p", { class: "note" }, "The log has no decision about this name."),
    complete ? null : el("p", { class: "note" }, "Older records may exist: safelora-vllm audit shows all of them."));
}
