// How a conversation is drawn: the user's messages, the answers of one model or of two, their tools.

import { button, make, note } from "/page/dom.js";
import { render } from "/page/markdown.js";
import { picture } from "/page/store.js";

/** A turn's node. `tools`: what its buttons do. */
export function turnNode(turn, number, tools) {
  const node = make("article.turn", {});
  const strip = make("div.strip");
  for (const entry of turn.pictures) strip.append(thumbnail(entry));
  node.append(
    make("div.user", {},
      turn.pictures.length ? strip : null,
      make("div.bubble", {}, turn.text),
      make("div.tools", {}, button("copy", "Copy", () => copy(turn.text)), button("edit", "Edit", () => tools.edit(number)))),
  );
  const answers = make("div.answers", {});
  answers.dataset.count = String(turn.answers.length);
  turn.answers.forEach((answer, lane) => answers.append(answerNode(answer, number, lane, tools, turn.answers.length)));
  node.append(answers);
  return node;
}

function thumbnail(entry) {
  const image = make("img", { alt: entry.name, title: `${entry.name}, ${entry.width}×${entry.height}` });
  picture(entry.id).then((url) => {
    if (url) image.src = url;
    else image.replaceWith(make("span.gone", {}, `${entry.name} is no longer in this browser`));
  });
  return image;
}

export function answerNode(answer, number, lane, tools, count) {
  const body = make("div.text");
  const below = make("div.below");
  const node = make("section.answer", { ariaLabel: answer.model }, count > 1 ? make("h2.lane", {}, answer.model) : null, body, below);
  draw(answer, node);
  below.append(make("span.speed", {}, speed(answer)));
  if (answer.state !== "busy") {
    const has = Boolean(answer.text.trim());
    below.append(
      make("span.tools", {},
        has ? button("copy", "Copy", () => copy(answer.text)) : null,
        button("retry", "Try again", () => tools.retry(number, lane)),
        has && tools.seen(number) ? button("eye", "Where it looked", () => tools.look(number, lane, node)) : null,
        button("steps", "Inside the model", () => tools.stages(number, lane))),
    );
  }
  return node;
}

/** The answer's text as it is now; cheap enough for every frame. */
export function draw(answer, node) {
  const body = node.querySelector(".text");
  body.replaceChildren(render(answer.text));
  for (const block of body.querySelectorAll("pre")) block.append(button("copy", "Copy the code", () => copy(block.firstChild.textContent)));
  if (answer.state === "busy") end(body).append(make("span.caret", { ariaLabel: "writing" }));
  if (answer.error) body.append(make("p.error", { role: "alert" }, answer.error));
  if (answer.state === "stopped") body.append(make("p.remark", {}, "stopped"));
  if (answer.state === "length") body.append(make("p.remark", {}, "cut off at the most new tokens (see settings)"));
  const place = node.querySelector(".speed");
  if (place) place.textContent = speed(answer);
}

export function speed({ model, stats = {}, state }) {
  const told = [];
  if (stats.first) told.push(`first token ${seconds(stats.first)}`);
  if (stats.rate) told.push(`${stats.rate.toFixed(stats.rate < 10 ? 1 : 0)} tokens/s`);
  if (stats.tokens) told.push(stats.tokens === 1 ? "1 token" : `${stats.tokens} tokens`);
  if (stats.prompt && state !== "busy") told.push(`prompt ${stats.prompt}${stats.cached ? `, ${stats.cached} reused` : ""}`);
  return told.length ? told.join(" · ") : state === "busy" ? `${model} is reading…` : "";
}

function seconds(value) {
  return value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    note("Copied.");
  } catch {
    note("This browser does not allow copying here.");
  }
}

/** The block that the next word will stand in. */
function end(body) {
  const inner = body.lastElementChild;
  return inner && ["P", "UL", "OL", "LI", "BLOCKQUOTE"].includes(inner.tagName) ? end(inner) : body;
}
