// Markdown as a tree, and the tree as nodes of the page. No text of a model or a user is ever read as HTML: every
// character ends in a text node, every element is one of those made below, and an address must be http, https or mailto.

const SAFE_ADDRESS = /^(https?:\/\/|mailto:)[^\s]+$/i;
const DEEPEST = 12; // levels of quotes, lists and emphasis; beyond them text stays text
const LONGEST_SPAN = 1200; // characters of a link or an emphasis: what is longer is text, and takes no time
const SPECIAL = /[\\\n[!h`*_~]/;

/** The blocks of a text: {type, ...} objects that hold only strings, numbers and each other. */
export function parse(text, depth = 0) {
  const lines = String(text).replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      at += 1;
      continue;
    }
    const fence = line.match(/^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/);
    if (fence) {
      const body = [];
      const end = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      for (at += 1; at < lines.length && !end.test(lines[at]); at += 1) body.push(lines[at]);
      at += 1;
      blocks.push({ type: "code", language: fence[2], text: body.join("\n") });
      continue;
    }
    const heading = line.match(/^ {0,3}(#{1,6})\s+(.*?)\s*#*$/);
    if (heading) {
      blocks.push({ type: "heading", level: heading[1].length, inline: inline(heading[2]) });
      at += 1;
      continue;
    }
    if (/^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      blocks.push({ type: "rule" });
      at += 1;
      continue;
    }
    if (/^ {0,3}>/.test(line) && depth < DEEPEST) {
      const body = [];
      for (; at < lines.length && /^ {0,3}>/.test(lines[at]); at += 1) body.push(lines[at].replace(/^ {0,3}> ?/, ""));
      blocks.push({ type: "quote", blocks: parse(body.join("\n"), depth + 1) });
      continue;
    }
    if (marker(line) && depth < DEEPEST) {
      const [list, next] = readList(lines, at, depth);
      blocks.push(list);
      at = next;
      continue;
    }
    if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[at + 1] || "")) {
      const head = cells(line);
      const rows = [];
      for (at += 2; at < lines.length && lines[at].includes("|") && lines[at].trim(); at += 1) rows.push(cells(lines[at]));
      blocks.push({ type: "table", head: head.map((c) => inline(c)), rows: rows.map((row) => row.map((c) => inline(c))) });
      continue;
    }
    const body = [];
    for (; at < lines.length && lines[at].trim() && !(body.length && starts(lines[at])); at += 1) body.push(lines[at]);
    blocks.push({ type: "paragraph", inline: inline(body.join("\n")) });
  }
  return blocks;
}

function marker(line) {
  return line.match(/^(\s*)([-*+]|\d{1,9}[.)])(\s+)(?=\S)/);
}

function starts(line) {
  return /^ {0,3}(#{1,6}\s|>|`{3,}|~{3,})/.test(line) || Boolean(marker(line));
}

