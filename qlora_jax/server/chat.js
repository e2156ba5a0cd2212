
// The chat. Conversations and the API key are in the memory of this page only.
const get = id => document.getElementById(id), NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
let key = "", models = [], panes = [], stopRun = null, running = null;

function ask(path, options = {}) {
  return fetch(path, { ...options, headers: { ...(key && { Authorization: `Bearer ${key}` }), ...options.headers } });
}

// The message of a server's error, whatever its form; a status of 401 asks for the key.
async function problemOf(response) {
  if (response.status === 401) get("key").hidden = false;
  const text = await response.text();
  try {
    return JSON.parse(text).error.message ?? text;
  } catch {
    return text.slice(0, 500) || `The server answered ${response.status}.`;
  }
}

async function loadModels() {
  get("problem").textContent = "";
  try {
    const response = await ask("v1/models");
    if (!response.ok) throw new Error(await problemOf(response));
    models = (await response.json()).data;
    get("key").hidden = true;
    if (!panes.length) setPanes(1);
  } catch (error) {
    get("problem").textContent = error.message;
  }
}

function setPanes(count) {
  while (panes.length > count) panes.pop().root.remove();
  while (panes.length < count) panes.push(pane(panes.length));
  get("panes").classList.toggle("two", count === 2);
  get("two").setAttribute("aria-pressed", count === 2);
}

function pane(index) {
  const select = element("select", { "aria-label": `model ${index + 1}` }, ...models.map(model => element("option", {}, model.id)));
  const trained = models.map((model, i) => model.parent ? i : -1).filter(i => i >= 0);
  select.selectedIndex = index ? models.findIndex((_, i) => i !== panes[0].select.selectedIndex) : trained[0] ?? 0;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
  if (!index) select.addEventListener("change", showRun);
  const log = element("div", { class: "log", role: "log", "aria-label": `conversation ${index + 1}` });
  const root = element("section", { class: "pane card" }, select, log);
  get("panes").append(root);
  return { root, select, log, messages: [] };
}

function copyButton(text) {
  const button = element("button", { type: "button", class: "small", onclick: async () => {
    await navigator.clipboard.writeText(text());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  return navigator.clipboard ? button : ""; // a browser has none on addresses without encryption
}

function requestOf(pane, prompt) {
  const request = { model: pane.select.value, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if (get(name).value !== "") request[name] = Number(get(name).value);
  const system = get("system").value.trim(), before = system ? [{ role: "system", content: system }] : [];
  return { ...request, messages: [...before, ...pane.messages, { role: "user", content: prompt }] };
}

// The objects of a stream of server-sent events, until [DONE] or its end.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
    if (done) return;
  }
}

function speedOf(reply) {
  const { started, first, ended, tokens, end } = reply, parts = [];
  if (tokens != null) parts.push(`${tokens} tokens`);
  if (tokens > 1 && ended > first) parts.push(`${((tokens - 1) / (ended - first) * 1000).toFixed(1)} tokens/s`);
  if (first) parts.push(`first after ${((first - started) / 1000).toFixed(2)} s`);
  return [...parts, ...(end && end !== "stop" ? [`ended: ${end}`] : [])].join(" · ");
}

// Sends one message from one pane and shows the reply as it comes.
async function converse(pane, prompt, signal) {
  const text = element("div", { class: "text", dir: "auto" }), thought = element("div", { class: "text", dir: "auto" });
  const thinking = element("details", { hidden: true }, element("summary", {}, "Reasoning"), thought);
  const facts = element("span"), error = element("div", { class: "bad", role: "alert" });
  const footer = element("footer", {}, copyButton(() => text.textContent), facts);
  pane.log.append(element("div", { class: "turn user text", dir: "auto" }, prompt), element("div", { class: "turn" }, thinking, text, error, footer));
  const reply = { started: performance.now(), first: 0, tokens: null, end: "" }, request = requestOf(pane, prompt);
  const messages = pane.messages; // a new chat has others
  try {
    const response = await ask("v1/chat/completions", { method: "POST", signal, body: JSON.stringify(request), headers: { "Content-Type": "application/json" } });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0], content = choice?.delta?.content, reasoning = choice?.delta?.reasoning_content;
      if (content || reasoning) reply.first ||= reply.ended = performance.now();
      if (reasoning) { thinking.hidden = false; thought.append(reasoning); }
      if (content) text.append(content);
      if (content || reasoning) reply.ended = performance.now();
      reply.end = choice?.finish_reason ?? reply.end;
      reply.tokens = event.usage?.completion_tokens ?? reply.tokens;
      follow();
    }
    if (!reply.end) throw new Error("The connection ended before the reply did.");
  } catch (problem) {
    reply.end = "stopped";
    if (problem.name !== "AbortError") error.textContent = problem.message;
  }
  const failed = error.textContent !== "";
  if (failed && !text.textContent) footer.remove();
  else facts.textContent = speedOf(reply);
  if (failed && !get("prompt").value) get("prompt").value = prompt; // to be sent again: the server has not answered it
  if (!failed && text.textContent) messages.push({ role: "user", content: prompt }, { role: "assistant", content: text.textContent });
}

// Keeps the end of the page in view, unless the reader has scrolled up.
function follow() {
  const page = document.scrollingElement;
  if (page.scrollHeight - page.scrollTop - page.clientHeight < 150) page.scrollTop = page.scrollHeight;
}

async function send() {
  const prompt = get("prompt").value;
  if (running || !prompt.trim() || !panes.length) return;
  running = new AbortController();
  get("prompt").value = "";
  [get("send").hidden, get("stop").hidden] = [true, false];
  await Promise.all(panes.map(pane => converse(pane, prompt, running.signal)));
  running = null;
  [get("send").hidden, get("stop").hidden] = [false, true];
  follow();
}

function showRun() {
  stopRun?.();
  const shown = get("show-run").getAttribute("aria-pressed") === "true" && panes.length > 0;
  get("run").hidden = !shown;
  get("work").classList.toggle("with-run", shown);
  const path = `runs/${encodeURIComponent(panes[0]?.select.value)}`;
  stopRun = shown ? watchRun(get("run"), () => ask(path, { cache: "no-cache" })) : null;
}

function toggle(button, change) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
    change(button.getAttribute("aria-pressed") === "true");
  });
}

toggle(get("two"), pressed => setPanes(panes.length ? 1 + pressed : 0));
toggle(get("show-run"), pressed => {
  showRun();
  if (pressed && innerWidth < 1200) get("run").scrollIntoView(); // it is below the chat
});
get("new").addEventListener("click", () => {
  running?.abort();
  for (const pane of panes) { pane.messages = []; pane.log.replaceChildren(); }
  get("prompt").focus();
});
get("stop").addEventListener("click", () => running?.abort());
get("composer").addEventListener("submit", event => { event.preventDefault(); send(); });
get("key").addEventListener("submit", event => { event.preventDefault(); key = get("key-text").value; loadModels(); });
get("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  if (event.key === "Escape") running?.abort();
});
loadModels();
