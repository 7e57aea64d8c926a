// The page: settings, prompt and panes; what was written outlives a reload of the tab.

import { Attachments } from "/page/attachments.js";
import { AttentionView } from "/page/attention.js";
import { ask, ServerError, useKey } from "/page/client.js";
import { insideTable } from "/page/inside.js";
import { Pane } from "/page/pane.js";

const STORE = "fanformer-playground";
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const ALTERNATIVES = 5;
const at = (id) => document.getElementById(id);
const kept = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
const every = new Map(); // panes by the names of their models, those of models that are not chosen too
let models = []; // as /v1/models tells them
let panes = []; // of the chosen models
let looked = null; // {model, prompt} of the look inside that is shown
let running = null; // AbortController of the answers that are coming

const mode = () => document.querySelector("[name=mode]:checked").value;
const chosen = () => models.filter((model) => at(`model-${models.indexOf(model)}`).checked);
const can = (test) => chosen().some((model) => test(model.capabilities ?? {}));
const say = (text) => (at("status").textContent = text);
const attached = new Attachments(at("attached"), at("record"), say);

function save() {
  if (!document.body.dataset.ready) return; // what was kept is not shown yet
  const fields = Object.fromEntries([...NUMBERS, "prompt", "system", "stop-strings"].map((id) => [id, at(id).value]));
  const turns = [...every.values()].map(({ model, turns }) => ({ model, turns }));
  const names = chosen().map((model) => model.id);
  const content = { fields, turns, names, mode: mode(), sure: at("sure").checked };
  try {
    sessionStorage.setItem(STORE, JSON.stringify(content));
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
    sessionStorage.setItem(STORE, JSON.stringify({ ...content, turns: [], isCut: true }));
  }
}

function restore() {
  for (const [id, value] of Object.entries(kept.fields ?? {})) at(id).value = value;
  at("sure").checked = kept.sure ?? false;
  const radio = document.querySelector(`[name=mode][value=${kept.mode ?? "text"}]`);
  radio.checked = true;
}

async function loadModels() {
  try {
    models = (await ask("/v1/models")).data;
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    at("key-part").hidden = error.status !== 401;
    say(error.status === 401 ? "This server asks for an API key: give it in the settings." : error.message);
    return;
  }
  at("key-part").hidden = true;
  for (const { model, turns } of kept.turns ?? []) every.set(model, new Pane(model, turns));
  const names = (kept.names ?? []).filter((name) => models.some((model) => model.id === name));
  at("models").replaceChildren(
    ...models.map((model, index) => {
      const label = document.createElement("label");
      const box = document.createElement("input");
      box.type = "checkbox";
      box.id = `model-${index}`;
      box.checked = names.length ? names.includes(model.id) : index < 2;
      box.addEventListener("change", arrange);
      label.append(box, ` ${model.id}`);
      return label;
    }),
  );
  const asked = kept.fields ? {} : models[0].capabilities?.sampling; // of its folder
  for (const [id, value] of Object.entries(asked ?? {})) at(id).value = value;
  const ready = models.length === 1 ? "1 model is ready." : `${models.length} models are ready.`;
  say(kept.isCut ? `${ready} What was shown is more than a tab keeps: the conversation begins anew.` : ready);
  const isShown = models.some((model) => model.capabilities?.inputs?.length > 1);
  if (isShown && !kept.mode) document.querySelector("[name=mode][value=chat]").checked = true;
  arrange();
  document.body.dataset.ready = "yes";
}

// Brings panes and fields in line with what is chosen.
function arrange() {
  for (const model of models) if (!every.has(model.id)) every.set(model.id, new Pane(model.id));
  panes = chosen().map((model) => every.get(model.id));
  at("panes").replaceChildren(...panes.map((pane) => pane.element));
  const canChat = models.some((model) => model.capabilities?.chat);
  at("mode").hidden = !canChat;
  if (!canChat) document.querySelector("[name=mode][value=text]").checked = true;
  const isChat = mode() === "chat";
  at("system-part").hidden = !isChat;
  at("prompt-label").textContent = isChat ? "Message" : "Text to continue";
  at("prompt").placeholder = isChat ? "" : "def ";
  const inputs = (kind) => isChat && can((one) => one.inputs?.includes(kind));
  at("picture-part").hidden = !inputs("image");
  at("record").hidden = !inputs("audio");
  at("media").hidden = !inputs("image") && !inputs("audio");
  if (at("media").hidden) attached.drop();
  const dial = chosen().map((model) => model.capabilities?.num_steps).find((steps) => steps);
  at("steps-part").hidden = !dial;
  if (dial) setDial(dial);
  at("inside").hidden = !can((one) => one.inside);
  at("inside-model").replaceChildren(
    ...chosen().filter((model) => model.capabilities?.inside).map((model) => new Option(model.id)),
  );
  showTurns();
}

function setDial(dial) {
  const range = at("num_steps");
  if (range.min !== String(dial.least) || range.max !== String(dial.most)) {
    Object.assign(range, { min: dial.least, max: dial.most, value: dial.usual });
  }
  at("steps-shown").textContent = range.value;
}

