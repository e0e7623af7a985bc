// Where the model looked: heat over the pictures of a conversation for a chosen word of the answer.

import { ask } from "/page/api.js";
import { make } from "/page/dom.js";

/** The panel under an answer. `request()` gives {model, messages}; `pictures` are {url, name}; `key()` the API key. */
export function panel({ answer, request, pictures, key, done }) {
  const state = { word: null, method: null, strength: 0.75, number: 0 };
  const told = make("p.told", { role: "status" }, "Choose a word of the answer.");
  const frames = make("div.frames");
  const words = make("p.words", { ariaLabel: "Words of the answer" });
  const found = new Map(); // what was asked before

  const buttons = [...answer.matchAll(/\S+/g)].map((match, number) =>
    make("button.word", { type: "button", ariaPressed: "false", onclick: () => choose(number) }, match[0]),
  );
  buttons.forEach((one) => words.append(one, " "));
  const methods = ["attention", "gradient"].map((name) =>
    make("button", { type: "button", ariaPressed: "false", title: METHODS[name], onclick: () => choose(state.word, name) }, name),
  );
  const slider = make("input", { type: "range", min: "0", max: "1", step: "0.05", value: "0.75", ariaLabel: "Strength of the heat" });
  slider.addEventListener("input", () => {
    state.strength = Number(slider.value);
    for (const canvas of frames.querySelectorAll("canvas")) canvas.style.opacity = state.strength;
  });
  const whole = make("button.word.all", { type: "button", ariaPressed: "false", onclick: () => choose(null) }, "whole answer");

  async function choose(word, method = state.method) {
    Object.assign(state, { word, method });
    const number = (state.number += 1);
    mark(word, method);
    const name = `${word} ${method}`;
    told.textContent = "Looking…";
    told.classList.remove("bad");
    try {
      if (!found.has(name)) found.set(name, await ask("/chiasm/look", { ...request(), answer, word, method }, key()));
    } catch (error) {
      if (number === state.number) {
        told.textContent = error.message;
        told.classList.add("bad");
      }
      return;
    }
    if (number === state.number) await show(found.get(name));
  }

  function mark(word, method) {
    buttons.forEach((one, at) => (one.ariaPressed = String(at === word)));
    whole.ariaPressed = String(word === null);
    methods.forEach((one) => (one.ariaPressed = String(one.textContent === method)));
  }

  async function show(look) {
    mark(state.word, look.method);
    const drawn = await Promise.all(look.pictures.map((heat) => figure(heat, pictures[heat.index], look.method, state.strength)));
    frames.replaceChildren(...drawn.filter(Boolean));
    const text = state.word === null ? "the whole answer" : `“${look.word.text}”`;
    told.textContent = `${look.method === "attention" ? "Attention" : "Gradient"} while it wrote ${text}.`;
  }

  const close = make("button.link", { type: "button", onclick: done }, "close");
  const node = make(
    "section.look",
    { ariaLabel: "Where the model looked" },
    make("div.bar", {}, make("b", {}, "Where it looked"), make("span.choice", {}, ...methods), slider, close),
    words,
    make("div.row", {}, whole, told, make("span.scale", { ariaHidden: "true" }, "less", make("i"), "more")),
    frames,
  );
  return { node, start: () => choose(null) };
}

const METHODS = {
  attention: "what the position that writes the word attends to",
  gradient: "what changes the word's probability",
};

async function figure(heat, picture, method, strength) {
  if (!picture) return null;
  const map = await loaded(heat.heat);
  const canvas = make("canvas", { width: map.naturalWidth, height: map.naturalHeight });
  canvas.style.opacity = strength;
  colour(canvas, map);
  const share = `${(100 * heat.share).toFixed(heat.share < 0.1 ? 1 : 0)} %`;
  const of = method === "attention" ? "of all attention" : "of all heat";
  const name = heat.frame === null ? `picture ${heat.index + 1}` : `frame ${heat.frame + 1}`;
  const over = make("div.over", {}, make("img", { src: picture.url, alt: picture.name || name }), canvas);
  // As wide as the picture is shown, or the map would lie beside it.
  over.style.width = `min(100%, 26rem, ${(24 * map.naturalWidth) / map.naturalHeight}rem)`;
  return make(
    "figure",
    {},
    over,
    make("figcaption", {}, `${name}: ${share} ${of}`),
  );
}

function loaded(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("the map cannot be shown"));
    image.src = url;
  });
}

/** Grey → a heat scale whose faint parts are transparent. */
function colour(canvas, map) {
  const brush = canvas.getContext("2d", { willReadFrequently: true });
  brush.drawImage(map, 0, 0);
  const pixels = brush.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const [red, green, blue, alpha] = RAMP[pixels.data[at]];
    pixels.data.set([red, green, blue, alpha], at);
  }
  brush.putImageData(pixels, 0, 0);
}

const STOPS = [ // .scale in style.css shows the same
  [0, [60, 20, 120, 0]],
  [0.25, [100, 20, 130, 80]],
  [0.5, [210, 50, 90, 140]],
  [0.75, [250, 130, 30, 180]],
  [1, [255, 220, 50, 205]],
];
const RAMP = Array.from({ length: 256 }, (_, value) => {
  const t = value / 255;
  const upper = Math.max(1, STOPS.findIndex(([stop]) => stop >= t));
  const [[low, from], [high, to]] = [STOPS[upper - 1], STOPS[upper]];
  return from.map((part, i) => part + ((to[i] - part) * (t - low)) / (high - low));
});
