// The page: what is open, what is asked, what is shown.

import { Refused, chat, models } from "/page/api.js";
import { composer } from "/page/composer.js";
import { button, byId, make, note } from "/page/dom.js";
import { panel } from "/page/look.js";
import { settings } from "/page/settings.js";
import { stages } from "/page/stages.js";
import * as store from "/page/store.js";
import { answerNode, draw, turnNode } from "/page/turns.js";

const set = settings(() => findModels());
let talk = fresh();
let running = null; // {abort}
let edited = null; // number of the turn that is edited
let names = [];

const input = composer({ send, stop, last: () => edit(talk.turns.length - 1), quit: () => quitEdit(true) });

function fresh() {
  return { id: store.newId(), title: "", turns: [] };
}

// --------------------------------------------------------------------------------------------------------------- models

async function findModels() {
  try {
    names = await models(set.key());
    byId("talk").classList.remove("locked");
  } catch (error) {
    names = [];
    if (error instanceof Refused && error.status === 401) {
      byId("talk").classList.add("locked");
      note("This server asks for an API key: see settings.");
    } else note(error.message || "the server cannot be reached");
  }
  const chosen = store.read("models", []);
  [0, 1].forEach((lane) => {
    const options = names.map((name) => make("option", { value: name }, name));
    const place = byId(`model-${lane}`);
    place.replaceChildren(...(options.length ? options : [make("option", { value: "" }, "no model")]));
    place.value = names.includes(chosen[lane]) ? chosen[lane] : names[lane % Math.max(1, names.length)] || "";
  });
  pair(store.read("two", false));
}

function lanes() {
  return byId("model-1").hidden ? [byId("model-0").value] : [byId("model-0").value, byId("model-1").value];
}

function pair(on) {
  byId("model-1").hidden = !on;
  byId("two").ariaPressed = String(on);
  store.write("two", on);
}

// ------------------------------------------------------------------------------------------------------------- messages

async function send({ text, pictures }) {
  if (!lanes()[0]) {
    note("There is no model to ask.");
    input.set(text, pictures);
    return;
  }
  if (edited !== null) {
    talk.turns.length = edited;
    quitEdit(false);
  }
  const kept = pictures.map((picture) => {
    const id = picture.id || store.newId();
    store.keepPicture(id, picture.url);
    return { id, name: picture.name, width: picture.width, height: picture.height };
  });
  talk.turns.push({ text, pictures: kept, answers: [] });
  talk.title ||= text.slice(0, 80);
  await answer(talk.turns.length - 1, lanes().map((model, lane) => ({ model, lane })));
}

/** Write the answers of a turn, side by side. */
async function answer(number, wanted) {
  const turn = talk.turns[number];
  const mine = talk;
  for (const { model, lane } of wanted) turn.answers[lane] = { model, text: "", state: "busy", stats: {} };
  const abort = new AbortController();
  running = { abort };
  input.busy(true);
  show();
  bottom(true);
  await Promise.all(wanted.map(({ lane }) => stream(mine, number, lane, abort.signal)));
  if (running?.abort === abort) {
    running = null;
    input.busy(false);
  }
  if (mine.gone) return;
  store.keep(mine);
  showList();
}

async function stream(mine, number, lane, signal) {
  const made = mine.turns[number].answers[lane];
  const began = performance.now();
  let first = 0;
  let pieces = 0;
  let pending = false;
  const refresh = () => {
    pending = false;
    const node = mine === talk && laneNode(number, lane);
    if (node) draw(made, node);
    if (node) bottom();
  };
  try {
    const body = { ...set.sampling(), model: made.model, messages: await messages(mine, number, lane) };
    for await (const chunk of chat(body, set.key(), signal)) {
      const piece = chunk.choices?.[0]?.delta?.content || "";
      if (piece) {
        first ||= performance.now();
        pieces += 1;
        made.text += piece;
        made.stats.first = (first - began) / 1000;
        timed(made.stats, first, pieces);
      }
      if (chunk.choices?.[0]?.finish_reason === "length") made.state = "length";
      if (chunk.usage) count(made.stats, chunk.usage, first);
      if (piece && !pending) {
        pending = true;
        requestAnimationFrame(refresh);
      }
    }
    if (made.state === "busy") made.state = "done";
  } catch (error) {
    made.state = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) made.error = said(error);
  }
  const node = mine === talk && laneNode(number, lane);
  if (node) node.replaceWith(answerNode(made, number, lane, tools, mine.turns[number].answers.length));
  bottom();
}

/** Tokens are known at the end only; until then a piece counts as one. */
function timed(stats, first, pieces) {
  const passed = (performance.now() - first) / 1000;
  if (passed > 0.2 && pieces > 1) stats.rate = (pieces - 1) / passed;
  stats.end = performance.now();
}

function count(stats, usage, first) {
  stats.tokens = usage.completion_tokens;
  stats.prompt = usage.prompt_tokens;
  stats.cached = usage.prompt_tokens_details?.cached_tokens || 0;
  const passed = ((stats.end || first) - first) / 1000;
  stats.rate = passed > 0.02 && stats.tokens > 1 ? (stats.tokens - 1) / passed : undefined;
  delete stats.end;
}

function said(error) {
  if (error instanceof TypeError) return "The server cannot be reached.";
  return error.again ? `${error.message} (again in ${error.again} s)` : error.message;
}

