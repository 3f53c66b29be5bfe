// Sign-in, the two views, and what keeps them up to date.

import * as api from "./api.js";
import { detailView } from "./detail.js";
import { UNREADABLE, dropped, uploadDialog } from "./dialogs.js";
import { el, nameOf, printable } from "./dom.js";
import { linkTo, listView } from "./list.js";

const SECONDS = 5; // between two looks, while the page can be seen
const main = document.getElementById("main"), who = document.getElementById("who"), status = document.getElementById("status");
const uploadButton = document.getElementById("open-upload"), signOut = document.getElementById("sign-out");
let overview = null, refusals = null, last = "", lastItem = "", list = null, timer = 0, shown = 0, session = 0;

function tell(sentence, bad = false) {
  status.textContent = printable(sentence);
  status.classList.toggle("bad", bad);
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => { status.textContent = ""; }, bad ? 20000 : 8000);
}

function failed(error) {
  if (error.status === 401) return signIn(error.message);
  tell([error.message, ...(error.reasons ?? []).map((r) => `[${r.code}] ${r.message}`)].slice(0, 4).join(" "), true);
  return undefined;
}

function signIn(problem = "") {
  clearTimeout(timer);
  session += 1; // answers that are on their way are the former reader's
  shown += 1;
  overview = list = null;
  last = lastItem = "";
  api.useKey("");
  who.replaceChildren();
  uploadButton.hidden = signOut.hidden = true;
  document.title = "Sign in · safelora";
  const field = el("input", { id: "key", type: "password", autocomplete: "off", spellcheck: "false", "aria-describedby": "key-help" });
  const keep = el("input", { type: "checkbox", id: "keep" });
  const error = el("p", { class: "error", role: "alert" }, problem);
  const enter = async (event) => {
    event.preventDefault();
    api.useKey(field.value.trim(), keep.checked);
    try {
      await look(true);
    } catch (reason) {
      api.useKey("");
      error.textContent = reason.message;
      field.focus();
    }
  };
  main.replaceChildren(el("form", { class: "sign-in", onsubmit: enter },
    el("h1", {}, "Sign in"),
    el("label", { for: "key" }, "Key"), field,
    el("p", { class: "help", id: "key-help" }, "An admin sees all adapters, a tenant its own and the shared ones. The key stays in this page's memory and is sent to this server only."),
    el("label", { class: "check" }, keep, " Keep it until this tab is closed, also over a reload"),
    error,
    el("div", { class: "buttons" }, el("button", { type: "submit", class: "primary" }, "Sign in"))));
  field.focus();
}

const route = () => { try { return decodeURIComponent(/^#\/adapter\/(.+)$/.exec(location.hash)?.[1] ?? ""); } catch { return ""; } };

/** Ask the server and show what is new. */
async function look(moved = false) {
  clearTimeout(timer);
  const mine = session;
  const now = await api.overview();
  const caller = now.caller;
  const newest = now.may_upload ? (await api.audit({ decision: "refused", limit: 10 })).records : null;
  if (mine !== session) return; // signed out meanwhile
  overview = now;
  refusals = newest;
  who.replaceChildren(caller.tenant ? "Tenant " : caller.kind === "admin" ? "Admin " : "", nameOf(caller.tenant ?? caller.key));
  uploadButton.hidden = !now.may_upload;
  signOut.hidden = false;
  await show(moved);
  if (mine === session) timer = setTimeout(again, SECONDS * 1000);
}

async function again() {
  if (document.hidden || !overview) return;
  const mine = session;
  try { await look(); } catch (error) {
    if (mine !== session) return;
    failed(error);
    if (error.status !== 401) timer = setTimeout(again, SECONDS * 1000);
  }
}

async function show(moved) {
  const name = route(), item = overview.adapters.find((adapter) => adapter.name === name);
  const turn = ++shown;
  if (name && !item) {
    lastItem = "";
    main.replaceChildren(el("p", { class: "back" }, el("a", { href: "#/" }, "← All adapters")),
      el("h1", { tabindex: "-1" }, "No such adapter"), el("p", {}, "There is no adapter ", nameOf(name), " for this key."));
  } else if (item) {
    const text = JSON.stringify(item);
    if (!moved && text === lastItem) return;
    const parts = await detailView(item, overview, changed, failed);
    if (turn !== shown) return; // the reader went on meanwhile
    lastItem = text;
    main.replaceChildren(...parts);
  } else {
    lastItem = "";
    const text = JSON.stringify([overview.adapters, refusals]);
    list ??= listView({ upload });
    if (text !== last || moved) list.update(overview, refusals);
    last = text;
    if (list.view.parentNode !== main) main.replaceChildren(list.view);
  }
  document.title = `${item ? printable(name) : "Adapters"} · safelora`;
  if (moved) main.querySelector("h1")?.focus({ preventScroll: false });
}

async function changed(sentence, gone = false) {
  tell(sentence);
  if (gone) {
    overview.adapters = overview.adapters.filter((adapter) => adapter.name !== route());
    location.hash = "#/";
  }
  try { await look(true); } catch (error) { failed(error); }
}

function upload(files = []) {
  const tenant = overview.caller.tenant;
  uploadDialog({ prefix: tenant ? `${tenant}/` : "", most: overview.max_adapter_bytes, files,
    done: (report) => { location.hash = linkTo(report.adapter); changed(`${report.adapter} is served as version ${report.version}.`); } });
}

uploadButton.addEventListener("click", () => upload());
signOut.addEventListener("click", () => signIn());
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  if (!overview?.may_upload || document.querySelector("dialog")) return;
  try { upload(await dropped(event.dataTransfer)); } catch { tell(UNREADABLE, true); }
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) again(); });
window.addEventListener("hashchange", () => { if (overview) show(true).catch(failed); });

if (api.keptKey()) {
  api.useKey(api.keptKey(), true);
  look(true).catch((error) => signIn(error.status === 401 ? "The kept key is not valid any more." : error.message));
} else {
  signIn();
}
