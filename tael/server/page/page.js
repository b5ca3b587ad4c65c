"use strict";

const POLL_MS = 1000;
const STORED_KEY = "tael-key"; // of this tab, gone when it is closed

const $ = (id) => document.getElementById(id);
let messages = []; // the conversation as the model is sent it
let model = "";
let answering = null; // the AbortController of the answer under way
let timer = 0;

// ---- The API

async function api(path, options = {}) {
  const key = sessionStorage.getItem(STORED_KEY);
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `The server answered ${response.status}.`);
  if (response.status === 401) askForKey(error.message, Boolean(key));
  throw error;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

// ---- The key

function askForKey(message, wasWrong) {
  sessionStorage.removeItem(STORED_KEY);
  clearTimeout(timer);
  $("forget").hidden = true;
  showState("needs a key", false);
  $("key-note").textContent = wasWrong ? message : "This server answers to those who have a key.";
  $("key-form").hidden = false;
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(STORED_KEY, $("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  $("input").focus();
  poll();
});

$("forget").addEventListener("click", () => {
  newChat();
  askForKey("", false);
});

// ---- The live view

async function poll() {
  try {
    const options = { signal: AbortSignal.timeout(10 * POLL_MS) };
    if (!document.hidden) show(await (await api("live", options)).json());
  } catch {
    if ($("key-form").hidden) showState("not reachable", false);
  } finally {
    clearTimeout(timer);
    if ($("key-form").hidden) timer = setTimeout(poll, POLL_MS);
  }
}

function showState(text, isGood) {
  if ($("state").textContent !== text) $("state").textContent = text; // readers say it once
  $("state").className = isGood ? "good" : "bad";
}

function show(live) {
  model = live.model;
  document.title = `${model} – Tael`;
  $("model").textContent = model;
  showState(live.ready ? "ready" : "not ready", live.ready);
  $("forget").hidden = !sessionStorage.getItem(STORED_KEY);
  $("running").textContent = live.requests.running;
  $("waiting").textContent = live.requests.waiting;
  $("rate").textContent = live.output_tokens_per_s.toFixed(1);
  const { prompt_tokens, cached_tokens, cost } = live.key;
  $("hits").textContent = prompt_tokens ? percent(cached_tokens / prompt_tokens) : "–";
  $("cost").textContent = cost ? money(cost) : "no prices";
  $("tiers").replaceChildren(...live.tiers.map(tierBar));
}

function tierBar(tier) {
  const free = Math.max(0, tier.capacity_bytes - tier.used_bytes - tier.cached_bytes);
  const parts = [["used", "in use", tier.used_bytes], ["cached", "cached", tier.cached_bytes],
    ["free", "free", free]];
  const legend = element("ul", "legend");
  const bar = element("div", "bar");
  for (const [kind, name, bytes] of parts) {
    const part = element("span", kind);
    part.style.flexGrow = bytes / (tier.capacity_bytes || 1);
    part.style.minWidth = bytes ? "3px" : 0; // however little, it is seen
    bar.append(part);
    legend.append(element("li", kind, `${size(bytes)} ${name}`));
  }
  bar.ariaHidden = "true"; // the legend says it
  const section = element("section", "tier");
  section.append(element("h2", "", `KV ${tier.name}, ${size(tier.capacity_bytes)}`), bar, legend);
  return section;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(Math.max(0, Math.floor(Math.log2(bytes) / 10)), units.length - 1);
  const value = bytes / 1024 ** power;
  return `${value.toFixed(value < 10 && power ? 1 : 0)} ${units[power]}`;
}

function percent(share) {
  return `${(100 * share).toFixed(0)} %`;
}

function money({ nano, currency }) {
  const amount = nano / 1e9;
  const digits = Math.abs(amount) >= 1 ? 2 : 6;
  return `${amount.toFixed(amount ? digits : 2)} ${currency}`;
}

// ---- The chat

function addMessage(role, text) {
  $("empty").hidden = true;
  const article = element("article", role);
  const body = element("div", "text", text);
  article.append(element("h2", "", role === "user" ? "You" : model), body);
  $("log").append(article);
  scroll(true);
  return { article, body };
}

function scroll(always) {
  const log = $("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 80) {
    log.scrollTop = log.scrollHeight;
  }
}

async function send(text) {
  const conversation = messages; // another one may begin meanwhile
  conversation.push({ role: "user", content: text });
  addMessage("user", text);
  const { article, body } = addMessage("assistant", "");
  answering = new AbortController();
  setAnswering(article, true);
  const start = performance.now();
  let answer = "", first = 0, note = "", failed = false;
  try {
    const response = await api("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({
        model, messages: conversation, stream: true, stream_options: { include_usage: true },
      }),
      signal: answering.signal,
    });
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      if (choice?.delta.content) {
        first ||= performance.now();
        answer += choice.delta.content;
        body.append(choice.delta.content); // as text, whatever it says
        scroll(false);
      }
      if (choice?.finish_reason === "length") note = "Cut off: the context is full. ";
      if (chunk.usage) note += summary(chunk.usage, first - start, performance.now() - first);
    }
  } catch (error) {
    failed = error.name !== "AbortError";
    note = failed ? error.message : "Stopped.";
  }
  if (answer) {
    conversation.push({ role: "assistant", content: answer });
  } else {
    conversation.pop();
    $("input").value ||= text; // to be sent again
  }
  body.normalize();
  const line = element("p", failed ? "note error" : "note", note);
  if (failed) line.role = "alert";
  article.append(line);
  setAnswering(article, false);
  answering = null;
  scroll(false);
}

function summary(usage, wait_ms, rest_ms) {
  const { prompt_tokens: prompt, completion_tokens: output } = usage;
  const cached = usage.prompt_tokens_details.cached_tokens;
  const rate = output > 1 && rest_ms > 0 ? `, ${(1000 * (output - 1) / rest_ms).toFixed(1)}/s` : "";
  return `${prompt} tokens in (${percent(cached / prompt)} cached), ${output} out${rate}, ` +
    `first after ${(wait_ms / 1000).toFixed(2)} s`;
}

function setAnswering(article, is) {
  article.ariaBusy = String(is); // readers wait for the whole
  $("send").disabled = is;
  if (!is && document.activeElement === $("stop")) $("input").focus();
  $("stop").hidden = !is;
}

function newChat() {
  answering?.abort();
  messages = [];
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("input").focus();
}

$("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || answering || !model) return;
  $("input").value = "";
  send(text);
});

$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("chat-form").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") answering?.abort();
});
$("stop").addEventListener("click", () => answering?.abort());
$("new").addEventListener("click", newChat);

// ---- Everything

function element(tag, className, text = "") {
  const created = document.createElement(tag);
  created.className = className;
  created.textContent = text;
  return created;
}

$("live").open = matchMedia("(min-width: 48rem)").matches;
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && $("key-form").hidden) poll();
});
poll();