function readList(lines, at, depth) {
  const first = marker(lines[at]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  while (at < lines.length) {
    const found = marker(lines[at]);
    if (!found || found[1].length > first[1].length + 1 || /\d/.test(found[2]) !== ordered) break;
    if (found[1].length < first[1].length) break;
    const inner = found[0].length;
    const body = [lines[at].slice(inner)];
    for (at += 1; at < lines.length; at += 1) {
      const line = lines[at];
      const indent = line.length - line.trimStart().length;
      if (!line.trim()) {
        const next = lines[at + 1] || "";
        if (!next.trim() || next.length - next.trimStart().length < Math.min(inner, 2)) break;
        body.push("");
      } else if (indent > first[1].length && indent >= 2) {
        body.push(line.slice(Math.min(indent, inner)));
      } else break;
    }
    items.push(parse(body.join("\n"), depth + 1));
    while (at < lines.length && !lines[at].trim() && marker(lines[at + 1] || "")) at += 1;
  }
  const start = ordered ? Number.parseInt(first[2], 10) : 1;
  return [{ type: "list", ordered, start, items }, at];
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

const SPANS = [
  { type: "code", pattern: /^(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/ },
  { type: "strong", pattern: /^(\*\*|__)(?=\S)([\s\S]*?\S)\1/ },
  { type: "strike", pattern: /^(~~)(?=\S)([\s\S]*?\S)\1/ },
  { type: "emphasis", pattern: /^([*_])(?=[^\s*_])([\s\S]*?[^\s*_])\1(?![\w*])/ },
];

/** The spans of a run of text. */
export function inline(text, depth = 0) {
  const found = [];
  let plain = "";
  const flush = () => {
    if (plain) found.push({ type: "text", text: plain });
    plain = "";
  };
  let at = 0;
  while (at < text.length) {
    const here = text[at];
    if (!SPECIAL.test(here)) {
      plain += here;
      at += 1;
      continue;
    }
    const rest = text.slice(at, at + LONGEST_SPAN);
    if (here === "\\" && /[\\`*_{}[\]()#+\-.!|>~]/.test(rest[1] || "")) {
      plain += rest[1];
      at += 2;
      continue;
    }
    if (here === "\n") {
      flush();
      found.push({ type: "break" });
      at += 1;
      continue;
    }
    const link = (here === "[" || here === "!") && rest.match(/^!?\[([^\]\n]*)\]\(\s*<?([^\s)>]+)>?(?:\s+"[^"]*")?\s*\)/);
    if (link) {
      flush();
      found.push(anchor(link[2], link[1], depth));
      at += link[0].length;
      continue;
    }
    const bare = here === "h" && !/\w$/.test(plain) && rest.match(/^https?:\/\/[^\s<>"'`)\]]*[^\s<>"'`)\].,;:!?]/i);
    if (bare) {
      flush();
      found.push(anchor(bare[0], bare[0], DEEPEST));
      at += bare[0].length;
      continue;
    }
    const span = "`*_~".includes(here) && depth < DEEPEST && !(here === "_" && /\w$/.test(plain)) && match(rest);
    if (span) {
      flush();
      const body = span.found[2];
      if (span.type === "code") found.push({ type: "code", text: body });
      else found.push({ type: span.type, inline: inline(body, depth + 1) });
      at += span.found[0].length;
      continue;
    }
    plain += here;
    at += 1;
  }
  flush();
  return found;
}

function match(rest) {
  for (const { type, pattern } of SPANS) {
    const found = rest.match(pattern);
    if (found) return { type, found };
  }
  return null;
}

function anchor(address, label, depth) {
  const spans = depth < DEEPEST ? inline(label, DEEPEST) : [{ type: "text", text: label }];
  return SAFE_ADDRESS.test(address) ? { type: "link", address, inline: spans } : { type: "text", text: label || address };
}

// ---------------------------------------------------------------------------------------------------------------- nodes

/** A text as a fragment of the page. */
export function render(text) {
  const made = document.createDocumentFragment();
  for (const block of parse(text)) made.append(blockNode(block));
  return made;
}

function element(name, children = []) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

function blockNode(block) {
  if (block.type === "heading") return element(`h${Math.min(6, block.level + 2)}`, spanNodes(block.inline));
  if (block.type === "rule") return element("hr");
  if (block.type === "quote") return element("blockquote", block.blocks.map(blockNode));
  if (block.type === "code") {
    const made = element("pre", [element("code", [block.text])]);
    if (block.language) made.dataset.language = block.language;
    return made;
  }
  if (block.type === "list") {
    const made = element(block.ordered ? "ol" : "ul", block.items.map((item) => element("li", itemNodes(item))));
    if (block.ordered && block.start !== 1) made.start = block.start;
    return made;
  }
  if (block.type === "table") {
    const row = (kind) => (found) => element("tr", found.map((cell) => element(kind, spanNodes(cell))));
    const table = element("table", [element("thead", [row("th")(block.head)]), element("tbody", block.rows.map(row("td")))]);
    const made = element("div", [table]);
    made.className = "scroll";
    return made;
  }
  return element("p", spanNodes(block.inline));
}

function itemNodes(blocks) {
  if (blocks.length && blocks[0].type === "paragraph") return [...spanNodes(blocks[0].inline), ...blocks.slice(1).map(blockNode)];
  return blocks.map(blockNode);
}

const NAMES = { strong: "strong", emphasis: "em", strike: "del" };

function spanNodes(spans) {
  return spans.map((span) => {
    if (span.type === "text") return document.createTextNode(span.text);
    if (span.type === "break") return element("br");
    if (span.type === "code") return element("code", [span.text]);
    if (span.type === "link") {
      const made = element("a", spanNodes(span.inline));
      made.href = span.address;
      made.rel = "noopener noreferrer nofollow";
      made.target = "_blank";
      return made;
    }
    return element(NAMES[span.type], spanNodes(span.inline));
  });
}
