// The field at the bottom: text, pictures by button, drop, paste and camera, and what is edited.

import { byId, icon, make, note } from "/page/dom.js";
import { filesOf, fromFile, fromVideo } from "/page/pictures.js";

/** `send({text, pictures})`, `stop()` and `last()` (edits the last message) are the page's. */
export function composer({ send, stop, last, quit }) {
  const field = byId("question");
  let pictures = [];
  let busy = false;

  function grow() {
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.4)}px`;
    byId("send").disabled = !field.value.trim();
  }

  function draw() {
    byId("pictures").replaceChildren(
      ...pictures.map((picture, at) => {
        const away = make("button.away", { type: "button", ariaLabel: `Remove ${picture.name}`, onclick: () => remove(at) }, icon("close"));
        return make("li", { title: picture.name }, make("img", { src: picture.url, alt: picture.name }), away);
      }),
    );
  }

  function remove(at) {
    pictures.splice(at, 1);
    draw();
    field.focus();
  }

  async function add(files) {
    for (const file of files) {
      try {
        pictures.push(await fromFile(file));
      } catch (error) {
        note(error.message);
      }
    }
    draw();
    field.focus();
  }

  function submit(event) {
    event?.preventDefault();
    const text = field.value.trim();
    if (busy || !text) return;
    const message = { text, pictures };
    set("", []);
    send(message);
  }

  function set(text, shown) {
    field.value = text;
    pictures = [...shown];
    draw();
    grow();
  }

  byId("composer").addEventListener("submit", submit);
  byId("stop").addEventListener("click", stop);
  byId("add").addEventListener("click", () => byId("file").click());
  for (const input of [byId("file"), byId("snap")])
    input.addEventListener("change", async () => {
      await add([...input.files]);
      input.value = "";
    });
  field.addEventListener("input", grow);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
    if (event.key === "ArrowUp" && !field.value && !pictures.length) {
      event.preventDefault();
      last();
    }
  });
  field.addEventListener("paste", (event) => {
    const files = filesOf(event.clipboardData);
    if (files.length) {
      event.preventDefault();
      add(files);
    }
  });
  drops(add);
  byId("camera").addEventListener("click", () => camera((picture) => {
    pictures.push(picture);
    draw();
  }));
  byId("edit-stop").addEventListener("click", quit);

  return {
    set,
    focus: () => field.focus(),
    busy(now) {
      busy = now;
      byId("send").hidden = now;
      byId("stop").hidden = !now;
    },
    editing(now) {
      byId("editing").hidden = !now;
    },
  };
}

function drops(add) {
  let inside = 0;
  const over = byId("drop");
  const carries = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  addEventListener("dragenter", (event) => {
    if (!carries(event)) return;
    inside += 1;
    over.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!carries(event)) return;
    inside = Math.max(0, inside - 1);
    over.hidden = inside === 0;
  });
  addEventListener("dragover", (event) => carries(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    inside = 0;
    over.hidden = true;
    const files = filesOf(event.dataTransfer);
    if (files.length) add(files);
    else note("Only pictures can be dropped here.");
  });
}

/** The camera, or the phone's own camera where the page may not open it. */
async function camera(taken) {
  const box = byId("camera-box");
  const video = byId("video");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    byId("snap").click();
    return;
  }
  video.srcObject = stream;
  const shoot = () => {
    if (!video.videoWidth) return;
    taken(fromVideo(video));
    box.close();
  };
  byId("shoot").addEventListener("click", shoot);
  box.addEventListener("close", () => {
    byId("shoot").removeEventListener("click", shoot);
    stream.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  }, { once: true });
  box.showModal();
}
