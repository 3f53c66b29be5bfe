// What the gate decided about one adapter: for the page, and for the file of `inspect --html`.

import { badge, counted, el, figure, printable, reasonList, section } from "./dom.js";
import { heatMap } from "./heatmap.js";

/** What follows the word of the decision. */
export function verdict(report) {
  const projected = report.modules.filter((module) => module.decision === "projected").length;
  const share = `${projected} of ${counted(report.modules.length, "module")}`;
  if (!report.accepted) return report.modules.length ? "" : " before it could be measured";
  if (report.policy.mode !== "enforce") {
    const would = report.reasons.length ? "would refuse it" : `would project ${share}`;
    return ` and UNPROJECTED, as in report-only mode; enforcing ${would}`;
  }
  return report.modules.length ? `: ${share} projected` : "";
}

/** A policy in few words. */
export function policyText(policy) {
  if (!policy || !policy.method) return "–";
  const select = { threshold: `similarity at most ${policy.threshold}`, number: `the ${policy.number} least similar`, all: "all modules" };
  const energy = policy.method === "safe-lora" ? "" : `, energy ${policy.energy}`;
  const opinion = policy.opinion ? "; second opinion" : "";
  if (policy.select === "none") return `nothing projected; ${policy.mode}${opinion}`;
  return `${policy.method}${energy}; ${select[policy.select] ?? policy.select}; ${policy.mode}${opinion}`;
}

/** Pairs of a term and what it is; pairs without a value are left out. */
export function facts(pairs) {
  return el("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))));
}

/** The gate's part of an adapter's view. more: further facts. */
export function reportView(report, more = []) {
  const largest = report.modules.reduce((most, module) => Math.max(most, module.relative_norm), 0);
  const uncertain = report.modules.filter((module) => module.uncertain).length;
  const nothing = report.modules.length && report.modules.every((module) => module.similarity === null);
  const unprojected = report.accepted && report.policy.mode !== "enforce";
  return [
    el("p", { class: unprojected ? "verdict warn" : "verdict" }, badge(report.accepted ? "accepted" : "refused"), verdict(report)),
    nothing ? el("p", { class: "note" }, "The adapter changes nothing: each of its modules has an A or a B of zeros.") : null,
    uncertain ? el("p", { class: "note" }, `${counted(uncertain, "module is", "modules are")} projected only because a thin projector cache leaves their similarity open.`) : null,
    report.reasons.length ? reasonList(report.reasons) : null,
    facts([
      ["Policy", policyText(report.policy)],
      ["Total norm", report.modules.length ? `${figure(report.total_norm, 4)} of ${report.policy.max_total_norm} allowed` : ""],
      ["Largest module norm", report.modules.length ? `${figure(largest, 4)} of ${report.policy.max_relative_norm} allowed` : ""],
      ...more,
      ["Content digest", report.digest ? el("code", { title: report.digest }, report.digest.slice(0, 16)) : ""],
      ["Projector cache", report.projectors ? el("code", { title: report.projectors }, report.projectors.slice(0, 16)) : ""],
    ]),
    report.modules.length
      ? section("Layers and modules", heatMap(report.modules, report.policy.mode === "enforce"))
      : report.accepted ? el("p", { class: "note" }, "The operator keeps the figures of single modules.") : null,
  ].filter(Boolean);
}

/** The whole of a file of `inspect --html`. */
export function reportPage(report) {
  const title = el("h1", {}, el("bdi", {}, printable(report.adapter)));
  document.title = `${printable(report.adapter)} · safelora`;
  document.getElementById("main").replaceChildren(title, ...reportView(report));
}