function showTurns() {
  at("scale").hidden = !at("sure").checked;
  panes.forEach((pane) => pane.show(at("sure").checked));
}

// Returns the fields of a request that the settings say; an empty one is the server's default.
function sampling(model) {
  const given = NUMBERS.filter((id) => at(id).value !== "").map((id) => [id, Number(at(id).value)]);
  const stops = at("stop-strings").value.split("\n").filter((line) => line);
  const steps = model.capabilities?.num_steps ? { num_steps: Number(at("num_steps").value) } : {};
  return { ...Object.fromEntries(given), ...(stops.length ? { stop: stops } : {}), ...steps };
}

function requestOf(pane, prompt) {
  const model = models.find((one) => one.id === pane.model);
  const fields = sampling(model);
  if (mode() === "text") {
    pane.turns = [];
    pane.show(at("sure").checked);
    const given = { role: "given", text: prompt, tokens: [] };
    return ["/v1/completions", { ...fields, prompt, logprobs: ALTERNATIVES }, given, "text"];
  }
  const system = at("system").value;
  const messages = pane.turns
    .filter((turn) => turn.role === "user" || turn.role === "assistant")
    .map((turn) => ({ role: turn.role, content: turn.content ?? turn.text }));
  const { parts, names } = attached;
  const content = parts.length ? [...parts, ...(prompt ? [{ type: "text", text: prompt }] : [])] : prompt;
  const given = { role: "user", text: prompt, tokens: [], content, names };
  messages.push({ role: "user", content });
  if (system) messages.unshift({ role: "system", content: system });
  const body = { ...fields, messages, logprobs: true, top_logprobs: ALTERNATIVES };
  return ["/v1/chat/completions", body, given, "assistant"];
}

async function send() {
  if (running || !panes.length || at("sampling").querySelector(":invalid")) {
    say(running ? "The answers are still coming." : panes.length ? "A setting is out of its range." : "Choose a model.");
    return;
  }
  const prompt = at("prompt").value;
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  say("The answer is coming.");
  const { signal } = running;
  const answers = panes.map((pane) => pane.ask(...requestOf(pane, prompt), signal));
  const isChat = mode() === "chat";
  if (isChat) at("prompt").value = "";
  const shown = attached.take();
  const ended = await Promise.all(answers);
  if (isChat && !ended.some((one) => one.isKept)) giveBack(prompt, shown);
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
  const isDone = ended.every((one) => one.isWhole);
  say(signal.aborted ? "Stopped." : isDone ? "Done." : "Not every answer came to its end.");
  save();
}

// Puts back what no model answered, for another try, unless something else is there by now.
function giveBack(prompt, shown) {
  if (!at("prompt").value) at("prompt").value = prompt;
  if (!at("media").hidden) attached.putBack(shown);
}

function stop() {
  running?.abort();
}

function clear() {
  stop();
  every.forEach((pane) => pane.clear());
  attached.drop();
  showTurns();
  save();
}

// Returns what the server tells of the inside, or null where it says why not.
async function askInside(fields) {
  try {
    return await ask("/inside", fields);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    at("inside-shown").textContent = error.message;
    at("attention-part").hidden = true;
    return null;
  }
}

async function look() {
  const pane = panes.find((one) => one.model === at("inside-model").value);
  looked = { model: pane.model, prompt: pane.turns.map((turn) => turn.text).join("") || at("prompt").value };
  const found = await askInside(looked);
  if (!found) return;
  at("inside-shown").replaceChildren(insideTable(found));
  at("inside-layer").replaceChildren(new Option("choose", ""), ...found.layers.map((_, index) => new Option(index)));
  at("attention-shown").replaceChildren();
  at("attention-part").hidden = false;
}

async function showAttention() {
  const layer = at("inside-layer").value;
  const found = layer === "" ? null : await askInside({ ...looked, layer: Number(layer) });
  at("attention-shown").replaceChildren(...(found ? [new AttentionView(looked.model, found.attention).element] : []));
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("prompt").addEventListener("keydown", (event) => {
  const isSend = event.key === "Enter" && (event.ctrlKey || event.metaKey || (mode() === "chat" && !event.shiftKey));
  if (isSend && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
document.querySelectorAll("[name=mode]").forEach((radio) =>
  radio.addEventListener("change", () => {
    clear();
    arrange();
  }),
);
at("stop").addEventListener("click", stop);
at("clear").addEventListener("click", clear);
at("sure").addEventListener("change", showTurns);
at("look").addEventListener("click", look);
at("inside-layer").addEventListener("change", showAttention);
at("num_steps").addEventListener("input", () => (at("steps-shown").textContent = at("num_steps").value));
at("picture").addEventListener("change", async () => {
  await attached.addPictures([...at("picture").files]);
  at("picture").value = "";
});
at("prompt").addEventListener("paste", (event) => {
  const pictures = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (!pictures.length || at("media").hidden || at("picture-part").hidden) return;
  event.preventDefault();
  attached.addPictures(pictures);
});
at("use-key").addEventListener("click", () => {
  useKey(at("key").value);
  loadModels();
});
addEventListener("pagehide", save);
if (matchMedia("(max-width: 48rem)").matches) at("settings").open = false;
restore();
loadModels();
