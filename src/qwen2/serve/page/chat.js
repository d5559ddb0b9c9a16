// The chat page: a conversation in memory, answers as a stream from /v1/chat/completions.

import { show } from "./render.js";

const $ = (id) => document.getElementById(id);
const SLIDERS = ["temperature", "top_p", "top_k", "repetition_penalty"];
const KEPT = ["system", "max_tokens", "seed", ...SLIDERS]; // settings, in this browser
const HINT = $("status").textContent;

let messages = []; // {role, content}, without the system prompt
let running = null; // AbortController of the answer that is coming

// ---- asking ----

function headers() {
  const key = $("key").value.trim();
  return {
    "content-type": "application/json",
    ...(key ? { authorization: `Bearer ${key}` } : {}),
  };
}

function request() {
  const system = $("system").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of SLIDERS) body[name] = Number($(name).value);
  for (const name of ["max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  return body;
}

// The JSON of each server-sent event of a response.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// Ask for an answer to the conversation as it stands.
async function answer() {
  const item = addMessage({ role: "assistant", content: "" });
  const reply = messages.at(-1);
  messages.pop(); // it is not part of what is asked
  const asked = request();
  messages.push(reply);
  setRunning(new AbortController());
  item.classList.add("waiting");
  const begun = performance.now();
  let first = null;
  let tokens = 0;
  let problem = "";
  let reason = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(asked),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      reason = choice?.finish_reason ?? reason;
      const piece = choice?.delta.content;
      if (!piece) continue;
      first ??= performance.now();
      tokens += 1; // about one a piece, until the usage says how many
      reply.content += piece;
      item.classList.remove("waiting");
      draw(item, reply.content);
      $("status").textContent = rate(tokens, first);
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else problem = error.message;
  }
  setRunning(null);
  item.classList.remove("waiting");
  finish(item, reply, { problem, reason, tokens, first, begun });
}

function rate(tokens, first) {
  const seconds = (performance.now() - first) / 1000;
  return seconds > 0.2 ? `${(Math.max(tokens - 1, 0) / seconds).toFixed(1)} tokens/s` : "…";
}

function finish(item, reply, { problem, reason, tokens, first, begun }) {
  const parts = [];
  if (first !== null) {
    parts.push(`${tokens} tokens`, rate(tokens, first));
    parts.push(`first after ${((first - begun) / 1000).toFixed(2)} s`);
  }
  if (reason === "length") parts.push("cut at the limit of tokens");
  if (reason === "stopped") parts.push("stopped");
  item.querySelector(".note").textContent = parts.join(" · ");
  $("status").textContent = problem ? "" : HINT;
  if (problem) {
    const line = document.createElement("p");
    line.className = "problem";
    line.setAttribute("role", "alert");
    line.textContent = problem;
    item.querySelector(".content").after(line);
  }
  if (!reply.content) messages = messages.filter((message) => message !== reply);
  if (problem.includes("API key")) {
    openSettings(true);
    $("key").focus();
  }
}

// ---- what is shown ----

function addMessage(message) {
  messages.push(message);
  $("empty").hidden = true;
  const item = document.createElement("li");
  item.className = message.role;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = message.role === "user" ? "You" : "Assistant";
  const content = document.createElement("div");
  content.className = "content";
  item.append(who, content);
  if (message.role === "assistant") item.append(foot(message));
  $("messages").append(item);
  draw(item, message.content, true);
  return item;
}

function foot(message) {
  const line = document.createElement("div");
  line.className = "foot";
  const note = document.createElement("span");
  note.className = "note";
  const again = document.createElement("button");
  again.type = "button";
  again.className = "again";
  again.textContent = "Regenerate";
  again.addEventListener("click", regenerate);
  const copy = document.createElement("button");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.addEventListener("click", () => navigator.clipboard.writeText(message.content));
  line.append(note, copy, again);
  return line;
}

function draw(item, text, follow = false) {
  const view = $("conversation");
  const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 80;
  show(item.querySelector(".content"), text);
  if (atEnd || follow) view.scrollTop = view.scrollHeight;
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  document.body.classList.toggle("running", running !== null);
  $("conversation").setAttribute("aria-busy", String(running !== null));
}

// ---- what a person does ----

function send(event) {
  event?.preventDefault();
  const text = $("question").value.trim();
  if (running || !text) return;
  $("question").value = "";
  grow();
  addMessage({ role: "user", content: text });
  answer();
}

function regenerate() {
  if (running) return;
  $("messages").lastElementChild.remove();
  if (messages.at(-1)?.role === "assistant") messages.pop();
  answer();
}

function reset() {
  running?.abort();
  messages = [];
  $("messages").replaceChildren();
  $("empty").hidden = false;
  $("status").textContent = HINT;
  $("question").focus();
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", String(open));
}

function grow() {
  const field = $("question");
  field.rows = Math.min(8, field.value.split("\n").length);
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function keepSettings() {
  const values = Object.fromEntries(KEPT.map((name) => [name, $(name).value]));
  localStorage.setItem("settings", JSON.stringify(values));
  sessionStorage.setItem("key", $("key").value);
  for (const output of document.querySelectorAll("output")) {
    output.value = $(output.htmlFor.value).value;
  }
}

function recallSettings() {
  setTheme(localStorage.getItem("theme"));
  let values = {};
  try {
    values = JSON.parse(localStorage.getItem("settings")) ?? {};
  } catch {
    // what was kept is not ours
  }
  for (const name of KEPT) if (typeof values[name] === "string") $(name).value = values[name];
  $("key").value = sessionStorage.getItem("key") ?? "";
  keepSettings();
}

async function nameModel() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.ok) $("model").textContent = (await response.json()).data[0].id;
}

recallSettings();
nameModel();
$("ask").addEventListener("submit", send);
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", reset);
$("options").addEventListener("input", keepSettings);
$("options").addEventListener("submit", (event) => event.preventDefault());
$("key").addEventListener("change", nameModel);
$("open-settings").addEventListener("click", () => openSettings($("settings").hidden));
$("close-settings").addEventListener("click", () => {
  openSettings(false);
  $("open-settings").focus();
});
$("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  setTheme(theme);
  localStorage.setItem("theme", theme);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if (!$("settings").hidden) $("close-settings").click();
});
