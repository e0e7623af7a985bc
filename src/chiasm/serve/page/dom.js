// Small helpers for nodes of the page.

/** An element: `make("button.icon", {title: "Copy", onclick}, "text", node)`. Strings become text nodes, never HTML. */
export function make(kind, attributes = {}, ...children) {
  const [name, ...classes] = kind.split(".");
  const made = document.createElement(name);
  if (classes.length) made.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  picture.append(use);
  picture.setAttribute("aria-hidden", "true");
  return picture;
}

export function button(name, label, onclick, text = "") {
  const made = make(text ? "button.tool" : "button.icon.small", { type: "button", title: label, ariaLabel: label, onclick });
  made.append(icon(name));
  if (text) made.append(make("span", {}, text));
  return made;
}

export const byId = (id) => document.getElementById(id);

let timer = 0;
/** A short message at the bottom of the page. */
export function note(text) {
  const place = byId("note");
  place.textContent = text;
  place.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(() => {
    place.hidden = true;
  }, 5000);
}
