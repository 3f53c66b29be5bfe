// Questions before what cannot be taken back, and the upload of an adapter.

import * as api from "./api.js";
import { bytesText, counted, el, nameOf, reasonList } from "./dom.js";

const CONFIG = "adapter_config.json", WEIGHTS = "adapter_model.safetensors";
export const UNREADABLE = "The dropped files cannot be read: choose them instead.";
const MOST_DROPPED = 1000; // files: a folder of checkpoints has some hundreds
const ARCHIVES = /\.(tar|tar\.gz|tgz|zip)$/i;

function open(label, ...children) {
  const dialog = el("dialog", { "aria-label": label, onclose: () => dialog.remove() }, ...children);
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Ask; gives whether the answer is yes. */
export function confirmed(title, sentence, verb) {
  return new Promise((resolve) => {
    let yes = false;
    const dialog = open(title, el("h2", {}, title), el("p", {}, sentence),
      el("div", { class: "buttons" },
        el("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
        el("button", { type: "button", class: "danger", onclick: () => { yes = true; dialog.close(); } }, verb)));
    dialog.addEventListener("close", () => resolve(yes));
  });
}

/** Files of a drop or a choice as form fields, or the sentence that says what is wrong. */
export function fieldsOf(files, most) {
  const named = (name) => files.find((file) => file.name === name);
  const archives = files.filter((file) => ARCHIVES.test(file.name));
  const found = named(CONFIG) && named(WEIGHTS) ? [[CONFIG, named(CONFIG)], [WEIGHTS, named(WEIGHTS)]]
    : archives.length === 1 ? [["archive", archives[0]]] : null;
  if (!found) {
    return `${files.length ? "These files are not an adapter" : "No files are chosen"}: expected ${CONFIG} and ${WEIGHTS}, the folder with both, or one .tar, .tar.gz or .zip of it.`;
  }
  const large = found.find(([, file]) => file.size > most);
  return large ? `${large[1].name} has ${bytesText(large[1].size)}: the server takes at most ${bytesText(most)}.` : found;
}

/** Files of a drop, those in folders too. */
export async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const found = [];
  const walk = async (entry, depth) => {
    if (found.length >= MOST_DROPPED) return;
    if (entry.isFile) found.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    else if (depth < 3) {
      const reader = entry.createReader();
      const some = () => new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      for (let inside = await some(); inside.length; inside = await some()) { // browsers give 100 at a time
        for (const inner of inside) await walk(inner, depth + 1);
      }
    }
  };
  for (const entry of entries) await walk(entry, 0);
  return found;
}

/** The dialog of an upload. replaces: the adapter's name; done(report) after it is served. */
export function uploadDialog({ prefix, most, replaces, files = [], done }) {
  let chosen = files;
  const name = el("input", { id: "upload-name", name: "name", required: true, maxlength: 257, autocomplete: "off",
    spellcheck: "false", value: replaces ?? prefix, readonly: Boolean(replaces), "aria-describedby": "upload-name-help" });
  const picked = el("p", { class: "picked" });
  const input = el("input", { id: "upload-files", type: "file", multiple: true, onchange: () => take([...input.files]) });
  const replace = el("input", { type: "checkbox", id: "upload-replace" });
  const progress = el("progress", { max: "1", value: "0", "aria-label": "Upload" });
  const progressText = el("span", {});
  const working = el("p", { class: "working", hidden: true, role: "status" }, progress, " ", progressText);
  const answer = el("div", { role: "alert" });
  const stop = new AbortController(); // what is sent as a whole, the server may serve all the same
  const send = el("button", { type: "submit", class: "primary" }, replaces ? "Replace" : "Upload");
  const cancel = el("button", { type: "button", onclick: () => dialog.close() }, "Cancel");
  const take = (given) => {
    chosen = given;
    const fields = fieldsOf(chosen, most);
    answer.replaceChildren();
    if (typeof fields === "string") {
      picked.replaceChildren();
      if (given.length) answer.replaceChildren(el("p", { class: "error" }, fields));
    } else {
      picked.replaceChildren("Chosen: ", ...fields.flatMap(([, file], i) => [i ? " and " : "", nameOf(file.name), ` (${bytesText(file.size)})`]));
    }
  };
  const drop = el("div", { class: "drop" },
    el("label", { for: "upload-files" }, "Files of the adapter"), input,
    el("p", { class: "help" }, `Drop the folder that PEFT saved here, its two files, or one archive of it. At most ${bytesText(most)} a file.`), picked);
  const submit = async (event) => {
    event.preventDefault();
    const fields = fieldsOf(chosen, most);
    if (typeof fields === "string") return answer.replaceChildren(el("p", { class: "error" }, fields));
    answer.replaceChildren();
    working.hidden = false;
    send.disabled = true;
    const told = (share) => {
      if (share < 1) { progress.value = share; progressText.textContent = `${Math.floor(share * 100)} % sent`; }
      else { progress.removeAttribute("value"); progressText.textContent = "Sent. The gate checks and projects it, also if this dialog is closed"; }
    };
    told(0);
    try {
      const report = await api.upload(name.value.trim(), fields, Boolean(replaces) || replace.checked, told, stop.signal);
      dialog.close();
      done(report);
    } catch (error) {
      answer.replaceChildren(...refusal(error));
    }
    working.hidden = true;
    send.disabled = false;
    return undefined;
  };
  const title = replaces ? "Replace an adapter" : "Upload an adapter";
  const dialog = open(title, el("form", { onsubmit: submit },
    el("h2", {}, title),
    el("label", { for: "upload-name" }, "Name"), name,
    el("p", { class: "help", id: "upload-name-help" }, replaces ? "Requests that run end on the old weights, later ones get the new."
      : `${prefix ? `Begins with ${prefix}.` : "NAME is shared by all, TENANT/NAME belongs to a tenant."} Letters, digits, dots, underscores and hyphens.`),
    drop,
    replaces ? null : el("label", { class: "check" }, replace, " Replace the adapter of this name, if there is one"),
    working, answer,
    el("div", { class: "buttons" }, cancel, send)));
  dialog.addEventListener("close", () => stop.abort());
  dialog.addEventListener("dragover", (event) => event.preventDefault());
  dialog.addEventListener("drop", async (event) => { event.preventDefault(); event.stopPropagation();
    try { take(await dropped(event.dataTransfer)); } catch { answer.replaceChildren(el("p", { class: "error" }, UNREADABLE)); }
  });
  if (files.length) take(files);
  if (!replaces) { name.focus(); name.setSelectionRange(name.value.length, name.value.length); }
}

function refusal(error) {
  if (!error.reasons?.length) return [el("p", { class: "error" }, error.message)];
  return [el("p", { class: "error" }, `Refused for ${counted(error.reasons.length, "reason")}. Nothing was stored and nothing has changed.`),
    reasonList(error.reasons)];
}
