// The settings box. What is set is kept in this browser; the API key only where that is asked for.

import { byId } from "/page/dom.js";
import * as store from "/page/store.js";

const FIELDS = { system: "s-system", temperature: "s-temperature", tokens: "s-tokens", seed: "s-seed" };
const BEGIN = { system: "", temperature: "0", tokens: "512", seed: "" };

/** `changed` is called when the key has changed. */
export function settings(changed) {
  let values = { ...BEGIN, ...store.read("settings", {}) };
  let key = store.plain.get("key") || "";
  const box = byId("settings-box");

  function open() {
    for (const [name, id] of Object.entries(FIELDS)) byId(id).value = values[name];
    byId("s-theme").value = document.documentElement.dataset.choice;
    byId("s-key").value = key;
    byId("s-keep").checked = Boolean(store.plain.get("key"));
    box.showModal();
  }

  function close() {
    for (const [name, id] of Object.entries(FIELDS)) values[name] = byId(id).value;
    store.write("settings", values);
    const before = key;
    key = byId("s-key").value.trim();
    store.plain.set("key", byId("s-keep").checked ? key : "");
    if (key !== before) changed();
  }

  function theme(name) {
    store.plain.set("theme", name);
    dispatchEvent(new Event("chiasm-theme"));
  }

  byId("settings").addEventListener("click", open);
  box.addEventListener("close", close);
  box.addEventListener("click", (event) => event.target === box && box.close());
  byId("s-theme").addEventListener("change", () => theme(byId("s-theme").value));
  byId("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

  return {
    key: () => key,
    system: () => values.system.trim(),
    /** The fields of a request. What is not a number is left to the server. */
    sampling() {
      const found = {};
      const number = (text) => (String(text).trim() === "" ? NaN : Number(text));
      if (number(values.temperature) >= 0) found.temperature = number(values.temperature);
      if (number(values.tokens) >= 1) found.max_tokens = Math.floor(number(values.tokens));
      if (Number.isInteger(number(values.seed))) found.seed = number(values.seed);
      return found;
    },
  };
}
