// What is kept in this browser: settings and conversations in localStorage, pictures in IndexedDB, since a few of them
// are larger than localStorage may be. Where either is forbidden, things last as long as the page is open.

const memory = new Map();
const PREFIX = "chiasm.";

export function read(name, otherwise) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    if (text !== null) return JSON.parse(text);
  } catch {
    // forbidden or damaged: what this page remembers
  }
  return memory.get(name) ?? otherwise;
}

/** False where there was no room: the value then lasts as long as the page. */
export function write(name, value) {
  memory.set(name, value);
  try {
    if (value === undefined) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const plain = {
  get: (name) => {
    try {
      return localStorage.getItem(PREFIX + name);
    } catch {
      return null;
    }
  },
  set: (name, text) => {
    try {
      localStorage.setItem(PREFIX + name, text);
    } catch {
      // kept for this page only
    }
  },
};

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(9)), (b) => b.toString(36).padStart(2, "0")).join("");
}

// -------------------------------------------------------------------------------------------------------- conversations

/** {id, title, at}, newest first. */
export function list() {
  return read("list", []).sort((a, b) => b.at - a.at);
}

export function open(id) {
  return read(`talk.${id}`, null);
}

/** Keeps a conversation; the oldest ones go where there is no room for it. */
export function keep(talk) {
  const entry = { id: talk.id, title: talk.title, at: Date.now() };
  let all = [entry, ...list().filter((other) => other.id !== talk.id)];
  while (!write(`talk.${talk.id}`, talk) && all.length > 1) {
    drop(all.pop().id);
  }
  write("list", all);
}

export function drop(id) {
  const talk = open(id);
  const used = (talk?.turns || []).flatMap((turn) => turn.pictures.map((picture) => picture.id));
  write(`talk.${id}`, undefined);
  write("list", list().filter((entry) => entry.id !== id));
  for (const picture of used) dropPicture(picture);
}

// ------------------------------------------------------------------------------------------------------------- pictures

const shown = new Map(); // id → data URL

let base = null;
function database() {
  base ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("chiasm", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("pictures");
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return base;
}

async function inPictures(mode, act) {
  try {
    const store = (await database()).transaction("pictures", mode).objectStore("pictures");
    return await new Promise((resolve, reject) => {
      const request = act(store);
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  } catch {
    return undefined;
  }
}

export function keepPicture(id, url) {
  shown.set(id, url);
  return inPictures("readwrite", (store) => store.put(url, id));
}

/** The data URL of a picture, or undefined where this browser no longer has it. */
export async function picture(id) {
  if (!shown.has(id)) {
    const url = await inPictures("readonly", (store) => store.get(id));
    if (url) shown.set(id, url);
  }
  return shown.get(id);
}

function dropPicture(id) {
  shown.delete(id);
  inPictures("readwrite", (store) => store.delete(id));
}
