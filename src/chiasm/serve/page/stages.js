// What `chiasm inspect` shows: the prompt as tokens, the units of each picture, every stage with its shape.

import { ask } from "/page/api.js";
import { byId, make } from "/page/dom.js";

/** Opens the box and fills it. `request` is {model, messages}. */
export async function stages(request, key) {
  const place = byId("stages");
  place.replaceChildren(make("p.told", {}, "Walking the conversation through the model…"));
  byId("stages-box").showModal();
  try {
    place.replaceChildren(...shown(await ask("/chiasm/inspect", request, key)));
  } catch (error) {
    place.replaceChildren(make("p.told.bad", {}, error.message));
  }
}

function shown(walk) {
  const counts = Object.entries(walk.counts).map(([name, count]) => `${count} ${name}`).join(" · ");
  return [
    make("p.told", {}, `${walk.model}: ${counts}`),
    ...walk.media.map((line) => make("p.told", {}, line)),
    make("h3", {}, "The prompt"),
    make("p.tokens", {}, ...walk.tokens.map((row) => make("span", { title: `id ${row.id}` }, row.text.replaceAll("\n", "⏎")))),
    ...(walk.units.length
      ? [
          make("h3", {}, "What the encoder sees"),
          make("div.units", {}, ...walk.units.map((unit) =>
            make("figure", {}, make("img", { src: unit.picture, alt: "" }), make("figcaption", {}, `${unit.medium + 1}.${unit.index + 1}`)))),
        ]
      : []),
    make("h3", {}, "Stages"),
    make("div.scroll", {}, make("table", {},
      make("thead", {}, make("tr", {}, ...["stage", "shape", "what it is", ""].map((name) => make("th", {}, name)))),
      make("tbody", {}, ...walk.stages.map((stage) =>
        make("tr", {},
          make("td", {}, stage.name),
          make("td", {}, make("code", {}, stage.shape)),
          make("td", {}, stage.what, make("small", {}, ` ${stage.numbers}`)),
          make("td", {}, stage.picture ? make("img.map", { src: stage.picture, alt: "" }) : ""),
        ))))),
    make("h3", {}, "The next token"),
    make("div.candidates", {}, ...walk.candidates.map(({ text, probability }) => {
      const bar = make("i");
      bar.style.width = `${100 * probability}%`;
      return make("div", {}, make("code", {}, text.replaceAll("\n", "⏎") || "∅"), make("span.rail", {}, bar), make("span", {}, `${(100 * probability).toFixed(1)} %`));
    })),
  ];
}
