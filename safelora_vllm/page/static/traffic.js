// An adapter's traffic. Servers that do not count it send nothing, and nothing is shown.

import { el, section } from "./dom.js";
import { facts } from "./report.js";

const TERMS = [
  ["requests", "Requests, last hour"], ["generated_tokens", "Generated tokens, last hour"],
  ["running", "Running now"], ["waiting", "Waiting now"],
  ["second_opinion_refusals", "Refused by the second opinion, since the start"],
];

/** The section of a report's `traffic`, or null. */
export function trafficView(traffic) {
  const pairs = TERMS.filter(([field]) => typeof traffic?.[field] === "number").map(([field, term]) => [term, traffic[field].toLocaleString()]);
  return pairs.length ? section("Traffic", facts(pairs)) : el("div");
}