/** The conversation as one model saw it, up to the question of a turn. Turns without an answer are left out. */
async function messages(mine, number, lane) {
  const found = set.system() ? [{ role: "system", content: set.system() }] : [];
  for (const [at, turn] of mine.turns.slice(0, number + 1).entries()) {
    const reply = (turn.answers[lane] || turn.answers[0])?.text.trim();
    if (at < number && !reply) continue;
    const urls = await Promise.all(turn.pictures.map((entry) => store.picture(entry.id)));
    const parts = urls.filter(Boolean).map((url) => ({ type: "image_url", image_url: { url } }));
    found.push({ role: "user", content: parts.length ? [...parts, { type: "text", text: turn.text }] : turn.text });
    if (at < number) found.push({ role: "assistant", content: reply });
  }
  return found;
}

async function seenPictures(mine, number, lane) {
  const found = [];
  for (const [at, turn] of mine.turns.slice(0, number + 1).entries()) {
    if (at < number && !(turn.answers[lane] || turn.answers[0])?.text.trim()) continue;
    for (const entry of turn.pictures) {
      const url = await store.picture(entry.id);
      if (url) found.push({ url, name: entry.name });
    }
  }
  return found;
}

function stop() {
  running?.abort.abort();
}

const tools = {
  edit,
  retry: (number, lane) => {
    if (running) return;
    talk.turns.length = number + 1;
    answer(number, [{ model: lanes()[lane] || talk.turns[number].answers[lane].model, lane }]);
  },
  seen: (number) => talk.turns.slice(0, number + 1).some((turn) => turn.pictures.length),
  look: async (number, lane, node) => {
    const open = node.querySelector(".look");
    if (open) {
      open.remove();
      return;
    }
    const made = talk.turns[number].answers[lane];
    const request = { model: made.model, messages: await messages(talk, number, lane) };
    const pictures = await seenPictures(talk, number, lane);
    const box = panel({ answer: made.text.trim(), request: () => request, pictures, key: set.key, done: () => box.node.remove() });
    node.append(box.node);
    await box.start();
    box.node.scrollIntoView({ block: "nearest" });
  },
  stages: async (number, lane) => {
    const { model } = talk.turns[number].answers[lane];
    stages({ model, messages: await messages(talk, number, lane) }, set.key());
  },
};

async function edit(number) {
  if (running || number < 0) return;
  const turn = talk.turns[number];
  const pictures = await Promise.all(turn.pictures.map(async (entry) => ({ ...entry, url: await store.picture(entry.id) })));
  edited = number;
  input.set(turn.text, pictures.filter((entry) => entry.url));
  input.editing(true);
  document.querySelectorAll(".turn").forEach((node, at) => node.classList.toggle("fading", at >= number));
  input.focus();
}

function quitEdit(clear) {
  edited = null;
  input.editing(false);
  if (clear) input.set("", []);
  document.querySelectorAll(".turn").forEach((node) => node.classList.remove("fading"));
}

// ------------------------------------------------------------------------------------------------------------ drawing

function laneNode(number, lane) {
  return byId("turns").children[number]?.querySelector(".answers")?.children[lane];
}

function show() {
  const empty = !talk.turns.length;
  byId("talk").classList.toggle("empty", empty);
  const hello = make("div.hello", {}, make("h1", {}, "What do you see?"), make("p", {}, "Drop a picture here, paste one, or take one, and ask."));
  byId("turns").replaceChildren(...(empty ? [hello] : talk.turns.map((turn, number) => turnNode(turn, number, tools))));
  document.title = talk.title ? `${talk.title} · Chiasm` : "Chiasm";
}

function bottom(always = false) {
  const place = byId("talk");
  if (always || place.scrollHeight - place.scrollTop - place.clientHeight < 140) place.scrollTop = place.scrollHeight;
}

function showList() {
  byId("list").replaceChildren(
    ...store.list().map((entry) => {
      const open = make("button.open", { type: "button", title: entry.title, onclick: () => choose(entry.id) }, entry.title || "…");
      open.ariaCurrent = entry.id === talk.id ? "true" : null;
      return make("li", {}, open, button("bin", `Delete ${entry.title}`, () => remove(entry.id)));
    }),
  );
}

function choose(id) {
  stop();
  talk = store.open(id) || fresh();
  for (const turn of talk.turns) for (const made of turn.answers) if (made.state === "busy") made.state = "stopped";
  quitEdit(true);
  aside(false);
  show();
  showList();
  bottom(true);
}

function begin() {
  stop();
  talk = fresh();
  quitEdit(true);
  aside(false);
  show();
  showList();
  input.focus();
}

function remove(id) {
  store.drop(id);
  if (id === talk.id) talk.gone = true;
  if (id === talk.id) begin();
  else showList();
}

function aside(open) {
  document.body.classList.toggle("aside", open);
}

// -------------------------------------------------------------------------------------------------------------- wiring

[0, 1].forEach((lane) =>
  byId(`model-${lane}`).addEventListener("change", () => store.write("models", [byId("model-0").value, byId("model-1").value])),
);
byId("two").addEventListener("click", () => pair(byId("model-1").hidden));
byId("new").addEventListener("click", begin);
byId("menu").addEventListener("click", () => aside(true));
byId("side-close").addEventListener("click", () => aside(false));
byId("shade").addEventListener("click", () => aside(false));
byId("forget").addEventListener("click", () => {
  if (!confirm("Delete all conversations of this browser?")) return;
  for (const entry of store.list()) store.drop(entry.id);
  talk.gone = true;
  begin();
});
addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName || "");
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (running) stop();
    else if (edited !== null) quitEdit(true);
    else aside(false);
  } else if (event.key === "/" && !typing && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    input.focus();
  } else if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    begin();
  }
});
addEventListener("pagehide", stop);

show();
showList();
findModels();
input.set("", []);
if (matchMedia("(hover: hover)").matches) input.focus();
