// The server's HTTP API. The key is held here, in memory, and leaves only in the Authorization header.

const KEPT = "safelora-key";
let key = "";

/** An answer that is no success. */
export class ApiError extends Error {
  constructor(status, message, reasons = []) {
    super(message);
    this.status = status;
    this.reasons = reasons;
  }
}

/** Take a key. keep: also in sessionStorage, which this tab alone reads and which ends with it. */
export function useKey(given, keep = false) {
  key = given;
  sessionStorage.removeItem(KEPT);
  if (keep && given) sessionStorage.setItem(KEPT, given);
}

/** The key that this tab kept; empty if none. */
export const keptKey = () => sessionStorage.getItem(KEPT) ?? "";

const address = (path) => new URL(`../v1/${path}`, new URL("./", document.baseURI));
const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});
const path = (name) => name.split("/").map(encodeURIComponent).join("/");

async function call(method, where, body) {
  let answer;
  try {
    answer = await fetch(address(where), {
      method, cache: "no-store", credentials: "omit",
      headers: body === undefined ? headers() : { ...headers(), "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new ApiError(0, "The server does not answer. Check that it runs and that this computer reaches it.");
  }
  return understood(answer.status, await answer.text());
}

function understood(status, text) {
  let body = {};
  try { body = JSON.parse(text); } catch { /* a proxy's page */ }
  if (status >= 200 && status < 300) return body;
  const error = body.error ?? {};
  throw new ApiError(status, error.message ?? `The server answered with status ${status}.`, error.reasons ?? []);
}

export const overview = () => call("GET", "overview");
export const report = (name) => call("GET", `adapters/${path(name)}`);
export const versions = (name) => call("GET", `adapters/${path(name)}/versions`);
export const rollBack = (name, version) => call("POST", `adapters/${path(name)}/rollback`, { version });
export const remove = (name) => call("DELETE", `adapters/${path(name)}`);
export const removeVersion = (name, version) => call("DELETE", `adapters/${path(name)}/versions/${version}`);
export const audit = (query) => call("GET", `audit?${new URLSearchParams(query)}`);

/** Upload files; told(share) hears how much of them is sent, which fetch does not say. signal: ends it. */
export function upload(name, files, replace, told, signal) {
  const form = new FormData();
  form.append("name", name); // first, so that the server refuses a wrong name before the files arrive
  for (const [field, file] of files) form.append(field, file, file.name);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", address(`adapters${replace ? "?replace=true" : ""}`));
    for (const [header, value] of Object.entries(headers())) request.setRequestHeader(header, value);
    request.upload.onprogress = (event) => event.lengthComputable && told(event.loaded / event.total);
    request.upload.onload = () => told(1);
    request.onload = () => {
      try { resolve(understood(request.status, request.responseText)); } catch (error) { reject(error); }
    };
    signal.addEventListener("abort", () => { request.abort(); reject(new ApiError(0, "The upload was cancelled.")); });
    request.onerror = () => reject(new ApiError(0, "The upload broke off: the server ended it, or is not reached. Nothing was stored."));
    request.send(form);
  });
}
