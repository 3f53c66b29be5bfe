// An adapter's traffic of the last hour. Servers that do not count it send nothing, and nothing is shown.

import { el, section } from "./dom.js";
import { facts } from "./report.js";

const TERMS = [
  ["requests", "Requests"], ["generated_tokens", "Generated tokens"],
  ["running", "Running now"], ["waiting", "Waiting now"],
];

/** The section of a report's `traffic`, or null. */
export function trafficView(traffic) {
  const pairs = TERMS.filter(([field]) => typeof traffic?.[field] === "number").map(([field, term]) => [term, traffic[field].toLocaleString()]);
  return pairs.length ? section("Traffic of the last hour", facts(pairs)) : el("div");
}
